"""A small network, a small text and trainers of them, and how their gradients are compared."""

from __future__ import annotations

import dataclasses
import random

import numpy as np

from gluon_bert.config import DataConfig, ModelConfig, TrainConfig
from gluon_bert.data.loader import Loader, PretrainingData
from gluon_bert.data.prepared import prepare_words
from gluon_bert.model.bert import BERTModel
from gluon_bert.runtime import mx
from gluon_bert.training.losses import pretraining_loss
from gluon_bert.training.trainer import Trainer

from . import reference_bert as reference

MODEL = ModelConfig(num_layers=1, units=16, ffn_units=32, num_heads=2, dropout=0.0, max_positions=16)
BERT = dataclasses.replace(MODEL, activation="gelu", embedding_norm=True, tied_decoder=True, init="normal")
NOISY = dataclasses.replace(BERT, dropout=0.3)
TEXT = DataConfig(max_seq_length=16, num_buckets=2)
TRAIN = TrainConfig(batch_size=8, num_steps=7, lr=1e-3, log_every=3)


def documents(how_many, seed, validation=False):
    """Documents of two to five sentences of two to six words."""
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(30)]
    for _ in range(how_many):
        sentences = [rng.choices(words, k=rng.randint(2, 6)) for _ in range(rng.randint(2, 5))]
        yield [" ".join(sentence) for sentence in sentences], validation


def small_data():
    prepared = prepare_words([*documents(20, 0), *documents(6, 1, validation=True)], min_freq=1)
    train, validation = (
        Loader(side, prepared.vocab, TEXT, TRAIN.batch_size, seed=0)
        for side in (prepared.train, prepared.validation)
    )
    return PretrainingData(
        train, validation, prepared.vocab, 3.0, 3.0, prepared.word_counts(prepared.train, False), ""
    )


def trainer_on(num_contexts, data, model=MODEL, seed=1, loss=pretraining_loss, **changes):
    contexts = [mx.cpu(i) for i in range(num_contexts)]
    net = BERTModel(len(data.vocab), model)
    net.initialize(ctx=contexts, seed=seed)
    net.hybridize()
    return Trainer(net, dataclasses.replace(TRAIN, **changes), contexts, loss)


def fit(trainer, data, *callbacks):
    """Train on data with these callbacks."""
    trainer.callbacks = list(callbacks)
    return trainer.fit(data.train, validation=data.validation)


def parameters(trainer):
    return trainer.net._collect_params_with_prefix()


def gradients_of(trainer, *batches):
    """The gradients after the last of these batches; with a learning rate of 0 the weights stay."""
    for each in batches:
        trainer.step(each)
    for name, parameter in parameters(trainer).items():
        first, *others = (grad.asnumpy() for grad in parameter.list_grad())
        for other in others:
            np.testing.assert_array_equal(other, first, err_msg=name)
    return reference.gradients(trainer.net)


def assert_same(ours, theirs, tolerance):
    """Equal relative to the largest value of each array."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        # A floor for what is 0 but for rounding, which is that of larger values: the gradient of key biases.
        scale = max(np.abs(theirs[name]).max(), 1e-2)
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=tolerance * scale, err_msg=name)


def random_batch(num_rows=8, seed=0):
    """Rows of other lengths, with other numbers of masked words."""
    lengths = np.random.default_rng(seed).integers(3, 17, num_rows)
    return reference.random_batch(lengths, 16, 30, seed)


def first_whole_batch(data):
    """Return the first whole batch; all its rows differ in length and in what they predict."""
    return next(b for b in data.train.epoch(0) if len(b) == TRAIN.batch_size)
