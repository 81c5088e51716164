"""Numbers gone wrong in a run: where, and in which gradients. Finds nothing and decides nothing."""

from __future__ import annotations

import math
from typing import NamedTuple, Sequence

from ..data.batch import Batch
from ..data.loader import Position
from ..errors import BadInput

# Steps in a row that --bad-numbers skip leaves out before it stops: so many are no accident.
MOST_SKIPPED = 10
# Times that --bad-numbers back goes back to one checkpoint before it stops.
MOST_BACK = 3

_SHOWN = 3


class Trouble(NamedTuple):
    """A step whose numbers went wrong.

    what: the number. position, batch: what the step was made with, None where several were or none. norms:
    by parameter, of its gradient before clipping.
    """

    step: int
    what: str
    position: Position | None = None
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


class Diverged(BadInput):
    """The training has diverged; `trouble` says where."""

    def __init__(self, trouble: Trouble, lr: float) -> None:
        super().__init__(
            f"--lr {lr:g}: {trouble.in_words()}. The training has diverged: a smaller learning rate is "
            "the usual remedy; for single bad steps there is --bad-numbers skip, or back"
        )
        self.trouble = trouble
