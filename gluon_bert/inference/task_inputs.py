"""Inputs and results of fine-tuned networks. Reads no files."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Iterable, Iterator, Mapping, Protocol, Sequence, TypeVar

from ..data.tokenizer import EncodedText, Tokenizer
from ..errors import InputError
from ..model.task import Task
from .predictor import NOT_FINE_TUNED, Prediction, Predictor
from .question_answering import Question
from .tagging import TextToTag


class TaskResult(Protocol):
    """The result of one input."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""


Result = TypeVar("Result", covariant=True)


class TaskInput(Protocol[Result]):
    """One input of a task, and its texts for the network, one or several."""

    @property
    def texts(self) -> Sequence[EncodedText]:
        """Return the texts that the network reads."""

    def result(self, predictions: Sequence[Prediction]) -> Result:
        """Return the result, from the predictions of all its texts."""


@dataclass(frozen=True)
class SentenceResult:
    """The label with the probabilities of all labels, or the score."""

    content: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return dict(self.content)


class Sentence:
    """A text or a pair of texts, for its label or its score."""

    def __init__(self, text: EncodedText) -> None:
        self.texts = [text]

    def result(self, predictions: Sequence[Prediction]) -> SentenceResult:
        """Return the label with its probabilities, or the score."""
        return SentenceResult(predictions[0].task_prediction)


def task_input(
    task: Task | None, reader: Tokenizer, first: str, second: str | None = None, truncate: bool = True
) -> TaskInput[TaskResult]:
    """Return a text or a pair of texts as a task reads it.

    truncate: cut a text that is too long for a label or a score; the other tasks read all of it. Raises
    InputError for a text that the task does not take.
    """
    if task is None:
        raise InputError(NOT_FINE_TUNED)
    if task.kind == "tagging":
        if second is not None:
            raise InputError("the text must be a single text for tagging, got a pair")
        return TextToTag.of_text(reader, task, first)
    if task.kind == "question-answering":
        if second is None:
            raise InputError("the text must be a pair of a question and its context, got a single text")
        return Question(reader, task, first, second)
    return Sentence(reader.text(first, second, truncate))


def predict_tasks(predictor: Predictor, inputs: Iterable[TaskInput[Result]]) -> Iterator[Result]:
    """Yield the result of each input, in their order. Reads ahead as `Predictor.predict` does."""
    waiting: deque[TaskInput[Result]] = deque()

    def texts() -> Iterator[EncodedText]:
        for each in inputs:
            waiting.append(each)
            yield from each.texts

    predictions: list[Prediction] = []
    for prediction in predictor.predict(texts()):
        predictions.append(prediction)
        if len(predictions) == len(waiting[0].texts):
            yield waiting.popleft().result(predictions)
            predictions = []
