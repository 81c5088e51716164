"""Describes what a network was fine-tuned for: classes or a score, of single texts or of pairs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Mapping

from ..errors import InputError

KINDS = ("classification", "regression")


@dataclass(frozen=True)
class Task:
    """A task: its kind, whether its texts are pairs, and what the network's scores mean.

    pairs: None where no file says it; single texts and pairs are then both taken.
    labels: a classification's, in the order of its scores. mean, scale: a regression's; its score is
    mean + scale * the network's output.

    >>> Task("classification", pairs=False, labels=("no", "yes")).outputs
    2
    """

    kind: str
    pairs: bool | None
    labels: tuple[str, ...] = ()
    mean: float = 0.0
    scale: float = 1.0

    @property
    def outputs(self) -> int:
        """K, the number of scores per text."""
        return len(self.labels) if self.kind == "classification" else 1

    @property
    def texts(self) -> int:
        """The number of texts per example."""
        return 2 if self.pairs else 1

    def to_json(self) -> dict[str, Any]:
        """Return plain values; the inverse of `from_json`."""
        return {**asdict(self), "labels": list(self.labels)}

    @classmethod
    def from_json(cls, content: Any, where: object) -> Task:
        """Return the task that `to_json` described; raise InputError for anything else."""
        if not isinstance(content, Mapping) or set(content) != set(cls.__dataclass_fields__):
            raise InputError(
                f"{where}: 'task' must be a task that this gluon_bert wrote, got {content!r:.80}"
            )
        labels, mean, scale = content["labels"], content["mean"], content["scale"]
        sound = [
            content["kind"] in KINDS,
            content["pairs"] is None or type(content["pairs"]) is bool,
            isinstance(labels, list) and all(isinstance(label, str) for label in labels),
            all(type(number) in (int, float) for number in (mean, scale)),
        ]
        if not all(sound) or (content["kind"] == "classification") != (len(labels) >= 2):
            raise InputError(
                f"{where}: 'task' must be a task that this gluon_bert wrote, got {content!r:.80}"
            )
        return cls(content["kind"], content["pairs"], tuple(labels), float(mean), float(scale))
