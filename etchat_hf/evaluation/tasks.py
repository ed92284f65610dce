"""What each benchmark asks, as data: how its annotations are read, what a row asks, and where the answer is stored.

E.T. Bench (Liu et al., NeurIPS 2024), Charades-STA (Gao et al., ICCV 2017), MVBench (Li et al., CVPR 2024). A further
benchmark is one more `Benchmark`; nothing else has to know of it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .answers import is_number
from .predictions import AnnotationError, read_rows, require

# Multiple-choice answers are begun for the model, so that it goes on with the letter.
CHOICE_START = "Best Option: ("
ETBENCH_CHOICE_TASKS = ("rar", "eca", "rvq")
ETBENCH_CHOICE_PENALTY = 1.2

CHARADES_LINE = re.compile(r"(\S+)\s+(\d+(?:\.\d*)?)\s+(\d+(?:\.\d*)?)\s*##(.*)")
CHARADES_PROMPT = "Localize the video moment according to the query '{}'."
CHARADES_EXTENSIONS = (".mp4", ".mkv", ".webm", ".avi", ".mov")

# Where the published folder of MVBench keeps the videos of each task.
MVBENCH_FOLDERS = {
    "action_antonym": "ssv2_video",
    "action_count": "perception/videos",
    "action_localization": "sta/sta_video",
    "action_prediction": "star/Charades_v1_480",
    "action_sequence": "star/Charades_v1_480",
    "character_order": "perception/videos",
    "counterfactual_inference": "clevrer/video_validation",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "fine_grained_pose": "nturgbd",
    "moving_attribute": "clevrer/video_validation",
    "moving_count": "clevrer/video_validation",
    "moving_direction": "clevrer/video_validation",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_v1_480",
    "object_shuffle": "perception/videos",
    "scene_transition": "scene_qa/video",
    "state_change": "perception/videos",
    "unexpected_action": "FunQA_test/test",
}


@dataclass(frozen=True)
class Request:
    """What one row asks.

    Attributes:
        videos: Paths below the folder of videos, of which the first that exists is shown.
        question: The user's message; an `<image>` in it says where the video stands, otherwise it stands before.
        src: Seconds of each `<vid>` of the question.
        duration: What the annotation takes for the video's length, seconds.
        segment: Restricts the video to `(start, end)`, seconds.
        answer_start: What the answer is begun with; it is part of the prompt, not of the answer.
        repetition_penalty: Divides the scores of words that have occurred; 1 for none.

    Raises:
        ValueError: If the question is no Unicode text, such as half of a surrogate pair, which JSON can hold.
    """

    videos: tuple[str, ...]
    question: str
    src: tuple[float, ...] = ()
    duration: float | None = None
    segment: tuple[float, float] | None = None
    answer_start: str = ""
    repetition_penalty: float = 1.0

    def __post_init__(self):
        try:
            self.question.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the question is no Unicode text at character {error.start}: {error.reason}") from error


@dataclass(frozen=True)
class Answer:
    """What the model answered: `text` with seconds in place of `<vid>`, and `timestamps`, those seconds unrounded."""

    text: str
    timestamps: Sequence[float] = ()


NO_ANSWER = Answer("")


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: As on the command line.
        read: Reads an annotation file into rows, their fields in order. MVBench's get a `task` at their end where they
            have none. Raises ValueError if the file has not the benchmark's structure.
        request: What a row asks. Raises ValueError if the row is broken.
        fill: The prediction row: the row with the answer added at its end, and nothing else changed.
    """

    name: str
    read: Callable[[Path], list[dict]]
    request: Callable[[dict], Request]
    fill: Callable[[dict, Answer], dict]


def _read_array(path: Path) -> list[dict]:
    rows = read_rows(path)
    if not rows:
        raise ValueError(f"{path}: the array is empty; give the benchmark's annotations")
    return rows


def _add_answer(row: dict, answer: Answer) -> dict:
    return {**row, "a": answer.text}


def _numbers(row: dict, key: str) -> tuple[float, ...]:
    values = require(row, key, list)
    if not all(map(is_number, values)):
        raise AnnotationError(f"field {key!r} should be numbers (seconds), got {values!r:.100}")
    return tuple(values)


def _ask_etbench(row: dict) -> Request:
    question, task = require(row, "q", str), require(row, "task", str)
    is_choice = task in ETBENCH_CHOICE_TASKS
    return Request(
        videos=(require(row, "video", str),),
        question=question,
        # The benchmark's text-only edition spells the times out in `q` and keeps `src` beside it.
        src=_numbers(row, "src") if "<vid>" in question and "src" in row else (),
        duration=row["duration"] if is_number(row.get("duration")) else None,
        answer_start=CHOICE_START if is_choice else "",
        repetition_penalty=ETBENCH_CHOICE_PENALTY if is_choice else 1.0,
    )


def _read_charades(path: Path) -> list[dict]:
    """Reads lines `VID START END##SENTENCE.`; the query is the sentence without its final period."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8 ({error})") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match = CHARADES_LINE.fullmatch(line.strip())
        if match is None:
            raise ValueError(f"{path} line {number}: expected 'VID START END##SENTENCE.', got {line!r:.100}")
        video, start, end, sentence = match.groups()
        rows.append({"vid": video, "query": sentence.strip().removesuffix("."), "span": [float(start), float(end)]})
    if not rows:
        raise ValueError(f"{path}: no line 'VID START END##SENTENCE.'; give Charades-STA's annotations")
    return rows


def _ask_charades(row: dict) -> Request:
    video = require(row, "vid", str)
    return Request(
        videos=tuple(video + extension for extension in CHARADES_EXTENSIONS),
        question=CHARADES_PROMPT.format(require(row, "query", str)),
    )


def _fill_charades(row: dict, answer: Answer) -> dict:
    """The prediction is the matched times as they come: the scorer counts anything but two as failed."""
    return {**row, "pred": list(answer.timestamps) or None, "response": answer.text}


def _read_mvbench(path: Path) -> list[dict]:
    """Reads a JSON array, or a folder of one per task.

    The published rows have no `task`, without which they cannot be scored: the file's name is added as theirs, after
    their own fields.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path}: no annotation files (*.json) in this folder")
    return [row if "task" in row else {**row, "task": file.stem} for file in files for row in _read_array(file)]


def _ask_mvbench(row: dict) -> Request:
    video, options = require(row, "video", str), require(row, "candidates", list)
    labelled = [f"({chr(ord('A') + i)}) {option}" for i, option in enumerate(options)]
    folder = MVBENCH_FOLDERS.get(str(row.get("task", "")).lower().replace(" ", "_").replace("-", "_"))
    segment = (row.get("start"), row.get("end"))
    if segment == (None, None):
        segment = None
    elif not (all(map(is_number, segment)) and 0 <= segment[0] < segment[1]):
        raise AnnotationError("fields 'start' and 'end' should be seconds, got {!r:.60} and {!r:.60}".format(*segment))
    return Request(
        videos=(video, f"{folder}/{video}") if folder else (video,),
        question="\n".join([require(row, "question", str), *labelled]),
        segment=segment,
        answer_start=CHOICE_START,
    )


ETBENCH = Benchmark("etbench", _read_array, _ask_etbench, _add_answer)
CHARADES = Benchmark("charades", _read_charades, _ask_charades, _fill_charades)
MVBENCH = Benchmark("mvbench", _read_mvbench, _ask_mvbench, _add_answer)
BENCHMARKS = {benchmark.name: benchmark for benchmark in (ETBENCH, CHARADES, MVBENCH)}
