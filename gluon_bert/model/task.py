"""Describes what a network was fine-tuned for: labels or a score of a text, tags of words, or answers."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Collection, Mapping

from ..errors import InputError

KINDS = ("classification", "regression", "tagging", "question-answering")
# Kinds that score every token, without the pooler. The others score a text.
TOKEN_KINDS = ("tagging", "question-answering")
# Tags of words: outside of entities, the first word of an entity, and the words inside it.
BIO_TAG = re.compile(r"O|[BI]-\S+")


def are_bio_tags(labels: Collection[str]) -> bool:
    """Return whether labels are BIO tags, which make entities. Plain labels, such as NOUN, do not.

    >>> are_bio_tags(["O", "B-place"]), are_bio_tags(["NOUN", "VERB"]), are_bio_tags(["O", "X"])
    (True, False, False)
    """
    return any(label != "O" for label in labels) and all(map(BIO_TAG.fullmatch, labels))


@dataclass(frozen=True)
class Task:
    """A task: its kind, whether its texts are pairs, and what the network's scores mean.

    pairs: None if unknown; single texts and pairs are then both allowed. A pair of question answering is a
    question and its context. labels: of classification or tagging, in the order of the scores. Tagging has
    BIO tags or plain labels, such as parts of speech. mean, scale: of regression, whose score is mean + scale
    * the network's output. no_answer: of question answering, whether a context may have no answer.

    >>> Task("classification", pairs=False, labels=("no", "yes")).outputs
    2
    """

    kind: str
    pairs: bool | None
    labels: tuple[str, ...] = ()
    mean: float = 0.0
    scale: float = 1.0
    no_answer: bool = False

    @property
    def outputs(self) -> int:
        """K, the number of scores per text or token. Question answering scores an answer's start and end."""
        return {"regression": 1, "question-answering": 2}.get(self.kind, len(self.labels))

    @property
    def scores_tokens(self) -> bool:
        """Whether the network scores every token."""
        return self.kind in TOKEN_KINDS

    @property
    def has_entities(self) -> bool:
        """Whether the tags of words make entities."""
        return self.kind == "tagging" and are_bio_tags(self.labels)

    @property
    def texts(self) -> int:
        """Return the number of texts per example."""
        return 2 if self.pairs else 1

    def to_json(self) -> dict[str, Any]:
        """Return plain values; the inverse of `from_json`."""
        return {**asdict(self), "labels": list(self.labels)}

    @classmethod
    def from_json(cls, content: Any, where: object) -> Task:
        """Return the task that `to_json` described; raise InputError for anything else."""
        refusal = InputError(
            f"{where}: 'task' must be a task that this gluon_bert wrote, got {content!r:.80}"
        )
        if not isinstance(content, Mapping) or set(content) != set(cls.__dataclass_fields__):
            raise refusal
        kind, labels, mean, scale = (content[name] for name in ("kind", "labels", "mean", "scale"))
        sound = [
            kind in KINDS,
            content["pairs"] is None or type(content["pairs"]) is bool,
            isinstance(labels, list) and all(isinstance(label, str) for label in labels),
            all(type(number) in (int, float) for number in (mean, scale)),
            type(content["no_answer"]) is bool,
        ]
        if not all(sound) or (kind in ("classification", "tagging")) != (len(labels) >= 2):
            raise refusal
        pairs, no_answer = content["pairs"], content["no_answer"]
        return cls(kind, pairs, tuple(labels), float(mean), float(scale), no_answer)
