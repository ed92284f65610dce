"""Annotations on their way to lmms-eval: environment variables say where they are, our own readers read them."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset

from ...clips import find_video
from ...runner import check_videos
from ...tasks import Benchmark


def setting(name: str) -> Path:
    """The path that an environment variable holds.

    Raises:
        ValueError: If it is not set.
    """
    if not os.environ.get(name):
        raise ValueError(f"the environment variable {name} is not set; it says where the data set is")
    return Path(os.environ[name])


def dataset_kwargs(annotations: str, videos: str, splits: list[str]) -> dict:
    """
    What lmms-eval gives to `load_dataset`. It must load something before `process_docs` may replace it: here the
    lines of the annotation file, as many times as there are splits.

    Args:
        annotations, videos: Names of the environment variables; both are checked before a model is run.
        splits: Names of the splits.

    Raises:
        ValueError: If a variable is not set.
        NotADirectoryError: If there is no such folder of videos.
    """
    check_videos(setting(videos))
    return {"data_files": {split: str(setting(annotations)) for split in splits}}


def make_docs(benchmark: Benchmark, rows: Sequence[dict]) -> Dataset:
    """
    Turns rows of annotations into docs: `question`, `videos` (paths below the folder of videos, of which the first
    that exists is shown), `etchat` (see `models.etchat.ETChat`) and `annotation`, the row as JSON: its values have
    not one type per column, as Arrow would want.

    Raises:
        ValueError: If a row is broken.
    """
    return Dataset.from_list([_make_doc(benchmark, row) for row in rows])


def _make_doc(benchmark: Benchmark, row: dict) -> dict:
    try:
        request = benchmark.request(row)
    except ValueError as error:
        raise ValueError(f"{error} in {row!r:.200}") from error
    fields = {
        "src": [float(second) for second in request.src],
        "duration": request.duration,
        "answer_start": request.answer_start,
        "repetition_penalty": request.repetition_penalty,
    }
    return {
        "question": request.question,
        "videos": list(request.videos),
        "etchat": fields,
        "annotation": json.dumps(row),
    }


def show_video(doc: dict, videos: str) -> list[str]:
    """The path of a doc's video; `videos` is the name of the environment variable.

    Raises:
        ValueError, FileNotFoundError: See `find_video`.
    """
    return [str(find_video(setting(videos), doc["videos"]))]
