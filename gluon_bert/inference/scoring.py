"""Scores texts by pseudo-log-likelihood (Salazar et al. 2020, https://arxiv.org/abs/1910.14659)."""

from __future__ import annotations

import dataclasses
from collections import deque
from dataclasses import dataclass
from typing import Any, Iterable, Iterator, Sequence

import numpy as np

from ..data.tokenizer import EncodedText
from ..errors import InputError
from .predictor import Predictor


@dataclass(frozen=True)
class TextScore:
    """The score of a text of T tokens. K of them are scored: all except <cls> and <sep>.

    positions: (K,) of the scored tokens. log_probabilities: (K,) float64, the natural logarithm of the
    probability of each token when it is masked and all others are visible. A token outside the vocabulary has
    the probability of <unk>.
    """

    text: EncodedText
    positions: np.ndarray
    log_probabilities: np.ndarray

    @property
    def log_likelihood(self) -> float:
        """Return the pseudo-log-likelihood: the sum of all log-probabilities."""
        return float(self.log_probabilities.sum())

    @property
    def perplexity(self) -> float:
        """Return the pseudo-perplexity per token."""
        return float(np.exp(-self.log_probabilities.mean()))

    def least_likely(self, top: int = 5) -> list[tuple[int, str, float]]:
        """Return the position, token and log-probability of the least likely tokens."""
        order = np.argsort(self.log_probabilities, kind="stable")[:top]
        return [
            (int(self.positions[i]), self.text.tokens[self.positions[i]], float(self.log_probabilities[i]))
            for i in order
        ]

    def to_json(self, top: int = 5, given: Sequence[str] = ()) -> dict[str, Any]:
        """Return the score as a JSON object; `log_probabilities` has null for <cls> and <sep>."""
        log_probabilities: list[float | None] = [None] * len(self.text)
        for position, value in zip(self.positions.tolist(), self.log_probabilities.tolist()):
            log_probabilities[position] = value
        text = self.text
        return {
            **dict(zip(("text", "pair"), given)),
            "tokens": list(text.tokens),
            "unknown": list(text.unknown),
            "truncated": text.truncated,
            "log_likelihood": self.log_likelihood,
            "perplexity": self.perplexity,
            "log_probabilities": log_probabilities,
            "least_likely": [
                {"position": position, "token": token, "log_probability": value}
                for position, token, value in self.least_likely(top)
            ],
        }


def score(predictor: Predictor, texts: Iterable[EncodedText]) -> Iterator[TextScore]:
    """Yield the score of each text in order.

    Masks each token in turn. The masked copies of many texts are computed together in batches. Raises
    InputError for a text with <mask>, and for a network without a trained masked-word head.

    >>> run = gb.load_run("runs/d2l-1")                                         # doctest: +SKIP
    >>> predictor = Predictor.of(run)
    >>> for each in score(predictor, [predictor.reader.text("a crane is flying")]):
    ...     print(each.log_likelihood, each.perplexity, each.least_likely(2))
    """
    waiting: deque[tuple[EncodedText, np.ndarray]] = deque()

    def copies() -> Iterator[EncodedText]:
        for text in texts:
            check_scorable(text)
            positions = scored_positions(text)
            waiting.append((text, positions))
            yield from masked_copies(text, positions)

    log_probabilities: list[float] = []
    for prediction in predictor.predict(copies()):
        text, positions = waiting[0]
        target = text.ids[positions[len(log_probabilities)]]
        (row,) = prediction.mask_log_probabilities()
        if not np.isfinite(row[target]):
            raise InputError("the network must return finite numbers. Its training may have diverged.")
        log_probabilities.append(float(row[target]))
        if len(log_probabilities) == len(positions):
            yield TextScore(text, positions, np.array(log_probabilities))
            waiting.popleft()
            log_probabilities = []


def scored_positions(text: EncodedText) -> np.ndarray:
    """Return the positions of all tokens except <cls> and <sep>."""
    return np.flatnonzero(~np.isin(text.ids, [text.vocab.cls, text.vocab.sep]))


def masked_copies(text: EncodedText, positions: np.ndarray) -> Iterator[EncodedText]:
    """Yield a copy of the text for each position, with the token there masked."""
    for position in positions:
        ids = text.ids.copy()
        ids[position] = text.vocab.mask
        yield dataclasses.replace(text, ids=ids)


def check_scorable(text: EncodedText) -> None:
    """Raise InputError for a text that has a <mask> already."""
    if len(text.masks):
        mask = text.vocab.tokens[text.vocab.mask]
        raise InputError(f"a text to score must not contain {mask}. Replace it by a word.")
