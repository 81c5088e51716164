"""Texts as ids, as in training, in batches of similar length. Masks nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable, Iterator, NamedTuple, Sequence

import numpy as np

from ..errors import InputError
from .alignment import Span, spans
from .vocab import Normalization, Vocabulary

# Padded lengths are multiples of this. MXNet plans its memory again for every new shape.
_LENGTH_STEP = 8


@dataclass(frozen=True)
class EncodedText:
    """A text or a pair as inputs of the network: `<cls> a <sep>` or `<cls> a <sep> b <sep>`.

    ids, token_types: (T,) int32. tokens: the T tokens, also unknown ones; with WordPiece the pieces, and
    whole words for [UNK]. unknown: the unknown tokens, each once. vocab: the vocabulary of the ids.
    truncated: the number of tokens that were cut off.
    """

    tokens: list[str]
    ids: np.ndarray
    token_types: np.ndarray
    unknown: list[str]
    vocab: Vocabulary
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def is_pair(self) -> bool:
        """Return whether there is a second segment."""
        return bool(self.token_types[-1])

    @property
    def masks(self) -> np.ndarray:
        """Return the positions of <mask>, rising, (K,)."""
        return np.flatnonzero(self.ids == self.vocab.mask)

    @property
    def words(self) -> np.ndarray:
        """(T,) int: which word of the text each token belongs to, counted from 0; -1 for <cls> and <sep>."""
        around = np.isin(self.ids, [self.vocab.cls, self.vocab.sep])
        begins = ~around & ~self.vocab.is_continuation[self.ids]
        # The first piece of a text always begins a word.
        begins[1:] |= around[:-1] & ~around[1:]
        return np.where(around, -1, np.cumsum(begins) - 1)


class Tokenizer:
    """Encodes texts, tokens or ids with a vocabulary, up to a maximum length.

    >>> reader = Tokenizer(Vocabulary(["crane", "a"]), 8, Normalization(lowercase=True))
    >>> text = reader.text("A <mask> crane.")
    >>> text.tokens, text.ids.tolist(), text.unknown
    (['<cls>', 'a', '<mask>', 'crane', '.', '<sep>'], [3, 6, 2, 5, 0, 4], ['.'])
    """

    def __init__(self, vocab: Vocabulary, max_seq_length: int, normalization: Normalization) -> None:
        self.vocab, self.max_seq_length, self.normalization = vocab, max_seq_length, normalization
        # A special token in a text is an unknown word, as in training. Only <mask> is allowed.
        self._unknown = vocab.special_but(normalization.all_added)
        self._unknown[vocab.mask] = False

    def text(self, first: str, second: str | None = None, truncate: bool = False) -> EncodedText:
        """Return a text or a pair of texts as ids.

        Raise InputError if one is empty or they are too long together.
        truncate: instead truncate the longer text at its end, as in training.
        """
        return self.tokens(self.pieces(first), None if second is None else self.pieces(second), truncate)

    def tokens(
        self, first: Sequence[str], second: Sequence[str] | None = None, truncate: bool = False
    ) -> EncodedText:
        """Return tokens as an EncodedText. They must not contain <cls> and <sep>, which are added."""
        if isinstance(first, str) or isinstance(second, str):
            raise InputError("tokens must be a list, got a string. Split it first, as in text.split().")
        return self._text([first] if second is None else [first, second], truncate)

    def ids(
        self, first: Sequence[int], second: Sequence[int] | None = None, truncate: bool = False
    ) -> EncodedText:
        """Return an EncodedText of ids without <cls> and <sep>. Raise InputError for invalid ids."""
        segments = [first] if second is None else [first, second]
        for number in (number for segment in segments for number in segment):
            if isinstance(number, bool) or not isinstance(number, (int, np.integer)):
                raise InputError(f"ids must be whole numbers below {len(self.vocab)}, got {number!r}")
            if not 0 <= number < len(self.vocab):
                raise InputError(f"ids must be from 0 to {len(self.vocab) - 1}, got {number}")
            if number in (self.vocab.pad, self.vocab.cls, self.vocab.sep):
                raise InputError(
                    f"id {number} is {self.vocab.tokens[number]}, which no text holds: it is put in where it "
                    "belongs"
                )
        return self._text([self.vocab.to_tokens(segment) for segment in segments], truncate)

    def words(self, text: str) -> list[str]:
        """Split running text into words, normalized as in training."""
        return self.vocab.split(text, self.normalization)

    def pieces(self, text: str) -> list[str]:
        """Split running text into tokens, without <cls> and <sep>."""
        return [piece for word in self.words(text) for piece in self.vocab.pieces(word)]

    def pieces_with_spans(self, text: str) -> tuple[list[str], list[Span]]:
        """Split running text into tokens, each with its place in the text."""
        words = [self.vocab.pieces(word) for word in self.words(text)]
        visible = [piece[2:] if i else piece for word in words for i, piece in enumerate(word)]  # without ##
        return [piece for word in words for piece in word], spans(text, visible)

    def _ids(self, tokens: Sequence[str]) -> np.ndarray:
        ids = self.vocab.to_indices(tokens)
        ids[self._unknown[ids]] = self.vocab.unk
        return ids

    def _text(self, segments: list[Sequence[str]], truncate: bool) -> EncodedText:
        if not all(segments):
            which = "the text" if len(segments) == 1 else "one text of the pair"
            raise InputError(f"{which} must have at least one word, got an empty text")
        special = len(segments) + 1  # <cls>, and a <sep> behind each
        excess = max(0, sum(map(len, segments)) + special - self.max_seq_length)
        if excess:
            if not truncate:
                raise InputError(
                    f"{self.max_seq_length + excess} tokens with <cls> and <sep>: the network takes "
                    f"{self.max_seq_length}; "
                    "shorten the text"
                )
            segments = _cut(segments, self.max_seq_length - special)
        cls, sep, unk = self.vocab.to_tokens([self.vocab.cls, self.vocab.sep, self.vocab.unk])
        tokens, ids, numbers = [cls], [np.array([self.vocab.cls], np.int32)], [0]
        for number, segment in enumerate(segments):
            tokens += [*segment, sep]
            ids += [self._ids(segment), np.array([self.vocab.sep], np.int32)]
            numbers += [number] * (len(segment) + 1)
        all_ids = np.concatenate(ids)
        unknown = [token for token, i in zip(tokens, all_ids) if i == self.vocab.unk and token != unk]
        all_numbers = np.array(numbers, dtype=np.int32)
        return EncodedText(tokens, all_ids, all_numbers, list(dict.fromkeys(unknown)), self.vocab, excess)


def _cut(segments: list[Sequence[str]], room: int) -> list[Sequence[str]]:
    """Return the segments, truncated to `room` tokens together."""
    if len(segments) == 1:
        return [segments[0][:room]]
    first, second = segments
    kept_first, kept_second = kept_lengths(np.array(len(first)), np.array(len(second)), room)
    return [first[: int(kept_first)], second[: int(kept_second)]]


def kept_lengths(a: np.ndarray, b: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the lengths of segments of a and b tokens after truncating the longer one until both fit."""
    kept_a = np.minimum(a, np.maximum(room - b, (room + 1) // 2))
    return kept_a, np.minimum(b, room - kept_a)


class PaddedBatch(NamedTuple):
    """A padded batch of texts: int32 arrays (B, T) or (B,).

    tokens, token_types: padded. valid_length: tokens of a row without padding. masked_positions: (2, M), row
    and position of each <mask>, rows rising.
    """

    tokens: np.ndarray
    token_types: np.ndarray
    valid_length: np.ndarray
    masked_positions: np.ndarray


def pad(texts: Sequence[EncodedText], max_seq_length: int) -> PaddedBatch:
    """Return texts as arrays, padded to one of few lengths, at most max_seq_length."""
    valid_length = np.array([len(text) for text in texts], dtype=np.int32)
    longest = int(valid_length.max())
    length = max(longest, min(-(-longest // _LENGTH_STEP) * _LENGTH_STEP, max_seq_length))
    vocab = texts[0].vocab
    tokens = np.full((len(texts), length), vocab.pad, dtype=np.int32)
    token_types = np.zeros((len(texts), length), dtype=np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text.ids
        token_types[row, : len(text)] = text.token_types
    masked_positions = np.stack(np.nonzero(tokens == vocab.mask)).astype(np.int32)
    return PaddedBatch(tokens, token_types, valid_length, masked_positions)


def chunks(texts: Iterable[EncodedText], max_tokens: int, max_masks: int) -> Iterator[list[EncodedText]]:
    """Yield lists of texts with at most `max_tokens` and `max_masks`, or of one text."""
    chunk: list[EncodedText] = []
    num_tokens = num_masks = 0
    for text in texts:
        num_tokens += len(text)
        num_masks += len(text.masks)
        if chunk and (num_tokens > max_tokens or num_masks > max_masks):
            yield chunk
            chunk, num_tokens, num_masks = [], len(text), len(text.masks)
        chunk.append(text)
    if chunk:
        yield chunk


def bucket_by_length(texts: Sequence[EncodedText], max_tokens: int, max_masks: int) -> Iterator[list[int]]:
    """Yield the indices of batches of texts of similar length; texts with masks are apart from others.

    No batch is padded to more than `max_tokens` tokens or `max_masks` masks, unless it is of one text.
    """
    batch: list[int] = []
    most = 0  # masks in a row of the batch
    for i in sorted(range(len(texts)), key=lambda i: (len(texts[i].masks) > 0, len(texts[i]))):
        rows, masks = len(batch) + 1, len(texts[i].masks)
        too_large = rows * len(texts[i]) > max_tokens or rows * max(most, masks) > max_masks
        if batch and (too_large or bool(masks) != bool(most)):
            yield batch
            batch, most = [], 0
        batch.append(i)
        most = max(most, masks)
    if batch:
        yield batch
