"""A corpus as ids, ready for drawing pairs: prepared once, then read from disk. Draws nothing itself."""

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
from .shards import Shards
from .vocab import SPECIAL_TOKENS, Normalization, Vocabulary
from .wordpiece import WordPieceVocabulary, installed_version

log = logging.getLogger(__name__)

# In memory, or on disk in shards.
DocumentSource = Union[Documents, Shards]


@dataclass(frozen=True)
class PreparedCorpus:
    """A corpus as ids: the text to train on, the validation text, and the vocabulary of the former.

    fingerprint: a hash of the text and of all that made these ids of it. statistics: what the manifest says
    of the text: documents, sentences and tokens, and shares of what is unknown, repeated or left out.
    """

    train: DocumentSource
    validation: DocumentSource
    vocab: Vocabulary
    fingerprint: str
    statistics: Mapping[str, Any] = field(default_factory=dict)

    def word_counts(self, documents: DocumentSource, predict_unknown: bool) -> np.ndarray:
        """(V,) float64: how often each token occurs in these documents as a word that may be predicted."""
        counts = documents.counts(len(self.vocab)).astype(np.float64)
        if not predict_unknown:
            counts[self.vocab.unk] = 0
        return counts

    def unigram_loss(self, documents: DocumentSource, predict_unknown: bool) -> float:
        """The loss in nats, on these documents, of a model that knows the words' frequencies in training.

        On the training text itself it is the entropy of the words to predict. Below it a model must have
        learnt something of the words' context.
        """
        frequent, asked = (self.word_counts(text, predict_unknown) for text in (self.train, documents))
        met = asked > 0
        # <unk>, or a token of a published vocabulary, may not stand in the training text: it counts as once.
        frequent = np.maximum(frequent, met)
        loss = -np.log(frequent[met] / frequent.sum())
        return float((asked[met] * loss).sum() / asked.sum())


def prepare(config: DataConfig, cache: Path | None = None) -> PreparedCorpus:
    """Read a corpus into ids, or what an earlier time left on disk; InputError where there is too little text.

    cache: the folder for that, by default in MXNet's data folder. What depends on a seed is not kept.
    """
    vocabulary_maker(config)  # tells what is wrong before any text is read
    corpus = Corpus(config)
    made_by = _made_by(corpus, config)
    folder = (data_folder() / "gluon_bert" if cache is None else cache) / made_by["fingerprint"]
    try:
        prepared = _read(folder, config)
    except shards.Damaged as problem:
        log.warning("%s is damaged and made anew (%s)", folder, problem)
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
                # Text that is refused is changed, and then has another folder.
                shutil.rmtree(folder)
                raise
    return prepared


def number(documents: Iterable[tuple[Document, bool]], min_freq: int) -> PreparedCorpus:
    """Documents of words, each with whether it is held out, to documents of ids of words.

    The vocabulary is made of the training text; in both texts the other words become <unk>.
    """
    return numbered(documents, lambda counts: Vocabulary.from_counts(counts, min_freq))


def numbered(documents: Iterable[tuple[Document, bool]], vocabulary_of: VocabularyOf) -> PreparedCorpus:
    """Documents of words, each with whether it is held out, to documents of ids, all in memory.

    vocabulary_of: gives the vocabulary for the training text's words and how often each of them occurs.
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
    """Raise InputError where the text is not enough. guessed: the formats that were guessed, see Corpus."""
    names = " ".join(config.corpus)
    usable = prepared.train.with_pairs()
    if usable < 2:
        formats = f"read as {', '.join(guessed)}" if guessed else f"text_format is {config.text_format}"
        raise InputError(
            f"corpus {names}: must have at least 2 training documents of 2 sentences, for next-sentence "
            f"prediction; got {usable}, and {len(prepared.validation)} for validation ({formats}). Put blank lines "
            "between documents; --text-format sentences reads a sentence a line, paragraphs a document a line, "
            "prose running text"
        )
    vocab = prepared.vocab
    if config.vocab_file and not prepared.train.counts(len(vocab))[vocab.ordinary_ids].any():
        raise InputError(f"vocab_file {config.vocab_file}: has no token for any word of corpus {names}")
    if not len(vocab.ordinary_ids):
        raise InputError(
            f"min_freq {config.min_freq}: no word of corpus {names} occurs so often. Choose a smaller min_freq"
        )


def _made_by(corpus: Corpus, config: DataConfig) -> dict[str, Any]:
    """What the ids depend on, for the manifest: the settings, and the fingerprint of these and the text."""
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
    """This folder, or one of the same name for this process alone where it cannot be made."""
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
    """The prepared text in a folder, or None where it is not finished; Damaged as read_manifest."""
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
    train, validation = (Shards(folder, manifest, side, own) for side, own in zip(shards.SIDES, counts))
    return PreparedCorpus(train, validation, vocab, folder.name, manifest["statistics"])
