"""Examples of a task, and their batches. The modules of the tasks fill them. Reads no files."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Iterator, Mapping, Protocol, Sequence

import numpy as np

from ..data.loader import LoaderState
from ..data.tokenizer import EncodedText, Tokenizer, pad
from ..inference.predictor import Predictor
from ..inference.task_inputs import TaskInput, predict_tasks
from ..model.task import Task

# Batches per pool. Sorting each pool by length reduces padding and keeps the order random.
_POOL = 32


@dataclass(frozen=True)
class TaskBatch:
    """Texts with their targets, padded to one length; see `data.batch.Batch`.

    tokens, token_types: (B, T) int32. valid_length: (B,) int32. targets: of the task's loss, B rows.
    """

    tokens: np.ndarray
    token_types: np.ndarray
    valid_length: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)

    def rows(self, start: int, stop: int) -> TaskBatch:
        """Return the batch of the rows from `start` up to `stop`."""
        arrays = (getattr(self, field.name) for field in dataclasses.fields(self))
        return type(self)(*(array[start:stop] for array in arrays))


class Examples:
    """Rows of a file as inputs of the network.

    Each task has its own class. rows: as in the file. inputs: one per row. targets: one per text of the
    inputs, None if the file has no labels.
    """

    batch_type: type[TaskBatch] = TaskBatch

    def __init__(
        self,
        task: Task,
        rows: Sequence[Any],
        inputs: Sequence[TaskInput[Any]],
        targets: Sequence[Any] | None,
    ) -> None:
        self.task, self.rows, self.inputs, self.targets = task, rows, inputs, targets
        self.texts: list[EncodedText] = [text for each in inputs for text in each.texts]

    def __len__(self) -> int:
        return len(self.texts)

    def batches(self, batch_size: int, seed: int, epoch: int) -> Iterator[np.ndarray]:
        """Yield the texts of each batch of an epoch, in random order with similar lengths together."""
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(self))
        lengths = np.array([len(text) for text in self.texts])
        batches = []
        for start in range(0, len(order), _POOL * batch_size):
            pool = order[start : start + _POOL * batch_size]
            pool = pool[np.argsort(lengths[pool], kind="stable")]
            batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        return (batches[i] for i in rng.permutation(len(batches)))

    def batch(self, numbers: Sequence[int], max_seq_length: int) -> TaskBatch:
        """Return the texts of these numbers with their targets, padded."""
        assert self.targets is not None
        padded = pad([self.texts[i] for i in numbers], max_seq_length)
        targets = self.padded_targets([self.targets[i] for i in numbers], padded.tokens.shape[1])
        return self.batch_type(padded.tokens, padded.token_types, padded.valid_length, targets)

    def padded_targets(self, targets: Sequence[Any], length: int) -> np.ndarray:
        """Return the targets of a batch as one array; `length`: of the padded texts."""
        return np.array(targets)

    def results(self, predictor: Predictor) -> list[Any]:
        """Return the result of each row."""
        return list(predict_tasks(predictor, self.inputs))

    def metrics(self, results: Sequence[Any]) -> dict[str, float]:
        """Return how good results are, by the name of the metric."""
        raise NotImplementedError

    def details(self, results: Sequence[Any]) -> list[str]:
        """Return lines with more about results than their metrics; by default none."""
        return []

    def records(self, results: Sequence[Any]) -> Iterator[dict[str, Any]]:
        """Yield each row with its result, as predictions.jsonl has them."""
        raise NotImplementedError

    def described(self) -> str:
        """Return how many rows there are, such as "1,000 texts"."""
        return f"{len(self.rows):,} rows"


class ExampleLoader:
    """Batches of labelled examples, epoch by epoch, in an order from the seed."""

    def __init__(self, data: Examples, batch_size: int, seed: int, max_seq_length: int) -> None:
        self.data, self.batch_size, self.seed, self.max_seq_length = data, batch_size, seed, max_seq_length

    def iter_from(self, start: LoaderState) -> Iterator[tuple[LoaderState, TaskBatch]]:
        """Yield the batches from a position on, epoch after epoch, each with its own position."""
        epoch, skip = start
        while True:
            for number, batch in enumerate(self.data.batches(self.batch_size, self.seed, epoch)):
                if number >= skip:
                    yield LoaderState(epoch, number), self._batch(batch)
            epoch, skip = epoch + 1, 0

    def __iter__(self) -> Iterator[TaskBatch]:
        return map(self._batch, self.data.batches(self.batch_size, self.seed, 0))

    def _batch(self, numbers: np.ndarray) -> TaskBatch:
        return self.data.batch(numbers.tolist(), self.max_seq_length)


@dataclass(frozen=True)
class TaskFiles:
    """The files of a task, and how to read them.

    text_columns: the columns of the texts, one or two. label: the column of the labels. Empty: the usual
    names. text_columns, label, header and quoting are for tables; see `tables.read_table`.
    """

    train: str
    validation: str
    test: str = ""
    text_columns: Sequence[str] = ()
    label: str = ""
    header: bool = True
    quoting: str = "auto"

    @property
    def by_role(self) -> dict[str, str]:
        """Return the files that are given, by what they are for: train, validation, test."""
        paths = {"train": self.train, "validation": self.validation, "test": self.test}
        return {role: path for role, path in paths.items() if path}


class TaskFormat(Protocol):
    """Reads the files of a kind of task. `formats.FORMATS` has them by kind."""

    def read(self, files: TaskFiles) -> Mapping[str, Sequence[Any]]:
        """Return the rows of each file, by its role; raise InputError with all problems of the files."""

    def infer_task(self, rows: Sequence[Any]) -> Task:
        """Return the task of labelled rows; raise InputError if they do not define one."""

    def examples(self, rows: Sequence[Any], task: Task, reader: Tokenizer, role: str) -> Examples:
        """Return the rows as the network reads them; raise InputError for labels unknown in training."""
