"""Answers as they come, on disk: what a killed run leaves for the next one.

A folder holds `run.json`, which says what run the answers belong to, and JSON lines files, one per process and start:
nobody ever appends to another's file, so a line torn by a kill can only be a file's last one.
"""

import json
import os
import time
from pathlib import Path

from .predictions import read_json, write_atomic

RUN_FILE = "run.json"


class Journal:
    """Records `{"row": index, "text", "timestamps"}` or `{"row": index, "error": reason}` of one process.

    Args:
        folder: Where the journals of a run lie; None keeps the records in memory only.
        process_index: Tells apart the files of processes that start together.
    """

    def __init__(self, folder: Path | None, process_index: int = 0):
        self.records: list[dict] = []
        self._path = folder / f"{time.time_ns()}-{process_index}.jsonl" if folder else None

    def append(self, records: list[dict]) -> None:
        """Adds records; they are on the disk, not just on their way there, when this returns."""
        self.records += records
        if self._path is None or not records:
            return
        # A reason may quote what UTF-8 does not have; it is written as JSON escapes it.
        with open(self._path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())


def read_journals(folder: Path) -> list[dict]:
    """Reads the records of all processes and starts so far, older files first.

    Raises:
        ValueError: If a line is broken that is not a file's last one.
    """
    records = []
    for path in sorted(folder.glob("*.jsonl")):
        # Split as bytes: a kill can tear a character apart.
        *lines, torn = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                records.append(json.loads(line))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{path} line {number} is broken ({error}); delete this file") from error
    return records


def count_answers(folder: Path) -> int:
    """How many rows have an answer so far.

    Raises:
        ValueError: See `read_journals`.
    """
    return len({record["row"] for record in read_journals(folder) if "error" not in record})


def check_same_run(folder: Path, run: dict) -> None:
    """Checks that the answers in a folder, if any, are of this run.

    Args:
        folder: Where the journals lie.
        run: What determines the answers: `{what: value}`.

    Raises:
        ValueError: If they were made with something else, naming it.
    """
    path = folder / RUN_FILE
    if not path.is_file():
        if any(folder.glob("*.jsonl")):
            raise ValueError(f"{path} is missing, so whose answers lie beside it is unknown; --restart discards them")
        return
    known = read_json(path)
    differing = [key for key in run if not isinstance(known, dict) or known.get(key) != run[key]]
    if differing:
        raise ValueError(
            f"{folder.parent} holds answers of another run: not the same {', '.join(differing)}; give another "
            "--output, or --restart to discard them"
        )


def write_run(folder: Path, run: dict) -> None:
    """Notes what run the journals in a folder belong to."""
    write_atomic(folder / RUN_FILE, json.dumps(run, indent=1) + "\n")


def discard(folder: Path) -> None:
    """Deletes the journals of a run."""
    for path in [*folder.glob("*.jsonl"), *folder.glob(RUN_FILE)]:
        path.unlink(missing_ok=True)  # another node may be at it
