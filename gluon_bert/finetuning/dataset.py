"""Rows of a table -> what a task is, and texts with targets as the network reads them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Iterator, Sequence

import numpy as np

from ..data.tokenizer import EncodedText, Tokenizer
from ..errors import InputError
from ..model.task import Task
from .tables import TableRow

log = logging.getLogger(__name__)

# Rows that are sorted by length together, in batches: padding becomes little, and the order stays random.
_POOL = 32
# As many labels as this, all of them whole numbers, may be classes or a score: the user has to say it.
_MOST_CLASSES = 20
_MOST_TOLD = 10


@dataclass(frozen=True)
class Examples:
    """Texts and their targets, (N,): int64 classes or float64 scores; None where the file has no labels."""

    texts: Sequence[EncodedText]
    targets: np.ndarray | None

    def __len__(self) -> int:
        return len(self.texts)

    def batches(self, batch_size: int, seed: int, epoch: int) -> Iterator[np.ndarray]:
        """The rows of each batch of an epoch, in an order from the seed; like lengths stand together."""
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(self))
        lengths = np.array([len(text) for text in self.texts])
        batches = []
        for start in range(0, len(order), _POOL * batch_size):
            pool = order[start : start + _POOL * batch_size]
            pool = pool[np.argsort(lengths[pool], kind="stable")]
            batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        return (batches[i] for i in rng.permutation(len(batches)))


def infer_task(rows: Sequence[TableRow], kind: str = "auto") -> Task:
    """The task that labelled rows are; what was guessed of it is told.

    kind: classification, regression, or auto: classes unless a label is a number that is not whole. Raises
    InputError for scores that are no numbers, fewer than two labels, and where auto cannot tell.
    """
    pairs = len(rows[0].texts) == 2
    labels = [str(row.label) for row in rows]
    distinct = sorted(set(labels))
    if kind == "auto":
        kind = _guessed(distinct)
        log.info("task: %s of %s (--task changes that)", kind, "pairs" if pairs else "single texts")
    if kind == "regression":
        scores = _scores(rows)
        if scores.std() == 0:
            raise InputError(f"--train: all {len(rows)} scores are {distinct[0]}: there is nothing to learn")
        return Task(kind, pairs, mean=float(scores.mean()), scale=float(scores.std()))
    if len(distinct) < 2:
        raise InputError(f"--train: all {len(rows)} labels are {distinct[0]!r}: there is nothing to learn")
    return Task(kind, pairs, labels=tuple(distinct))


def examples(rows: Sequence[TableRow], task: Task, reader: Tokenizer, what: str) -> Examples:
    """The rows as the network reads them; how many texts were cut is told.

    what: the flag that named their file. Raises InputError for labels that do not occur in training.
    """
    texts = [_read(row, reader) for row in rows]
    cut = sum(text.truncated > 0 for text in texts)
    if cut:
        log.info(
            "%s: %d of %d texts are longer than %d tokens and cut",
            what,
            cut,
            len(texts),
            reader.max_seq_length,
        )
    if rows[0].label is None:
        return Examples(texts, None)
    if task.kind == "regression":
        return Examples(texts, _scores(rows))
    number = {label: i for i, label in enumerate(task.labels)}
    unseen = [row for row in rows if row.label not in number]
    if unseen:
        told = [
            f"{row.where}: label {row.label!r} does not occur in the training file"
            for row in unseen[:_MOST_TOLD]
        ]
        told[-1] += f", which has {', '.join(task.labels[:_MOST_CLASSES])}"
        if len(unseen) > _MOST_TOLD:
            told.append(f"and {len(unseen) - _MOST_TOLD} more lines")
        raise InputError("\n".join(told))
    return Examples(texts, np.array([number[str(row.label)] for row in rows]))


def _read(row: TableRow, reader: Tokenizer) -> EncodedText:
    try:
        first, second = row.texts if len(row.texts) == 2 else (row.texts[0], None)
        return reader.text(first, second, truncate=True)
    except InputError as problem:
        raise InputError(f"{row.where}: {problem}") from problem


def _guessed(distinct: Sequence[str]) -> str:
    numbers = [_number(label) for label in distinct]
    if any(number is None for number in numbers):
        return "classification"
    if any(number != round(number) for number in numbers if number is not None):
        return "regression"
    if len(distinct) > _MOST_CLASSES:
        raise InputError(
            f"--task: {len(distinct)} different whole numbers may be classes or a score; say "
            "classification or regression"
        )
    return "classification"


def _scores(rows: Sequence[TableRow]) -> np.ndarray:
    numbers = [_number(str(row.label)) for row in rows]
    wrong = [row for row, number in zip(rows, numbers) if number is None]
    if wrong:
        told = [f"{row.where}: {row.label!r} is no number, as a score must be" for row in wrong[:_MOST_TOLD]]
        raise InputError("\n".join(told))
    return np.array(numbers, dtype=np.float64)


def _number(label: str) -> float | None:
    try:
        number = float(label)
    except ValueError:
        return None
    return number if np.isfinite(number) else None
