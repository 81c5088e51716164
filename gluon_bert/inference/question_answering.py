"""Answers to questions: parts of a context, which may exceed the network's length. Trains nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Sequence

import numpy as np

from ..data.tokenizer import EncodedText, Tokenizer
from ..errors import InputError
from ..model.task import Task
from .predictor import Prediction

# The longest answer in tokens, as in run_squad.py of google-research/bert.
MAX_ANSWER_TOKENS = 30
# <cls> question <sep> context <sep>
_NUM_SPECIAL = 3


@dataclass(frozen=True)
class Answer:
    """The answer to a question: `context[start:end]`, or no answer.

    score: the sum of the scores of the answer's first and last token. no_answer_score: the score of "no
    answer"; None if all questions in training had an answer.
    """

    context: str
    start: int
    end: int
    score: float
    no_answer_score: float | None = None

    @property
    def has_answer(self) -> bool:
        """Return whether the answer scores at least as high as "no answer"."""
        return self.no_answer_score is None or self.score >= self.no_answer_score

    @property
    def text(self) -> str:
        """Return the answer as in the context, or "" for no answer."""
        return self.context[self.start : self.end] if self.has_answer else ""

    def to_json(self) -> dict[str, Any]:
        """Return plain values: `answer`, `start` and `end` in characters (None without one), and scores."""
        place = (self.start, self.end) if self.has_answer else (None, None)
        content = {"answer": self.text, "start": place[0], "end": place[1], "score": self.score}
        return (
            content if self.no_answer_score is None else {**content, "no_answer_score": self.no_answer_score}
        )


class Question:
    """A question and its context, in windows that fit the network.

    texts: a pair of the question and a part of the context each. Windows overlap by a third of the network's
    length, as in transformers' run_qa.py (128 of 384 tokens). The overlap is at most half of the context's
    part.
    """

    def __init__(self, reader: Tokenizer, task: Task, question: str, context: str) -> None:
        self.task, self.question, self.context = task, question, context
        asked = reader.pieces(question)
        pieces, self._spans = reader.pieces_with_spans(context)
        if not asked or not pieces:
            what = "context" if asked else "question"
            raise InputError(f"the {what} must have at least one word, got an empty text")
        room = reader.max_seq_length - len(asked) - _NUM_SPECIAL
        if room < 1:
            most = reader.max_seq_length - _NUM_SPECIAL - 1
            raise InputError(
                f"the question must have at most {most} tokens, so that {reader.max_seq_length} leave room "
                f"for the context, got {len(asked)}. Shorten it, or fine-tune with a larger max_seq_length."
            )
        overlap = min(reader.max_seq_length // 3, room // 2)
        self._first = len(asked) + 2  # the position of a window's first token of the context
        self._starts = list(range(0, max(len(pieces) - overlap, 1), room - overlap))
        self.texts: list[EncodedText] = [
            reader.tokens(asked, pieces[start : start + room]) for start in self._starts
        ]

    def targets(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return for each window the positions of the first and the last token of `context[start:end]`.

        Both are 0, the position of <cls>, for a window without all of it, and for start = end.
        """
        begins, ends = np.array(self._spans).T
        first, last = int((ends <= start).sum()), int((begins < end).sum()) - 1
        found = []
        for window, text in zip(self._starts, self.texts):
            stop = window + len(text) - self._first - 1
            inside = start < end and window <= first <= last < stop
            shift = self._first - window
            found.append((first + shift, last + shift) if inside else (0, 0))
        return found

    def result(self, predictions: Sequence[Prediction]) -> Answer:
        """Return the part of the context with the highest score in any window."""
        best, place, no_answer = -np.inf, (0, 0), np.inf
        for window, prediction in zip(self._starts, predictions):
            scores = prediction.scores_of_tokens()
            if not np.isfinite(scores).all():
                raise InputError("the network must return finite numbers. Its training may have diverged.")
            no_answer = min(no_answer, float(scores[0].sum()))
            first, last, score = best_span(scores[self._first : -1])
            if score > best:
                best, place = score, (window + first, window + last)
        start, end = self._spans[place[0]].start, self._spans[place[1]].end
        return Answer(self.context, start, end, best, no_answer if self.task.no_answer else None)


def best_span(scores: np.ndarray) -> tuple[int, int, float]:
    """Return the first and the last token with the highest sum of scores, (T, 2), and that sum.

    The last token does not precede the first one, and follows it by fewer than MAX_ANSWER_TOKENS.
    """
    sums = scores[:, :1] + scores[:, 1]
    place = np.arange(len(scores))
    distance = place - place[:, None]
    sums[(distance < 0) | (distance >= MAX_ANSWER_TOKENS)] = -np.inf
    first, last = np.unravel_index(sums.argmax(), sums.shape)
    return int(first), int(last), float(sums[first, last])
