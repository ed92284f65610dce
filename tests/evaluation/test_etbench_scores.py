"""E.T. Bench: the golden figures, every task's rule, and bad input."""

import copy
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from etchat_hf.evaluation import evaluate_etbench
from etchat_hf.evaluation.metrics import pairwise_iou
from etchat_hf.evaluation.similarity import EncoderUnavailableError

GOLDEN = Path(__file__).parents[1] / "golden" / "metrics"


@pytest.fixture
def predictions():
    return json.loads((GOLDEN / "etbench_predictions.json").read_text())


def make_row(task, answer, idx=0, **fields):
    row = {"task": task, "source": "s", "idx": idx, "video": f"s/{idx}.mp4", "q": "?", "a": answer}
    return {**row, **fields}


def figures(rows, similarity="jaccard"):
    return evaluate_etbench(rows, similarity)["by_source"][rows[0]["task"]]["s"]


def test_golden_figures(predictions):
    expected = json.loads((GOLDEN / "etbench_expected.json").read_text())
    result = evaluate_etbench(predictions, "jaccard")
    for task, sources in expected["by_source"].items():
        for source, golden in sources.items():
            measured = result["by_source"][task][source]
            assert {key: measured[key] for key in golden} == golden, (task, source)
    assert result["overall"] == expected["overall"]
    assert result["merged"] == expected["merged"]
    assert result["problems"] == {}


def test_order_of_rows_does_not_matter(predictions):
    shuffled = copy.copy(predictions)
    random.Random(0).shuffle(shuffled)
    first, second = evaluate_etbench(predictions, "jaccard"), evaluate_etbench(shuffled, "jaccard")
    assert first["overall"] == pytest.approx(second["overall"], abs=2e-5)


def test_input_is_left_alone(predictions):
    before = copy.deepcopy(predictions)
    evaluate_etbench(predictions, "jaccard")
    assert predictions == before


def test_grounding_takes_the_first_span_and_counts_failures_as_zero():
    rows = [make_row("tvg", "5 - 10, 0 - 10", tgt=[0, 10]), make_row("tvg", "none", 1, tgt=[0, 10])]
    expected = {"Total": 2, "Failed": 1, "mIoU": 0.25, "F1@0.1": 0.5, "F1@0.3": 0.5, "F1@0.5": 0.5, "F1@0.7": 0.0}
    assert figures(rows) == {**expected, "F1": 0.375}


def test_matching_takes_the_best_annotated_span():
    result = figures([make_row("tem", "20 - 30, 0 - 1", tgt=[[0, 10], [20, 28]])])
    assert (result["mIoU"], result["R@0.7"], result["mRec"]) == (0.8, 1.0, 1.0)


def test_action_localization_is_f1_of_best_matches():
    # One of three predictions matches (P = 1/3), one of two annotations is found (R = 1/2): F1 = 0.4.
    row = make_row("tal", "0 - 10, 50 - 60, 70 - 80", tgt=[[0, 10], [20, 30]])
    assert figures([row])["F1"] == 0.4
    assert figures([row, make_row("tal", "none", 1, tgt=[[0, 1]])])["F1"] == 0.2


def test_summary_rounds_halves_to_even_and_leaves_out_failures():
    # round(0.5) = 0 and round(2.5) = 2: the seconds 0 and 1. Chosen: 0 to 3. P = 1/2, R = 1.
    row = make_row("evs", "0 - 4", tgt=[[0.5, 2.5]])
    assert figures([row, make_row("evs", "none", 1, tgt=[[0, 1]])]) == {"Total": 2, "Failed": 1, "F1": 0.66667}
    # Spans that cover no full second choose nothing, but are no failure.
    assert figures([make_row("evs", "3.1 - 3.4", tgt=[[0, 5]])]) == {"Total": 1, "Failed": 0, "F1": 0.0}
    # The map ends after 1000 seconds.
    assert figures([make_row("evs", "0 - 99999", tgt=[[0, 1000]])])["F1"] == 1.0


