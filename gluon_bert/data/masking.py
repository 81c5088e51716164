"""Choose the tokens that a masked language model predicts, and replace them. Builds no batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..config import DataConfig
from .vocab import Vocabulary


def num_draws(config: DataConfig) -> int:
    """Return the random numbers per position: for the order of masking, the replacement and the random token.

    Spans of words need one more, for the length of the span.
    """
    return 4 if config.masking == "ngrams" else 3


@dataclass(frozen=True)
class Masked:
    """Masked rows, with the positions and ids of the masked tokens.

    tokens: (B, T) int32, what the model sees.
    masked_positions: (2, M) int32, row and position of every token to predict, in reading order.
    masked_ids: (M,) int32, the original ids.
    """

    tokens: np.ndarray
    masked_positions: np.ndarray
    masked_ids: np.ndarray


def mask(
    tokens: np.ndarray, valid_length: np.ndarray, noise: np.ndarray, vocab: Vocabulary, config: DataConfig
) -> Masked:
    """Mask rows of tokens: (B, T) int32 and valid_length (B,) -> Masked. All randomness is in `noise`.

    noise: (`num_draws`, B, T) uniform on [0, 1). A share of `mlm_probability` of a row's ordinary tokens is
    chosen, at least one. Of these `mask_token_rate` become <mask> and `random_token_rate` a random token; the
    rest stays (Devlin et al. 2018, section 3.1: 15 %, and 80, 10 and 10 %). Words and n-grams are chosen
    whole while they fit in that number. If no word fits, the shortest one is chosen.
    """
    real = np.arange(tokens.shape[1]) < valid_length[:, None]
    # Padding and special tokens are never words. <unk> is a word, but the configuration may exclude it.
    word = real & (~vocab.special[tokens] | (tokens == vocab.unk))
    candidate = word if config.predict_unknown else word & (tokens != vocab.unk)
    if config.preparation == "d2l":
        wanted = np.rint(config.mlm_probability * valid_length)
    else:
        # Without the small term 0.15 * 20 and the like may fall just below a whole number.
        wanted = np.floor(config.mlm_probability * word.sum(axis=1) + 1e-9)
    wanted = np.minimum(np.maximum(wanted, 1), candidate.sum(axis=1)).astype(np.int64)
    if config.masking == "tokens":
        chosen = _smallest(np.where(candidate, noise[0], np.inf), wanted)
    else:
        is_continuation = vocab.is_continuation[tokens]
        chosen = _whole_words(word, candidate, is_continuation, wanted, noise, config)
    rows, positions = np.nonzero(chosen)
    masked_ids = tokens[rows, positions]
    shown = _replacements(masked_ids, noise[1, rows, positions], noise[2, rows, positions], vocab, config)
    masked = tokens.copy()
    masked[rows, positions] = shown
    return Masked(masked, np.stack([rows, positions]).astype(np.int32), masked_ids)


def _smallest(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the `counts` (B,) smallest values of each row, (B, T) bool."""
    ranks = np.argsort(np.argsort(values, axis=1), axis=1)
    return ranks < counts[:, None]


class _Words(NamedTuple):
    """The words of each row, numbered from 0: arrays (B, W), empty behind a row's last word.

    place: where the word begins. size: its tokens. usable: whether it may be chosen.
    """

    place: np.ndarray
    size: np.ndarray
    usable: np.ndarray


def _whole_words(
    word: np.ndarray,
    candidate: np.ndarray,
    is_continuation: np.ndarray,
    wanted: np.ndarray,
    noise: np.ndarray,
    config: DataConfig,
) -> np.ndarray:
    """Choose whole words or n-grams in the order of their noise, (B, T) bool.

    Those that do not fit are left out.

    word, candidate, is_continuation: (B, T) bool, tokens of words, those that may be chosen, and those that
    continue with a word. wanted: (B,) how many tokens are chosen at most, or one shortest word.
    """
    most = config.max_ngram if config.masking == "ngrams" else 1
    # A piece whose word lost its beginning when the pair was truncated begins a word itself.
    begins = word & ~(is_continuation & np.pad(word, ((0, 0), (1, 0)))[:, :-1])
    number = np.cumsum(begins, axis=1) - 1
    row, position = np.nonzero(begins)
    # Empty words after the last, for n-grams that begin with it.
    shape = len(word), word.shape[1] + most

    def by_word(values: np.ndarray, empty: Any) -> np.ndarray:
        result = np.full(shape, empty, dtype=values.dtype)
        result[row, number[begins]] = values[row, position]
        return result

    cells = np.arange(len(word))[:, None] * shape[1] + number
    size = np.bincount(cells[word], minlength=shape[0] * shape[1]).reshape(shape)
    place = by_word(np.broadcast_to(np.arange(word.shape[1]), word.shape), 0)
    words = _Words(place, size, by_word(candidate, False))
    lengths = words.usable.astype(np.int64)
    if most > 1:
        lengths = _ngram_lengths(words, by_word(noise[3], 0.0), most)
    shortest = np.where(words.usable, size, word.shape[1]).min(axis=1)
    budget = np.where(wanted > 0, np.maximum(wanted, shortest), 0)
    order = np.argsort(np.where(words.usable, by_word(noise[0], 0.0), np.inf), axis=1)
    taken = _taken(words, order, lengths, budget, most)
    return word & taken[np.arange(len(word))[:, None], number]


