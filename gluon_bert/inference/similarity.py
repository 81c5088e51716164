"""Similarity of texts by their embeddings. Computes no embeddings."""

from __future__ import annotations

from typing import Any, Iterator, NamedTuple, Sequence

import numpy as np

from ..model.pooling import Pooling
from .text_files import SEPARATOR, Line

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


def similar_pairs(
    lines: Sequence[Line], embeddings: Sequence[np.ndarray], pooling: Pooling
) -> Iterator[dict[str, Any]]:
    """Yield the similarity of the two texts of each pair; the embeddings of a pair follow each other."""
    for line, one, other in zip(lines, embeddings[::2], embeddings[1::2]):
        (similarity,) = pooling.similarities(one[None], other[None]).ravel().tolist()
        yield {"text": line.first, "pair": line.second, "similarity": similarity}


def similar_texts(
    lines: Sequence[Line], embeddings: Sequence[np.ndarray], pooling: Pooling, count: int
) -> Iterator[dict[str, Any]]:
    """Yield for each text its `count` most similar other texts, numbered from 1."""
    texts = [f" {SEPARATOR} ".join(line.given) for line in lines]
    for text, found in zip(texts, nearest(np.stack(embeddings), count, pooling)):
        similar = [
            {"number": int(i) + 1, "text": texts[i], "similarity": float(value)}
            for i, value in zip(found.indices, found.similarities)
        ]
        yield {"text": text, "similar": similar}
