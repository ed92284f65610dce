"""`etchat evaluate`: files in, tables and JSON out; one line for a user's error."""

import json
import re
from pathlib import Path

import pytest

from etchat_hf.cli import main
from etchat_hf.evaluation.journal import Journal, write_run
from etchat_hf.evaluation.predictions import write_atomic

GOLDEN = Path(__file__).parents[1] / "golden" / "metrics"


@pytest.fixture
def run(capsys):
    """Runs `etchat evaluate`; returns exit code, stdout and stderr."""

    def evaluate(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(["evaluate", *map(str, arguments)])
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return evaluate


@pytest.fixture
def folder(tmp_path):
    """Golden predictions in two files of one folder, as two processes leave them."""
    rows = json.loads((GOLDEN / "etbench_predictions.json").read_text())
    for i in range(2):
        (tmp_path / f"part_{i}.json").write_text(json.dumps(rows[i::2]))
    return tmp_path


def test_etbench_folder_gives_the_golden_figures(run, folder):
    output = folder / "metrics.json"
    for _ in range(2):  # The second run must not read the first one's output as predictions.
        code, out, err = run("etbench", folder, "--similarity", "jaccard", "--output", output)
        assert code == 0, err
    expected = json.loads((GOLDEN / "etbench_expected.json").read_text())
    assert json.loads(output.read_text())["merged"] == pytest.approx(expected["merged"], abs=1e-5)
    assert re.search(r"TVG +F1 +75\.0 +38\.6 +24 +1\n", out)
    assert re.search(r"Grounding +F1 +58\.1 +33\.5", out)
    assert re.search(r"GVQ +qa_ego4d +33\.3 +33\.3 +33\.3 +33\.3 +33\.3 +25\.6 +33\.3 +2 of 12", out)
    assert re.search(r"DVC_Sim +Sim +absent +19\.7", out) and re.search(r"DVC +hirest .* absent\n", out)
    assert "SentSim of dvc/hirest, slc/crosstask is absent: needs the sentence encoder" in err
    assert max(map(len, out.splitlines())) <= 80


def test_etbench_shows_only_what_was_answered(run, tmp_path):
    rows = json.loads((GOLDEN / "etbench_predictions.json").read_text())
    (tmp_path / "p.json").write_text(json.dumps([row for row in rows if row["task"] == "tvg"]))
    code, out, _ = run("etbench", tmp_path / "p.json")
    assert code == 0 and "no answers of RAR, ECA, RVQ, EPM" in out and "Captions" not in out
    assert not re.search(r"^(RAR|Grounding)", out, re.MULTILINE)


def test_charades(run, tmp_path):
    output = tmp_path / "new" / "metrics.json"
    code, out, err = run("charades", GOLDEN / "charades_predictions.json", "--output", output)
    assert code == 0, err
    assert json.loads(output.read_text())["R1@0.5"] == 0.52
    assert re.search(r"mIoU +43\.4 +42\.3", out) and "28 of 200" in out


def test_mvbench_prints_names_as_they_are(run, tmp_path):
    row = {"task": "[/red] a", "video": "v", "question": "?", "candidates": ["x", "y"], "answer": "y", "a": "B"}
    (tmp_path / "p.json").write_text(json.dumps([row]))
    code, out, err = run("mvbench", tmp_path / "p.json")
    assert code == 0, err
    assert re.search(r"\[/red\] a +100\.0 +1 +0", out) and re.search(r"Mean of the tasks +100\.0 +1 +0", out)


def test_subset_file(run, folder):
    (folder / "sub").mkdir()
    subset = folder / "sub" / "subset.json"
    subset.write_text("[0, 1]")
    output = folder / "sub" / "out.json"
    code, _, err = run("etbench", folder, "--similarity", "jaccard", "--subset", subset, "--output", output)
    assert code == 0 and f"2 samples of {subset}, from 192 predictions" in err
    assert json.loads(output.read_text())["by_source"]["tvg"]["qvhighlights"]["Total"] == 2


TVG = {"task": "tvg", "source": "s", "video": "v", "idx": 5, "tgt": [0, 1], "a": "0 - 1"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "p.json: not a JSON file"),
        ("{", "p.json: not a JSON file"),
        ("[" * 100_000, "p.json: not a JSON file"),
        ("[" + "9" * 5000 + "]", "p.json: not a JSON file"),
        ("\0\xff", "p.json: not a JSON file"),
        ('{"a": 1}', "p.json: expected a JSON array of rows, got dict"),
        ("[]", "p.json: no predictions"),
        ("[3]", "p.json row 0: expected a JSON object, got 3"),
        (json.dumps([{**TVG, "tgt": [2, 1]}]), "p.json row 0 (idx 5): field 'tgt' is [2, 1]"),
        (json.dumps([{**TVG, "source": None}]), "p.json row 0 (idx 5): field 'source' should be str, got None"),
        (
            json.dumps([{"vid": "V", "query": "q", "span": [0, 1], "pred": [0, 1]}]),
            "p.json row 0: field 'task' is mis",
        ),
        (json.dumps([{**TVG, "task": "xyz"}]), "can be scored: unknown task, {file} row 0 (idx 5): 'xyz'"),
    ],
)
def test_bad_files_are_named_in_one_line(run, tmp_path, content, message):
    (tmp_path / "p.json").write_bytes(content.encode("latin-1"))
    code, out, err = run("etbench", tmp_path / "p.json")
    assert code == 2 and out == ""
    message = message.replace("{file}", str(tmp_path / "p.json"))
    assert message in err and err.startswith("etchat: error: ") and err.count("\n") == 1


