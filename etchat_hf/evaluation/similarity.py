"""How alike two texts are: the sentence encoder that E.T. Bench uses, and a stand-in that needs nothing installed."""

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np

ENCODER = "sentence-transformers/all-MiniLM-L6-v2"

Similarity = Callable[[str, Sequence[str]], Sequence[float]]


class EncoderUnavailableError(ValueError):
    """The sentence encoder is needed and cannot be had; the message says why."""


def jaccard(text: str, options: Sequence[str]) -> list[float]:
    """Scores each option by the overlap of its lower-cased word set with that of the text, in [0, 1]."""
    words = set(text.lower().split())
    others = [set(option.lower().split()) for option in options]
    return [len(words & other) / max(len(words | other), 1) for other in others]


class SentenceEncoder:
    """Cosine similarity of sentence embeddings, loaded when first needed.

    Args:
        name: Model id on the Hub or a local folder.
    """

    def __init__(self, name: str = ENCODER):
        self.name = name

    @cached_property
    def _loaded(self) -> tuple[object, str]:
        """The model, or why there is none: the Hub is tried for a minute, so a failure is kept as well."""
        try:
            from sentence_transformers import SentenceTransformer

            return SentenceTransformer(self.name), ""
        except ImportError:
            return None, "sentence-transformers is not installed (pip install etchat_hf[eval])"
        except (OSError, ValueError) as error:
            return None, f"the sentence encoder {self.name} cannot be loaded: {str(error).splitlines()[0]}"

    def _encode(self, texts: Sequence[str]) -> np.ndarray:
        model, reason = self._loaded
        if reason:
            raise EncoderUnavailableError(reason)
        return model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)

    def __call__(self, text: str, options: Sequence[str]) -> list[float]:
        """Scores each option against the text, cosine in [-1, 1].

        Raises:
            EncoderUnavailableError: If the library or the model is missing.
        """
        query, *others = self._encode([text, *options])
        return [float(query @ other) for other in others]

    def pairs(self, first: Sequence[str], second: Sequence[str]) -> list[float]:
        """Scores texts pair by pair, cosine in [-1, 1]; `first` and `second` are equally long.

        Raises:
            EncoderUnavailableError: If the library or the model is missing.
        """
        texts = sorted({*first, *second})
        rows = dict(zip(texts, self._encode(texts), strict=True))
        return [float(rows[a] @ rows[b]) for a, b in zip(first, second, strict=True)]


def get_similarity(name: str | Similarity) -> Similarity:
    """Returns the similarity of that name, or the given function itself.

    Raises:
        ValueError: If there is none of that name.
    """
    if callable(name):
        return name
    if name == "jaccard":
        return jaccard
    if name == "sentence-transformers":
        return SentenceEncoder()
    raise ValueError(f"unknown similarity {name!r}: use 'sentence-transformers' or 'jaccard'")
