"""A configuration in YAML: what it says, checked against the dataclasses that it is for."""

import difflib
import enum
import types
import typing
from pathlib import Path

import yaml

NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list", dict: "a map"}


def read_config(path: str | Path) -> dict:
    """
    The options that a YAML file sets.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not a YAML mapping.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a mapping of option: value.")
    return content


def type_hints(*classes: type) -> dict[str, object]:
    """Option -> type, of all dataclasses."""
    return {name: hint for cls in classes for name, hint in typing.get_type_hints(cls).items()}


def fit_types(config: dict, hints: dict[str, object], path: str | Path) -> dict:
    """
    The options as their types want them: YAML reads `1e-3` as a text, and one value may stand for a list of one.

    Args:
        config (`dict`): option -> value; each must be in `hints`.
        hints (`dict`): option -> type; see [`type_hints`].
        path (`str` or `Path`): file to name in errors.

    Raises:
        ValueError: for a value of another type, naming file and option.
    """
    return {name: _fit(value, hints[name], f"{path}: {name}") for name, value in config.items()}


def check_known(config: dict, hints: dict[str, object], path: str | Path) -> None:
    """ValueError if the file sets an option that does not exist."""
    for name in config:
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, n=1)
            raise ValueError(f"{path}: {name}: no such option{f'; did you mean {near[0]}?' if near else '.'}")


def _fit(value: object, hint: object, place: str) -> object:
    try:
        return _converted(value, hint)
    except TypeError:
        names = (NAMES[base] for kind in _alternatives(hint) if (base := _base(kind)) in NAMES)
        bare = '; put it in quotes, for YAML reads a bare "no" or "off" as false' if isinstance(value, bool) else ""
        raise ValueError(f"{place} is {value!r}; it must be {' or '.join(dict.fromkeys(names))}{bare}.") from None


def _converted(value: object, hint: object) -> object:
    for kind in _alternatives(hint):
        try:
            return _as_kind(value, kind)
        except TypeError:
            continue
    raise TypeError


def _as_kind(value: object, kind: object) -> object:
    base = _base(kind)
    if base is list and value is not None:
        (inner,) = typing.get_args(kind) or (object,)
        return [_converted(item, inner) for item in (value if isinstance(value, list) else [value])]
    if base is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError as error:
            raise TypeError from error
    allowed = (int, float) if base is float else (base,)
    if type(value) in allowed or base not in (*NAMES, type(None)):
        return value
    raise TypeError


def _alternatives(hint: object) -> tuple:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        # One text is a text, before it is a list of one
        return tuple(sorted(typing.get_args(hint), key=lambda kind: _base(kind) is list))
    return (hint,)


def _base(kind: object) -> object:
    """`list` of `list[str]`; `str` of an enumeration, whose values are texts."""
    kind = typing.get_origin(kind) or kind
    return str if isinstance(kind, type) and issubclass(kind, enum.Enum) else kind
