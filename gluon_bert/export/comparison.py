"""Two networks side by side on the same texts: how far apart their results are, how fast each is."""

from __future__ import annotations

from typing import Iterable

import numpy as np

from ..data.texts import Padded
from ..data.vocab import Vocabulary
from ..encoding import Network


def random_texts(rng: np.random.Generator, batch_size: int, length: int, vocab_size: int) -> Padded:
    """Rows of random words in two segments, of different lengths up to `length`, some of them masked."""
    lengths = rng.integers(max(length // 2, 3), length + 1, batch_size).astype(np.int32)
    lengths[0] = length
    position = np.arange(length)
    padding = position >= lengths[:, None]
    middle = lengths[:, None] // 2
    tokens = rng.integers(Vocabulary.num_special, vocab_size, (batch_size, length)).astype(np.int32)
    tokens[(position == middle) | (position == lengths[:, None] - 1)] = Vocabulary.sep
    tokens[:, 0] = Vocabulary.cls
    tokens[:, 1] = Vocabulary.mask
    tokens[padding] = Vocabulary.pad
    segments = ((position > middle) & ~padding).astype(np.int32)
    return Padded(tokens, segments, lengths, np.stack(np.nonzero(tokens == Vocabulary.mask)).astype(np.int32))


def differences(reference: Network, other: Network, batches: Iterable[Padded]) -> dict[str, float]:
    """The largest difference of each of the other's outputs, in units of the reference's largest value.

    The unit is 1 where all values are smaller; the vectors of padding, which mean nothing, are left out.
    """
    largest: dict[str, float] = {}
    for texts in batches:
        expected, found = reference(texts)._asdict(), other(texts)._asdict()
        real = np.arange(texts.tokens.shape[1]) < texts.lengths[:, None]
        for name, array in found.items():
            if array is None:
                continue
            a, b = (each[real] if name == "encoded" else each for each in (expected[name], array))
            difference = np.abs(a - b).max() / max(1.0, np.abs(a).max())
            # Infinite where a value is none, or a comparison with NaN would find nothing to object to.
            largest[name] = max(largest.get(name, 0.0), float(np.nan_to_num(difference, nan=np.inf)))
    return largest
