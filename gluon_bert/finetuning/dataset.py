"""Rows of a table -> what a task is, and texts with targets as the network reads them."""

from __future__ import annotations

import logging
import re
from collections import Counter
from dataclasses import dataclass
from typing import Iterator, Mapping, Sequence

import numpy as np

from ..data.tokenizer import EncodedText, Tokenizer
from ..errors import InputError
from ..model.task import Task
from .tables import TableRow, first_lines

log = logging.getLogger(__name__)

# Rows that are sorted by length together, in batches: padding becomes little, and the order stays random.
_POOL = 32
# As many labels as this, all of them whole numbers, may be classes or a score: the user has to say it.
_MAX_CLASSES = 20
# What tables have where a row has no label, in lower case.
_NO_LABEL = {"-", "?", "n/a", "na", "nan", "none", "null"}
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+", re.ASCII)


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
    """Find out what task labelled rows are, and log what was found.

    kind: classification, regression, or auto: classes unless a label is a number that is not whole. Raises
    InputError for scores that are not numbers, fewer than two labels, and where auto cannot decide.
    """
    pairs = len(rows[0].texts) == 2
    labels = [str(row.label) for row in rows]
    if kind == "auto":
        kind = _inferred_kind(rows)
        log.info("task: %s of %s (--task changes that)", kind, "pairs" if pairs else "single texts")
    if kind == "regression":
        scores = _scores(rows)
        if scores.std() == 0:
            raise InputError(f"--train: all {len(rows)} scores are {labels[0]}: there is nothing to learn")
        return Task(kind, pairs, mean=float(scores.mean()), scale=float(scores.std()))
    counts = Counter(labels)
    if len(counts) < 2:
        raise InputError(f"--train: all {len(rows)} labels are {labels[0]!r}: there is nothing to learn")
    _log_classes(counts)
    return Task(kind, pairs, labels=tuple(sorted(counts)))


def _log_classes(counts: Mapping[str, int]) -> None:
    """Log the classes with their numbers of rows, and warn of those that may be a mistake."""
    shown = [
        f"{label!r} {count:,}"
        for label, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]
    more = len(shown) - _MAX_CLASSES
    log.info("classes: %s%s", ", ".join(shown[:_MAX_CLASSES]), f" and {more} more" if more > 0 else "")
    for label in sorted(counts):
        if label.lower() in _NO_LABEL and not (label == "-" and "+" in counts):
            log.warning("class %r may mean that a row has no label; remove these rows if so", label)
    lower = Counter(label.lower() for label in counts)
    alike = sorted(label for label in counts if lower[label.lower()] > 1)
    if alike:
        log.warning("classes that differ in capitals only: %s", ", ".join(map(repr, alike)))
    once = sum(count == 1 for count in counts.values())
    if once > len(counts) / 2 and len(counts) > _MAX_CLASSES:
        log.warning("%d of %d classes occur once; the labels may be scores or texts", once, len(counts))


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
    if what == "--test" and len(unseen) == len(rows):
        log.info("%s: no label occurs in training, as %r: read as texts without labels", what, rows[0].label)
        return Examples(texts, None)
    if unseen:
        problems = [f"{row.where}: label {row.label!r} does not occur in the training file" for row in unseen]
        problems = first_lines(problems, what)
        problems[min(len(unseen), len(problems)) - 1] += (
            f", which has {', '.join(task.labels[:_MAX_CLASSES])}"
        )
        raise InputError("\n".join(problems))
    return Examples(texts, np.array([number[str(row.label)] for row in rows]))


def _read(row: TableRow, reader: Tokenizer) -> EncodedText:
    try:
        first, second = row.texts if len(row.texts) == 2 else (row.texts[0], None)
        return reader.text(first, second, truncate=True)
    except InputError as problem:
        raise InputError(f"{row.where}: {problem}") from problem


def _inferred_kind(rows: Sequence[TableRow]) -> str:
    """Classification or regression, by the labels; InputError where they may be either."""
    labels = [str(row.label) for row in rows]
    numbers = [_number(label) for label in labels]
    num_numbers = sum(number is not None for number in numbers)
    commas = [row for row in rows if _DECIMAL_COMMA.fullmatch(str(row.label))]
    if commas and num_numbers + len(commas) > len(rows) / 2:
        raise InputError(
            f"{commas[0].where}: label {commas[0].label!r} may be a score with a decimal comma or a class; add "
            "--task regression or --task classification"
        )
    if num_numbers < len(rows):
        if num_numbers > len(rows) / 2:
            raise InputError(
                "\n".join(
                    [*_not_numbers(rows, numbers), "if the labels are classes, add --task classification"]
                )
            )
        return "classification"
    if any(number != round(number) for number in numbers if number is not None):
        return "regression"
    if len(set(labels)) > _MAX_CLASSES:
        raise InputError(
            f"--task: {len(set(labels))} different whole numbers may be classes or a score; say "
            "classification or regression"
        )
    return "classification"


def _scores(rows: Sequence[TableRow]) -> np.ndarray:
    numbers = [_number(str(row.label), decimal_comma=True) for row in rows]
    wrong = _not_numbers(rows, numbers)
    if wrong:
        raise InputError("\n".join(wrong))
    return np.array(numbers, dtype=np.float64)


def _not_numbers(rows: Sequence[TableRow], numbers: Sequence[float | None]) -> list[str]:
    """What is wrong with the labels that are not numbers, where most are."""
    wrong = [row for row, number in zip(rows, numbers) if number is None]
    return first_lines([f"{row.where}: label {row.label!r} must be a number" for row in wrong], "labels")


def _number(label: str, decimal_comma: bool = False) -> float | None:
    """The label as a finite number, or None."""
    if decimal_comma and _DECIMAL_COMMA.fullmatch(label):
        label = label.replace(",", ".")
    return float(label) if _NUMBER.fullmatch(label) and np.isfinite(float(label)) else None
