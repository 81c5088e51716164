"""Named losses and accuracies, as sums that stay on the devices until read. Prints nothing."""

from __future__ import annotations

from typing import Any, Dict, Mapping, NamedTuple, Sequence

import numpy as np

from ..runtime import mx
from .device_batch import DeviceBatch
from .losses import ShardLoss

# Means over some batches by name: "mlm_loss" in nats, "mlm_accuracy" from 0 to 1. Metrics that were not
# counted are absent.
Metrics = Dict[str, float]


def perplexity(metrics: Mapping[str, float]) -> float | None:
    """Return e to the MLM loss: the number of equally likely words; None without an MLM loss."""
    if "mlm_loss" not in metrics:
        return None
    with np.errstate(over="ignore"):
        return float(np.exp(metrics["mlm_loss"]))


def losses_of(metrics: Mapping[str, float]) -> list[float]:
    """Return the losses among the metrics."""
    return [value for name, value in metrics.items() if name.endswith("_loss")]


class MetricSums(NamedTuple):
    """Sums over some batches on the host, and their counts, float64, both by the name of the metric."""

    sums: Mapping[str, float]
    counts: Mapping[str, float]
    num_pairs: float = 0.0

    @classmethod
    def nothing(cls) -> MetricSums:
        """Return the sums of no batch."""
        return cls({}, {})

    def plus(self, other: MetricSums) -> MetricSums:
        """Return the sums of both."""
        return MetricSums(
            _added(self.sums, other.sums),
            _added(self.counts, other.counts),
            self.num_pairs + other.num_pairs,
        )

    def averages(self) -> Metrics:
        """Return the means of the counted metrics."""
        return {name: self.sums[name] / count for name, count in self.counts.items() if count}

    def to_array(self) -> np.ndarray:
        """Return the sums, the counts and the number of pairs, (2 K + 1,) float64."""
        return np.array([*self.sums.values(), *self.counts.values(), self.num_pairs], dtype=np.float64)

    def with_array(self, values: np.ndarray) -> MetricSums:
        """Return these metrics with other values, as `to_array` lists them."""
        names, (*numbers, num_pairs) = list(self.sums), values.tolist()
        sums, counts = numbers[: len(names)], numbers[len(names) :]
        return MetricSums(dict(zip(names, sums)), dict(zip(names, counts)), num_pairs)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"sums": dict(self.sums), "counts": dict(self.counts), "num_pairs": self.num_pairs}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> MetricSums:
        """Return the inverse of `to_json`; raise ValueError for other content."""
        sums, counts = content["sums"], content["counts"]
        if list(sums) != list(counts):
            raise ValueError("the sums and the counts must have the same names")
        values = float_array([*sums.values(), *counts.values(), content["num_pairs"]], 2 * len(sums) + 1)
        return cls(sums, counts).with_array(values)


def _added(some: Mapping[str, float], more: Mapping[str, float]) -> dict[str, float]:
    return {name: some.get(name, 0.0) + more.get(name, 0.0) for name in {**some, **more}}


class Meter:
    """Sums over batches of any size on any devices; `totals` waits for the devices.

    The accuracy of a loss covers the batches in which its correct predictions were counted.
    """

    def __init__(self) -> None:
        self._names: list[str] = []  # of the metrics; a loss and an accuracy for each loss
        self._sums: dict[Any, Any] = {}  # by device, (K,)
        self._counts = np.zeros(0)
        self._num_pairs = 0.0

    def add(self, shards: Sequence[DeviceBatch], results: Sequence[ShardLoss]) -> None:
        """Add the losses of one batch, shard by shard. Does not wait."""
        if not self._names:
            kinds = ("loss", "accuracy")
            self._names = [f"{name}_{kind}" for kind in kinds for name in results[0].losses]
            self._counts = np.zeros(len(self._names))
        for shard, result in zip(shards, results):
            if not shard.num_pairs:
                continue
            losses = list(result.losses.values())
            corrects = [mx.nd.zeros_like(x.value) if x.correct is None else x.correct for x in losses]
            sums = mx.nd.concat(*(x.value for x in losses), *corrects, dim=0)
            before = self._sums.get(sums.context)
            self._sums[sums.context] = sums if before is None else before + sums
            counted = [0 if x.correct is None else x.number for x in losses]
            self._counts += [*(x.number for x in losses), *counted]
            self._num_pairs += shard.num_pairs

    def to_json(self) -> dict[str, Any]:
        """Return plain values, exact to the last bit. Waits for the devices."""
        return {
            "names": self._names,
            "sums": {str(device): sums.asnumpy().tolist() for device, sums in self._sums.items()},
            "counts": self._counts.tolist(),
            "num_pairs": self._num_pairs,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any], devices: Sequence[Any]) -> Meter:
        """Return the inverse of `to_json`; sums of devices that are missing now go to the first."""
        meter = cls()
        meter._names = [str(name) for name in content["names"]]
        how_many = len(meter._names)
        meter._counts = float_array(content["counts"], how_many)
        meter._num_pairs = float(content["num_pairs"])
        here = {str(device): device for device in devices}
        for name, sums in content["sums"].items():
            device = here.get(name, devices[0])
            array = mx.nd.array(float_array(sums, how_many), ctx=device, dtype=np.float32)
            before = meter._sums.get(device)
            meter._sums[device] = array if before is None else before + array
        return meter

    @classmethod
    def of(cls, totals: MetricSums, device: Any) -> Meter:
        """Return a meter with these totals, on a device."""
        content = {
            "names": list(totals.sums),
            "sums": {"": list(totals.sums.values())} if totals.sums else {},
            "counts": list(totals.counts.values()),
            "num_pairs": totals.num_pairs,
        }
        return cls.from_json(content, [device])

    def cleared(self) -> Meter:
        """Return a meter with the same metrics and no batch."""
        meter = Meter()
        meter._names, meter._counts = self._names, np.zeros(len(self._names))
        return meter

    def totals(self) -> MetricSums:
        """Return the sums so far. Waits for the devices."""
        zeros = np.zeros(len(self._names))
        sums = sum((array.asnumpy().astype(np.float64) for array in self._sums.values()), zeros)
        return MetricSums(
            dict(zip(self._names, sums.tolist())),
            dict(zip(self._names, self._counts.tolist())),
            self._num_pairs,
        )


def float_array(values: Any, how_many: int) -> np.ndarray:
    """Return a JSON list as (how_many,) float64; raise ValueError for anything else."""
    array = np.array(values, dtype=np.float64)
    if array.shape != (how_many,):
        raise ValueError(f"must be {how_many} numbers")
    return array
