"""Tables of texts with classes or scores: the task of rows, and texts with targets."""

from __future__ import annotations

import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

import numpy as np

from ..data.tokenizer import EncodedText, Tokenizer
from ..errors import InputError
from ..inference.task_inputs import Sentence, SentenceResult
from ..model.task import Task
from .dataset import Examples, TaskFiles
from .metrics import classification_metrics, regression_metrics
from .tables import TableRow, choose_columns, first_lines, read_table

log = logging.getLogger(__name__)

# This many different whole numbers may be classes or scores, so the user must choose the task.
_MAX_CLASSES = 20
# Entries of tables for a missing label, in lower case.
_NO_LABEL = {"-", "?", "n/a", "na", "nan", "none", "null"}
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+", re.ASCII)


class SentenceExamples(Examples):
    """Texts or pairs with their targets, (N,): int64 classes or float64 scores."""

    def metrics(self, results: Sequence[SentenceResult]) -> dict[str, float]:
        assert self.targets is not None
        targets, contents = np.asarray(self.targets), [result.content for result in results]
        if self.task.kind == "regression":
            return regression_metrics(targets, np.array([content["score"] for content in contents]))
        number = {label: i for i, label in enumerate(self.task.labels)}
        predicted = np.array([number[content["label"]] for content in contents])
        return classification_metrics(targets, predicted, self.task.outputs)

    def records(self, results: Sequence[SentenceResult]) -> Iterator[dict[str, Any]]:
        for row, result in zip(self.rows, results):
            given = {"label": row.label} if row.label is not None else {}
            yield {"texts": row.texts, "given": given, "predicted": result.to_json()}


class SentenceFormat:
    """Reads tables of texts with classes or scores; see `tables.read_table`.

    kind: classification, regression, or auto: classes unless a label is a number that is not whole.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def read(self, files: TaskFiles) -> dict[str, list[TableRow]]:
        """Return the rows of each file, by its role."""
        columns = choose_columns(
            Path(files.train),
            "train",
            files.header,
            list(files.text_columns),
            files.label or None,
            files.quoting,
        )
        return {
            role: read_table(Path(path), role, files.header, columns, role != "test", quoting=files.quoting)
            for role, path in files.by_role.items()
        }

    def infer_task(self, rows: Sequence[TableRow]) -> Task:
        """Return the task of labelled rows, and log it."""
        return infer_task(rows, self.kind)

    def examples(
        self, rows: Sequence[TableRow], task: Task, reader: Tokenizer, role: str
    ) -> SentenceExamples:
        """Return the rows as the network reads them."""
        return examples(rows, task, reader, role)


def infer_task(rows: Sequence[TableRow], kind: str = "auto") -> Task:
    """Infer the task of labelled rows, and log it.

    kind: classification, regression, or auto: classes unless a label is a number that is not whole. Raise
    InputError for scores that are not numbers, for fewer than two labels, and if auto cannot decide.
    """
    pairs = len(rows[0].texts) == 2
    labels = [str(row.label) for row in rows]
    if kind == "auto":
        kind = _inferred_kind(rows)
        log.info("task: %s of %s, by the labels", kind, "pairs" if pairs else "single texts")
    if kind == "regression":
        scores = _scores(rows)
        if scores.std() == 0:
            raise InputError(f"train: all {len(rows)} scores are {labels[0]}: there is nothing to learn")
        return Task(kind, pairs, mean=float(scores.mean()), scale=float(scores.std()))
    counts = Counter(labels)
    if len(counts) < 2:
        raise InputError(f"train: all {len(rows)} labels are {labels[0]!r}: there is nothing to learn")
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


def examples(rows: Sequence[TableRow], task: Task, reader: Tokenizer, what: str) -> SentenceExamples:
    """Return the rows as inputs of the network, and log how many texts were truncated.

    what: train, validation or test. Raise InputError for labels that do not occur in training.
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
    return SentenceExamples(task, rows, list(map(Sentence, texts)), _targets(rows, task, what))


def _targets(rows: Sequence[TableRow], task: Task, what: str) -> Sequence[Any] | None:
    """Return the rows' classes or scores, or None."""
    if rows[0].label is None:
        return None
    if task.kind == "regression":
        return _scores(rows).tolist()
    number = {label: i for i, label in enumerate(task.labels)}
    unseen = [row for row in rows if row.label not in number]
    if what == "test" and len(unseen) == len(rows):
        log.info("%s: no label occurs in training, as %r: read as texts without labels", what, rows[0].label)
        return None
    if unseen:
        problems = [f"{row.where}: label {row.label!r} does not occur in the training file" for row in unseen]
        problems = first_lines(problems, what)
        problems[min(len(unseen), len(problems)) - 1] += (
            f", which has {', '.join(task.labels[:_MAX_CLASSES])}"
        )
        raise InputError("\n".join(problems))
    return [number[str(row.label)] for row in rows]


def _read(row: TableRow, reader: Tokenizer) -> EncodedText:
    try:
        first, second = row.texts if len(row.texts) == 2 else (row.texts[0], None)
        return reader.text(first, second, truncate=True)
    except InputError as problem:
        raise InputError(f"{row.where}: {problem}") from problem


def _inferred_kind(rows: Sequence[TableRow]) -> str:
    """Classification or regression, by the labels. Raise InputError if they may be either."""
    labels = [str(row.label) for row in rows]
    numbers = [_number(label) for label in labels]
    num_numbers = sum(number is not None for number in numbers)
    commas = [row for row in rows if _DECIMAL_COMMA.fullmatch(str(row.label))]
    if commas and num_numbers + len(commas) > len(rows) / 2:
        raise InputError(
            f"{commas[0].where}: label {commas[0].label!r} may be a score with a decimal comma or a class; "
            "choose task=regression or task=classification"
        )
    if num_numbers < len(rows):
        if num_numbers > len(rows) / 2:
            raise InputError(
                "\n".join(
                    [*_not_numbers(rows, numbers), "if the labels are classes, choose task=classification"]
                )
            )
        return "classification"
    if any(number != round(number) for number in numbers if number is not None):
        return "regression"
    if len(set(labels)) > _MAX_CLASSES:
        raise InputError(
            f"train: {len(set(labels))} different whole numbers may be classes or a score; "
            "choose task=classification or task=regression"
        )
    return "classification"


def _scores(rows: Sequence[TableRow]) -> np.ndarray:
    numbers = [_number(str(row.label), decimal_comma=True) for row in rows]
    wrong = _not_numbers(rows, numbers)
    if wrong:
        raise InputError("\n".join(wrong))
    return np.array(numbers, dtype=np.float64)


def _not_numbers(rows: Sequence[TableRow], numbers: Sequence[float | None]) -> list[str]:
    """Return what is wrong with the labels that are not numbers, where most are."""
    wrong = [row for row, number in zip(rows, numbers) if number is None]
    return first_lines([f"{row.where}: label {row.label!r} must be a number" for row in wrong], "labels")


def _number(label: str, decimal_comma: bool = False) -> float | None:
    """Return the label as a finite number, or None."""
    if decimal_comma and _DECIMAL_COMMA.fullmatch(label):
        label = label.replace(",", ".")
    return float(label) if _NUMBER.fullmatch(label) and np.isfinite(float(label)) else None
