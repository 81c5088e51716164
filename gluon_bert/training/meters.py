"""Running losses, accuracies and throughput; sums stay on the devices until asked for. Prints nothing."""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from typing import Any, Iterator, Mapping, NamedTuple, Sequence

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


class Best(NamedTuple):
    """The best evaluation so far, and how many were made in all and since."""

    step: int
    held_out: Averages
    evaluations: int = 1
    since: int = 0

    def exhausts(self, patience: int) -> bool:
        """Whether so many evaluations in a row were no better; never with a patience of 0."""
        return 0 < patience <= self.since


def best_of(before: Best | None, step: int, held_out: Averages) -> Best:
    """The best evaluation, now that there is one more.

    The lower MLM loss is the better. NSP has no say: it is easy, and a small text's pairs are soon learnt by
    heart, while what is learnt of the words goes on improving.
    """
    if before is None:
        return Best(step, held_out)
    if held_out.mlm_loss < before.held_out.mlm_loss:
        return Best(step, held_out, before.evaluations + 1)
    return before._replace(evaluations=before.evaluations + 1, since=before.since + 1)


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

    def to_json(self) -> dict[str, Any]:
        """The meter as plain values, exact to the last bit. Waits for the devices."""
        sums = {str(context): sums.asnumpy().tolist() for context, sums in self._sums.items()}
        return {"sums": sums, "counts": self._counts.tolist()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], contexts: Sequence[Any]) -> Meter:
        """The inverse of `to_json`; what was on contexts that are not there any more goes to the first."""
        meter = cls()
        meter._counts = numbers(content["counts"], 4)
        here = {str(context): context for context in contexts}
        for name, sums in content["sums"].items():
            context = here.get(name, contexts[0])
            array = mx.nd.array(numbers(sums, 4), ctx=context, dtype=np.float32)
            before = meter._sums.get(context)
            meter._sums[context] = array if before is None else before + array
        return meter

    @classmethod
    def of(cls, totals: Totals, context: Any) -> Meter:
        """A meter that has these totals, on a context."""
        return cls.from_json({"sums": {"": totals.sums}, "counts": totals.counts}, [context])

    def totals(self) -> Totals:
        """What was added up so far. Waits for the devices."""
        sums = sum((total.asnumpy().astype(np.float64) for total in self._sums.values()), np.zeros(4))
        return Totals(sums, self._counts.copy())


class Progress(NamedTuple):
    """Where a run stands: the window since the last report, and the run so far."""

    step: int
    planned_steps: float  # of the whole run, as far as one can tell
    window: Averages
    run: Averages
    pairs_per_second: float  # of the window
    run_pairs_per_second: float
    seconds: float  # since the first step began, without evaluations
    seconds_left: float  # of the whole run, with evaluations at the rate so far
    lr: float  # of this step
    gradient_norm: float  # of this step, before clipping
    loss_scale: float | None = None  # of the next step, where it has one


def numbers(values: Any, how_many: int) -> np.ndarray:
    """(how_many,) float64 of a JSON list; ValueError where it is anything else."""
    array = np.array(values, dtype=np.float64)
    if array.shape != (how_many,):
        raise ValueError(f"{how_many} numbers were expected")
    return array


class Clock:
    """The time and the totals of a run, from the making of its first batch on."""

    def __init__(self) -> None:
        self.start()
        self._before = 0.0  # seconds that the run took until it was stopped and resumed
        self._stopped = 0.0  # seconds that do not count as training
        self._window_started = 0.0  # seconds that do, before the window
        self._run = Totals.nothing()

    def start(self) -> None:
        """The run begins now, or goes on: time counts from now on, beside what counted already."""
        self._started = time.perf_counter()

    def catch_up(self, other: Clock) -> None:
        """Count the time of another clock of the run as well, of which nothing else is left, as stopped."""
        lost = other.elapsed() - self.elapsed()
        self._before += lost
        self._stopped += lost

    def to_json(self) -> dict[str, Any]:
        """The clock as plain values."""
        run = {"sums": self._run.sums.tolist(), "counts": self._run.counts.tolist()}
        times = {"stopped": self._stopped, "window_started": self._window_started}
        return {"elapsed": self.elapsed(), **times, "run": run}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Clock:
        """The inverse of `to_json`: a clock that goes on from there, now."""
        clock = cls()
        clock._before, clock._stopped, clock._window_started = numbers(
            [content[name] for name in ("elapsed", "stopped", "window_started")], 3
        ).tolist()
        clock._run = Totals(numbers(content["run"]["sums"], 4), numbers(content["run"]["counts"], 4))
        return clock

    def elapsed(self) -> float:
        """Seconds since the start, with those that do not count as training."""
        return self._before + time.perf_counter() - self._started

    def progress(
        self,
        step: int,
        planned_steps: float,
        window: Totals,
        lr: float,
        gradient_norm: float,
        loss_scale: float | None = None,
    ) -> Progress:
        """How the run stands after a step with this learning rate, given what came since the last call."""
        elapsed = self.elapsed()
        self._run = self._run.plus(window)
        seconds = elapsed - self._stopped
        window_seconds, self._window_started = seconds - self._window_started, seconds
        return Progress(
            step,
            planned_steps,
            window.averages(),
            self._run.averages(),
            window.num_pairs / window_seconds,
            self._run.num_pairs / seconds,
            seconds,
            elapsed / step * (planned_steps - step),
            lr,
            gradient_norm,
            loss_scale,
        )

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Time that does not count as training."""
        before = self.elapsed()
        yield
        self._stopped += self.elapsed() - before
