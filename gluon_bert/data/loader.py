"""Epochs of batches, from a seed and a position. Holds no state: the same arguments give the same batches."""

from __future__ import annotations

import logging
import math
from typing import Iterator, NamedTuple

import numpy as np

from ..config import DataConfig, check_group
from ..errors import BadInput
from .batch import Batch, make_batch
from .documents import Documents, prepare
from .masking import num_draws, pair_noise
from .pairs import Pairs, draw_pairs
from .vocab import Vocabulary

# What the seed's streams are drawn for: pairs, the order of an epoch. Masks have their noise.
_PAIRS, _ORDER = 0, 1


log = logging.getLogger(__name__)


class Loader:
    """The batches of a text, epoch by epoch.

    >>> loader = Loader(documents, vocab, config, batch_size=512, seed=0)      # doctest: +SKIP
    >>> for batch in loader.epoch(0): ...
    >>> for batch in loader.forever(): ...      # epoch 0, 1, 2 and so on
    """

    def __init__(
        self, documents: Documents, vocab: Vocabulary, config: DataConfig, batch_size: int, seed: int
    ) -> None:
        self.documents, self.vocab, self.config = documents, vocab, config
        self.batch_size, self.seed = batch_size, seed
        self._drawn: tuple[int, Pairs] | None = None

    def pairs(self, epoch: int) -> Pairs:
        """The pairs of an epoch: the same for all where the configuration does not draw them anew."""
        drawing = self._drawing(epoch)
        if self._drawn is None or self._drawn[0] != drawing:
            rng = np.random.default_rng([self.seed, _PAIRS, drawing])
            self._drawn = drawing, draw_pairs(self.documents, self.config, rng, self.vocab.unk)
        return self._drawn[1]

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch in their shuffled order, the last of each bucket maybe smaller."""
        pairs, draws = self.pairs(epoch), num_draws(self.config)
        for members, length in self._plan(pairs, epoch):
            noise = pair_noise(self.seed, self._drawing(epoch), members, length, draws)
            yield make_batch(self.documents, pairs.take(members), noise, self.vocab, self.config)

    def forever(self, epoch: int = 0) -> Iterator[Batch]:
        """Epoch after epoch, beginning with this one."""
        while True:
            yield from self.epoch(epoch)
            epoch += 1

    def _drawing(self, epoch: int) -> int:
        return epoch if self.config.redraw else 0

    def _plan(self, pairs: Pairs, epoch: int) -> list[tuple[np.ndarray, int]]:
        """Which pairs stand in which batch, and to what length it is padded."""
        rng = np.random.default_rng([self.seed, _ORDER, epoch])
        order = rng.permutation(len(pairs))
        # Few lengths, all known beforehand: every new shape costs a new plan of the graph's memory.
        bounds = np.ceil(
            self.config.max_len * np.arange(1, self.config.num_buckets + 1) / self.config.num_buckets
        )
        bucket = np.searchsorted(bounds, pairs.lengths()[order])
        plan = []
        for i, bound in enumerate(bounds):
            members = order[bucket == i]
            for start in range(0, len(members), self.batch_size):
                plan.append((members[start : start + self.batch_size], int(bound)))
        return [plan[i] for i in rng.permutation(len(plan))]


class Data(NamedTuple):
    """What a run trains on.

    held_out: batches for evaluation, or None where there is too little text for them. unigram_loss and
    held_out_unigram_loss: on either text, of a model that knows only how frequent words are, in nats.
    fingerprint: a hash of the text and its preparation.
    """

    train: Loader
    held_out: Loader | None
    vocab: Vocabulary
    unigram_loss: float
    held_out_unigram_loss: float
    fingerprint: str


def load_data(config: DataConfig, batch_size: int, seed: int = 0) -> Data:
    """Read a corpus, prepared once and cached, into loaders of batches.

    Raises BadInput where the corpus cannot be used as the configuration asks.
    """
    check_group(config)
    prepared = prepare(config)
    train = Loader(prepared.train, prepared.vocab, config, batch_size, seed)
    if not len(train.pairs(0)):
        raise BadInput(f"--max-len {config.max_len}: no pair of sentences fits; a larger figure is needed")
    held_out = Loader(prepared.held_out, prepared.vocab, config, batch_size, seed)
    usable = prepared.held_out.with_pairs() >= 2 and len(held_out.pairs(0)) > 0
    if not usable:
        log.info("too little text is held out for an evaluation; --held-out asks for more")
    return Data(
        train,
        held_out if usable else None,
        prepared.vocab,
        prepared.unigram_loss(prepared.train, config.predict_unknown),
        prepared.unigram_loss(prepared.held_out, config.predict_unknown) if usable else math.nan,
        prepared.fingerprint,
    )
