"""The events of a training run. Trains nothing."""

from __future__ import annotations

from typing import Any, Protocol, Sequence

from ..checkpoint import Snapshot
from ..config import TrainConfig
from .divergence import NonFiniteStep
from .metrics import Metrics
from .state import BestEvaluation, StepReport, TrainState


class TrainerLike(Protocol):
    """The part of a `Trainer` that callbacks may use."""

    net: Any
    config: TrainConfig
    state: TrainState
    monitor: str

    def wait(self) -> None:
        """Wait until the devices have done all steps."""

    def snapshot(self) -> Snapshot:
        """Return a copy on the host of all that a resumed run needs."""


class Callback:
    """Handles the events of a training run; the base class does nothing.

    A trainer calls its callbacks in their order, and `on_fit_end` in the reverse order.
    """

    def on_fit_begin(self, trainer: TrainerLike) -> None:
        """Training starts or resumes after `trainer.state.step` steps."""

    def on_step(self, trainer: TrainerLike, step: int) -> None:
        """A step has been queued on the devices."""

    def on_log(self, trainer: TrainerLike, report: StepReport) -> None:
        """A window of `log_every` steps is done."""

    def on_evaluate(self, trainer: TrainerLike, step: int, metrics: Metrics, best: BestEvaluation) -> None:
        """The validation batches were evaluated after this step; `best` includes this evaluation."""

    def on_checkpoint(self, trainer: TrainerLike) -> None:
        """A checkpoint is due; `trainer.snapshot()` is its content."""

    def on_save_checkpoint(self, trainer: TrainerLike) -> None:
        """`trainer.snapshot()` is about to copy `trainer.state`, which may still be changed."""

    def latest_checkpoint(self) -> Snapshot | None:
        """Return the checkpoint for a rollback; None if this callback has none."""
        return None

    def on_non_finite(self, trainer: TrainerLike, found: NonFiniteStep) -> None:
        """A step had a non-finite loss or gradient; it may be skipped, rolled back, or end the run."""

    def on_overflow(self, trainer: TrainerLike, step: int, scale: float) -> None:
        """A step was skipped: the gradient of the loss times this scale overflowed float16."""

    def on_weight_drift(self, trainer: TrainerLike, step: int, ranks: Sequence[int]) -> None:
        """The weights of these workers differ from those of worker 0."""

    def on_rollback(self, trainer: TrainerLike, found: NonFiniteStep) -> None:
        """`trainer.state` is now from an earlier checkpoint; other batches follow."""

    def on_fit_end(self, trainer: TrainerLike) -> None:
        """Training has ended, also by an exception."""
