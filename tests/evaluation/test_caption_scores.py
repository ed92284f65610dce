"""Caption metrics: what they reward, and that an absent one is said to be absent."""

import os
import subprocess
import sys

import pytest

from etchat_hf.evaluation import captions, evaluate_etbench
from etchat_hf.evaluation.similarity import SentenceEncoder, jaccard

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
def encoder(tmp_path_factory):
    """A tiny random sentence encoder in a local folder."""
    library = pytest.importorskip("sentence_transformers")
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("encoder")
    words = "the door opens a cat sleeps person walks ( ) b red square runs away".split()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(folder)
    modules = library.sentence_transformer.modules
    transformer = modules.Transformer(str(folder))
    model = library.SentenceTransformer(modules=[transformer, modules.Pooling(16)])
    model.save(str(folder / "saved"))
    return SentenceEncoder(str(folder / "saved"))


def test_sentence_similarity_of_matched_captions(encoder):
    result = evaluate_etbench(make_rows(), encoder)
    figures = result["by_source"]["dvc"]["s"]
    assert 0 < figures["SentSim"] <= 0.75
    assert result["overall"]["DVC_Sim"] == figures["SentSim"]
    assert "SentSim" not in result["absent"].get("dvc/s", {})


def test_encoder_prefers_the_same_text(encoder):
    scores = encoder("the door opens", ["a cat sleeps", "the door opens", "runs away"])
    assert scores[1] == pytest.approx(1, abs=1e-5) and max(scores) == scores[1]
    assert encoder.pairs(["a cat"], ["a cat"]) == pytest.approx([1], abs=1e-5)
