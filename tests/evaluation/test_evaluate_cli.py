"""`etchat evaluate`: files in, tables, JSON and a page out; one line for a user's error."""

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from typer.testing import CliRunner

from etchat_hf.evaluation.cli import app
from etchat_hf.evaluation.predictions import write_atomic

GOLDEN = Path(__file__).parents[1] / "golden" / "metrics"


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path):
    """Golden predictions in two files of one folder, as two processes leave them."""
    rows = json.loads((GOLDEN / "etbench_predictions.json").read_text())
    for i in range(2):
        (tmp_path / f"part_{i}.json").write_text(json.dumps(rows[i::2]))
    return tmp_path


def test_etbench_folder_gives_the_golden_figures(folder):
    output = folder / "metrics.json"
    for _ in range(2):  # The second run must not read the first one's output as predictions.
        result = run("etbench", folder, "--similarity", "jaccard", "--output", output)
        assert result.exit_code == 0, result.stderr
    expected = json.loads((GOLDEN / "etbench_expected.json").read_text())
    assert json.loads(output.read_text())["merged"] == pytest.approx(expected["merged"], abs=1e-5)
    assert re.search(r"TVG\W+24\W+1\W+75\.0\W+38\.6", result.stdout)
    assert "absent: SentSim of dvc/hirest" in result.stderr


def test_etbench_page_is_one_well_formed_file(folder):
    rows = json.loads((folder / "part_0.json").read_text())
    tvg = next(row for row in rows if row["task"] == "tvg")
    tvg.update(a="<script>alert(1)</script>", q="<b>&")
    (folder / "part_0.json").write_text(json.dumps(rows))
    page = folder / "page.html"
    assert run("etbench", folder, "--similarity", "jaccard", "--html", page).exit_code == 0
    text = page.read_text()
    assert "<script" not in text and "&lt;script&gt;" in text
    assert not re.search(r"(src|href)=|https?:|url\(|@import", text)
    drawings = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text)]
    # Bars of 12 tasks with a published mark each, ten bins that hold every answer drawn, then timelines.
    assert len(drawings[0].findall("rect")) == len(drawings[0].findall("line")) == 12
    assert len(drawings[1].findall("rect")) == 10
    assert len(drawings) > 10
    assert all(drawing.findall("rect[@class='target']") for drawing in drawings[2:])


def test_charades(tmp_path):
    output, page = tmp_path / "new" / "metrics.json", tmp_path / "page.html"
    result = run("charades", GOLDEN / "charades_predictions.json", "--output", output, "--html", page)
    assert result.exit_code == 0, result.stderr
    assert json.loads(output.read_text())["R1@0.5"] == 0.52
    assert re.search(r"mIoU\W+43\.4\W+42\.3", result.stdout)
    assert "Charades-STA" in page.read_text()


def test_mvbench(tmp_path):
    row = {"task": "action", "video": "v", "question": "?", "candidates": ["x", "y"], "answer": "y", "a": "B"}
    (tmp_path / "p.json").write_text(json.dumps([row]))
    result = run("mvbench", tmp_path / "p.json", "--html", tmp_path / "page.html")
    assert result.exit_code == 0, result.stderr
    assert re.search(r"Average\W+100\.0", result.stdout)


def test_subset_file(folder):
    (folder / "sub").mkdir()
    subset = folder / "sub" / "subset.json"
    subset.write_text("[0, 1]")
    output = folder / "sub" / "out.json"
    assert run("etbench", folder, "--similarity", "jaccard", "--subset", subset, "--output", output).exit_code == 0
    assert json.loads(output.read_text())["by_source"]["tvg"]["qvhighlights"]["Total"] == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"),
        ('{"a": 1}', "expected a JSON array"),
        ("[]", "no predictions"),
        ("[3]", "p.json row 0: expected an object"),
        (
            '[{"task": "tvg", "idx": 5, "a": "0 - 1", "tgt": [2, 1]}]',
            "p.json row 0 (idx 5): field 'tgt' is [2, 1]",
        ),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(tmp_path, content, message):
    (tmp_path / "p.json").write_text(content)
    result = run("etbench", tmp_path / "p.json")
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1 and result.stdout == ""


def test_missing_paths(tmp_path):
    for path, message in ((tmp_path / "none.json", "none.json"), (tmp_path, "no prediction files")):
        result = run("charades", path)
        assert result.exit_code == 2 and message in result.stderr


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "metrics.json"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "\ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