def _ngram_lengths(words: _Words, draw: np.ndarray, most: int) -> np.ndarray:
    """Return the length of the n-gram that begins at each word, 0 for words that may not be chosen, (B, W).

    The length is n with a probability in proportion to 1/n, up to `most` (Lan et al. 2019, section 3.1). It
    ends before the next word that may not be chosen, and at the end of the segment. draw: (B, W) uniform on
    [0, 1).
    """
    place, size, usable = words
    go_on = usable[:, :-1] & usable[:, 1:] & (place[:, 1:] == place[:, :-1] + size[:, :-1])
    go_on = np.pad(go_on, ((0, 0), (0, most)))
    possible, whole = usable.astype(np.int64), usable
    for n in range(1, most):
        whole = whole & go_on[:, n - 1 : n - 1 + whole.shape[1]]
        possible = possible + whole
    up_to = np.cumsum(1 / np.arange(1, most + 1))
    point = draw * up_to[np.maximum(possible, 1) - 1]
    return np.minimum(1 + (point[..., None] >= up_to[:-1]).sum(axis=-1), possible)


def _taken(
    words: _Words, order: np.ndarray, lengths: np.ndarray, budget: np.ndarray, most: int
) -> np.ndarray:
    """Return the words of the n-grams that begin at words in this order, while they fit, (B, W) bool.

    An n-gram that exceeds the rest of a row's budget (B,) is shortened word by word. An n-gram that overlaps
    an earlier one is left out. All rows are processed together, one word of each at a time.
    """
    row = np.arange(len(order))
    before = np.pad(np.cumsum(words.size, axis=1), ((0, 0), (1, 0)))  # tokens in the words before a word
    taken = np.pad(np.zeros_like(words.usable), ((0, 0), (0, most)))
    left = budget
    for w in order.T[: words.usable.sum(axis=1).max(initial=0)]:
        n = lengths[row, w]
        for _ in range(most):
            n = n - (before[row, w + n] - before[row, w] > left)
        for i in range(most):
            n = np.where((i < n) & taken[row, w + i], 0, n)
        for i in range(most):
            taken[row, w + i] |= i < n
        left = left - (before[row, w + n] - before[row, w])
        if not left.any():
            break
    return taken


def _replacements(
    masked_ids: np.ndarray, action: np.ndarray, which: np.ndarray, vocab: Vocabulary, config: DataConfig
) -> np.ndarray:
    choice = np.arange(len(vocab)) if config.preparation == "d2l" else vocab.ordinary_ids
    random_tokens = choice[(which * len(choice)).astype(np.int64)]
    as_mask = action < config.mask_token_rate
    as_random = ~as_mask & (action < config.mask_token_rate + config.random_token_rate)
    return np.where(as_mask, vocab.mask, np.where(as_random, random_tokens, masked_ids)).astype(
        masked_ids.dtype
    )


def pair_noise(seed: int, epoch: int, pairs: np.ndarray, length: int, draws: int = 3) -> np.ndarray:
    """Return the noise of these pairs in this epoch: pair numbers (B,) -> (draws, B, T) float64 on [0, 1).

    It is computed from the pair's own number, not drawn from a stream. So a pair has the same masks in any
    batch, bucket, worker or device, and a resumed run needs no random state. The mixing function is
    SplitMix64's (Steele, Lea and Flood 2014, figure 17).
    """
    key = _mix(_mix(np.array([seed], dtype=np.uint64)) ^ np.uint64(epoch))
    rows = _mix(_mix(pairs.astype(np.uint64) ^ key) + np.uint64(1))
    # A cell's number must not depend on the length, or padding would change the masks.
    cells = (np.arange(draws, dtype=np.uint64)[:, None, None] << np.uint64(32)) + np.arange(
        length, dtype=np.uint64
    )
    bits = _mix(rows[:, None] ^ _mix(cells))
    return (bits >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
