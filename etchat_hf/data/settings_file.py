"""What a folder's files were made with, kept beside them, so that no others are mixed in unnoticed."""

import json
import os
import secrets
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
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
        partial.write_text(json.dumps(settings), encoding="utf-8")
        os.replace(partial, path)
    try:
        changed = differences(json.loads(path.read_text(encoding="utf-8")), settings)
    except ValueError as error:
        raise ValueError(
            f"{path}: not valid JSON ({error}); if what lies beside it was made with {settings}, delete it."
        ) from error
    if changed:
        raise ValueError(f"{path.parent}: what is there was made with {changed}; choose another destination.")


def differences(known: object, settings: dict) -> str:
    """Which settings are known otherwise, and how; empty if none."""
    known = known if isinstance(known, dict) else {}
    return "; ".join(
        f"{name} {known.get(name)}, not {value}" for name, value in settings.items() if known.get(name) != value
    )
