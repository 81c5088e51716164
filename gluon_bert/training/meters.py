"""Running losses, accuracies and throughput; sums stay on the devices until asked for. Prints nothing."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import Any, Iterator, NamedTuple

import numpy as np

from ..data.batch import Shard
from ..runtime import mx
from .loss import ShardLoss


class Averages(NamedTuple):
    """Means over some batches: losses in nats, accuracies from 0 to 1; NaN where nothing was counted."""

    mlm_loss: float
    nsp_loss: float
    mlm_accuracy: float
    nsp_accuracy: float


class Totals(NamedTuple):
    """Sums over some batches, on the host, and what to divide them by; both (4,) float64 as in Averages."""

    sums: np.ndarray
    counts: np.ndarray

    @property
    def num_pairs(self) -> float:
        """How many pairs were added up."""
        return float(self.counts[1])

    @classmethod
    def nothing(cls) -> Totals:
        """The totals of no batch."""
        return cls(np.zeros(4), np.zeros(4))

    def plus(self, other: Totals) -> Totals:
        """The totals of both."""
        return Totals(self.sums + other.sums, self.counts + other.counts)

    def averages(self) -> Averages:
        """The means."""
        with np.errstate(invalid="ignore"):
            return Averages(*(self.sums / self.counts).tolist())


class Meter:
    """Sums over batches of any size on any contexts, kept there until `totals` waits for them.

    Batches may leave out the hits among their predictions; the MLM accuracy is that of those that did not.
    """

    def __init__(self) -> None:
        self._sums: dict[Any, Any] = {}
        self._counts = np.zeros(4)

    def add(self, shards: list[Shard], losses: list[ShardLoss], count_mlm_hits: bool) -> None:
        """Add what one batch gave, shard by shard. Waits for nothing."""
        for shard, loss in zip(shards, losses):
            if not shard.num_pairs:
                continue
            sums = mx.nd.concat(loss.mlm, loss.nsp, loss.hits, dim=0)
            before = self._sums.get(sums.context)
            self._sums[sums.context] = sums if before is None else before + sums
            predictions, pairs = shard.num_predictions, shard.num_pairs
            self._counts += [predictions, pairs, predictions * count_mlm_hits, pairs]

    def totals(self) -> Totals:
        """What was added up so far. Waits for the devices."""
        sums = sum((total.asnumpy().astype(np.float64) for total in self._sums.values()), np.zeros(4))
        return Totals(sums, self._counts.copy())


class Progress(NamedTuple):
    """Where a run stands: the window since the last report, and the run so far."""

    step: int
    window: Averages
    run: Averages
    pairs_per_second: float  # of the window
    run_pairs_per_second: float
    seconds: float  # since the first step began, without evaluations
    lr: float  # of this step
    gradient_norm: float  # of this step, before clipping


class Clock:
    """The time and the totals of a run, from the making of its first batch on."""

    def __init__(self) -> None:
        self._started = self._window_started = time.perf_counter()
        self._run = Totals.nothing()

    def progress(self, step: int, window: Totals, lr: float, gradient_norm: float) -> Progress:
        """How the run stands after a step with this learning rate, given what came since the last call."""
        now = time.perf_counter()
        self._run = self._run.plus(window)
        window_seconds, seconds = now - self._window_started, now - self._started
        self._window_started = now
        return Progress(
            step,
            window.averages(),
            self._run.averages(),
            window.num_pairs / window_seconds,
            self._run.num_pairs / seconds,
            seconds,
            lr,
            gradient_norm,
        )

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Time that does not count as training."""
        before = time.perf_counter()
        yield
        away = time.perf_counter() - before
        self._started += away
        self._window_started += away
