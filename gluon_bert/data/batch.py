"""A batch of masked pairs as named NumPy arrays. Knows no devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import DataConfig
from .masking import mask
from .prepared import Documents
from .sentence_pairs import Pairs
from .vocab import Vocabulary


@dataclass(frozen=True)
class Batch:
    """Masked pairs, padded to one length.

    tokens: (B, T) int32. token_types: (B, T) int32, 0 up to the first <sep>, then 1, and 0 on padding.
    valid_length: (B,) int32, tokens of a row without padding. masked_positions: (2, M) int32, row and
    position of the masked tokens, rows rising. masked_ids: (M,) int32, the ids that were masked.
    next_sentence_labels: (B,) int32, 1 where the second segment follows the first.
    """

    tokens: np.ndarray
    token_types: np.ndarray
    valid_length: np.ndarray
    masked_positions: np.ndarray
    masked_ids: np.ndarray
    next_sentence_labels: np.ndarray

    def __len__(self) -> int:
        return len(self.next_sentence_labels)

    def rows(self, start: int, stop: int) -> Batch:
        """Return the batch of the rows from `start` up to `stop`."""
        first, last = np.searchsorted(self.masked_positions[0], [start, stop])
        return Batch(
            self.tokens[start:stop],
            self.token_types[start:stop],
            self.valid_length[start:stop],
            self.masked_positions[:, first:last] - np.array([[start], [0]], dtype=np.int32),
            self.masked_ids[first:last],
            self.next_sentence_labels[start:stop],
        )


def make_batch(
    documents: Documents, pairs: Pairs, noise: np.ndarray, vocab: Vocabulary, config: DataConfig
) -> Batch:
    """Pairs to a masked batch: `<cls> first <sep> second <sep>`, padded to the noise's T, its last axis."""
    num_rows, length = noise.shape[1:]
    first_len = pairs.first[:, 1] - pairs.first[:, 0]
    lengths = pairs.lengths()
    position = np.arange(length)
    first_end = first_len[:, None] + 1  # the place of the first <sep>
    last = lengths[:, None] - 1  # the place of the second
    in_first = (position > 0) & (position < first_end)
    in_second = (position > first_end) & (position < last)
    source = np.where(in_first, pairs.first[:, :1] + position - 1, 0)
    source = np.where(in_second, pairs.second[:, :1] + position - first_end - 1, source)
    tokens = np.full((num_rows, length), vocab.pad, dtype=np.int32)
    word = in_first | in_second
    tokens[word] = documents.tokens[source[word]]
    tokens[:, 0] = vocab.cls
    tokens[(position == first_end) | (position == last)] = vocab.sep
    token_types = ((position > first_end) & (position <= last)).astype(np.int32)
    masked = mask(tokens, lengths, noise, vocab, config)
    return Batch(
        masked.tokens,
        token_types,
        lengths.astype(np.int32),
        masked.masked_positions,
        masked.masked_ids,
        pairs.is_next.astype(np.int32),
    )


def worker_rows(batch: Any, rank: int, num_workers: int) -> Any:
    """Return the rows of one worker, divided as evenly as possible; possibly none."""
    start, stop = np.linspace(0, len(batch), num_workers + 1).astype(int)[rank : rank + 2]
    return batch.rows(start, stop)


def micro_batches(batch: Any, size: int) -> list[Any]:
    """Yield the batch in parts of `size` rows, the last with the rest; with size 0 the whole batch."""
    if not 0 < size < len(batch):
        return [batch]
    return [batch.rows(start, min(start + size, len(batch))) for start in range(0, len(batch), size)]
