"""lmms-eval runs our model on our tasks, and gets the answers and scores that `etchat infer` and `evaluate` get."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tenacity
from conftest import MAX_NEW_TOKENS, NUM_VIDEOS
from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from loguru import logger

from etchat_hf.evaluation import evaluate_charades, evaluate_etbench
from etchat_hf.evaluation.etbench_tasks import TASKS
from etchat_hf.evaluation.lmms import tasks as our_tasks
from etchat_hf.evaluation.lmms.models.etchat import ETChat
from etchat_hf.evaluation.lmms.tasks.charades_sta import utils as charades_utils
from etchat_hf.evaluation.lmms.tasks.etbench import utils as etbench_utils
from etchat_hf.evaluation.runner import Settings, infer
from etchat_hf.evaluation.tasks import CHARADES, ETBENCH
from etchat_hf.inference import load

FOLDER = our_tasks.__path__[0]
SETTINGS = Settings(batch_size=3, max_new_tokens=MAX_NEW_TOKENS)


def evaluate(model, tasks: list[str], **kwargs) -> dict:
    manager = TaskManager(include_path=FOLDER, include_defaults=False, model_name="etchat")
    options = {"task_manager": manager, "gen_kwargs": f"max_new_tokens={MAX_NEW_TOKENS}", "bootstrap_iters": 0}
    return simple_evaluate(model, tasks=tasks, **options, **kwargs)


def answers(results: dict, task: str) -> list[str]:
    return [sample["filtered_resps"][0] for sample in results["samples"][task]]


@pytest.fixture
def lm(world):
    return ETChat(str(world.model), batch_size=4, device="cpu")


def direct(world, benchmark, rows: list[dict]) -> list[dict]:
    model, processor = load(world.model, device="cpu")
    return infer(model, processor, benchmark, rows, world.videos, SETTINGS, show_progress=False).predictions


def test_the_model_is_registered():
    assert get_model("etchat") is ETChat


def test_etbench_equals_our_own_evaluation(world, environment, lm):
    results = evaluate(lm, ["etbench"])
    expected = direct(world, ETBENCH, world.rows)
    scores = evaluate_etbench(expected, similarity="jaccard")
    assert len({row["a"] for row in expected}) > 6
    assert any(character.isdigit() for row in expected for character in row["a"])
    for task, definition in TASKS.items():
        got = results["results"][f"etbench_{task}"]
        assert answers(results, f"etbench_{task}") == [row["a"] for row in expected if row["task"] == task]
        assert got[f"{definition.headline},none"] == scores["overall"][task.upper()]
        assert got["Failed,none"] == sum(source["Failed"] for source in scores["by_source"][task].values())
    for group, metric in {"acc_ref": "Acc", "f1_gnd": "F1", "f1_cap": "F1", "rec_com": "mRec"}.items():
        got = results["groups"][f"etbench_{group.split('_')[1]}"][f"{metric},none"]
        assert got == pytest.approx(scores["merged"][group])
    assert any(score > 0 for score in scores["overall"].values())
    assert math.isnan(results["results"]["etbench_dvc"]["Sim,none"])  # jaccard gives none, and that is not 0


def test_charades_gets_the_same_answers_and_our_scores(world, environment, lm):
    results = evaluate(lm, ["charades_sta"])
    expected = direct(world, CHARADES, CHARADES.read(world.charades))
    assert answers(results, "charades_sta") == [row["response"] for row in expected]
    rows = [sample["mIoU"] for sample in results["samples"]["charades_sta"]]
    scores = evaluate_charades(rows)
    got = results["results"]["charades_sta"]
    assert {name: got[f"{name},none"] for name in ("R1@0.3", "R1@0.5", "R1@0.7", "mIoU", "failed")} == {
        name: scores[name] for name in ("R1@0.3", "R1@0.5", "R1@0.7", "mIoU", "failed")
    }
    assert len(rows) == scores["total"] == 6


@pytest.mark.parametrize(
    ("answer", "times"),
    [("From 0.5 to 7 seconds.", [0.5, 7.0]), ("7 - 0.5", [7.0, 0.5]), ("at 3", [3.0]), ("never", None)],
)
def test_charades_times_are_the_numbers_as_they_come(answer, times):
    row = {"vid": "a", "query": "q", "span": [0.5, 7.0]}
    (scored,) = {
        json.dumps(row) for row in charades_utils.process_results({"annotation": json.dumps(row)}, [answer]).values()
    }
    assert json.loads(scored) == row | {"pred": times, "response": answer}


def test_each_video_is_encoded_once_and_batches_change_nothing(world, environment, lm, monkeypatch):
    encoded = []
    encode = ETChat._encode
    monkeypatch.setattr(ETChat, "_encode", lambda self, path: encoded.append(path) or encode(self, path))
    batched = evaluate(lm, ["etbench", "charades_sta"])
    assert len(encoded) == len(set(encoded)) == NUM_VIDEOS
    alone = evaluate("etchat", ["etbench", "charades_sta"], model_args=f"pretrained={world.model}", batch_size="1")
    for task in batched["samples"]:
        assert answers(alone, task) == answers(batched, task)


def request(lm, visuals, context="When?", doc=None, **generation_kwargs) -> Instance:
    lm.task_dict["toy"] = {"test": [doc or {}]}
    arguments = (context, generation_kwargs, lambda _: visuals, 0, "toy", "test")
    return Instance("generate_until", arguments, 0, {"task": "toy", "doc_id": 0, "repeats": 1})


def test_a_task_without_our_fields_runs_and_its_stops_end_the_answer(world, lm):
    video = str(world.videos / "3.mp4")
    (whole,) = lm.generate_until([request(lm, [video], max_new_tokens=MAX_NEW_TOKENS, temperature=0)])
    stop = whole[len(whole) // 2]
    (cut,) = lm.generate_until([request(lm, [video], max_new_tokens=MAX_NEW_TOKENS, until=[stop, "\n\n"])])
    assert len(whole) > 2 and cut == whole[: whole.index(stop)]


def test_fields_of_a_doc_reach_the_model_and_the_command_line_goes_first(lm):
    doc = {"etchat": {"src": [1.5], "answer_start": "Best Option: (", "repetition_penalty": 1.2}}
    asked = lm._read(request(lm, ["a.mp4"], "At <vid>?", doc, repetition_penalty=1.0)).request
    assert (asked.src, asked.answer_start, asked.repetition_penalty) == ([1.5], "Best Option: (", 1.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"visuals": []}, "path of one video"),
        ({"visuals": ["a.mp4", "b.mp4"]}, "path of one video"),
        ({"do_sample": True}, "greedily"),
        ({"temperature": 0.7}, "greedily"),
        ({"num_beams": 4}, "greedily"),
    ],
)
def test_what_the_model_cannot_do_is_said(world, lm, change, words):
    arguments = {"visuals": [str(world.videos / "0.mp4")], **change}
    with pytest.raises(ValueError, match=words):
        lm.generate_until([request(lm, **arguments)])


@pytest.fixture
def warnings():
    """What is warned of during the test."""
    messages = []
    handler = logger.add(lambda message: messages.append(message.record["message"]), level="WARNING")
    yield messages
    logger.remove(handler)


def test_what_cannot_be_answered_is_empty_and_named(world, lm, tmp_path, warnings):
    (tmp_path / "torn.mp4").write_bytes((world.videos / "0.mp4").read_bytes()[:300])
    video = str(world.videos / "0.mp4")
    paths = [video, str(tmp_path / "torn.mp4"), str(tmp_path / "none.mp4"), video]
    asked = [request(lm, [path], max_new_tokens=MAX_NEW_TOKENS) for path in paths]
    asked.append(request(lm, [video], context="At <vid>?"))
    first, *others, again, timeless = lm.generate_until(asked)
    assert first and first == again and (*others, timeless) == ("", "", "")
    assert len(warnings) == 3 and all(text.startswith("toy doc 0 gets an empty answer: ") for text in warnings)
    assert {name for name in ("torn.mp4", "none.mp4", "1 <vid>") if any(name in text for text in warnings)} == {
        "torn.mp4",
        "none.mp4",
        "1 <vid>",
    }


def test_a_missing_video_fails_its_rows_only_and_scores_are_computed_once(
    world, environment, lm, tmp_path, monkeypatch, warnings
):
    rows = [dict(row) for row in world.rows if row["task"] == "tvg"]
    rows[1]["video"] = "nowhere.mp4"
    strangers = [{**rows[0], "task": task} for task in ("xyz", "xyz", None)]
    (tmp_path / "rows.json").write_text(json.dumps(rows + strangers))
    monkeypatch.setenv("ETBENCH_ANNOTATIONS", str(tmp_path / "rows.json"))
    calls = []
    monkeypatch.setattr(
        etbench_utils, "evaluate_etbench", lambda *a, **k: calls.append(a) or evaluate_etbench(*a, **k)
    )
    results = evaluate(lm, ["etbench_tvg"])
    given = answers(results, "etbench_tvg")
    assert given[1] == "" and given[0] and given[2] and len(calls) == 1
    expected = evaluate_etbench([row | {"a": answer} for row, answer in zip(rows, given, strict=True)], "jaccard")
    assert results["results"]["etbench_tvg"]["F1,none"] == expected["overall"]["TVG"]
    assert [text for text in warnings if "nowhere.mp4" in text and "etbench_tvg doc 1" in text]
    (unknown,) = [text for text in warnings if "unknown tasks" in text]
    assert unknown.endswith("rows.json: 3 rows are of unknown tasks, and not asked: 'xyz', None")


def test_a_task_without_rows_is_named_with_the_file(world, environment, lm, tmp_path, monkeypatch, warnings):
    (tmp_path / "rows.json").write_text(json.dumps([row for row in world.rows if row["task"] != "dvc"]))
    monkeypatch.setenv("ETBENCH_ANNOTATIONS", str(tmp_path / "rows.json"))
    monkeypatch.setattr(tenacity.nap.time, "sleep", lambda seconds: None)  # between the harness's attempts
    with pytest.raises(tenacity.RetryError) as error:
        evaluate(lm, ["etbench"])
    message = str(error.value.__cause__)
    assert message.startswith(f"{tmp_path / 'rows.json'} holds no row of task 'dvc'; leave etbench_dvc")
    assert message in warnings


@pytest.mark.parametrize("name", ["ETBENCH_ANNOTATIONS", "ETBENCH_VIDEOS"])
def test_a_data_set_that_is_not_configured_is_named(environment, lm, monkeypatch, name):
    monkeypatch.delenv(name)
    with pytest.raises(ImportError) as error:
        evaluate(lm, ["etbench_tvg"])
    assert name in str(error.value.__cause__)


def test_command_line(world, environment, tmp_path):
    folder = subprocess.check_output([sys.executable, "-m", "etchat_hf.evaluation.lmms"], text=True).strip()
    assert folder == FOLDER
    command = [sys.executable, "-m", "lmms_eval", "--model", "etchat", "--model_args", f"pretrained={world.model}"]
    command += ["--tasks", "etbench_tvg,charades_sta", "--include_path", folder, "--batch_size", "4"]
    command += ["--gen_kwargs", f"max_new_tokens={MAX_NEW_TOKENS}", "--output_path", str(tmp_path), "--log_samples"]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-3000:]
    (file,) = Path(tmp_path).rglob("*_results.json")
    results = json.loads(file.read_text())["results"]
    assert {"F1,none", "Failed,none"} <= set(results["etbench_tvg"])
    assert {"R1@0.5,none", "mIoU,none"} <= set(results["charades_sta"])
