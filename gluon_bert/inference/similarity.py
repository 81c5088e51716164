"""Similarity of texts by their embeddings. Computes no embeddings."""

from __future__ import annotations

from typing import Iterator, NamedTuple

import numpy as np

from ..model.pooling import Pooling

# Rows per block that is compared with all others: 1,000 x 100,000 takes 400 MB.
_BLOCK_BYTES = 400_000_000


class Neighbours(NamedTuple):
    """The most similar other texts of one text: their numbers and similarities, the most similar first."""

    indices: np.ndarray
    similarities: np.ndarray


def nearest(embeddings: np.ndarray, count: int, pooling: Pooling) -> Iterator[Neighbours]:
    """Yield for each row of (N, C) its `count` most similar other rows; equal ones by index."""
    total = len(embeddings)
    rows_at_once = max(1, _BLOCK_BYTES // (4 * max(1, total)))
    for start in range(0, total, rows_at_once):
        found = pooling.similarities(embeddings[start : start + rows_at_once], embeddings)
        for row, similarities in enumerate(found, start):
            order = np.argsort(-similarities, kind="stable")
            order = order[order != row][:count]
            yield Neighbours(order, similarities[order])