@pytest.mark.parametrize(("answer", "hit"), [("5", 1.0), ("at 10.0", 1.0), ("at 10.1", 0.0), ("31 or 5", 1.0)])
def test_highlight_lies_in_any_annotators_span(answer, hit):
    assert figures([make_row("vhd", answer, tgt=[[[5, 10], [20, 21]], [[30, 40]]])])["F1"] == hit


OPTIONS = ["opens the door", "closes the window", "reads a book", "runs away"]


@pytest.mark.parametrize(
    ("answer", "accuracy", "failed"),
    [
        ("Best Option: (C)", 1.0, 0),
        ("c", 1.0, 0),
        ("B. x", 0.0, 0),
        ("reads a book", 1.0, 1),
        ("runs away", 0.0, 1),
        ("(Z) reads a book", 1.0, 0),
        ("", 0.0, 1),
        ("  ", 0.0, 1),
    ],
)
def test_choices(answer, accuracy, failed):
    result = figures([make_row("rar", answer, o=OPTIONS, p=2)])
    assert (result["Acc"], result["Failed"]) == (accuracy, failed)


@pytest.mark.parametrize(
    ("answer", "accuracy", "recall", "failed"),
    [
        ("(B) it. 0 - 10", 1.0, 1.0, 0),
        ("(A) it. 0 - 10", 0.0, 0.0, 0),
        ("B. no time", 1.0, 0.0, 1),
        ("A. no time", 0.0, 0.0, 0),
        # A letter inside the text does not count here: "closes the window" decides.
        ("the person closes the window, not (A), 0 - 10", 1.0, 1.0, 0),
        ("", 0.0, 0.0, 1),
    ],
)
def test_grounded_choices(answer, accuracy, recall, failed):
    result = figures([make_row("gvq", answer, o=OPTIONS, p=1, tgt=[0, 10])])
    assert (result["Acc"], result["mRec"], result["Failed"]) == (accuracy, recall, failed)


def test_events_take_mean_precision_and_recall_times_the_answered_share():
    texts = {"g": ["x", "y"], "tgt": [[0, 10], [20, 30]]}
    rows = [make_row("dvc", "0 - 10 seconds, x.", 0, **texts), make_row("dvc", "0 - 10 x. 50 - 60 y", 1, **texts)]
    # P = (1 + 1/2) / 2, R = 1/2: F1 = 0.6; one of three videos has no answer.
    assert figures(rows)["F1"] == 0.6
    result = figures([*rows, make_row("dvc", "nothing", 2, **texts)])
    assert (result["Total"], result["Failed"], result["F1"]) == (3, 1, 0.4)


def test_events_of_a_video_answered_twice_keep_the_last():
    texts = {"g": ["x"], "tgt": [[0, 10]], "video": "same.mp4"}
    result = figures([make_row("slc", "0 - 10 x", 0, **texts), make_row("slc", "50 - 60 x", 1, **texts)])
    assert (result["Total"], result["F1"]) == (2, 0.0)


def test_event_overlap_is_strictly_above_the_threshold():
    # IoU is exactly 0.5 (5 / 10): a hit for TVG, none for DVC.
    assert figures([make_row("tvg", "0 - 5", tgt=[0, 10])])["F1@0.5"] == 1.0
    result = figures([make_row("dvc", "0 - 5 x", tgt=[[0, 10]], g=["x"])])
    assert (result["F1@0.3"], result["F1@0.5"]) == (1.0, 0.0)
    # 0.3 s of 1 s is 0.30000000000000004 in binary, still no more than 0.3.
    assert figures([make_row("dvc", "0.1 - 0.4 x", tgt=[[0.1, 1.1]], g=["x"])])["F1@0.3"] == 0.0


def test_iou_is_symmetric_and_bounded():
    rng = np.random.default_rng(0)
    a, b = np.sort(rng.random((50, 2))), np.sort(rng.random((40, 2)))
    iou = pairwise_iou(a, b)
    assert iou.shape == (50, 40)
    assert np.allclose(iou, pairwise_iou(b, a).T)
    assert iou.min() >= 0 and iou.max() <= 1
    assert np.allclose(np.diag(pairwise_iou(a, a)), 1)
    assert pairwise_iou([(3, 3)], [(3, 3)]) == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_times_beyond_what_a_float_holds_overlap_nothing(dtype):
    assert 1e-300 > pairwise_iou([(0, 1.7e308), (1e300, 1e300), (-1.7e308, 1.7e308)], [(0, 10)], dtype).max().item()


