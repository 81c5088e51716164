"""One vector for a text from the vectors of its tokens, and the similarity of texts. Knows no network."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Mapping

import numpy as np

from ..errors import InputError

POOLINGS = ("mean", "cls", "max")
SIMILARITIES = ("cosine", "dot")


@dataclass(frozen=True)
class Pooling:
    """How the vectors of a text's tokens become one vector.

    mode: their mean, the first one (cls), or the largest value of each column (max); <cls> and <sep> count.
    normalize: divide the vector by its length. similarity: how two such vectors are compared.

    >>> Pooling("max", normalize=True)(np.array([[3.0, 0.0], [0.0, 4.0]])).tolist()
    [0.6, 0.8]
    """

    mode: str = "mean"
    normalize: bool = False
    similarity: str = "cosine"

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """Pool the vectors of one text: (T, C) -> (C,)."""
        pooled = {"mean": vectors.mean(axis=0), "cls": vectors[0], "max": vectors.max(axis=0)}[self.mode]
        return unit_vectors(pooled) if self.normalize else pooled

    def similarities(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Compare every row of one array with every row of another: (N, C), (M, C) -> (N, M)."""
        if self.similarity == "cosine":
            first, second = unit_vectors(first), unit_vectors(second)
        return first @ second.T

    def to_json(self) -> dict[str, Any]:
        """Return plain values; `from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Any, where: object) -> Pooling:
        """Return the pooling that `to_json` gave; raise InputError for anything else."""
        if (
            not isinstance(content, Mapping)
            or set(content) != set(cls.__dataclass_fields__)
            or content["mode"] not in list(POOLINGS)
            or content["similarity"] not in list(SIMILARITIES)
            or type(content["normalize"]) is not bool
        ):
            raise InputError(f"{where}: 'pooling' must be what this gluon_bert writes, got {content!r}")
        return cls(**content)


def unit_vectors(vectors: np.ndarray) -> np.ndarray:
    """Divide vectors by their lengths, along the last axis; a vector of zeros stays as it is."""
    # The floor is the one of torch.nn.functional.normalize.
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