def test_a_broken_annotation_is_a_warning_beside_the_scores(run, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps([TVG, {**TVG, "idx": 6, "tgt": "0 - 1"}]))
    code, out, err = run("etbench", tmp_path / "p.json")
    assert code == 0 and re.search(r"TVG +F1 +100\.0 +38\.6 +1 +0\n", out)
    where = f"{tmp_path / 'p.json'} row 1 (idx 6)"
    assert err == f"warning: 1 x broken annotation: {where}: field 'tgt' should be list, got '0 - 1'\n"


def test_a_folder_of_answers_can_be_scored_again_whatever_lies_beside_them(run, tmp_path):
    (tmp_path / "predictions.json").write_text(json.dumps([TVG]))
    (tmp_path / "failures.json").write_text("[]")
    for _ in range(2):
        code, _, err = run("etbench", tmp_path, "--output", tmp_path / "scores.json")
        assert code == 0, err
    assert json.loads((tmp_path / "scores.json").read_text())["overall"] == {"TVG": 1.0}


def test_an_unfinished_run_is_said_to_be_one(run, tmp_path):
    journal = Journal(tmp_path / "progress")
    write_run(tmp_path / "progress", {})
    journal.append([{"row": row, "text": "", "timestamps": []} for row in (0, 4)] + [{"row": 2, "error": "torn"}])
    (tmp_path / "metrics.json").write_text("{}")
    code, out, err = run("etbench", tmp_path)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert "the run is unfinished, with 2 answers so far; the same `etchat infer` command again" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("charades", "{tmp}/none.json"), "none.json: no such file or folder; give what `etchat infer` wrote"),
        (("charades", "{tmp}/bare"), "bare: no prediction files (*.json) in this folder"),
        (("mvbench", "{good}"), "p.json row 0 (idx 5): field 'candidates' is missing"),
        (("etbench", "{good}", "--similarity", "cosine"), "'cosine': use 'sentence-transformers' or 'jaccard'"),
        (("etbench", "{good}", "--subset", "{tmp}/none.json"), "none.json: No such file"),
        (
            ("etbench", "{good}", "--subset", "{tmp}/subset.json"),
            "subset.json entry 1: expected an idx or an annotation",
        ),
        (("etbench", "{good}", "--subset", "{tmp}/dict.json"), "dict.json: expected an array of idx or annotations"),
        (("etbench", "{good}", "--subset", "{tmp}/other.json"), "the idx of none of the 1 predictions"),
        (("etbench", "{good}", "--output", "{good}/metrics.json"), "p.json"),
        (("etbench", "{good}", "--html", "{tmp}/bare"), "bare: this is a folder; give a file"),
    ],
)
def test_bad_arguments_are_named_in_one_line(run, tmp_path, arguments, message):
    (tmp_path / "bare").mkdir()
    (tmp_path / "p.json").write_text(json.dumps([TVG]))
    for name, content in (("subset", [5, "x"]), ("dict", {"tvg": [5]}), ("other", [7])):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    code, _, err = run(*(part.format(tmp=tmp_path, good=tmp_path / "p.json") for part in arguments))
    assert code == 2
    assert message in err and err.startswith("etchat: error: ") and err.count("\n") == 1


def test_a_file_from_windows_is_read(run, tmp_path):
    (tmp_path / "p.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([TVG]).encode())
    assert run("etbench", tmp_path / "p.json")[0] == 0


def test_files_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "metrics.json"
    write_atomic(path, "old")
    with pytest.raises(TypeError):
        write_atomic(path, {"not": "text"})
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_text_that_is_no_unicode_survives(tmp_path):
    text = {"q": "half a pair: \ud800, Zürich"}
    write_atomic(tmp_path / "rows.json", json.dumps(text, ensure_ascii=False))
    assert json.loads((tmp_path / "rows.json").read_text(encoding="utf-8")) == text
