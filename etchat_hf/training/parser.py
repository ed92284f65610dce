"""Command line and YAML files of training, with errors that say where."""

import sys
from collections.abc import Iterable

from trl import TrlParser

from ..data.config_file import check_known, fit_types, read_config, type_hints


class ETChatParser(TrlParser):
    """
    trl's `TrlParser`, of which a mistake in the file of `--config` is told with file and option.

    Raises:
        OSError, ValueError: by `parse_args_and_config`: for a file that is no YAML mapping, options that do not exist,
            and values of other types than theirs.
    """

    def parse_args_and_config(self, args: Iterable[str] | None = None, **options) -> tuple:
        args = list(sys.argv[1:] if args is None else args)
        if "--config" in args:
            if args[-1] == "--config":
                raise ValueError("--config needs a YAML file.")
            self._config_path = args[args.index("--config") + 1]
            read_config(self._config_path)
        return super().parse_args_and_config(args, **options)

    def set_defaults_with_config(self, **config) -> list[str]:
        hints = type_hints(*self.dataclass_types)
        check_known(config, hints, self._config_path)
        return super().set_defaults_with_config(**fit_types(config, hints, self._config_path))
