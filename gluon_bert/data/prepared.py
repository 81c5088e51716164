"""Corpora as ids: prepared once, then read from disk. Draws no pairs."""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterable, Mapping, Union

import numpy as np

from ..config import DataConfig
from ..errors import InputError
from ..fileio import file_hash
from . import shards
from .build_shards import VocabularyOf, WordIds, finish, prepare_shards, vocabulary_maker
from .corpora.corpus import Corpus
from .corpora.text_formats import Document
from .corpora.wikitext2 import data_folder
from .document_arrays import Documents, index_words
from .shards import DocumentShards
from .vocab import SPECIAL_TOKENS, Normalization, Vocabulary
from .wordpiece import WordPieceVocabulary, installed_version

log = logging.getLogger(__name__)

# Documents in memory, or in shards on disk.
DocumentSource = Union[Documents, DocumentShards]


@dataclass(frozen=True)
class PreparedCorpus:
    """A corpus as ids: training documents, validation documents and the vocabulary.

    fingerprint: a hash of the text and of the options of its preparation. statistics: the numbers of
    documents, sentences and tokens, and the shares that are unknown, repeated or left out.
    """

    train: DocumentSource
    validation: DocumentSource
    vocab: Vocabulary
    fingerprint: str
    statistics: Mapping[str, Any] = field(default_factory=dict)

    def word_counts(self, documents: DocumentSource, predict_unknown: bool) -> np.ndarray:
        """Return the count of each token that may be predicted in these documents, (V,) float64."""
        counts = documents.counts(len(self.vocab)).astype(np.float64)
        if not predict_unknown:
            counts[self.vocab.unk] = 0
        return counts

    def unigram_loss(self, documents: DocumentSource, predict_unknown: bool) -> float:
        """Return the loss of the unigram model of the training text on these documents, in nats.

        A model with a smaller loss has learned something about the context of words.
        """
        frequent, asked = (self.word_counts(text, predict_unknown) for text in (self.train, documents))
        met = asked > 0
        # Tokens of a published vocabulary may not occur in the training text: they count once.
        frequent = np.maximum(frequent, met)
        loss = -np.log(frequent[met] / frequent.sum())
        return float((asked[met] * loss).sum() / asked.sum())


def prepare(config: DataConfig, cache: Path | None = None) -> PreparedCorpus:
    """Read a corpus into ids, or read the ids from the cache. Raise InputError if there is too little text.

    cache: a folder, by default in MXNet's data folder. Nothing in it depends on a seed.
    """
    vocabulary_maker(config)  # raises InputError before any text is read
    corpus = Corpus(config)
    made_by = _made_by(corpus, config)
    folder = (data_folder() / "gluon_bert" if cache is None else cache) / made_by["fingerprint"]
    try:
        prepared = _read(folder, config)
    except shards.Damaged as problem:
        log.warning("%s is damaged (%s); it is built again", folder, problem)
        prepared = None
    if prepared:
        log.info("prepared text read from %s", folder)
        return prepared
    folder = _writable(folder)
    with shards.locked(folder):
        with suppress(shards.Damaged):
            prepared = _read(folder, config)  # another process may have prepared it meanwhile
        if not prepared:
            log.info("reading %s", ", ".join(config.corpus))
            try:
                manifest = prepare_shards(corpus, config, folder, made_by)
                prepared = _prepared(folder, manifest, config)
                _check(prepared, config, corpus.guessed)
                finish(folder, manifest, config)
            except InputError:
                # A user changes text that was refused. It then gets another folder.
                shutil.rmtree(folder)
                raise
    return prepared


def prepare_words(documents: Iterable[tuple[Document, bool]], min_freq: int) -> PreparedCorpus:
    """Prepare documents of words in memory. documents: with whether each is for validation.

    The vocabulary is built from the training documents; other words become <unk>.
    """
    return prepare_documents(documents, lambda counts: Vocabulary.from_counts(counts, min_freq))


