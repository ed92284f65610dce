"""One annotation row: what it must hold, and the few facts that filters and grouping need.

A row is `{"id"?, "image"? | "video"?, "duration"?, "src"?, "tgt"?, "conversations": [{"from", "value"}, ...], ...}`.
"""

import math
import re

from etchat_hf.processing_etchat import IMAGE_TOKEN, SPAN, VID_TOKEN

MODALITIES = ("text", "image", "video")
ROLES = {"human": "user", "gpt": "assistant"}
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def modality_of(row: dict) -> str:
    """One of `MODALITIES`."""
    return "video" if row.get("video") else "image" if row.get("image") else "text"


def duration_of(row: dict) -> float:
    """`duration` in seconds; NaN where there is none."""
    return _number(row.get("duration"))


def _number(value: object) -> float:
    """NaN for what is no number, which `True` is not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def words_of_first_answer(row: dict) -> int:
    """Space-separated words of the first answer; 0 where there is none, which `read_turns` reports."""
    turns = row.get("conversations")
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, dict) and turn.get("from") == "gpt":
            return str(turn.get("value")).count(" ") + 1
    return 0


def read_turns(row: dict) -> list[tuple[str, str]]:
    """
    The conversation as (role, text) from the first question on; an answer before it, as in some chats, is left out.

    Raises:
        ValueError: if there is no question with an answer, a role is unknown or out of turn, or a text is not a text.
    """
    turns = row.get("conversations")
    if turns is None or turns == []:
        raise ValueError("there are no conversations")
    if not isinstance(turns, list):
        raise ValueError(f"conversations is {turns!r:.40}; it must be a list of turns")
    read = []
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("from") not in list(ROLES):  # a list may look for what has no hash
            found = turn.get("from") if isinstance(turn, dict) else turn
            raise ValueError(f"unknown role {found!r:.40} in conversations; it must be one of {', '.join(ROLES)}")
        if not isinstance(turn.get("value"), str):
            raise ValueError(f"a turn's value is {turn.get('value')!r:.40}; it must be a text")
        if not (text := turn["value"]).isascii() and LONE_SURROGATE.search(text):
            raise ValueError(f"{text!r:.40} holds half of a surrogate pair, which is no Unicode text")
        read.append((ROLES[turn["from"]], text))
    if read[0][0] == "assistant":
        del read[0]
    for index, (role, _) in enumerate(read):
        if role != ("user", "assistant")[index % 2]:
            raise ValueError(f"two turns of role {role!r} follow each other; human and gpt must alternate")
    if len(read) < 2:
        raise ValueError("there is no question with an answer")
    return read


def check_clip(row: dict, turns: list[tuple[str, str]]) -> None:
    """
    Raises:
        ValueError: if there are an image *and* a video, or placeholders where no clip can be shown or within a line.
    """
    if row.get("image") and row.get("video"):
        raise ValueError("there are an image and a video; only one of them can be shown")
    for role, text in turns:
        if IMAGE_TOKEN in text and (role == "assistant" or modality_of(row) == "text"):
            where = "an answer" if role == "assistant" else "a question without image or video"
            raise ValueError(f"{where} holds the placeholder {IMAGE_TOKEN}")
        if any(IMAGE_TOKEN in line and line != IMAGE_TOKEN for line in text.split("\n")):
            raise ValueError(f"the placeholder {IMAGE_TOKEN} must stand on a line of its own")


def read_times(row: dict, turns: list[tuple[str, str]], use_matching: bool) -> list[float]:
    """
    The time of each `<vid>` in order of occurrence: those in questions come from `src`, those in answers from `tgt`.

    Times beyond the clip's end are fine: the model clamps them. Without matching there are no `<vid>`.

    Raises:
        ValueError: if there are `<vid>` without matching, the numbers of `<vid>` and times differ, a time is no number
            or negative, a span that the text writes as `<vid> - <vid>` ends before it starts, or there is no clip that
            times could belong to.
    """
    if not use_matching:
        if any(VID_TOKEN in text for _, text in turns):
            raise ValueError(f"the row holds {VID_TOKEN}, but matching is off; use annotations with written times")
        return []
    sources = {"user": _seconds(row, "src"), "assistant": _seconds(row, "tgt")}
    for role, key in (("user", "src"), ("assistant", "tgt")):
        found = sum(text.count(VID_TOKEN) for speaker, text in turns if speaker == role)
        if found != len(sources[role]):
            who = "questions" if role == "user" else "answers"
            raise ValueError(f"the {who} hold {found} {VID_TOKEN}, but {key} has {len(sources[role])} times")
    iterators = {role: iter(times) for role, times in sources.items()}
    times = []
    for role, text in turns:
        spoken = [next(iterators[role]) for _ in range(text.count(VID_TOKEN))]
        _check_spans(text, spoken)
        times += spoken
    if times and modality_of(row) == "text":
        raise ValueError(f"there are {VID_TOKEN}, but no video that they could point into")
    return times


def _seconds(row: dict, key: str) -> list[float]:
    values = row.get(key) or []
    if not isinstance(values, list):
        raise ValueError(f"{key} is {values!r}; it must be a list of seconds")
    for value in values:
        if not 0 <= _number(value) < math.inf:
            raise ValueError(f"{key} holds {value!r:.40}; times must be numbers of at least 0")
    return [float(value) for value in values]


def _check_spans(text: str, times: list[float]) -> None:
    places = [found.start() for found in re.finditer(VID_TOKEN, text)]
    for span in SPAN.finditer(text):
        start, end = (time for place, time in zip(places, times, strict=True) if span.start() <= place < span.end())
        if end < start:
            raise ValueError(f"the span {start} - {end} s ends before it starts")
