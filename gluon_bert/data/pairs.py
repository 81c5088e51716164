"""Documents to sentence pairs for next-sentence prediction, as spans of their tokens. Masks nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..config import DataConfig
from .documents import Documents
from .vocab import Vocabulary

# [CLS] a [SEP] b [SEP]
NUM_SPECIAL_IN_PAIR = 3


@dataclass(frozen=True)
class Pairs:
    """Sentence pairs as spans of `Documents.tokens`.

    first, second: (N, 2) int64, where a segment starts and ends.
    is_next: (N,) bool, whether the second follows the first.
    """

    first: np.ndarray
    second: np.ndarray
    is_next: np.ndarray

    def __len__(self) -> int:
        return len(self.is_next)

    def lengths(self) -> np.ndarray:
        """(N,) tokens of each pair with its special tokens."""
        return (
            self.first[:, 1] - self.first[:, 0] + self.second[:, 1] - self.second[:, 0] + NUM_SPECIAL_IN_PAIR
        )

    def take(self, keep: np.ndarray) -> Pairs:
        """The pairs at these indices, or those that a (N,) bool array marks."""
        return Pairs(self.first[keep], self.second[keep], self.is_next[keep])


def draw_pairs(documents: Documents, config: DataConfig, rng: np.random.Generator) -> Pairs:
    """A pair for every sentence that has a next one: with it, or at `negative_rate` with a random one.

    Pairs above max_len are truncated or dropped, and those without a word to predict are dropped, as the
    configuration says; all that stay have one word to predict at least.
    """
    last = documents.documents[1:] - 1
    has_next = np.ones(len(documents.sentences) - 1, dtype=bool)
    has_next[last[documents.documents[1:] > documents.documents[:-1]]] = False
    a = np.flatnonzero(has_next)
    is_next = rng.random(len(a)) >= config.negative_rate
    negatives = _matched_negatives if config.negatives == "matched" else _any_negatives
    b = np.where(is_next, a + 1, negatives(documents, a, rng))
    spans = np.stack([documents.sentences[:-1], documents.sentences[1:]], axis=1)
    pairs = Pairs(spans[a], spans[b], is_next)
    if config.long_pairs == "drop":
        pairs = pairs.take(pairs.lengths() <= config.max_len)
    else:
        pairs = _truncated(pairs, config.max_len)
    return pairs.take(_predictable(documents, pairs, config.predict_unknown) > 0)


def _any_negatives(documents: Documents, a: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The book's draw: any sentence of any document, the true next one and first sentences included."""
    starts, counts = documents.documents[:-1], np.diff(documents.documents)
    chosen = rng.integers(len(documents), size=len(a))
    return starts[chosen] + (rng.random(len(a)) * counts[chosen]).astype(np.int64)


def _matched_negatives(documents: Documents, a: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A sentence of another document that is not its first: from the set that the true ones come from.

    In the book's draw three in ten random sentences open a paragraph and no true one does, so up to two
    thirds of the labels can be told without reading the first sentence.
    """
    # The followers, all sentences but the firsts, stand in the order of their documents: those of a's own
    # document, (own_start, own_stop), are skipped by drawing from what comes after them, and then around.
    document_of = np.repeat(np.arange(len(documents)), np.diff(documents.documents))
    followers = a + 1
    owner = document_of[followers]
    own_start, own_stop = np.searchsorted(owner, owner), np.searchsorted(owner, owner, side="right")
    foreign = len(followers) - (own_stop - own_start)
    return followers[(own_stop + rng.integers(0, foreign)) % len(followers)]


def _truncated(pairs: Pairs, max_len: int) -> Pairs:
    """The pairs cut at the end of their longer segment until they fit, as Devlin et al. 2018 cut them."""
    room = max_len - NUM_SPECIAL_IN_PAIR
    a = pairs.first[:, 1] - pairs.first[:, 0]
    b = pairs.second[:, 1] - pairs.second[:, 0]
    kept_a, kept_b = kept_lengths(a, b, room)
    first = np.stack([pairs.first[:, 0], pairs.first[:, 0] + kept_a], axis=1)
    second = np.stack([pairs.second[:, 0], pairs.second[:, 0] + kept_b], axis=1)
    return Pairs(first, second, pairs.is_next)


def kept_lengths(a: np.ndarray, b: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """What is left of segments of a and b tokens when the longer one is cut until both fit in `room`."""
    kept_a = np.minimum(a, np.maximum(room - b, (room + 1) // 2))
    return kept_a, np.minimum(b, room - kept_a)


def _predictable(documents: Documents, pairs: Pairs, predict_unknown: bool) -> np.ndarray:
    """(N,) words of each pair that may be masked."""
    if predict_unknown:
        return pairs.lengths() - NUM_SPECIAL_IN_PAIR
    known = np.concatenate([[0], np.cumsum(documents.tokens != Vocabulary.unk)])
    return (known[pairs.first[:, 1]] - known[pairs.first[:, 0]]) + (
        known[pairs.second[:, 1]] - known[pairs.second[:, 0]]
    )
