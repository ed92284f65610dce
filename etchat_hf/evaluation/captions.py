"""Text metrics of dense captions, without Java.

ROUGE-L (Lin, 2004) and CIDEr (Vedantam et al., CVPR 2015) are the pure-Python scorers of pycocoevalcap, which dense
captioning papers use; METEOR (Banerjee & Lavie, 2005) is nltk's, which needs WordNet's data on the machine. The Java
METEOR and the Java Penn Treebank tokenizer give slightly different figures. What cannot be computed is reported as
absent with its reason, never as 0.
"""

import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec

from .similarity import EncoderUnavailableError, SentenceEncoder, Similarity

_WORD = re.compile(r"\w+(?:'\w+)?")

Pair = tuple[str, str]
Scorer = Callable[[Sequence[Pair]], list[float]]


class MetricAbsentError(ValueError):
    """A caption metric cannot be computed here; the message says why."""


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _require(module: str, package: str) -> None:
    if find_spec(module) is None:
        raise MetricAbsentError(f"{package} is not installed (pip install etchat_hf[eval])")


def rouge_l(pairs: Sequence[Pair]) -> list[float]:
    """Scores `(caption, reference)` pairs by ROUGE-L, in [0, 1].

    Raises:
        MetricAbsentError: If pycocoevalcap is missing.
    """
    _require("pycocoevalcap", "pycocoevalcap")
    from pycocoevalcap.rouge.rouge import Rouge

    scorer = Rouge()
    joined = [(" ".join(_words(caption)), " ".join(_words(reference))) for caption, reference in pairs]
    return [float(scorer.calc_score([caption], [reference])) for caption, reference in joined]


def cider(pairs: Sequence[Pair]) -> list[float]:
    """Scores `(caption, reference)` pairs by CIDEr, in [0, 10]; word weights come from the references given.

    Raises:
        MetricAbsentError: If pycocoevalcap is missing, or all references are the same: words that occur in every
            reference weigh nothing, and even a perfect caption would score 0.
    """
    _require("pycocoevalcap", "pycocoevalcap")
    from pycocoevalcap.cider.cider import Cider

    if not pairs:
        return []
    if len({reference for _, reference in pairs}) < 2:
        raise MetricAbsentError("needs at least two different references among the matched captions")
    captions = {i: [" ".join(_words(caption))] for i, (caption, _) in enumerate(pairs)}
    references = {i: [" ".join(_words(reference))] for i, (_, reference) in enumerate(pairs)}
    return [float(score) for score in Cider().compute_score(references, captions)[1]]


def meteor(pairs: Sequence[Pair]) -> list[float]:
    """Scores `(caption, reference)` pairs by METEOR with stems and WordNet synonyms, in [0, 1].

    Raises:
        MetricAbsentError: If nltk or WordNet's data is missing.
    """
    _require("nltk", "nltk")
    from nltk.corpus import wordnet
    from nltk.translate.meteor_score import single_meteor_score

    try:
        wordnet.ensure_loaded()
    except LookupError as error:
        raise MetricAbsentError("WordNet's data is not here (python -m nltk.downloader wordnet)") from error
    return [float(single_meteor_score(_words(reference), _words(caption))) for caption, reference in pairs]


def sentence_similarity(similarity: Similarity) -> Scorer:
    """Returns the scorer of `(caption, reference)` pairs by sentence embedding, cosine in [-1, 1]."""

    def score(pairs: Sequence[Pair]) -> list[float]:
        if not isinstance(similarity, SentenceEncoder):
            raise MetricAbsentError("needs the sentence encoder (similarity 'sentence-transformers')")
        try:
            return similarity.pairs([caption for caption, _ in pairs], [reference for _, reference in pairs])
        except EncoderUnavailableError as error:
            raise MetricAbsentError(str(error)) from error

    return score


def score_captions(pairs: Sequence[Pair], similarity: Similarity) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Scores matched captions by every metric that can be had.

    Args:
        pairs: `(caption, reference)`, N of them. An empty caption scores 0 everywhere.
        similarity: A `SentenceEncoder` for the sentence similarity; with any other, that metric is absent.

    Returns:
        Per metric name its N scores; and per absent metric the reason.
    """
    scorers = {"METEOR": meteor, "ROUGE_L": rouge_l, "CIDEr": cider, "SentSim": sentence_similarity(similarity)}
    spoken = [i for i, (caption, reference) in enumerate(pairs) if _words(caption) and _words(reference)]
    scores, absent = {}, {}
    for name, scorer in scorers.items():
        scores[name] = [0.0] * len(pairs)
        try:
            for i, score in zip(spoken, scorer([pairs[i] for i in spoken]), strict=True):
                scores[name][i] = score
        except MetricAbsentError as error:
            absent[name] = str(error)
            del scores[name]
    return scores, absent
