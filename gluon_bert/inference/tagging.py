"""Tags of words, and the entities of BIO tags. Trains nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Iterable, NamedTuple, Sequence

import numpy as np

from ..data.alignment import Span, spans
from ..data.tokenizer import EncodedText, Tokenizer
from ..errors import InputError
from ..model.task import Task
from .predictor import Prediction, softmax

OUTSIDE = "O"


class Entity(NamedTuple):
    """An entity of the words from `start` up to `end`."""

    type: str
    start: int
    end: int


def entities(tags: Iterable[str]) -> list[Entity]:
    """Return the entities of BIO tags.

    A tag I-x that follows neither B-x nor I-x begins an entity, as in conlleval and seqeval.

    >>> entities(["B-person", "I-person", "O", "I-place"])
    [Entity(type='person', start=0, end=2), Entity(type='place', start=3, end=4)]
    """
    found: list[Entity] = []
    inside = ""  # the type of the entity that the word before belongs to
    for place, tag in enumerate(tags):
        prefix, _, type_ = tag.partition("-")
        if prefix == "I" and type_ == inside:
            found[-1] = found[-1]._replace(end=place + 1)
        elif tag != OUTSIDE:
            found.append(Entity(type_, place, place + 1))
        inside = type_
    return found


@dataclass(frozen=True)
class TaggedText:
    """A text with a tag for each of its N words.

    words: (N,). tags: (N,). probabilities: (N,) float64 of the tags. has_entities: whether the tags are BIO
    tags. text, spans: the running text and the positions of the words in it; None if the caller gave words.
    """

    words: Sequence[str]
    tags: Sequence[str]
    probabilities: np.ndarray
    has_entities: bool
    text: str | None = None
    spans: Sequence[Span] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values: `words`, `tags`, and `entities` or, of plain tags, their `probabilities`.

        An entity has its place in characters, `start` and `end`, its `text`, and the mean of its words'
        probabilities. If the caller gave words, the place counts words. Plain tags of running text have the
        places of the words, `starts` and `ends`.
        """
        content: dict[str, Any] = {"words": list(self.words), "tags": list(self.tags)}
        if self.has_entities:
            return {**content, "entities": self._entities()}
        if self.spans is not None:
            content.update(starts=[span.start for span in self.spans], ends=[span.end for span in self.spans])
        return {**content, "probabilities": self.probabilities.tolist()}

    def _entities(self) -> list[dict[str, Any]]:
        found = []
        for type_, start, end in entities(self.tags):
            entity = {"type": type_, "start": start, "end": end, "text": " ".join(self.words[start:end])}
            if self.text is not None and self.spans is not None:
                span = Span(self.spans[start].start, self.spans[end - 1].end)
                entity.update(start=span.start, end=span.end, text=self.text[span.start : span.end])
            found.append({**entity, "probability": float(self.probabilities[start:end].mean())})
        return found


class TextToTag:
    """Words for tagging, in parts that fit the network.

    texts: the parts, of whole words. first_pieces: for each part the position of each word's first piece,
    which carries the word's tag.
    """

    def __init__(
        self,
        reader: Tokenizer,
        task: Task,
        words: Sequence[str],
        text: str | None = None,
        spans: Sequence[Span] | None = None,
    ) -> None:
        if not words:
            raise InputError("the text must have at least one word, got an empty text")
        self.task, self.words, self.text, self.spans = task, words, text, spans
        self.texts: list[EncodedText] = []
        self.first_pieces: list[np.ndarray] = []
        room = reader.max_seq_length - 2  # <cls> and <sep>
        pieces: list[str] = []
        starts: list[int] = []
        for word in words:
            new = _pieces(reader, word)[:room]
            if len(pieces) + len(new) > room:
                self._add(reader, pieces, starts)
                pieces, starts = [], []
            starts.append(len(pieces) + 1)
            pieces += new
        self._add(reader, pieces, starts)

    def _add(self, reader: Tokenizer, pieces: list[str], starts: list[int]) -> None:
        self.texts.append(reader.tokens(pieces))
        self.first_pieces.append(np.array(starts))

    @classmethod
    def of_text(cls, reader: Tokenizer, task: Task, text: str) -> TextToTag:
        """Split running text with the tokenizer and return its words for tagging."""
        words = reader.words(text)
        return cls(reader, task, words, text, spans(text, words))

    def targets(self, tags: Sequence[int]) -> list[np.ndarray]:
        """Return for each part (T,) int32 the index of each token's tag; -1 without a tag."""
        found, done = [], 0
        for text, places in zip(self.texts, self.first_pieces):
            target = np.full(len(text), -1, dtype=np.int32)
            target[places] = tags[done : done + len(places)]
            done += len(places)
            found.append(target)
        return found

    def result(self, predictions: Sequence[Prediction]) -> TaggedText:
        """Return the text with the likeliest tag of each word."""
        parts = zip(predictions, self.first_pieces)
        scores = np.concatenate([each.scores_of_tokens()[places] for each, places in parts])
        if not np.isfinite(scores).all():
            raise InputError("the network must return finite numbers. Its training may have diverged.")
        best = scores.argmax(axis=-1)
        probabilities = softmax(scores)[np.arange(len(best)), best]
        tags = [self.task.labels[i] for i in best]
        return TaggedText(self.words, tags, probabilities, self.task.has_entities, self.text, self.spans)


def _pieces(reader: Tokenizer, word: str) -> list[str]:
    """Return the pieces of a word; one without a visible character is an unknown word."""
    return reader.pieces(word) or [reader.vocab.tokens[reader.vocab.unk]]
