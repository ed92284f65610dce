"""Prediction files: annotation rows with the model's answer added as `a`, and what can be wrong with them."""

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from numbers import Integral
from pathlib import Path
from typing import TypeVar

METRICS_FILE = "metrics.json"
# What `etchat infer` writes.
PREDICTIONS_FILE = "predictions.json"
FAILURES_FILE = "failures.json"
JOURNAL_FOLDER = "progress"
# 2,048 tokens are some 10,000 characters: far above that, something else than an answer was stored.
HUGE = 100_000
# What stands for a type of JSON in rows that come from Python.
STAND_INS = {list: (list, tuple), int: Integral}

Scored = TypeVar("Scored")


class AnnotationError(ValueError):
    """A row cannot be scored because of its annotation; the message names field and value.

    Attributes:
        kind: The kind of problem that such a row is counted under.
    """

    kind = "broken annotation"


class Problems(dict):
    """Rows that are not as they should be: `{kind: [row names]}`. They are counted and shown, never lost."""

    def note(self, kind: str, name: str) -> None:
        """Files a row under a kind of problem."""
        self.setdefault(kind, []).append(name)

    def copy(self) -> "Problems":
        """Returns problems to which more can be added without changing these."""
        return Problems({kind: list(names) for kind, names in self.items()})


def default_names(rows: Sequence[dict]) -> list[str]:
    """Names rows by their position, for messages."""
    return [f"row {i}" for i in range(len(rows))]


def check_rows(rows: Sequence[dict], names: Sequence[str]) -> None:
    """Checks that there are rows and that each is a dict.

    Raises:
        ValueError: If not, naming the first bad row.
    """
    if not rows:
        raise ValueError("there are no predictions to score")
    for row, name in zip(rows, names, strict=True):
        if not isinstance(row, dict):
            raise ValueError(f"{name}: expected a JSON object, got {row!r:.100}")


def require(row: dict, key: str, kind: type) -> object:
    """Returns a field of an annotation; a tuple counts as a list, and an integer of numpy as an int.

    Raises:
        AnnotationError: If the field is missing or of another type.
    """
    if key not in row:
        raise AnnotationError(f"field {key!r} is missing")
    if not isinstance(row[key], STAND_INS.get(kind, kind)) or isinstance(row[key], bool):
        raise AnnotationError(f"field {key!r} should be {kind.__name__}, got {row[key]!r:.100}")
    return row[key]


def score_each(
    rows: Sequence[dict], names: Sequence[str], score: Callable[[dict, str], Scored], problems: Problems
) -> list[Scored]:
    """Scores rows one by one; those that cannot be because of their annotation are noted as problems and left out.

    Args:
        rows: The predictions.
        names: Of the rows.
        score: Scores a row of that name. Raises AnnotationError if its annotation is broken.
        problems: Where such rows are noted, by the error's kind.

    Raises:
        ValueError: If none of the rows can be scored, with the reason of the first.
    """
    scored, first = [], ""
    for row, name in zip(rows, names, strict=True):
        try:
            scored.append(score(row, name))
        except AnnotationError as error:
            problems.note(error.kind, f"{name}: {error}")
            first = first or f"{error.kind}, {name}: {error}"
    if not scored:
        raise ValueError(f"none of the {len(rows)} rows can be scored: {first}")
    return scored


def get_answer(row: dict, name: str, problems: Problems) -> str:
    """Returns a row's answer `a`; one that is missing or no text is noted as a problem and read as an empty answer."""
    if row.get("a") is None:
        problems.note("missing answer", name)
        return ""
    if not isinstance(row["a"], str):
        problems.note("answer is not text", f"{name}: {row['a']!r:.60}")
        return ""
    if len(row["a"]) > HUGE:
        problems.note("huge answer", f"{name}: {len(row['a']):,} characters")
    return row["a"]


def note_doubles(rows: Sequence[dict], names: Sequence[str], fields: Sequence[str], problems: Problems) -> None:
    """Notes rows that agree in all the identifying fields with an earlier one; each still counts."""
    seen: dict[str, str] = {}
    for row, name in zip(rows, names, strict=True):
        key = json.dumps([row.get(field) for field in fields], sort_keys=True, default=_plain)
        if key in seen:
            problems.note("answered more than once", f"{name} repeats {seen[key]}")
        else:
            seen[key] = name


