"""Epochs of batches, from a seed and a position: the same arguments give the same batches."""

from __future__ import annotations

import logging
import math
from typing import Any, Callable, Iterator, Mapping, NamedTuple

import numpy as np

from ..config import DataConfig, check_group
from ..errors import InputError
from .batch import Batch, make_batch
from .masking import num_draws, pair_noise
from .prepared import Documents, DocumentSource, prepare
from .sentence_pairs import NUM_SPECIAL_IN_PAIR, Pairs, draw_pairs
from .vocab import Vocabulary

# Streams of the seed: pairs, and the order of a part. Masks have their own noise.
_PAIRS, _ORDER, _MIXTURE, _TURNS = 0, 1, 2, 3
# Tokens whose pairs are drawn and shuffled at once: a thousand batches of 256 x 128, some hundred MB.
_PART_TOKENS = 1 << 25


log = logging.getLogger(__name__)


class LoaderState(NamedTuple):
    """A position in the data: the number of the epoch and of its batch, from 0."""

    epoch: int = 0
    batch: int = 0

    def next(self) -> LoaderState:
        """Return the position after this batch, maybe after the last of the epoch."""
        return self._replace(batch=self.batch + 1)


class Loader:
    """The batches of a text, epoch by epoch.

    A text of up to 64 M tokens is shuffled as a whole. A larger text is read in parts, one in memory at a
    time. Each epoch draws the shards of a part and the order of the parts. A part is shuffled like a small
    text. Random second segments come from the same part.

    >>> loader = Loader(documents, vocab, config, batch_size=512, seed=0)      # doctest: +SKIP
    >>> for batch in loader.epoch(0): ...
    >>> for batch in loader.batches(): ...      # epoch 0, 1, 2 and so on

    progress: a function that returns the share of the run that has passed, from 0 to 1. `Trainer.fit` sets
    it. The share of masked tokens depends on it if there is a `final_mlm_probability`.
    """

    def __init__(
        self, documents: DocumentSource, vocab: Vocabulary, config: DataConfig, batch_size: int, seed: int
    ) -> None:
        self.documents, self.vocab, self.config = documents, vocab, config
        self.batch_size, self.seed = batch_size, seed
        self.progress: Callable[[], float] = lambda: 0.0
        self._drawn: tuple[tuple[int, int], Documents, Pairs] | None = None

    def num_pairs(self) -> int:
        """Return the pairs of an epoch; of a text in parts, about as many from one of them."""
        sizes, part = self.documents.sizes, self._parts(0)[0]
        _, pairs = self._part(0, 0)
        return round(len(pairs) * (sizes.sum() / max(sizes[part].sum(), 1)))

    def pairs(self, epoch: int) -> Pairs:
        """Return the pairs of an epoch, or of its first part."""
        return self._part(self._drawing(epoch), 0)[1]

    def fraction_truncated(self) -> float:
        """Return the share of sentence pairs above max_seq_length, in the first part of the text."""
        documents = self._part(0, 0)[0]
        sizes = np.diff(documents.sentences)
        inside = np.ones(len(sizes), dtype=bool)
        inside[documents.documents[1:] - 1] = False  # a document's last sentence has no next one
        pairs = sizes[:-1] + sizes[1:] + NUM_SPECIAL_IN_PAIR
        return float((pairs[inside[:-1]] > self.config.max_seq_length).mean())

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over the batches of epoch 0."""
        return self.epoch(0)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch in their shuffled order, the last of each bucket maybe smaller.

        skip: number of batches to skip at the beginning.
        """
        num_parts = len(self._parts(self._drawing(epoch)))
        for number in np.random.default_rng([self.seed, _TURNS, epoch]).permutation(num_parts).tolist():
            plan = self._plan(epoch, number)
            for members, length in plan[skip:]:
                yield self._batch(epoch, number, members, length)
            skip = max(0, skip - len(plan))

    def batches(self, epoch: int = 0, skip: int = 0) -> Iterator[Batch]:
        """Yield the batches of all epochs from this one on, without its first `skip` batches."""
        return (batch for _, batch in self.iter_from(LoaderState(epoch, skip)))

    def iter_from(self, start: LoaderState) -> Iterator[tuple[LoaderState, Batch]]:
        """Yield the batches from a position on, epoch after epoch, each with its own position."""
        epoch, skip = start
        while True:
            for number, batch in enumerate(self.epoch(epoch, skip), skip):
                yield LoaderState(epoch, number), batch
            epoch, skip = epoch + 1, 0

    def _drawing(self, epoch: int) -> int:
        return epoch if self.config.dynamic_masking else 0

    def _parts(self, drawing: int) -> list[list[int]]:
        """Return the shards of each part, in the order of the text; a small text is one part."""
        sizes = self.documents.sizes
        count = max(1, int(sizes.sum()) // _PART_TOKENS)
        if count == 1:
            return [list(range(len(sizes)))]
        order = np.random.default_rng([self.seed, _MIXTURE, drawing]).permutation(len(sizes))
        starts = np.cumsum(sizes[order]) - sizes[order]
        number = starts * count // sizes.sum()
        return [sorted(order[number == i].tolist()) for i in np.unique(number)]

    def _part(self, drawing: int, number: int) -> tuple[Documents, Pairs]:
        """Return the documents of a part and the pairs drawn of them; one part is kept in memory."""
        if self._drawn is None or self._drawn[0] != (drawing, number):
            kept = self._drawn[1] if self._drawn and len(self._parts(drawing)) == 1 else None
            self._drawn = None  # before the next one is read
            documents = kept or self.documents.part(self._parts(drawing)[number])
            # Part 0 has the stream of [seed, _PAIRS, drawing], since NumPy fills up with zeros.
            rng = np.random.default_rng([self.seed, _PAIRS, drawing, number])
            pairs = draw_pairs(documents, self.config, rng, self.vocab.unk)
            self._drawn = (drawing, number), documents, pairs
        return self._drawn[1:]

    def _batch(self, epoch: int, number: int, members: np.ndarray, length: int) -> Batch:
        drawing = self._drawing(epoch)
        documents, pairs = self._part(drawing, number)
        # Pairs are numbered over all parts. Otherwise two parts would have the same masks.
        own = members + (number << 32)
        config = self.config.at(min(1.0, self.progress()))
        noise = pair_noise(self.seed, drawing, own, length, num_draws(self.config))
        return make_batch(documents, pairs.take(members), noise, self.vocab, config)

    def _plan(self, epoch: int, number: int) -> list[tuple[np.ndarray, int]]:
        """Return the pairs of each batch of a part, and the length to which it is padded."""
        _, pairs = self._part(self._drawing(epoch), number)
        rng = np.random.default_rng([self.seed, _ORDER, epoch, number])
        order = rng.permutation(len(pairs))
        # Few lengths: MXNet plans the graph's memory again for every new shape.
        bounds = np.ceil(
            self.config.max_seq_length * np.arange(1, self.config.num_buckets + 1) / self.config.num_buckets
        )
        bucket = np.searchsorted(bounds, pairs.lengths()[order])
        plan = []
        for i, bound in enumerate(bounds):
            members = order[bucket == i]
            for start in range(0, len(members), self.batch_size):
                plan.append((members[start : start + self.batch_size], int(bound)))
        return [plan[i] for i in rng.permutation(len(plan))]


class PretrainingData(NamedTuple):
    """The training and validation batches of a run, with statistics of the text.

    validation: batches for evaluation, or None if there is too little text. unigram_loss and
    validation_unigram_loss: the loss of word frequencies alone on either text, in nats.
    word_counts: (V,) float64, how often each token is a word that may be predicted, in the training text.
    fingerprint: a hash of the text and its preparation. statistics: of the text, see PreparedCorpus.
    """

    train: Loader
    validation: Loader | None
    vocab: Vocabulary
    unigram_loss: float
    validation_unigram_loss: float
    word_counts: np.ndarray
    fingerprint: str
    statistics: Mapping[str, Any] = {}


def load_pretraining_data(config: DataConfig, batch_size: int, seed: int = 0) -> PretrainingData:
    """Read a corpus, prepared once and cached, into loaders of batches.

    Raise InputError if the corpus cannot be used as the configuration asks.
    """
    check_group(config)
    prepared = prepare(config)
    train = Loader(prepared.train, prepared.vocab, config, batch_size, seed)
    if not len(train.pairs(0)):
        raise InputError(
            f"max_seq_length must be larger: no pair of sentences fits in {config.max_seq_length} tokens."
        )
    if config.pairs == "sentences":
        log.info(
            "%.0f %% of the pairs of sentences are longer than max_seq_length=%d and are %s",
            100 * train.fraction_truncated(),
            config.max_seq_length,
            "dropped" if config.preparation == "d2l" else "truncated",
        )
    # One share of masked tokens in all evaluations, so that they can be compared.
    validation = Loader(prepared.validation, prepared.vocab, config.at(1.0), batch_size, seed)
    usable = prepared.validation.with_pairs() >= 2 and len(validation.pairs(0)) > 0
    if not usable:
        log.info("the validation text is too short for evaluations; increase validation_fraction")
    return PretrainingData(
        train,
        validation if usable else None,
        prepared.vocab,
        prepared.unigram_loss(prepared.train, config.predict_unknown),
        prepared.unigram_loss(prepared.validation, config.predict_unknown) if usable else math.nan,
        prepared.word_counts(prepared.train, config.predict_unknown),
        prepared.fingerprint,
        prepared.statistics,
    )
