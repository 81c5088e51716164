"""Documents as ids, ready for drawing pairs, and their cache on disk. Draws nothing itself."""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from array import array
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Mapping

import numpy as np

from ..config import DataConfig
from ..errors import BadInput
from ..files import digest, written_aside
from .corpus import Corpus, Document
from .vocab import SPECIAL_TOKENS, Vocabulary
from .wikitext import data_folder
from .wordpiece import WordPieceVocabulary, installed_version

log = logging.getLogger(__name__)

# Part of every cache key: raise it when the same text would give other ids.
_FORMAT = 4
_PARTS = ("tokens", "sentences", "documents")
# Sentences whose words become pieces at once, so that what that takes besides stays small.
_BLOCK = 1 << 16


@dataclass(frozen=True)
class Documents:
    """All documents of a corpus in three arrays.

    tokens: (N,) int32, the ids of all sentences one after the other.
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
        """How many documents have two sentences or more."""
        return int(np.count_nonzero(np.diff(self.documents) >= 2))


@dataclass(frozen=True)
class Prepared:
    """A corpus as ids: the text to train on, the held-out text, and the vocabulary of the former.

    `fingerprint` is a hash of the text and of all that made these ids of it.
    """

    train: Documents
    held_out: Documents
    vocab: Vocabulary
    fingerprint: str

    def unigram_loss(self, documents: Documents, predict_unknown: bool) -> float:
        """The loss in nats, on these documents, of a model that knows the words' frequencies in training.

        On the training text itself it is the entropy of the words to predict. Below it a model must have
        learnt something of the words' context.
        """
        frequent, asked = (
            np.bincount(text.tokens, minlength=len(self.vocab)).astype(np.float64)
            for text in (self.train, documents)
        )
        if not predict_unknown:
            frequent[self.vocab.unk] = asked[self.vocab.unk] = 0
        met = asked > 0
        # <unk>, or a token of a published vocabulary, may not stand in the training text: it counts as once.
        frequent = np.maximum(frequent, met)
        loss = -np.log(frequent[met] / frequent.sum())
        return float((asked[met] * loss).sum() / asked.sum())


def prepare(config: DataConfig, cache: Path | None = None) -> Prepared:
    """Read a corpus into ids, or its cache of an earlier time; BadInput where there is too little text.

    cache: the folder for that, by default in MXNet's data folder. What depends on a seed is not cached.
    """
    vocabulary_of = _vocabulary_maker(config)
    corpus = Corpus(config)
    folder = data_folder() / "gluon_bert" if cache is None else cache
    fingerprint = _fingerprint(corpus, config)
    path = folder / f"{fingerprint}.npz"
    prepared = _load(path, config)
    if prepared is None:
        log.info("reading %s", ", ".join(config.corpus))
        prepared = numbered(corpus, vocabulary_of, fingerprint)
        _check(prepared, config)
        _save(prepared, path)
    else:
        log.info("prepared text read from %s", path)
    return prepared


def number(documents: Iterable[tuple[Document, bool]], min_freq: int) -> Prepared:
    """Documents of words, each with whether it is held out, to documents of ids of words.

    The vocabulary is made of the training text; in both texts the other words become <unk>.
    """
    return numbered(documents, lambda counts: Vocabulary.from_counts(counts, min_freq))


def numbered(
    documents: Iterable[tuple[Document, bool]],
    vocabulary_of: Callable[[Mapping[str, int]], Vocabulary],
    fingerprint: str = "",
) -> Prepared:
    """Documents of words, each with whether it is held out, to documents of ids.

    vocabulary_of: gives the vocabulary for the training text's words and how often each of them occurs.
    """
    order: defaultdict[str, int] = defaultdict(lambda: len(order))
    sides = {False: _Growing(order), True: _Growing(order)}
    for document, held_out in documents:
        sides[held_out].add(document)
    words = list(order)
    counts = np.bincount(sides[False].tokens(), minlength=len(words))
    vocab = vocabulary_of({word: n for word, n in zip(words, counts.tolist()) if n})
    pieces = [vocab.pieces(word) for word in words]
    ids = vocab.ids([piece for word in pieces for piece in word])
    # A special token that stands in the text as a word is an unknown word, never the token itself.
    ids[vocab.special[ids]] = vocab.unk
    starts = np.concatenate([[0], np.cumsum([len(word) for word in pieces], dtype=np.int64)])
    return Prepared(sides[False].finished(ids, starts), sides[True].finished(ids, starts), vocab, fingerprint)


def _vocabulary_maker(config: DataConfig) -> Callable[[Mapping[str, int]], Vocabulary]:
    """What gives the vocabulary for counted words; BadInput where it cannot, before any text is read."""
    if config.tokenizer == "words":
        return lambda counts: Vocabulary.from_counts(counts, config.min_freq)
    installed_version()
    if not config.vocab_file:
        return lambda counts: WordPieceVocabulary.from_counts(counts, config.min_freq, config.vocab_size)
    vocab = WordPieceVocabulary.load(Path(config.vocab_file))
    vocab.check_case(config.vocab_file, config.lowercase)
    return lambda counts: vocab


class _Growing:
    """Documents that are being read, their words numbered in the order of their first occurrence."""

    def __init__(self, order: dict[str, int]) -> None:
        self._order = order
        self._tokens, self._sentences, self._documents = array("i"), array("q", [0]), array("q", [0])

    def add(self, document: Document) -> None:
        for sentence in document:
            self._tokens.extend(map(self._order.__getitem__, sentence.split()))
            self._sentences.append(len(self._tokens))
        self._documents.append(len(self._sentences) - 1)

    def tokens(self) -> np.ndarray:
        return np.frombuffer(self._tokens, dtype=np.int32) if self._tokens else np.zeros(0, np.int32)

    def finished(self, ids: np.ndarray, starts: np.ndarray) -> Documents:
        """The documents; the tokens of word n are ids[starts[n]:starts[n + 1]]."""
        words, bounds = self.tokens(), np.array(self._sentences)
        tokens, ends, total = [np.zeros(0, np.int32)], [np.zeros(1, np.int64)], 0
        for first in range(0, len(bounds) - 1, _BLOCK):
            block = bounds[first : first + _BLOCK + 1]
            these = words[block[0] : block[-1]]
            sizes = starts[these + 1] - starts[these]
            end = np.concatenate([[0], np.cumsum(sizes)])
            # Token j of the block is the (j - end[k])th of its word k.
            tokens.append(ids[np.repeat(starts[these] - end[:-1], sizes) + np.arange(end[-1])])
            ends.append(total + end[block[1:] - block[0]])
            total += end[-1]
        return Documents(np.concatenate(tokens), np.concatenate(ends), np.array(self._documents))


def _check(prepared: Prepared, config: DataConfig) -> None:
    names = " ".join(config.corpus)
    usable = prepared.train.with_pairs()
    if usable < 2:
        raise BadInput(
            f"--corpus {names}: {usable} of the documents to train on have two sentences or more, where "
            "next-sentence prediction needs two such documents, as a random second segment from the first's "
            f"own document would be labelled wrongly; {len(prepared.held_out)} more are held out "
            "(--held-out), and --text-format says what parts documents and sentences"
        )
    vocab, tokens = prepared.vocab, prepared.train.tokens
    if config.vocab_file and vocab.special[tokens].all():
        raise BadInput(f"--vocab-file {config.vocab_file}: has no token for any word of --corpus {names}")
    if not len(vocab.ordinary):
        raise BadInput(
            f"--min-freq {config.min_freq}: no word of --corpus {names} occurs so often; a smaller figure "
            "keeps rarer words"
        )


def _fingerprint(corpus: Corpus, config: DataConfig) -> str:
    settings = [config.text_format, config.language, config.lowercase, config.held_out, config.min_freq]
    if config.tokenizer == "wordpiece":
        file = digest(Path(config.vocab_file)) if config.vocab_file else ""
        settings += [config.tokenizer, config.vocab_size, file, installed_version()]
    content = json.dumps([_FORMAT, corpus.fingerprint(), *settings])
    return hashlib.sha1(content.encode()).hexdigest()


def _save(prepared: Prepared, path: Path) -> None:
    arrays = {f"train_{name}": getattr(prepared.train, name) for name in _PARTS}
    arrays.update({f"held_out_{name}": getattr(prepared.held_out, name) for name in _PARTS})
    content = "\n".join(prepared.vocab.tokens).encode("utf-8", "surrogatepass")
    arrays["vocabulary"] = np.frombuffer(content, dtype=np.uint8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path, "wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        log.warning(
            "the prepared text is not kept for next time: %s cannot be written (%s)", path, error.strerror
        )


def _load(path: Path, config: DataConfig) -> Prepared | None:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            train, held_out = (
                Documents(*(arrays[f"{side}_{name}"] for name in _PARTS)) for side in ("train", "held_out")
            )
            tokens = arrays["vocabulary"].tobytes().decode("utf-8", "surrogatepass").split("\n")
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        log.warning("%s is damaged and made anew (%s)", path, error)
        return None
    if config.tokenizer == "wordpiece":
        return Prepared(train, held_out, WordPieceVocabulary(tokens), path.stem)
    return Prepared(train, held_out, Vocabulary(tokens[len(SPECIAL_TOKENS) :]), path.stem)
