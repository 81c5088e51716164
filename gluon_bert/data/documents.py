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
from typing import Iterable

import numpy as np

from ..config import DataConfig
from ..errors import BadInput
from ..files import written_aside
from .corpus import Corpus, Document
from .vocab import Vocabulary
from .wikitext import data_folder

log = logging.getLogger(__name__)

# Part of every cache key: raise it when the same text would give other ids.
_FORMAT = 2
_PARTS = ("tokens", "sentences", "documents")


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
        # Every word of the vocabulary stands in the training text; <unk> may not.
        loss = -np.log(np.maximum(frequent[met], 1) / frequent.sum())
        return float((asked[met] * loss).sum() / asked.sum())


def prepare(config: DataConfig, cache: Path | None = None) -> Prepared:
    """Read a corpus into ids, or its cache of an earlier time; BadInput where there is too little text.

    cache: the folder for that, by default in MXNet's data folder. What depends on a seed is not cached.
    """
    corpus = Corpus(config)
    folder = data_folder() / "gluon_bert" if cache is None else cache
    fingerprint = _fingerprint(corpus, config)
    path = folder / f"{fingerprint}.npz"
    prepared = _load(path)
    if prepared is None:
        log.info("reading %s", ", ".join(config.corpus))
        prepared = number(corpus, config.min_freq, fingerprint)
        _check(prepared, config)
        _save(prepared, path)
    else:
        log.info("prepared text read from %s", path)
    return prepared


def number(documents: Iterable[tuple[Document, bool]], min_freq: int, fingerprint: str = "") -> Prepared:
    """Documents of words, each with whether it is held out, to documents of ids.

    The vocabulary is made of the training text; in both texts the other words become <unk>.
    """
    order: defaultdict[str, int] = defaultdict(lambda: len(order))
    sides = {False: _Growing(order), True: _Growing(order)}
    for document, held_out in documents:
        sides[held_out].add(document)
    words = list(order)
    counts = np.bincount(sides[False].tokens(), minlength=len(words))
    vocab = Vocabulary.from_counts(dict(zip(words, counts.tolist())), min_freq)
    # A special token that stands in the text as a word is an unknown word, never the token itself.
    final = vocab.ids(words)
    final[final < vocab.num_special] = vocab.unk
    return Prepared(sides[False].finished(final), sides[True].finished(final), vocab, fingerprint)


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

    def finished(self, final: np.ndarray) -> Documents:
        return Documents(final[self.tokens()], np.array(self._sentences), np.array(self._documents))


def _check(prepared: Prepared, config: DataConfig) -> None:
    names = " ".join(config.corpus)
    usable = prepared.train.with_pairs()
    if usable < 2:
        raise BadInput(
            f"--corpus {names}: {usable} of the documents to train on have two sentences or more, where "
            f"next-sentence prediction needs two such documents; {len(prepared.held_out)} more are held out "
            "(--held-out), and --text-format says what parts documents and sentences"
        )
    if len(prepared.vocab) == prepared.vocab.num_special:
        raise BadInput(
            f"--min-freq {config.min_freq}: no word of --corpus {names} occurs so often; a smaller figure "
            "keeps rarer words"
        )


def _fingerprint(corpus: Corpus, config: DataConfig) -> str:
    settings = [config.text_format, config.language, config.lowercase, config.held_out, config.min_freq]
    content = json.dumps([_FORMAT, corpus.fingerprint(), *settings])
    return hashlib.sha1(content.encode()).hexdigest()


def _save(prepared: Prepared, path: Path) -> None:
    arrays = {f"train_{name}": getattr(prepared.train, name) for name in _PARTS}
    arrays.update({f"held_out_{name}": getattr(prepared.held_out, name) for name in _PARTS})
    words: list[str] = prepared.vocab.tokens[prepared.vocab.num_special :]
    arrays["words"] = np.frombuffer("\n".join(words).encode("utf-8", "surrogatepass"), dtype=np.uint8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path, "wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        log.warning(
            "the prepared text is not kept for next time: %s cannot be written (%s)", path, error.strerror
        )


def _load(path: Path) -> Prepared | None:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            train, held_out = (
                Documents(*(arrays[f"{side}_{name}"] for name in _PARTS)) for side in ("train", "held_out")
            )
            words = arrays["words"].tobytes().decode("utf-8", "surrogatepass").split("\n")
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        log.warning("%s is damaged and made anew (%s)", path, error)
        return None
    return Prepared(train, held_out, Vocabulary(words), path.stem)
