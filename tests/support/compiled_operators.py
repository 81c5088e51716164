"""Networks and training steps by the compiled operators and by MXNet's own, to compare them."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from gluon_bert import ops
from gluon_bert.config import ModelConfig
from gluon_bert.model.bert import BERTModel
from gluon_bert.runtime import mx
from gluon_bert.training.device_batch import split_and_load
from gluon_bert.training.losses import pretraining_loss
from support import reference_bert as reference

SMALL = ModelConfig(num_layers=2, units=8, ffn_units=12, num_heads=2, dropout=0.0, max_positions=400)
BERT = dataclasses.replace(
    SMALL, activation="gelu", embedding_norm=True, tied_decoder=True, norm_epsilon=1e-12
)
VARIANTS = {
    "post": SMALL,
    "bert": BERT,
    "tanh": dataclasses.replace(BERT, activation="gelu_tanh"),
    "pre": dataclasses.replace(BERT, norm="pre"),
    "pre-relu": dataclasses.replace(SMALL, norm="pre", num_layers=3),
    "one-layer": dataclasses.replace(BERT, num_layers=1),
    "relative": dataclasses.replace(BERT, position="relative-bias"),
    "relative-pre": dataclasses.replace(BERT, norm="pre", position="relative-bias"),
}


@pytest.fixture(autouse=True)
def compiled():
    """Skip where this process has no compiled operators, with the reason."""
    if ops.describe() != "compiled for this processor":
        pytest.skip(f"the operators are {ops.describe()}")


def network(config, vocab_size=50, seed=0):
    net = BERTModel(vocab_size, config)
    net.initialize(ctx=mx.cpu(), seed=seed)
    net.hybridize()
    reference.randomise(net, seed)
    return net


def step(net, batch, by_mxnet=False, bf16=False):
    """The shard's losses and hits, and all gradients, by one side; bf16: by the compiled one, in bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        if by_mxnet:
            patch.setattr(ops, "use_compiled", lambda *_: False)
        if bf16:
            multiply_bf16(patch)
        (shard,) = split_and_load(batch, [mx.cpu()], count_correct=True)
        with mx.autograd.record():
            found = pretraining_loss(net, shard)
        found.total.backward()
        mlm, nsp = found.losses.values()
        correct = mx.nd.concat(mlm.correct, nsp.correct, dim=0)
        return [x.asnumpy() for x in (mlm.value, nsp.value, found.total, correct)], reference.gradients(net)


def multiply_bf16(patch):
    """Make the compiled operators multiply bfloat16, also on processors where that is not faster."""
    for name in ("encode", "masked_loss"):
        operator = getattr(ops, name)
        patch.setattr(ops, name, lambda *a, _operator=operator, **k: _operator(*a, **{**k, "bf16": True}))


def assert_same(ours, theirs, tolerance=1e-5):
    """Equal to 1e-5 of the largest value of each array, or of a hundredth where all are small."""
    for one, other in zip(ours[0], theirs[0]):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    for name, expected in theirs[1].items():
        atol = tolerance * max(np.abs(expected).max(), 1e-2)
        np.testing.assert_allclose(ours[1][name], expected, rtol=0, atol=atol, err_msg=name)


def tolerance_for(net, batch, theirs):
    """Four times what the last digit of the weights changes in the gradients, and 1e-5 at least."""
    with reference.moved_weights(net):
        moved = step(net, batch, by_mxnet=True)[1]
    changes = [np.abs(moved[n] - g).max() / max(np.abs(g).max(), 1e-2) for n, g in theirs[1].items()]
    return max(1e-5, 4 * max(changes))


def to_bf16(x):
    """x in float64, rounded to 8 bits, ties to the even one; there are no numbers beyond float32's."""
    fraction, exponent = np.frexp(np.asarray(x, np.float64))
    return np.ldexp(np.rint(fraction * 256), exponent - 8)


def run(code, **variables):
    """Run a Python program with these environment variables; return what its last line has in JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout.decode().splitlines()[-1])
