"""Draw pairs of segments from documents, as spans of their tokens. Masks nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..config import DataConfig
from .prepared import Documents
from .tokenizer import kept_lengths

# [CLS] a [SEP] b [SEP]
NUM_SPECIAL_IN_PAIR = 3
# Positions in a document, in sentences, that are distinguished when random segments imitate true ones.
_PLACES = 8
# Similar segments to search for one of another document.
_NEIGHBOURS = 64


@dataclass(frozen=True)
class Pairs:
    """Pairs of segments as spans of `Documents.tokens`.

    first, second: (N, 2) int64, where a segment starts and ends.
    is_next: (N,) bool, whether the second follows the first. With swapped negative pairs the first follows
    the second in all other pairs.
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
        """Return the pairs at these indices, or those that a (N,) bool array marks."""
        return Pairs(self.first[keep], self.second[keep], self.is_next[keep])


def draw_pairs(documents: Documents, config: DataConfig, rng: np.random.Generator, unk: int) -> Pairs:
    """Draw the pairs of one epoch, sentences or packed. Each has at least one word to predict.

    unk: the id of <unk>, which counts as a word to predict only if the configuration says so.
    """
    draw = _packed_pairs if config.pairs == "packed" else _sentence_pairs
    pairs = draw(documents, config, rng)
    if config.predict_unknown:
        return pairs.take(pairs.lengths() > NUM_SPECIAL_IN_PAIR)
    return pairs.take(_has_other_than(unk, documents, pairs))


def _sentence_pairs(documents: Documents, config: DataConfig, rng: np.random.Generator) -> Pairs:
    """Draw a pair for each sentence with a next one: with that, or at `random_next_prob` with a random one.

    Pairs above max_seq_length are truncated or dropped, as the configuration says.
    """
    last = documents.documents[1:] - 1
    has_next = np.ones(len(documents.sentences) - 1, dtype=bool)
    has_next[last[documents.documents[1:] > documents.documents[:-1]]] = False
    a = np.flatnonzero(has_next)
    is_next = _labels(len(a), config, rng)
    b = a + 1
    if config.negative_pairs == "random":
        negatives = _any_negatives if config.preparation == "d2l" else _matched_negatives
        b = np.where(is_next, b, negatives(documents, a, rng))
    spans = np.stack([documents.sentences[:-1], documents.sentences[1:]], axis=1)
    pairs = Pairs(spans[a], spans[b], is_next)
    if config.negative_pairs == "swapped":
        pairs = _swapped(pairs)
    if config.preparation == "d2l":
        return pairs.take(pairs.lengths() <= config.max_seq_length)
    return _truncated(pairs, config.max_seq_length)


def _labels(count: int, config: DataConfig, rng: np.random.Generator) -> np.ndarray:
    """Return (count,) bool: True for a pair in order; always True without negative pairs."""
    if config.negative_pairs == "none":
        return np.ones(count, dtype=bool)
    return rng.random(count) >= config.random_next_prob


def _swapped(pairs: Pairs) -> Pairs:
    """Swap the segments of the negative pairs, for sentence-order prediction.

    Lan et al. 2019, section 3.1.
    """
    in_order = pairs.is_next[:, None]
    first = np.where(in_order, pairs.first, pairs.second)
    return Pairs(first, np.where(in_order, pairs.second, pairs.first), pairs.is_next)


