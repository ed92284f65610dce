"""Reading times and choices out of free text."""

import numpy as np
import pytest

from etchat_hf.evaluation.answers import flatten_spans, read_captions, read_letter, read_number, read_spans


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("The event happens in 7.6 - 16.9 seconds.", [(7.6, 16.9)]),
        ("13.8-16.1 , 12 -17.7", [(13.8, 16.1), (12.0, 17.7)]),
        ("From 4.1 TO 10.9 seconds.", [(4.1, 10.9)]),
        ("It is 17.4 - 16", [(16.0, 17.4)]),
        # A dash wins over `to`, wherever it stands.
        ("1 to 2, or 3 - 4", [(3.0, 4.0)]),
        ("Start time is 23.1!\nEnd time is 20.1.", [(20.1, 23.1)]),
        # A sentence gives its first number only, and an odd one out is dropped.
        ("It starts at 5.5, not 6\nends at 9\nhappens at 12", [(5.5, 9.0)]),
        # A full stop does not end a sentence: only one number is found here.
        ("It starts at 5. It ends at 9.", []),
        ("It starts at 00:00:18 and ends at 01:02:03", [(18.0, 3723.0)]),
        ("5 and 9 seconds", []),
        # Written as the benchmark's scorer wants it, or not read: no unit within, no other dash, no sign.
        ("2.5s to 7s", []),
        ("3–5", []),
        ("-5 - 10", [(5.0, 10.0)]),
        ("1.5.2 - 3.", [(3.0, 5.2)]),
        ("at 0:30 - 1:00", [(1.0, 30.0)]),
        ("٣ - ٥", [(3.0, 5.0)]),
        ("no idea", []),
        ("", []),
    ],
)
def test_spans(text, spans):
    assert read_spans(text) == spans


def test_numbers_beyond_any_clock_are_no_answer():
    assert read_spans(f"1 - {'9' * 400}") == []
    assert read_number("9" * 400) is None


def test_number():
    assert read_number("The highlight is at 25.1 seconds, or 30") == 25.1
    assert read_number("nothing") is None


@pytest.mark.parametrize(
    ("text", "anywhere", "letter"),
    [
        ("Best Option: (D) because", True, 3),
        ("It is (b).", True, 1),
        ("It is (b).", False, None),
        # Any letter that stands alone leads an answer, also one beyond the options.
        ("I say b", True, 8),
        ("(C) it", False, 2),
        ("best option: c", False, 2),
        ("B. x", True, 1),
        ("D, because", True, 3),
        ("d", True, 3),
        ("a red square", True, 0),
        ("closes the window", True, None),
        ("B: x", True, None),
        ("A (C) is right", True, 2),
        ("(Z) reads a book", True, 25),
        ("(12)", True, None),
        ("A)", True, 0),
        ("A.", False, 0),
        ("best option:(b", False, 1),
        ("Answer: B", True, None),
        ("(AB)", True, None),
        ("( A )", True, None),
        ("Ａ", True, None),
        ("", True, None),
    ],
)
def test_letter(text, anywhere, letter):
    assert read_letter(text, anywhere) == letter


def test_captions_reach_to_the_next_span():
    text = "29.5 - 60.9 seconds, The door opens. 70 - 65 Seconds, someone walks."
    assert read_captions(text) == [((29.5, 60.9), "the door opens"), ((65.0, 70.0), "someone walks")]
    assert read_captions("starts at 1\nends at 2") == [((1.0, 2.0), "")]


def test_captions_keep_their_ends_where_lower_case_is_longer():
    assert len("İ".lower()) == 2
    assert read_captions("İİİİ 1 - 2 the door opens") == [((1.0, 2.0), "the door opens")]


def test_spans_of_any_nesting():
    assert flatten_spans([1, 2.5]) == [(1.0, 2.5)]
    assert flatten_spans([[[1, 2], [3, 4]], [[5, 6]]]) == [(1.0, 2.0), (3.0, 4.0), (5.0, 6.0)]


@pytest.mark.parametrize(
    "value", [[], [1], [1, "2"], [[1, 2], 3], None, [True, 2], [float("nan"), 1], [5, 2], [np.float32("inf"), 1]]
)
def test_broken_spans(value):
    with pytest.raises(ValueError, match="span|expected"):
        flatten_spans(value)


def nested(value, depth):
    return value if depth == 0 else nested([value], depth - 1)


def test_spans_are_nested_three_deep_at_most():
    assert flatten_spans(nested([1, 2], 2)) == [(1.0, 2.0)]
    for depth in (3, 500):
        with pytest.raises(ValueError, match="expected"):
            flatten_spans(nested([1, 2], depth))


@pytest.mark.parametrize(
    ("text", "spans", "letter"),
    [
        ("9" * 10**6, 0, None),
        ("5" + " " * 10**6, 0, None),
        ("1." * 10**6, 0, None),
        ("(" * 10**6, 0, None),
        ("start " * 200_000, 0, None),
        ("1 - 2 " * 200_000, 200_000, None),
        ("starts at 00:00:05\n" * 100_000, 50_000, None),
    ],
)
def test_huge_text_is_read_in_linear_time(text, spans, letter):
    """A search that steps back over what it has read would take hours here."""
    assert len(read_spans(text)) == len(read_captions(text)) == spans
    assert read_letter(text) == letter
