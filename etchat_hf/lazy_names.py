"""Packages whose modules are loaded when one of their names is first used (PEP 562)."""

import importlib
import sys
from collections.abc import Callable
from typing import Any


def lazy_names(package: str, modules: dict[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """
    Args:
        package (`str`): its `__name__`.
        modules (`dict` of `str` to `str`): the module below it that defines each name.

    Returns:
        `tuple`: the package's `__getattr__` and `__dir__`.
    """
    namespace = vars(sys.modules[package])

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        namespace[name] = value = getattr(importlib.import_module(f".{modules[name]}", package), name)
        return value

    return load, lambda: sorted({*namespace, *modules})
