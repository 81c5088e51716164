"""The state of training between two steps, to and from plain values. Holds no weights."""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Iterator, Mapping, NamedTuple, Sequence

from ..data.loader import LoaderState
from ..errors import InputError
from .loss_scale import LossScale
from .metrics import Meter, Metrics, MetricSums, float_array


class BestEvaluation(NamedTuple):
    """The best evaluation so far, and the numbers of evaluations in all and since."""

    step: int
    validation: Metrics
    evaluations: int = 1
    since: int = 0

    def out_of_patience(self, patience: int) -> bool:
        """Return whether `patience` evaluations in a row brought no improvement; never with 0."""
        return 0 < patience <= self.since


def best_of(
    before: BestEvaluation | None,
    step: int,
    validation: Metrics,
    monitor: str = "mlm_loss",
    mode: str = "min",
) -> BestEvaluation:
    """Return the best evaluation after one more; of equal ones the earlier.

    monitor: the metric that decides; the first metric if an evaluation lacks it. mode: min or max.

    Pretraining monitors the MLM loss. NSP is easy and soon overfits on a small text, while the MLM loss still
    improves.
    """
    if before is None:
        return BestEvaluation(step, validation)
    sign = 1 if mode == "min" else -1
    new, old = (sign * _monitored(metrics, monitor) for metrics in (validation, before.validation))
    if new < old or (math.isnan(old) and not math.isnan(new)):
        return BestEvaluation(step, validation, before.evaluations + 1)
    return before._replace(evaluations=before.evaluations + 1, since=before.since + 1)


def _monitored(metrics: Metrics, monitor: str) -> float:
    return metrics[monitor] if monitor in metrics else next(iter(metrics.values()), math.nan)


class StepReport(NamedTuple):
    """A report of training: the window since the last report, and the run so far."""

    step: int
    planned_steps: float  # of the whole run, as expected now
    window: Metrics
    run: Metrics
    pairs_per_second: float  # of the window
    run_pairs_per_second: float
    seconds: float  # since the first step began, without evaluations
    seconds_left: float  # of the whole run, with evaluations at the rate so far
    lr: float  # of this step
    gradient_norm: float  # of this step, before clipping
    loss_scale: float | None = None  # of the next step, or None


class Clock:
    """Measures the time and the totals of a run, from its first batch on."""

    def __init__(self) -> None:
        self.start()
        self._before = 0.0  # seconds of the run before it was stopped and resumed
        self._stopped = 0.0  # seconds that do not count as training
        self._window_started = 0.0  # seconds that do, before the window
        self._run = MetricSums.nothing()

    def start(self) -> None:
        """Start or resume the clock: time counts from now on, in addition to the recorded time."""
        self._started = time.perf_counter()

    def catch_up(self, other: Clock) -> None:
        """Add the time of another clock of the run, as stopped time."""
        lost = other.elapsed() - self.elapsed()
        self._before += lost
        self._stopped += lost

    def to_json(self) -> dict[str, Any]:
        """Return the clock as plain values."""
        times = {"stopped": self._stopped, "window_started": self._window_started}
        return {"elapsed": self.elapsed(), **times, "run": self._run.to_json()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Clock:
        """Return a clock that continues from the values of `to_json`."""
        clock = cls()
        clock._before, clock._stopped, clock._window_started = float_array(
            [content[name] for name in ("elapsed", "stopped", "window_started")], 3
        ).tolist()
        clock._run = MetricSums.from_json(content["run"])
        return clock

    def elapsed(self) -> float:
        """Seconds since the start, with those that do not count as training."""
        return self._before + time.perf_counter() - self._started

    def progress(
        self,
        step: int,
        planned_steps: float,
        window: MetricSums,
        lr: float,
        gradient_norm: float,
        loss_scale: float | None = None,
    ) -> StepReport:
        """Return the report of a step with this learning rate, from the sums since the last call."""
        elapsed = self.elapsed()
        self._run = self._run.plus(window)
        seconds = elapsed - self._stopped
        window_seconds, self._window_started = seconds - self._window_started, seconds
        return StepReport(
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
        """Exclude the time of the block from training time."""
        before = self.elapsed()
        yield
        self._stopped += self.elapsed() - before


@dataclass
class TrainState:
    """All that the next step depends on, except the weights and the optimizer.

    step: steps made. position: of the next batch. evaluating: whether the evaluation after this step is still
    due. skipped: non-finite steps skipped in a row. log_bytes: size of the log at this step. meter: of the
    window that is not logged yet. scale: of the next step's loss, or None.
    """

    step: int = 0
    position: LoaderState = field(default_factory=LoaderState)
    evaluating: bool = False
    best: BestEvaluation | None = None
    skipped: int = 0
    log_bytes: int = 0
    meter: Meter = field(default_factory=Meter)
    clock: Clock = field(default_factory=Clock)
    scale: LossScale | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values, exact to the last bit. Waits for the devices."""
        return {
            "step": self.step,
            "position": self.position._asdict(),
            "evaluating": self.evaluating,
            "best": self.best and {**self.best._asdict(), "validation": self.best.validation},
            "skipped": self.skipped,
            "log_bytes": self.log_bytes,
            "meter": self.meter.to_json(),
            "clock": self.clock.to_json(),
            "loss_scale": None if self.scale is None else self.scale.to_json(),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any], contexts: Sequence[Any], where: str) -> TrainState:
        """Return the inverse of `to_json`. Raise InputError, which begins with `where`, for other content."""
        try:
            best, scale = content["best"], content.get("loss_scale")
            return cls(
                _count(content["step"]),
                LoaderState(_count(content["position"]["epoch"]), _count(content["position"]["batch"])),
                content["evaluating"] is True,
                None if best is None else _best(best),
                _count(content["skipped"]),
                _count(content["log_bytes"]),
                Meter.from_json(content["meter"], contexts),
                Clock.from_json(content["clock"]),
                None if scale is None else LossScale.from_json(scale, contexts[0]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(f"{where}: cannot be resumed ({type(error).__name__}: {error})") from error


def _best(content: Mapping[str, Any]) -> BestEvaluation:
    names, values = list(content["validation"]), list(content["validation"].values())
    averages = dict(zip(names, float_array(values, len(values)).tolist()))  # null, for JSON, is NaN
    if not averages:
        raise ValueError("the best evaluation must have metrics")
    counts = [_count(content[name]) for name in ("step", "evaluations", "since")]
    return BestEvaluation(counts[0], averages, *counts[1:])


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"must be a count, got {value!r}")
    return value
