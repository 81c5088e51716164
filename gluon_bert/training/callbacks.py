"""The events of a training run and who handles them. Trains nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Sequence

from ..checkpoint import Snapshot
from .divergence import NonFiniteStep
from .metrics import Metrics
from .state import BestEvaluation, StepReport, TrainState

if TYPE_CHECKING:
    from .trainer import Trainer


class Reporter:
    """Who is told of a run's progress; this one keeps it to itself."""

    def stepped(self, step: int) -> None:
        """A step has been queued."""

    def progressed(self, progress: StepReport) -> None:
        """A window of steps is done."""

    def evaluated(self, step: int, validation: Metrics, best: BestEvaluation) -> None:
        """The validation text was evaluated after this step; `best` takes it into account."""

    def on_non_finite(self, trouble: NonFiniteStep) -> None:
        """The numbers of a step are unusable; whether that ends the run is another matter."""

    def overflowed(self, step: int, scale: float) -> None:
        """A step was skipped, as float16 could not hold a gradient of the loss times this scale."""

    def on_weight_drift(self, step: int, ranks: Sequence[int]) -> None:
        """The weights of these workers are not those of the first one any more."""

    def on_rollback(self, state: TrainState, trouble: NonFiniteStep) -> None:
        """The run goes on from an earlier checkpoint, where it stands so, with other batches than before."""


class Saver:
    """Who keeps what a run can be gone on from; this one keeps nothing."""

    def save(self, trainer: Trainer) -> None:
        """A checkpoint is due; `trainer.snapshot()` is what it holds."""

    def latest(self) -> Snapshot | None:
        """The checkpoint that was kept last, None where there is none."""
        return None
