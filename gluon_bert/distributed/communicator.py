"""The interface between the workers of a run: sum, gather, compare, decide. Takes no training step."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Callable, Mapping, Sequence, TypeVar

import numpy as np

from ..errors import InputError, join_words
from ..runtime import mx

Result = TypeVar("Result")

START = "Start the workers with tools/launch.py."

# Keys of summed arrays. Gradients use the keys from 0 on. MXNet multiplies a key by 9973 in 32 bits to choose
# a server, so keys must stay small.
_DECISION_KEY, _GATHER_KEY = 100_000, 100_001

_HASH_BYTES = 16  # compared bytes of a hash


class Communicator:
    """The communicator of a single process, and the interface of all others.

    rank: this worker's number, from 0. Rank 0 writes the run folder.
    count: the number of workers.
    alone: True if the job has only this process.
    kvstore: sums gradients in a Gluon Trainer, over all contexts. It also sums over all workers unless
        `all_reduce` does.
    """

    rank, count, alone = 0, 1, True
    kvstore: Any = "device"

    def init_trainer(self, trainer: Any) -> None:
        """Initialize the kvstore of a Gluon Trainer before its first step."""

    def all_reduce(self, gradients: Sequence[Sequence[Any]]) -> None:
        """Sum gradients over the workers in place, unless the kvstore has done so. Does not wait.

        gradients: for each context a list of arrays, already summed over the contexts of this worker.
        """

    def all_gather(self, content: bytes) -> list[bytes]:
        """Return the bytes of each worker in rank order. All must have one length. Waits for all workers."""
        return [content]

    def broadcast_decision(self, squared_norms: Any, stop: bool) -> tuple[Any, Any]:
        """Return rank 0's squared norms, (P,), and the number of workers that want to stop, (1,).

        Does not wait.
        Gradients are equal on all workers. Norms may differ in the last digit between processor models. So
        rank 0 decides for all.
        """
        return squared_norms, mx.nd.array([stop], ctx=squared_norms.context)

    def shutdown(self) -> None:
        """Leave the job. Waits for the other workers."""

    def sum_values(self, values: np.ndarray) -> np.ndarray:
        """Return the sum of float64 values over all workers, added in rank order. Waits for all workers."""
        values = np.asarray(values, dtype=np.float64, order="C")
        rows = [np.frombuffer(row).reshape(values.shape) for row in self.all_gather(values.tobytes())]
        return np.sum(rows, axis=0)

    def root_first(self, action: Callable[[], Result]) -> Result:
        """Return the result of an action. Other workers begin it after rank 0 has finished it."""
        if self.rank:
            self.all_gather(b"+")
        result = action()
        if not self.rank:
            self.all_gather(b"+")
        return result

    def ranks_differing_from_root(self, value: Any) -> list[int]:
        """Return the ranks whose value differs from that of rank 0. Waits for all workers."""
        rows = self.all_gather(_hash(value))
        return [rank for rank, row in enumerate(rows) if row != rows[0]]

    def check_same_on_all(self, values: Mapping[str, Any]) -> None:
        """Raise InputError on every worker if a value differs from rank 0. The message names them."""
        names = sorted(values)
        if self.ranks_differing_from_root(names):
            raise InputError(
                "workers run different versions of gluon_bert. Install one version on all machines."
            )
        rows = self.all_gather(b"".join(_hash(values[name]) for name in names))
        for rank, row in enumerate(rows):
            places = [slice(i * _HASH_BYTES, (i + 1) * _HASH_BYTES) for i in range(len(names))]
            different = [name for name, place in zip(names, places) if row[place] != rows[0][place]]
            if different:
                raise InputError(
                    f"{join_words(different)} must be the same on all workers, and worker {rank} has others "
                    "than worker 0."
                )


class DistributedCommunicator(Communicator):
    """Builds all operations from one: the sum of an array over the workers."""

    alone = False

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count
        self.is_shut_down = False

    def check_distinct_ranks(self) -> None:
        """Raise InputError if two workers have the same rank."""
        # If two workers fill one row, its sum is 2 and another row stays 0.
        if set(self.all_gather(b"\1")) != {b"\1"}:
            raise InputError(
                f"each of the {self.count} workers must have its own rank, got {self.rank} twice. {START}"
            )

    def all_gather(self, content: bytes) -> list[bytes]:
        # Sums in float32 are exact here, because all but one of the summands are 0.
        table = np.zeros((self.count, len(content)), dtype=np.float32)
        table[self.rank] = np.frombuffer(content, dtype=np.uint8)
        summed = self._sum(_GATHER_KEY + len(content), mx.nd.array(table, dtype=np.float32))
        return [row.astype(np.uint8).tobytes() for row in summed.asnumpy()]

    def broadcast_decision(self, squared_norms: Any, stop: bool) -> tuple[Any, Any]:
        norms = mx.nd.zeros_like(squared_norms) if self.rank else squared_norms
        stops = mx.nd.array([stop], ctx=squared_norms.context)
        summed = self._sum(_DECISION_KEY, mx.nd.concat(norms, stops, dim=0))
        return summed[:-1], summed[-1:]

    def shutdown(self) -> None:
        """Leave the job when all workers do."""
        self.is_shut_down = True
        mx.nd.waitall()
        self._leave()

    def _sum(self, key: int, array: Any) -> Any:
        """Sum an array over the workers in place. Does not wait. A key always has one array shape."""
        raise NotImplementedError

    def _leave(self) -> None:
        """Disconnect from the other workers, which do the same."""
        raise NotImplementedError


def weights_hash(weights: Mapping[str, np.ndarray]) -> str:
    """Return a hash of all weights, bit by bit."""
    content = hashlib.blake2b()
    for name in sorted(weights):
        content.update(name.encode() + np.ascontiguousarray(weights[name]).tobytes())
    return content.hexdigest()


def _hash(value: Any) -> bytes:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).digest()[:_HASH_BYTES]
