"""Documents as arrays of word indices or of token ids. Reads no file."""

from __future__ import annotations

from array import array
from collections import defaultdict
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count
from typing import Iterable, NamedTuple, Sequence

import numpy as np

from .corpora.text_formats import Document

# Sentences whose words become pieces at once. This bounds the temporary memory.
_BLOCK = 1 << 16


@dataclass(frozen=True)
class Documents:
    """Documents in three arrays.

    tokens: (N,) int32, or uint16 where all ids fit in it: the ids of all sentences one after the other.
    sentences: (S + 1,) int64, where each sentence starts in `tokens`, and the end.
    documents: (D + 1,) int64, where each document starts in `sentences`, and the end.

    >>> d = Documents(np.arange(5, 11), np.array([0, 2, 3, 6]), np.array([0, 2, 3]))
    >>> d.tokens[d.sentences[1]:d.sentences[2]]     # the second sentence, of the first document
    array([7])
    """

    tokens: np.ndarray
    sentences: np.ndarray
    documents: np.ndarray

    def __len__(self) -> int:
        return len(self.documents) - 1

    def with_pairs(self) -> int:
        """Return how many documents have two sentences or more."""
        return int(np.count_nonzero(np.diff(self.documents) >= 2))

    def counts(self, size: int) -> np.ndarray:
        """(size,) int64: how often each id occurs."""
        return np.bincount(self.tokens, minlength=size)

    # A text in memory has one shard, so code for `DocumentShards` also works for it.

    folder = None

    @property
    def sizes(self) -> np.ndarray:
        """(1,) int64: tokens per shard."""
        return np.array([len(self.tokens)])

    def part(self, shards: Sequence[int]) -> Documents:
        """Return the documents of these shards."""
        assert list(shards) == [0]
        return self


class WordIndexedDocuments(NamedTuple):
    """Documents of numbered words; word n is `words[n]`, in the order of their first occurrence.

    tokens: (N,) int32. sentences: (S,) int64, words of each. documents: (D,) int64, sentences of each.
    validation: (D,) bool. sentence_hashes: (S,) uint64. document_hashes: (D,) uint64. dropped: (2,) int64,
    the number of documents with one sentence, which are left out, and of their words.
    """

    words: list[str]
    tokens: np.ndarray
    sentences: np.ndarray
    documents: np.ndarray
    validation: np.ndarray
    sentence_hashes: np.ndarray
    document_hashes: np.ndarray
    dropped: np.ndarray

    def select(self, keep: np.ndarray) -> WordIndexedDocuments:
        """Return the documents that a (D,) bool array marks. The words keep their numbers."""
        sentence_kept = np.repeat(keep, self.documents)
        token_kept = np.repeat(sentence_kept, self.sentences)
        return WordIndexedDocuments(
            self.words,
            self.tokens[token_kept],
            self.sentences[sentence_kept],
            self.documents[keep],
            self.validation[keep],
            self.sentence_hashes[sentence_kept],
            self.document_hashes[keep],
            self.dropped,
        )

    def word_counts(self) -> np.ndarray:
        """Return the count of each word in the training and validation documents, (2, W) int64."""
        validation = np.repeat(np.repeat(self.validation, self.documents), self.sentences)
        size = len(self.words)
        return np.stack(
            [np.bincount(self.tokens[validation == side], minlength=size) for side in (False, True)]
        )

    def to_token_ids(self, ids: np.ndarray, starts: np.ndarray) -> Documents:
        """Return documents of token ids; word n has ids[starts[n]:starts[n + 1]].

        The tokens have the type of `ids`.
        """
        bounds = _bounds(self.sentences)
        tokens, ends, total = [np.zeros(0, ids.dtype)], [np.zeros(1, np.int64)], 0
        for first in range(0, len(self.sentences), _BLOCK):
            block = bounds[first : first + _BLOCK + 1]
            these = self.tokens[block[0] : block[-1]]
            sizes = starts[these + 1] - starts[these]
            end = _bounds(sizes)
            # Token j of the block is the (j - end[k])th of its word k.
            tokens.append(ids[np.repeat(starts[these] - end[:-1], sizes) + np.arange(end[-1])])
            ends.append(total + end[block[1:] - block[0]])
            total += end[-1]
        return Documents(np.concatenate(tokens), np.concatenate(ends), _bounds(self.documents))


def numbering() -> defaultdict[str, int]:
    """Return a dict that gives each new word the next number."""
    # Not the dict's own length: a dict that refers to itself would stay in memory until garbage collection.
    return defaultdict(count().__next__)


def index_words(
    documents: Iterable[tuple[Document, bool]], dropped: Sequence[int] = (0, 0)
) -> WordIndexedDocuments:
    """Return documents of words as arrays.

    documents: each with a flag for validation. dropped: the number of documents with one sentence, which are
    left out, and of their words.
    """
    order = numbering()
    tokens, ends, counts, sides = array("i"), array("q", [0]), array("q"), array("b")
    sentence_hashes, document_hashes = [], []
    for document, validation in documents:
        for sentence in document:
            tokens.extend(map(order.__getitem__, sentence.split()))
            ends.append(len(tokens))
        counts.append(len(document))
        sides.append(validation)
        hashes = b"".join([_hash(sentence.encode("utf-8", "surrogatepass")) for sentence in document])
        sentence_hashes.append(hashes)
        document_hashes.append(_hash(hashes))
    return WordIndexedDocuments(
        list(order),
        np.array(tokens, dtype=np.int32),
        np.diff(np.array(ends)),
        np.array(counts, dtype=np.int64),
        np.array(sides, dtype=bool),
        np.frombuffer(b"".join(sentence_hashes), dtype=np.uint64),
        np.frombuffer(b"".join(document_hashes), dtype=np.uint64),
        np.array(dropped, dtype=np.int64),
    )


class DocumentBuilder:
    """Builds one `WordIndexedDocuments` from several pieces of text."""

    def __init__(self) -> None:
        self._order = numbering()
        self._pieces = [index_words([])]
        self.num_words = 0  # running words, not different ones

    def add(self, piece: WordIndexedDocuments) -> None:
        """Append the documents of a piece."""
        numbers = np.fromiter(map(self._order.__getitem__, piece.words), np.int32, len(piece.words))
        self._pieces.append(piece._replace(words=[], tokens=numbers[piece.tokens]))
        self.num_words += len(piece.tokens)

    def numbered(self) -> WordIndexedDocuments:
        """Return all documents. Nothing can be added afterwards."""
        pieces, self._pieces = self._pieces, []
        arrays = {
            name: [getattr(piece, name) for piece in pieces] for name in WordIndexedDocuments._fields[1:]
        }
        dropped = np.sum(arrays.pop("dropped"), axis=0)
        whole = {name: np.concatenate(parts) for name, parts in arrays.items()}
        return WordIndexedDocuments(words=list(self._order), dropped=dropped, **whole)


def _bounds(sizes: np.ndarray) -> np.ndarray:
    """(N + 1,) int64: where each of N neighbours of these sizes starts, and the end."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def _hash(content: bytes) -> bytes:
    return blake2b(content, digest_size=8).digest()
