"""Processes that train one network together: what they add up, compare and agree on. Takes no step."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Callable, Mapping, Sequence, TypeVar

import numpy as np

from ..errors import InputError, join_words
from ..runtime import mx

Result = TypeVar("Result")

START = "start the workers with tools/launch.py"


# Keys of arrays that are summed, where those of the gradients count up from 0. To choose a server MXNet
# multiplies a key by 9973 in 32 bits.
_AGREED, _GATHERED = 100_000, 100_001

_DIGEST = 16  # bytes of a hash that are compared


class Communicator:
    """One process, which trains alone: what each way of training together has to offer.

    rank: this worker's number, from 0; the first one writes the run's folder. count: how many there are.
    alone: whether no other process takes part in the job. kvstore: what a Gluon Trainer sums gradients with:
    those of all contexts, and those of all workers unless `add_up` does that.
    """

    rank, count, alone = 0, 1, True
    kvstore: Any = "device"

    def begin(self, trainer: Any) -> None:
        """Make a Gluon Trainer's kvstore ready, before its first step."""

    def all_reduce(self, gradients: Sequence[Sequence[Any]]) -> None:
        """Sum each context's gradients over the workers, in place, where the kvstore has not. Does not wait.

        The kvstore has summed those of this worker's contexts.
        """

    def all_gather(self, content: bytes) -> list[bytes]:
        """Every worker's bytes, by rank, of the same length on all. Waits for all workers."""
        return [content]

    def broadcast_decision(self, squared_norms: Any, stop: bool) -> tuple[Any, Any]:
        """The first worker's squared norms, (P,), and how many workers want to stop, (1,). Does not wait.

        Gradients are the same on all workers, but processors of different kinds may differ in the last digit
        of a norm: so one of them decides for all.
        """
        return squared_norms, mx.nd.array([stop], ctx=squared_norms.context)

    def shutdown(self) -> None:
        """Part from the other workers. Waits for them."""

    def total(self, values: np.ndarray) -> np.ndarray:
        """The sum over all workers of float64 values, added by rank. Waits for all workers."""
        values = np.ascontiguousarray(values, dtype=np.float64)
        rows = [np.frombuffer(row).reshape(values.shape) for row in self.all_gather(values.tobytes())]
        return np.sum(rows, axis=0)

    def root_first(self, action: Callable[[], Result]) -> Result:
        """What an action gives, which the others begin when the first worker has done it."""
        if self.rank:
            self.all_gather(b"+")
        result = action()
        if not self.rank:
            self.all_gather(b"+")
        return result

    def ranks_differing_from_root(self, fact: Any) -> list[int]:
        """The ranks of the workers for which a fact is another than for the first. Waits for all workers."""
        rows = self.all_gather(_digest(fact))
        return [rank for rank, row in enumerate(rows) if row != rows[0]]

    def check_same_on_all(self, facts: Mapping[str, Any]) -> None:
        """Raise InputError, on every worker, where facts differ from the first worker's; names them."""
        names = sorted(facts)
        if self.ranks_differing_from_root(names):
            raise InputError("the workers run different versions of gluon_bert: install one on all machines")
        rows = self.all_gather(b"".join(_digest(facts[name]) for name in names))
        for rank, row in enumerate(rows):
            places = [slice(i * _DIGEST, (i + 1) * _DIGEST) for i in range(len(names))]
            different = [name for name, place in zip(names, places) if row[place] != rows[0][place]]
            if different:
                raise InputError(
                    f"worker {rank} differs from worker 0 in {join_words(different)}: all workers of a run "
                    "need the same"
                )


class DistributedCommunicator(Communicator):
    """Workers that have a way to sum an array of each; the rest comes from that."""

    alone = False

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count
        self.has_left = False

    def check_distinct_ranks(self) -> None:
        """Raise InputError where two workers have the same rank."""
        # A row that two workers fill is the sum of both, 2, and another row is 0.
        if set(self.all_gather(b"\1")) != {b"\1"}:
            raise InputError(f"worker {self.rank}: two of {self.count} workers have the same number; {START}")

    def all_gather(self, content: bytes) -> list[bytes]:
        # The sum is in float32, which is exact where all but one of the summands are 0.
        table = np.zeros((self.count, len(content)), dtype=np.float32)
        table[self.rank] = np.frombuffer(content, dtype=np.uint8)
        summed = self._sum(_GATHERED + len(content), mx.nd.array(table, dtype=np.float32))
        return [row.astype(np.uint8).tobytes() for row in summed.asnumpy()]

    def broadcast_decision(self, squared_norms: Any, stop: bool) -> tuple[Any, Any]:
        told = mx.nd.zeros_like(squared_norms) if self.rank else squared_norms
        asked = mx.nd.array([stop], ctx=squared_norms.context)
        summed = self._sum(_AGREED, mx.nd.concat(told, asked, dim=0))
        return summed[:-1], summed[-1:]

    def shutdown(self) -> None:
        """Wait until all workers are here, and part from them."""
        self.has_left = True
        mx.nd.waitall()
        self._part()

    def _sum(self, key: int, array: Any) -> Any:
        """The sum of the workers' arrays, of one shape for each key; in place, without a wait."""
        raise NotImplementedError

    def _part(self) -> None:
        """Leave, when all others do."""
        raise NotImplementedError


def weights_hash(weights: Mapping[str, np.ndarray]) -> str:
    """A hash of all weights, bit for bit."""
    content = hashlib.blake2b()
    for name in sorted(weights):
        content.update(name.encode() + np.ascontiguousarray(weights[name]).tobytes())
    return content.hexdigest()


def _digest(fact: Any) -> bytes:
    return hashlib.sha256(json.dumps(fact, sort_keys=True, default=str).encode()).digest()[:_DIGEST]
