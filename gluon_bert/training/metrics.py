"""Running losses, accuracies and throughput; sums stay on the devices until asked for. Prints nothing."""

from __future__ import annotations

import math
from typing import Any, Mapping, NamedTuple, Sequence

import numpy as np

from ..runtime import mx
from .device_batch import DeviceBatch
from .losses import ShardLoss


class Metrics(NamedTuple):
    """Means over some batches: losses in nats, accuracies from 0 to 1; NaN where nothing was counted."""

    mlm_loss: float
    nsp_loss: float
    mlm_accuracy: float
    nsp_accuracy: float

    @property
    def loss(self) -> float:
        """MLM and NSP loss together; what was not counted, as its accuracy tells, adds nothing."""
        both = ((self.mlm_loss, self.mlm_accuracy), (self.nsp_loss, self.nsp_accuracy))
        return sum(loss for loss, accuracy in both if not math.isnan(accuracy))

    @property
    def perplexity(self) -> float:
        """e to the MLM loss: among so many equally likely words it would be as hard to choose."""
        with np.errstate(over="ignore"):
            return float(np.exp(self.mlm_loss))


class MetricSums(NamedTuple):
    """Sums over some batches, on the host, and what to divide them by; both (4,) float64 as in Averages."""

    sums: np.ndarray
    counts: np.ndarray

    @property
    def num_pairs(self) -> float:
        """How many pairs were added up."""
        return float(self.counts[1])

    @classmethod
    def nothing(cls) -> MetricSums:
        """The totals of no batch."""
        return cls(np.zeros(4), np.zeros(4))

    def plus(self, other: MetricSums) -> MetricSums:
        """The totals of both."""
        return MetricSums(self.sums + other.sums, self.counts + other.counts)

    def averages(self) -> Metrics:
        """The means."""
        with np.errstate(invalid="ignore"):
            return Metrics(*(self.sums / self.counts).tolist())


class Meter:
    """Sums over batches of any size on any contexts, kept there until `totals` waits for them.

    Batches may leave out the hits among their predictions; the MLM accuracy is that of those that did not.
    """

    def __init__(self) -> None:
        self._sums: dict[Any, Any] = {}
        self._counts = np.zeros(4)

    def add(self, shards: list[DeviceBatch], losses: list[ShardLoss], count_mlm_correct: bool) -> None:
        """Add what one batch gave, shard by shard. Waits for nothing."""
        for shard, loss in zip(shards, losses):
            if not shard.num_pairs:
                continue
            sums = mx.nd.concat(loss.mlm, loss.nsp, loss.correct, dim=0)
            before = self._sums.get(sums.context)
            self._sums[sums.context] = sums if before is None else before + sums
            predictions, pairs = shard.num_masked, shard.num_pairs
            self._counts += [predictions, pairs, predictions * count_mlm_correct, pairs]

    def to_json(self) -> dict[str, Any]:
        """The meter as plain values, exact to the last bit. Waits for the devices."""
        sums = {str(context): sums.asnumpy().tolist() for context, sums in self._sums.items()}
        return {"sums": sums, "counts": self._counts.tolist()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], contexts: Sequence[Any]) -> Meter:
        """The inverse of `to_json`; what was on contexts that are not there any more goes to the first."""
        meter = cls()
        meter._counts = float_array(content["counts"], 4)
        here = {str(context): context for context in contexts}
        for name, sums in content["sums"].items():
            context = here.get(name, contexts[0])
            array = mx.nd.array(float_array(sums, 4), ctx=context, dtype=np.float32)
            before = meter._sums.get(context)
            meter._sums[context] = array if before is None else before + array
        return meter

    @classmethod
    def of(cls, totals: MetricSums, context: Any) -> Meter:
        """A meter that has these totals, on a context."""
        return cls.from_json({"sums": {"": totals.sums}, "counts": totals.counts}, [context])

    def totals(self) -> MetricSums:
        """What was added up so far. Waits for the devices."""
        sums = sum((total.asnumpy().astype(np.float64) for total in self._sums.values()), np.zeros(4))
        return MetricSums(sums, self._counts.copy())


def float_array(values: Any, how_many: int) -> np.ndarray:
    """(how_many,) float64 of a JSON list; ValueError where it is anything else."""
    array = np.array(values, dtype=np.float64)
    if array.shape != (how_many,):
        raise ValueError(f"{how_many} numbers were expected")
    return array