def _plain(value: object) -> object:
    # What JSON has for numbers and arrays of numpy; of anything else its text.
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; give what `etchat infer` wrote")
    if not path.is_dir():
        return [path]
    merged, journal = path / PREDICTIONS_FILE, path / JOURNAL_FOLDER
    if merged.is_file() and (journal.is_dir() or _is_inference(path)):
        # Whatever else lies there is none of its answers, such as scores under a name of the user's.
        return [merged]
    if journal.is_dir():
        raise ValueError(_unfinished(path, journal))
    files = sorted(file for file in path.glob("*.json") if file.name not in (METRICS_FILE, FAILURES_FILE))
    if not files:
        raise ValueError(f"{path}: no prediction files (*.json) in this folder; `etchat infer` writes them")
    return files


def _unfinished(output: Path, journal: Path) -> str:
    from .journal import count_answers  # it writes by means of this module

    return (
        f"{output}: the run is unfinished, with {count_answers(journal):,} answers so far; the same `etchat infer` "
        "command again goes on with it"
    )


def read_json(path: str | Path) -> object:
    """Reads a JSON file.

    Raises:
        ValueError: If it is not JSON in UTF-8.
        OSError: If it cannot be read.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file ({error}); was it written completely?") from error


def read_rows(path: str | Path) -> list[dict]:
    """Reads a JSON array of rows.

    Raises:
        ValueError: If it is none, or holds something else than objects.
        OSError: If it cannot be read.
    """
    rows = read_json(path)
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a JSON array of rows, got {type(rows).__name__}")
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path} row {i}: expected a JSON object, got {row!r:.100}")
    return rows


def load_predictions(paths: Sequence[str | Path]) -> tuple[list[dict], list[str]]:
    """Reads prediction files, each a JSON array of rows.

    Args:
        paths: Files, or folders. Of a folder that inference wrote, its `predictions.json` is read; of another one all
            `*.json` files, except for our own `metrics.json` and `failures.json`.

    Returns:
        The rows of all files, and per row its name for messages: file, position, and idx where it has one.

    Raises:
        ValueError: If a file is no JSON array of objects, a folder holds no file or an unfinished run, or there are
            no rows.
        OSError: If a file cannot be read.
    """
    rows, names = [], []
    for file in (file for path in paths for file in _files(Path(path))):
        for i, row in enumerate(read_rows(file)):
            label = f" (idx {row['idx']})" if "idx" in row else ""
            names.append(f"{file} row {i}{label}")
            rows.append(row)
    if not rows:
        raise ValueError(f"{', '.join(map(str, paths))}: no predictions, only an empty array")
    return rows, names


def read_failures(paths: Sequence[str | Path]) -> Problems:
    """Reads which rows inference could not answer, and why, from the `failures.json` beside its `predictions.json`.

    Args:
        paths: As for `load_predictions`.

    Returns:
        The problem "failed inference", if there is one.

    Raises:
        ValueError: If that file is not what inference writes.
    """
    problems = Problems()
    folders = [path if path.is_dir() else path.parent for path in map(Path, paths) if _is_inference(path)]
    for path in dict.fromkeys(folder / FAILURES_FILE for folder in folders):
        failures = read_json(path)
        if not isinstance(failures, list) or not all(isinstance(entry, dict) for entry in failures):
            raise ValueError(f"{path}: expected a JSON array of failures")
        for entry in failures:
            problems.note("failed inference", f"row {entry.get('row')}: {entry.get('reason')}")
    return problems


def _is_inference(path: Path) -> bool:
    if path.is_dir():
        return (path / FAILURES_FILE).is_file()
    return path.name == PREDICTIONS_FILE and path.with_name(FAILURES_FILE).is_file()


def write_atomic(path: str | Path, text: str) -> None:
    """Writes a text file in one step: readers see the old file or the whole new one.

    Args:
        path: Where to write; missing folders are made.
        text: The content. What UTF-8 does not have, half of a surrogate pair, is written as JSON escapes it.

    Raises:
        OSError: If it cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
