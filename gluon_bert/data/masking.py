"""Which tokens a masked language model predicts, and what it is shown in their place. Builds no batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..config import DataConfig
from .vocab import Vocabulary

NUM_DRAWS = 3


@dataclass(frozen=True)
class Masked:
    """Masked rows and what was masked.

    tokens: (B, T) int32, what the model sees.
    predictions: (2, M) int32, row and position of every token to predict, in reading order.
    labels: (M,) int32, the tokens that stood there.
    """

    tokens: np.ndarray
    predictions: np.ndarray
    labels: np.ndarray


def mask(
    tokens: np.ndarray, lengths: np.ndarray, noise: np.ndarray, vocab_size: int, config: DataConfig
) -> Masked:
    """Mask rows of tokens: (B, T) int32 and lengths (B,) -> Masked. All randomness is in `noise`.

    noise: (3, B, T) uniform on [0, 1): which positions come first, what they are shown as, and as which
    random token. Of a row's words `mask_rate` are chosen, one at least; of these `mask_token_rate` are
    shown as <mask>, `random_token_rate` as a random token, and the rest as they are (Devlin et al. 2018,
    section 3.1: 15 %, and 80, 10 and 10 %).
    """
    real = np.arange(tokens.shape[1]) < lengths[:, None]
    # Padding and special tokens are never words; <unk> is one, but not always worth predicting.
    word = real & ((tokens >= Vocabulary.num_special) | (tokens == Vocabulary.unk))
    candidate = word if config.predict_unknown else word & (tokens != Vocabulary.unk)
    if config.mask_count == "round":
        wanted = np.rint(config.mask_rate * lengths)
    else:
        # Without the small term 0.15 * 20 and the like may fall just below a whole number.
        wanted = np.floor(config.mask_rate * word.sum(axis=1) + 1e-9)
    wanted = np.minimum(np.maximum(wanted, 1), candidate.sum(axis=1)).astype(np.int64)
    chosen = _smallest(np.where(candidate, noise[0], np.inf), wanted)
    rows, positions = np.nonzero(chosen)
    labels = tokens[rows, positions]
    shown = _replacements(labels, noise[1, rows, positions], noise[2, rows, positions], vocab_size, config)
    masked = tokens.copy()
    masked[rows, positions] = shown
    return Masked(masked, np.stack([rows, positions]).astype(np.int32), labels)


def _smallest(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(B, T) bool: the `counts` (B,) smallest values of each row."""
    ranks = np.argsort(np.argsort(values, axis=1), axis=1)
    return ranks < counts[:, None]


def _replacements(
    labels: np.ndarray, action: np.ndarray, which: np.ndarray, vocab_size: int, config: DataConfig
) -> np.ndarray:
    lowest = 0 if config.random_token == "any" else Vocabulary.num_special
    random_tokens = lowest + (which * (vocab_size - lowest)).astype(labels.dtype)
    as_mask = action < config.mask_token_rate
    as_random = ~as_mask & (action < config.mask_token_rate + config.random_token_rate)
    return np.where(as_mask, Vocabulary.mask, np.where(as_random, random_tokens, labels)).astype(labels.dtype)


def pair_noise(seed: int, epoch: int, pairs: np.ndarray, length: int) -> np.ndarray:
    """The noise of these pairs in this epoch: pair numbers (B,) -> (3, B, T) float64 on [0, 1).

    It is computed from the pair's own number, not drawn from a stream. So a pair has the same masks
    whatever batch, bucket, worker or device it comes to, and a resumed run needs no random state.
    The mixing function is SplitMix64's (Steele, Lea and Flood 2014, figure 17).
    """
    key = _mix(_mix(np.array([seed], dtype=np.uint64)) ^ np.uint64(epoch))
    rows = _mix(_mix(pairs.astype(np.uint64) ^ key) + np.uint64(1))
    # A cell's number must not depend on the length, or padding would change the masks.
    draws = np.arange(NUM_DRAWS, dtype=np.uint64).reshape(NUM_DRAWS, 1, 1) << np.uint64(32)
    cells = draws + np.arange(length, dtype=np.uint64)
    bits = _mix(rows[:, None] ^ _mix(cells))
    return (bits >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
