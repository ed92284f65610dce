"""What a folder's files were made with, kept beside them, so that no others are mixed in unnoticed."""

import json
import os
from pathlib import Path


def keep_settings(path: Path, settings: dict) -> None:
    """
    Notes the settings, or compares them with those noted by an earlier run or another process.

    Args:
        path (`Path`): a JSON file in the folder, which is made if it is missing.
        settings (`dict`): option -> value, as JSON has it.

    Raises:
        ValueError: if the file holds others, naming the options, or is damaged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps(settings), encoding="utf-8")
        os.replace(partial, path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path}: not valid JSON ({error}); if what lies beside it was made with {settings}, delete it."
        ) from error
    changed = [
        f"{name} {found.get(name)}, not {value}" for name, value in settings.items() if found.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"{path.parent}: what is there was made with {', '.join(changed)}; choose another destination."
        )