def prepare_documents(
    documents: Iterable[tuple[Document, bool]], vocabulary_of: VocabularyOf
) -> PreparedCorpus:
    """Prepare documents in memory. documents: with whether each is for validation.

    vocabulary_of: returns the vocabulary for the counts of the training words.
    """
    text = index_words(documents)
    counts = text.word_counts()[0].tolist()
    vocab = vocabulary_of({word: count for word, count in zip(text.words, counts) if count})
    of_words = WordIds(text.words, vocab)
    train, validation = (
        text.select(text.validation == side).to_token_ids(of_words.ids, of_words.starts)
        for side in (False, True)
    )
    return PreparedCorpus(train, validation, vocab, fingerprint="")


def _check(prepared: PreparedCorpus, config: DataConfig, guessed: Mapping[str, Path]) -> None:
    """Raise InputError if there is too little text. guessed: the formats that were guessed, see Corpus."""
    names = " ".join(config.corpus)
    usable = prepared.train.with_pairs()
    if usable < 2:
        formats = f"read as {', '.join(guessed)}" if guessed else f"text_format is {config.text_format}"
        raise InputError(
            f"corpus must have at least 2 training documents of 2 sentences, got {usable} in {names} "
            f"({formats}), and {len(prepared.validation)} for validation. Put blank lines between documents. "
            'text_format="sentences" reads one sentence per line, "paragraphs" one document per line, '
            '"prose" running text.'
        )
    vocab = prepared.vocab
    if config.vocab_file and not prepared.train.counts(len(vocab))[vocab.ordinary_ids].any():
        raise InputError(
            f"vocab_file must have tokens for words of {names}, got {config.vocab_file}, which has none."
        )
    if not len(vocab.ordinary_ids):
        raise InputError(
            f"min_freq must be smaller for {names}, got {config.min_freq}: no word occurs so often."
        )


def _made_by(corpus: Corpus, config: DataConfig) -> dict[str, Any]:
    """Return the settings that the ids depend on, and the fingerprint of these and of the text."""
    names = ["text_format", "language", *Normalization._fields, "validation_fraction", "min_freq"]
    settings = {name: getattr(config, name) for name in names}
    if config.vocab_file:
        settings["vocab_file"] = file_hash(Path(config.vocab_file))
        settings["extend_vocab"] = config.extend_vocab
    if config.tokenizer == "wordpiece":
        settings["tokenizer"], settings["vocab_size"] = config.tokenizer, config.vocab_size
        settings["tokenizers"] = installed_version()
    content = json.dumps([shards.FORMAT, corpus.fingerprint(), settings])
    return {"fingerprint": hashlib.sha1(content.encode()).hexdigest(), "corpus": config.corpus, **settings}


def _writable(folder: Path) -> Path:
    """Return this folder, or a temporary one of the same name if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        log.warning(
            "the prepared text is not kept for next time: %s cannot be written (%s)", folder, error.strerror
        )
    own = Path(tempfile.mkdtemp(prefix="gluon_bert."))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return own / folder.name


def _read(folder: Path, config: DataConfig) -> PreparedCorpus | None:
    """Read the prepared text of a folder; None if it is not finished. Raise Damaged as read_manifest."""
    manifest = shards.read_manifest(folder)
    if manifest is None:
        return None
    try:
        return _prepared(folder, manifest, config)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, EOFError) as error:
        raise shards.Damaged(f"{type(error).__name__}: {error}") from error


def _prepared(folder: Path, manifest: Mapping[str, Any], config: DataConfig) -> PreparedCorpus:
    tokens = (folder / shards.VOCABULARY).read_bytes().decode("utf-8", "surrogatepass").split("\n")
    wordpiece = config.tokenizer == "wordpiece"
    vocab = WordPieceVocabulary(tokens) if wordpiece else Vocabulary(tokens[len(SPECIAL_TOKENS) :])
    counts = np.load(folder / shards.COUNTS, allow_pickle=False)
    sides = zip(shards.SIDES, counts)
    train, validation = (DocumentShards(folder, manifest, side, own) for side, own in sides)
    return PreparedCorpus(train, validation, vocab, folder.name, manifest["statistics"])
