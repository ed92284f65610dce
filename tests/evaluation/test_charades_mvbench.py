"""Charades-STA and MVBench: the golden figures, the rules, and bad input."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from etchat_hf.evaluation import evaluate_charades, evaluate_mvbench

GOLDEN = Path(__file__).parents[1] / "golden" / "metrics"


def make_charades(span, prediction, vid="V"):
    return {"vid": vid, "query": "q", "span": span, "pred": prediction, "response": ""}


def test_charades_golden_figures():
    result = evaluate_charades(json.loads((GOLDEN / "charades_predictions.json").read_text()))
    expected = json.loads((GOLDEN / "charades_expected.json").read_text())
    assert {key: result[key] for key in expected} == expected
    assert result["problems"] == {}


def test_charades_ties_fall_as_in_float32():
    assert evaluate_charades([make_charades([0, 10], [0, 7])])["R1@0.7"] == 0.0
    assert evaluate_charades([make_charades([0, 10], [0, 5])])["R1@0.5"] == 1.0


@pytest.mark.parametrize(("prediction", "failed"), [([10, 0], 0), ([5, 5], 0), (None, 1), ([5], 1), ([0, 5, 10], 1)])
def test_charades_answers_that_score_nothing(prediction, failed):
    result = evaluate_charades([make_charades([0, 10], prediction), make_charades([0, 10], [0, 10], "W")])
    assert (result["failed"], result["total"], result["mIoU"], result["R1@0.3"]) == (failed, 2, 0.5, 0.5)


def test_charades_bad_answers_are_named():
    rows = [make_charades([0, 10], [0, 10]), make_charades([0, 10], "0 - 10", "W"), make_charades([0, 10], [0, 10])]
    rows.append({"vid": "X", "query": "q", "span": [0, 10]})
    rows.append(make_charades([0, 10], [0, float("inf")], "Y"))
    result = evaluate_charades(rows, names=list("ABCDE"))
    assert result["problems"] == {
        "answered more than once": ["C repeats A"],
        "answer is not numbers": ["B: '0 - 10'", "E: [0, inf]"],
        "missing answer": ["D"],
    }
    assert (result["failed"], result["total"]) == (3, 5)


@pytest.mark.parametrize("span", [None, [1], [5, 1], [[0, 1], [2, 3]]])
def test_charades_broken_annotations_are_named_and_left_out(span):
    broken = make_charades(span, [0, 1])
    result = evaluate_charades([broken, make_charades([0, 10], [0, 10], "W")])
    assert (result["total"], result["failed"], result["mIoU"]) == (1, 0, 1.0)
    (reason,) = result["problems"].pop("broken annotation")
    assert reason.startswith("row 0: field 'span'") and not result["problems"]
    with pytest.raises(ValueError, match="row 0.*'span'"):
        evaluate_charades([broken])


def test_charades_spans_may_be_tuples_of_numpys():
    assert evaluate_charades([make_charades((np.int64(0), np.float32(10)), (np.float64(0), 10))])["mIoU"] == 1.0


def make_mvbench(answer, task="action", video="v.mp4"):
    candidates = ["up", "down", "left"]
    return {"task": task, "video": video, "question": "?", "candidates": candidates, "answer": "down", "a": answer}


@pytest.mark.parametrize(
    ("answer", "accuracy", "failed"),
    [("B) down", 1, 0), ("(b", 1, 0), ("Best Option: (B)", 1, 0), ("C. left", 0, 0), ("", 0, 1), ("7", 0, 1)],
)
def test_mvbench_first_letter(answer, accuracy, failed):
    assert evaluate_mvbench([make_mvbench(answer)])["by_task"]["action"] == {
        "Total": 1,
        "Failed": failed,
        "Acc": accuracy,
    }


def test_mvbench_averages_tasks():
    rows = [make_mvbench("B", video=f"{i}") for i in range(3)] + [make_mvbench("A", "state", "4")]
    assert evaluate_mvbench(rows)["overall"] == {"Avg": 0.5}


def test_mvbench_bad_input():
    rows = [make_mvbench("B"), make_mvbench(None), make_mvbench("B", video="w")]
    problems = evaluate_mvbench(rows, names=list("ABC"))["problems"]
    assert problems == {"answered more than once": ["B repeats A"], "missing answer": ["B"]}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"answer": "in"}, "field 'answer' 'in' is none of the candidates ['up', 'down', 'left']"),
        ({"candidates": []}, "field 'answer' 'down' is none of the candidates []"),
        ({"candidates": "down"}, "field 'candidates' should be list, got 'down'"),
        ({"task": None}, "field 'task' should be str, got None"),
    ],
)
def test_mvbench_broken_annotations_are_named_and_left_out(broken, message):
    rows = [make_mvbench("B"), {**make_mvbench("B"), "video": "w", **broken}]
    result = evaluate_mvbench(rows)
    assert result["by_task"] == {"action": {"Total": 1, "Failed": 0, "Acc": 1.0}}
    assert result["problems"] == {"broken annotation": [f"row 1: {message}"]}
    with pytest.raises(ValueError, match=f"row 0: {re.escape(message)}"):
        evaluate_mvbench(rows[1:])


def test_mvbench_candidates_may_be_a_tuple():
    assert evaluate_mvbench([{**make_mvbench("B"), "candidates": ("up", "down")}])["overall"] == {"Avg": 1.0}