def test_groups_need_all_their_tasks(predictions):
    grounding = [row for row in predictions if row["task"] in ("tvg", "rar", "eca", "rvq")]
    result = evaluate_etbench(grounding, "jaccard")
    assert set(result["overall"]) == {"TVG", "RAR", "ECA", "RVQ"}
    assert set(result["merged"]) == {"acc_ref"}


def test_bad_answers_are_named_and_count_as_unanswered():
    rows = [
        make_row("tvg", "0 - 10", 0, tgt=[0, 10]),
        make_row("tvg", "0 - 10", 0, tgt=[0, 10]),
        make_row("tvg", None, 1, tgt=[0, 10]),
        make_row("tvg", 7, 2, tgt=[0, 10]),
        make_row("tvg", "0 - 10" + "." * 200_000, 3, tgt=[0, 10]),
        make_row("xyz", "0 - 10", 4, tgt=[0, 10]),
    ]
    result = evaluate_etbench(rows, "jaccard", names=list("ABCDEF"))
    assert result["problems"] == {
        "answered more than once": ["B repeats A"],
        "missing answer": ["C"],
        "answer is not text": ["D: 7"],
        "huge answer": ["E: 200,006 characters"],
        "unknown task": ["F: 'xyz'"],
    }
    assert result["by_source"]["tvg"]["s"]["Total"] == 5
    assert result["by_source"]["tvg"]["s"]["Failed"] == 2


def test_a_source_without_one_readable_answer_is_named():
    result = evaluate_etbench([make_row("evs", "none", tgt=[[0, 1]])], "jaccard")
    assert result["problems"] == {"not one answer could be read": ["evs/s"]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (make_row("tvg", "0 - 1"), "r7.*'tgt'"),
        (make_row("tvg", "0 - 1", tgt=[[0, 1], [2, 3]]), "r7.*one span"),
        (make_row("tal", "0 - 1", tgt=[[0, "x"]]), "r7.*'tgt'.*'x'"),
        (make_row("tal", "0 - 1", tgt=[[0, 10**400]]), "r7.*'tgt'.*expected"),
        (make_row("rar", "A", o=["x"], p=1), "r7.*'p' is 1"),
        (make_row("rar", "A", o="xy", p=1), "r7.*'o'"),
        (make_row("rar", "A", o=["x"], p=True), "r7.*'p'.*True"),
        (make_row("dvc", "0 - 1 x", tgt=[[0, 1]], g=[]), "r7.*'g' should be 1 texts"),
        ({"a": "x"}, "r7.*'task'"),
        ({**make_row("tvg", "0 - 1", tgt=[0, 1]), "video": 5}, "r7.*'video' should be str, got 5"),
        ({"task": "tvg", "idx": 7, "video": "v", "tgt": [0, 1], "a": "0 - 1"}, "r7.*'source' is missing"),
    ],
)
def test_broken_annotations_are_named_and_left_out(row, message):
    sound = [make_row("tvg", "0 - 10", 1, tgt=[0, 10]), make_row("rar", "A", 2, o=["x", "y"], p=0)]
    result = evaluate_etbench([sound[0], row, sound[1]], "jaccard", names=["r6", "r7", "r8"])
    assert result["overall"] == {"RAR": 1.0, "TVG": 1.0}
    (kind,) = result["problems"]
    (reason,) = result["problems"][kind]
    assert kind == "broken annotation" and re.search(message, reason)
    with pytest.raises(ValueError, match=f"none of the 1 rows can be scored: broken annotation, {message}"):
        evaluate_etbench([row], "jaccard", names=["r7"])


def test_what_is_no_row_is_refused_by_name():
    with pytest.raises(ValueError, match="r7.*object"):
        evaluate_etbench(["x"], "jaccard", names=["r7"])


