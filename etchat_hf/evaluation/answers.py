"""Reading times and choices out of a model's free text.

The rules are those of the E.T. Bench scorer (Liu et al., "E.T. Bench: Towards Open-Ended Event-Level Video-Language
Understanding", NeurIPS 2024): they decide what counts as an answer, so that scores stay comparable with its tables.
All times are seconds.
"""

import math
import re
from collections.abc import Sequence
from numbers import Real

from .metrics import Span

# A number is only tried from its first digit, which keeps the search linear on a long run of digits.
_TIME = r"(?<!\d)(\d+(?:\.\d*)?)"
_RANGES = (re.compile(rf"{_TIME}\s*-\s*{_TIME}"), re.compile(rf"{_TIME}\s*to\s*{_TIME}"))
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_CLOCK = re.compile(r"\b(\d{1,2}):(\d{2}):(\d{2})\b")
# A full stop does not end a sentence here: it is more often a decimal point.
_SENTENCE_END = re.compile(r"[!?\n]")
_TIME_WORDS = ("start", "end", "happen")

_BRACKETED_LETTER = re.compile(r"\(([a-z])\)")
_LEADING_LETTER = re.compile(r"(?:best option:\s*)?\(?([a-z])(?=$|[.,\s)])")
_UNIT = re.compile(r"^\s*(?:seconds?|secs?|s)\b", re.IGNORECASE)


def _ordered(start: float, end: float) -> Span:
    return (start, end) if start <= end else (end, start)


def _finite(spans: Sequence[Span]) -> list[Span]:
    """Leaves out spans that no clock can show, such as the infinity that 400 digits make."""
    return [span for span in spans if math.isfinite(span[0]) and math.isfinite(span[1])]


def _pairs(times: Sequence[float]) -> list[Span]:
    return [_ordered(start, end) for start, end in zip(times[::2], times[1::2], strict=False)]


def _find_ranges(text: str) -> list[re.Match]:
    for pattern in _RANGES:
        if matches := list(pattern.finditer(text)):
            return matches
    return []


def _span_of(match: re.Match) -> Span:
    return _ordered(float(match[1]), float(match[2]))


def read_spans(text: str) -> list[Span]:
    """Finds the time spans that an answer names, in the order of the text.

    In this order, the first form that occurs wins: `a - b`; `a to b`; the first numbers of the sentences that speak of
    a start, an end or a happening, taken two by two; `hh:mm:ss` in those sentences, taken two by two.

    Args:
        text: The answer.

    Returns:
        Spans `(start, end)` in seconds with start <= end; empty if the answer names none.
    """
    text = text.lower()
    if matches := _find_ranges(text):
        return _finite([_span_of(match) for match in matches])
    sentences = [part for part in _SENTENCE_END.split(text) if any(word in part for word in _TIME_WORDS)]
    firsts = [float(match[0]) for match in map(_NUMBER.search, sentences) if match]
    if spans := _pairs(firsts):
        return _finite(spans)
    clocks = [clock for part in sentences for clock in _CLOCK.findall(part)]
    return _pairs([3600.0 * int(hours) + 60 * int(minutes) + int(seconds) for hours, minutes, seconds in clocks])


def read_captions(text: str) -> list[tuple[Span, str]]:
    """Finds time spans together with what is said about them: `29.5 - 60.9 seconds, the door opens. 61 - ..`.

    Args:
        text: The answer.

    Returns:
        `((start, end), caption)` per span, seconds. A caption reaches to the next span; it is empty where the answer
        gives times in another form than `a - b` or `a to b`.
    """
    text = text.lower()
    matches = _find_ranges(text)
    if not matches:
        return [(span, "") for span in read_spans(text)]
    ends = [match.start() for match in matches[1:]] + [len(text)]
    captions = (text[match.end() : end] for match, end in zip(matches, ends, strict=True))
    events = [
        (_span_of(match), _UNIT.sub("", caption).strip(" \t\r\n,.:;-"))
        for match, caption in zip(matches, captions, strict=True)
    ]
    return [(span, caption) for span, caption in events if _finite([span])]


def read_number(text: str) -> float | None:
    """Returns the first number of an answer (seconds), or None if it holds none."""
    match = _NUMBER.search(text)
    if match is None or not math.isfinite(float(match[0])):
        return None
    return float(match[0])


def read_letter(text: str, anywhere: bool = True) -> int | None:
    """Reads which option an answer names by its letter.

    Args:
        text: The answer.
        anywhere: Whether a bracketed letter, `(B)`, counts wherever it stands. Otherwise, and if there is none, the
            letter must lead the answer, after an optional `best option:` and `(`, and stand alone or be followed by
            `.`, `,`, a space or `)`.

    Returns:
        0 for A, 1 for B, ...; this may lie beyond the options there are. None if no letter is named.
    """
    text = text.lower().strip()
    match = _BRACKETED_LETTER.search(text) if anywhere else None
    match = match or _LEADING_LETTER.match(text)
    return ord(match[1]) - ord("a") if match else None


def is_number(value: object) -> bool:
    """Whether a JSON value is a number that a float can hold (a truth value is none)."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def flatten_spans(value: object, depth: int = 3) -> list[Span]:
    """Turns annotated spans of any nesting into one list.

    E.T. Bench stores one span `[s, e]`, several `[[s, e], ..]`, or several per annotator `[[[s, e], ..], ..]`.

    Args:
        value: Parsed JSON, seconds.
        depth: The most lists inside of each other.

    Returns:
        At least one `(start, end)` with start <= end.

    Raises:
        ValueError: If this is no such list or a span ends before it starts.
    """
    if not isinstance(value, list | tuple) or not value or not depth:
        raise ValueError(f"expected [start, end] or lists of it, got {value!r:.100}")
    if len(value) == 2 and all(map(is_number, value)):
        start, end = value
        if end < start:
            raise ValueError(f"span {value!r} ends before it starts")
        return [(float(start), float(end))]
    return [span for part in value for span in flatten_spans(part, depth - 1)]