def _any_negatives(documents: Documents, a: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw as D2L: any sentence of any document, including the true next one and first sentences."""
    starts, counts = documents.documents[:-1], np.diff(documents.documents)
    chosen = rng.integers(len(documents), size=len(a))
    return starts[chosen] + (rng.random(len(a)) * counts[chosen]).astype(np.int64)


def _matched_negatives(documents: Documents, a: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw a sentence of another document that is not its first, as true next sentences are.

    In D2L's draw 30 % of the random sentences open a paragraph, but no true one does. So up to two thirds of
    the labels can be predicted without the first sentence.
    """
    # Followers are all sentences except first ones, ordered by document. To skip the own document,
    # (own_start, own_stop), the draw counts from its end and wraps around.
    document_of = np.repeat(np.arange(len(documents)), np.diff(documents.documents))
    followers = a + 1
    owner = document_of[followers]
    own_start, own_stop = np.searchsorted(owner, owner), np.searchsorted(owner, owner, side="right")
    foreign = len(followers) - (own_stop - own_start)
    return followers[(own_stop + rng.integers(0, foreign)) % len(followers)]


def _truncated(pairs: Pairs, max_seq_length: int) -> Pairs:
    """Truncate the longer segment of each pair at its end until the pair fits, as Devlin et al. 2018."""
    room = max_seq_length - NUM_SPECIAL_IN_PAIR
    a = pairs.first[:, 1] - pairs.first[:, 0]
    b = pairs.second[:, 1] - pairs.second[:, 0]
    kept_a, kept_b = kept_lengths(a, b, room)
    first = np.stack([pairs.first[:, 0], pairs.first[:, 0] + kept_a], axis=1)
    second = np.stack([pairs.second[:, 0], pairs.second[:, 0] + kept_b], axis=1)
    return Pairs(first, second, pairs.is_next)


def _has_other_than(unk: int, documents: Documents, pairs: Pairs) -> np.ndarray:
    """Return the pairs with another token than this one, (N,) bool.

    It checks the first tokens of all pairs, then the second tokens of the remaining pairs, and so on. So it
    reads little of the text.
    """
    found = np.zeros(len(pairs), dtype=bool)
    for segment in (pairs.first, pairs.second):
        left = np.flatnonzero(~found)
        at = segment[left, 0]
        while len(left):
            inside = at < segment[left, 1]
            left, at = left[inside], at[inside]
            is_other = documents.tokens[at] != unk
            found[left[is_other]] = True
            left, at = left[~is_other], at[~is_other] + 1
    return found


def _packed_pairs(documents: Documents, config: DataConfig, rng: np.random.Generator) -> Pairs:
    """Draw pairs of consecutive sentences of one document in two segments that fill max_seq_length.

    As in Devlin et al. 2018 (create_pretraining_data.py), sentences are taken until they reach
    max_seq_length, or at `short_seq_prob` a random shorter length, and split between two of them. With
    `random_next_prob` the second segment is replaced by one from another document, and its sentences are used
    again. Long pairs are truncated at random ends.

    In that code lengths and positions reveal the labels. The last sentence of a document never has a true
    next segment. Random segments may open a document or fill a short pair. Here a remaining last sentence is
    dropped; another epoch splits differently. A random segment is another pair's true one, with similar
    position and length. The shorter length is drawn per pair instead of per document.
    """
    room = config.max_seq_length - NUM_SPECIAL_IN_PAIR
    start, middle, stop, is_next = _packed(documents, config, room, rng)
    bounds = documents.sentences[np.stack([start, middle, stop], axis=1)]
    # Leave out pairs in which a segment has no word.
    filled = (np.diff(bounds) > 0).all(axis=1)
    bounds, start, middle, stop, is_next = (x[filled] for x in (bounds, start, middle, stop, is_next))
    if config.negative_pairs != "random":
        pairs = Pairs(bounds[:, :2], bounds[:, 1:], is_next)
        return _truncated_at_random_ends(_swapped(pairs), room, rng)
    owner = np.searchsorted(documents.documents, start, side="right") - 1
    place = np.minimum(middle - documents.documents[owner], _PLACES)
    at_end = stop == documents.documents[owner + 1]
    alike = _alike(2 * place + at_end, bounds[:, 2] - bounds[:, 1], owner, rng)
    b = np.where(is_next, np.arange(len(start)), alike)
    pairs = Pairs(bounds[:, :2], bounds[b, 1:], is_next).take(is_next | (owner[b] != owner))
    return _truncated_at_random_ends(pairs, room, rng)


def _packed(
    documents: Documents, config: DataConfig, room: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return where each pair starts, where its second segment starts, where it stops, and is_next.

    All values are drawn for each sentence, as if a pair started with it. A loop then goes from pair to pair.
    The next pair starts after the end of a pair, or at its second segment if that is used again.
    """
    num_sentences = len(documents.sentences) - 1
    sentence = np.arange(num_sentences)
    document_stop = np.repeat(documents.documents[1:], np.diff(documents.documents))
    short = rng.random(num_sentences) < config.short_seq_prob
    target = np.where(short, rng.integers(2, room + 1, num_sentences), room)
    stop = np.searchsorted(documents.sentences, documents.sentences[:-1] + target)
    # A pair has at least two sentences. A last sentence alone is left out.
    stop = np.minimum(np.maximum(stop, sentence + 2), document_stop)
    alone = stop - sentence == 1
    middle = sentence + 1 + (rng.random(num_sentences) * (stop - sentence - 1)).astype(np.int64)
    is_next = _labels(num_sentences, config, rng)
    # A random second segment is not the rest of the pair, so the rest is put back.
    keeps_rest = is_next | alone if config.negative_pairs == "random" else np.ones(num_sentences, dtype=bool)
    following = np.where(keeps_rest, stop, middle)
    chosen = []
    at, follow = 0, following.data  # which gives Python's ints, faster than the array
    while at < num_sentences:
        chosen.append(at)
        at = follow[at]
    starts = np.array(chosen, dtype=np.int64)
    starts = starts[~alone[starts]]
    return starts, middle[starts], stop[starts], is_next[starts]


def _alike(
    kinds: np.ndarray, lengths: np.ndarray, owners: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Return for each segment one of another document, with the same kind and a similar length, (N,).

    kinds, lengths, owners: (N,) position, tokens and document of each; documents ascend. So length and
    position do not distinguish random segments from true ones. A segment without a match gets itself.
    """
    num = len(lengths)
    chosen = np.arange(num)
    # Similar segments are in random order. Each gets the next one of another document.
    order = np.lexsort((rng.random(num), lengths, kinds))
    left = np.arange(num)
    for step in range(1, min(_NEIGHBOURS, num)):
        place = np.where(left + step < num, left + step, 2 * num - 2 - left - step)  # turning at the end
        mine, theirs = order[left], order[place]
        foreign = owners[theirs] != owners[mine]
        chosen[mine[foreign]] = theirs[foreign]
        left = left[~foreign]
        if not len(left):
            return chosen
    # Their document has nearly all of the text. They get any segment of another document.
    left = order[left]
    own_start = np.searchsorted(owners, owners[left])
    own_stop = np.searchsorted(owners, owners[left], side="right")
    foreign_count = num - (own_stop - own_start)
    any_foreign = (own_stop + rng.integers(0, np.maximum(foreign_count, 1))) % num
    chosen[left] = np.where(foreign_count > 0, any_foreign, left)
    return chosen


def _truncated_at_random_ends(pairs: Pairs, room: int, rng: np.random.Generator) -> Pairs:
    """Truncate the longer segment, token by token at a random end, until the pairs fit in `room`."""
    a = pairs.first[:, 1] - pairs.first[:, 0]
    b = pairs.second[:, 1] - pairs.second[:, 0]
    cut = []
    for segment, size, kept in zip((pairs.first, pairs.second), (a, b), kept_lengths(a, b, room)):
        start = segment[:, 0] + rng.binomial(size - kept, 0.5)
        cut.append(np.stack([start, start + kept], axis=1))
    return Pairs(cut[0], cut[1], pairs.is_next)
