"""Where a run stands between two steps, to and from plain values. Holds no weights and takes no step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Mapping, Sequence

from ..data.loader import Position
from ..errors import BadInput
from .meters import Averages, Best, Clock, Meter, numbers
from .scaling import LossScale


@dataclass
class Standing:
    """All that the next step depends on beside the weights and the optimizer.

    step: steps made. position: of the next batch. evaluating: whether the evaluation that is due after this
    step is still to be made. skipped: steps that were skipped in a row, as their numbers were wrong.
    log_bytes: of the log, when this was kept. meter: of the window that is not logged yet. scale: of the next
    step's loss, None where it has none.
    """

    step: int = 0
    position: Position = field(default_factory=Position)
    evaluating: bool = False
    best: Best | None = None
    skipped: int = 0
    log_bytes: int = 0
    meter: Meter = field(default_factory=Meter)
    clock: Clock = field(default_factory=Clock)
    scale: LossScale | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, exact to the last bit. Waits for the devices."""
        return {
            "step": self.step,
            "position": self.position._asdict(),
            "evaluating": self.evaluating,
            "best": self.best and {**self.best._asdict(), "held_out": self.best.held_out._asdict()},
            "skipped": self.skipped,
            "log_bytes": self.log_bytes,
            "meter": self.meter.to_json(),
            "clock": self.clock.to_json(),
            "loss_scale": None if self.scale is None else self.scale.to_json(),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any], contexts: Sequence[Any], where: str) -> Standing:
        """The inverse of `to_json`; BadInput, which begins with `where`, if it was not written by that."""
        try:
            best, scale = content["best"], content.get("loss_scale")
            return cls(
                _count(content["step"]),
                Position(_count(content["position"]["epoch"]), _count(content["position"]["batch"])),
                content["evaluating"] is True,
                None if best is None else _best(best),
                _count(content["skipped"]),
                _count(content["log_bytes"]),
                Meter.from_json(content["meter"], contexts),
                Clock.from_json(content["clock"]),
                None if scale is None else LossScale.from_json(scale, contexts[0]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise BadInput(f"{where}: cannot be gone on from ({type(error).__name__}: {error})") from error


def _best(content: Mapping[str, Any]) -> Best:
    held_out = [content["held_out"][name] for name in Averages._fields]  # null, for JSON, is NaN
    averages = Averages(*numbers(held_out, len(held_out)).tolist())
    counts = [_count(content[name]) for name in ("step", "evaluations", "since")]
    return Best(counts[0], averages, *counts[1:])


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value