def test_a_row_that_no_subset_can_hold_is_named_and_left_out():
    rows = [make_row("tvg", "0 - 10", idx, tgt=[0, 10]) for idx in (0, "1")]
    result = evaluate_etbench(rows, "jaccard", subset=[0, 1])
    assert result["by_source"]["tvg"]["s"]["Total"] == 1
    assert result["problems"] == {
        "broken annotation": ["row 1: field 'idx' should be int, got '1'"],
        "no prediction": ["idx 1"],
    }


def test_rows_need_not_come_from_files():
    rows = [
        make_row("tvg", "0 - 10", np.int64(0), tgt=(np.float32(0), np.int32(10))),
        make_row("tem", "0 - 10", np.int64(1), tgt=((0, 10), (20, 30))),
        make_row("gvq", "(B) 0 - 10", np.int64(2), o=("x", "y"), p=np.int64(1), tgt=(0, 10)),
        make_row("dvc", "0 - 10 x", np.int64(3), tgt=((0, 10),), g=("x",)),
        make_row("tvg", "0 - 10", 0, tgt=[0, 10]),
    ]
    result = evaluate_etbench(rows, "jaccard")
    assert result["overall"] == {"TVG": 1.0, "DVC": 1.0, "TEM": 1.0, "GVQ": 1.0}
    assert result["problems"] == {"answered more than once": ["row 4 repeats row 0"]}
    json.dumps(result)
    subset = [np.int64(1), make_row("tvg", "", 0, tgt=[0, 10])]
    assert set(evaluate_etbench(rows[:2], "jaccard", subset=subset)["overall"]) == {"TVG", "TEM"}


def test_questions_tell_rows_without_idx_apart():
    rows = [{**make_row("tvg", "0 - 10", tgt=[0, 10]), "q": question} for question in ("a?", "b?", "a?")]
    for row in rows:
        del row["idx"]
    assert evaluate_etbench(rows, "jaccard")["problems"] == {"answered more than once": ["row 2 repeats row 0"]}


@pytest.mark.parametrize("rows", [[], [make_row("xyz", "a")]])
def test_nothing_to_score_is_an_error(rows):
    with pytest.raises(ValueError, match="no predictions|none of the 1 rows can be scored: unknown task"):
        evaluate_etbench(rows, "jaccard")


def test_subset_restricts_and_counts_the_unanswered():
    rows = [make_row("tvg", "0 - 10", i, tgt=[0, 10]) for i in range(4)]
    assert evaluate_etbench(rows, "jaccard", subset=[1, 2])["by_source"]["tvg"]["s"]["Total"] == 2
    annotations = [make_row("tvg", "ignored", i, tgt=[0, 10]) for i in (3, 4)]
    result = evaluate_etbench(rows, "jaccard", subset=annotations)
    assert result["by_source"]["tvg"]["s"]["F1"] == 0.5
    assert result["problems"]["no prediction"] == ["task tvg idx 4"]


def test_predictions_of_other_annotations_are_refused():
    row = make_row("tvg", "0 - 10", tgt=[0, 10])
    with pytest.raises(ValueError, match=r"1 predictions do not belong.*P: tgt is \[0, 10\], not \[0, 12\]"):
        evaluate_etbench([row], "jaccard", subset=[{**row, "tgt": [0, 12]}], names=["P"])


def test_unknown_similarity():
    with pytest.raises(ValueError, match="unknown similarity 'cosine'"):
        evaluate_etbench([make_row("rar", "A", o=OPTIONS, p=0)], "cosine")


def test_missing_encoder_is_said_only_when_needed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    assert figures([make_row("rar", "A", o=OPTIONS, p=0)], "sentence-transformers")["Acc"] == 1.0
    with pytest.raises(EncoderUnavailableError, match="row 0.*'runs away'.*not installed.*jaccard"):
        figures([make_row("rar", "runs away", o=OPTIONS, p=0)], "sentence-transformers")
    with pytest.raises(EncoderUnavailableError, match="row 1"):  # no broken annotation, so the row is not left out
        rows = [make_row("rar", answer, i, o=OPTIONS, p=0) for i, answer in enumerate(("A", "runs away"))]
        figures(rows, "sentence-transformers")
