"""Non-finite losses and gradients: the step and its largest gradients.

Detects nothing and decides nothing.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Sequence

from ..data.loader import LoaderState
from ..errors import InputError

# Steps in a row that on_nonfinite=skip leaves out before it stops.
MAX_SKIPPED_STEPS = 10
# Times that on_nonfinite=rollback returns to one checkpoint before it stops.
MAX_ROLLBACKS = 3

_SHOWN = 3


class NonFiniteStep(NamedTuple):
    """A step with a non-finite loss or gradient.

    what: which of them. position, batch: of the step, None if unknown. norms: the norm of each parameter's
    gradient before clipping.
    """

    step: int
    what: str
    position: LoaderState | None = None
    batch: Any = None
    norms: Sequence[tuple[str, float]] = ()

    def __str__(self) -> str:
        where = f" (epoch {self.position.epoch}, batch {self.position.batch})" if self.position else ""
        sentence = f"at step {self.step}{where} {self.what}"
        shown = ", ".join(f"{name} {norm:.3g}" for name, norm in self.largest())
        return f"{sentence}; largest gradients, by norm: {shown}" if shown else sentence

    def largest(self) -> list[tuple[str, float]]:
        """Return the parameters with the largest gradients, non-finite ones first."""
        ordered = sorted(self.norms, key=lambda each: each[1] if math.isfinite(each[1]) else math.inf)
        return ordered[::-1][:_SHOWN]


class TrainingDiverged(InputError):
    """The training has diverged; `found` is the step."""

    def __init__(self, found: NonFiniteStep, lr: float) -> None:
        super().__init__(
            f"training with lr={lr:g} has diverged: {found}. Use a smaller lr. For single bad steps, set "
            "on_nonfinite to skip or rollback"
        )
        self.found = found
