"""Numbers gone wrong in a run: where, and in which gradients. Finds nothing and decides nothing."""

from __future__ import annotations

import math
from typing import NamedTuple, Sequence

from ..data.batch import Batch
from ..data.loader import LoaderState
from ..errors import InputError

# Steps in a row that --on-nonfinite skip leaves out before it stops: so many are no accident.
MAX_SKIPPED_STEPS = 10
# Times that --on-nonfinite rollback goes back to one checkpoint before it stops.
MAX_ROLLBACKS = 3

_SHOWN = 3


class NonFiniteStep(NamedTuple):
    """A step whose numbers went wrong.

    what: the number. position, batch: what the step was made with, None where several were or none. norms:
    by parameter, of its gradient before clipping.
    """

    step: int
    what: str
    position: LoaderState | None = None
    batch: Batch | None = None
    norms: Sequence[tuple[str, float]] = ()

    def in_words(self) -> str:
        """The trouble for a person."""
        where = f" (epoch {self.position.epoch}, batch {self.position.batch})" if self.position else ""
        told = f"at step {self.step}{where} {self.what}"
        shown = ", ".join(f"{name} {norm:.3g}" for name, norm in self.largest())
        return f"{told}; largest gradients, by norm: {shown}" if shown else told

    def largest(self) -> list[tuple[str, float]]:
        """The parameters with the largest gradients, those that are no numbers before all others."""
        ordered = sorted(self.norms, key=lambda each: each[1] if math.isfinite(each[1]) else math.inf)
        return ordered[::-1][:_SHOWN]


class TrainingDiverged(InputError):
    """The training has diverged; `trouble` says where."""

    def __init__(self, trouble: NonFiniteStep, lr: float) -> None:
        super().__init__(
            f"--lr {lr:g}: {trouble.in_words()}. The training has diverged: a smaller learning rate is "
            "the usual remedy; for single bad steps there is --on-nonfinite skip, or back"
        )
        self.trouble = trouble
