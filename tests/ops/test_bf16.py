"""The compiled operators with products of bfloat16: NumPy's of rounded numbers, and near to those of float32.

Where the processor has no instruction for them they are made of float32's, and that is what is tested there.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from support import reference_bert as reference
from support.compiled_operators import VARIANTS, compiled, multiply_bf16, network, step, to_bf16
from support.trainers import BERT, NOISY, gradients_of, small_data, trainer_on

from gluon_bert import ops
from gluon_bert.runtime import mx
from gluon_bert.training.device_batch import split_and_load

__all__ = ["compiled"]  # a fixture for all tests here, too

# Odd numbers of terms everywhere, and rows and heads that fill more than a vector.
SIZES = {"units": 51, "num_heads": 3, "ffn_units": 83}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def net(request):
    return network(dataclasses.replace(request.param, **SIZES), vocab_size=301)


@pytest.fixture
def batch():
    return reference.random_batch([3, 45, 31, 18, 45, 4], 45, 301)


@pytest.fixture(scope="module")
def data():
    return small_data()


def test_bf16_forward_equals_reference_with_rounding(net, batch, monkeypatch):
    """To a quarter of what rounding changes: near halfway float32 rounds some numbers to the other side."""
    values = reference.values(net)
    exact = reference.encode(net.config, values, batch)
    monkeypatch.setattr(reference, "product", lambda x, y: to_bf16(x) @ to_bf16(y))
    encoded, scores, _ = reference.forward(net.config, values, batch)
    multiply_bf16(monkeypatch)
    (shard,) = split_and_load(batch, [mx.cpu()])
    found = net.encoder(shard.tokens, shard.token_types, shard.valid_length).asnumpy()
    real = np.arange(found.shape[1]) < batch.valid_length[:, None]
    assert np.abs(found - encoded)[real].mean() < 0.25 * np.abs(exact - encoded)[real].mean()
    assert step(net, batch)[0][0] == pytest.approx(
        reference.cross_entropy(scores, batch.masked_ids), rel=5e-4
    )


def test_bf16_step_is_near_float32(net, batch):
    """To a few times the 2^-9 of a rounding; where ReLU cuts off, some gradients go elsewhere."""
    (losses, expected), (near, gradients) = step(net, batch), step(net, batch, bf16=True)
    for found, exact in zip(near[:3], losses):
        assert found == pytest.approx(exact, rel=1e-2)
    tolerance = 0.15 if net.config.activation == "relu" else 0.03
    # A floor for what is 0 but for rounding: the gradient of key biases.
    floor = 0.05 * np.mean([np.linalg.norm(gradient) for gradient in expected.values()])
    for name, gradient in expected.items():
        distance = np.linalg.norm(gradients[name] - gradient)
        assert 0 < distance < tolerance * max(np.linalg.norm(gradient), floor), name


def test_bf16_grad_req_add_adds_gradients(batch):
    net = network(dataclasses.replace(VARIANTS["bert"], **SIZES), vocab_size=301)
    once = step(net, batch, bf16=True)[1]
    net.collect_params().setattr("grad_req", "add")
    for _ in range(3):
        _, added = step(net, batch, bf16=True)
    for name, gradient in once.items():
        np.testing.assert_allclose(added[name], 3 * gradient, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_bf16_recompute_gives_the_same_bits(data, norm, monkeypatch):
    multiply_bf16(monkeypatch)
    model, batch = dataclasses.replace(NOISY, norm=norm), next(data.train.epoch(0))
    kept, again = (
        gradients_of(trainer_on(1, data, model, lr=0.0, micro_batch=4, recompute=recompute), batch)
        for recompute in (False, True)
    )
    for name, gradient in kept.items():
        np.testing.assert_array_equal(again[name], gradient, err_msg=name)


def test_bf16_training_follows_float32(data, monkeypatch):
    def curve():
        trainer = trainer_on(1, data, dataclasses.replace(BERT, units=32), lr=1e-3)
        batch = next(data.train.epoch(0))
        return [trainer.step(batch)[1][0].total.asscalar() for _ in range(80)]

    exact = curve()
    multiply_bf16(monkeypatch)
    found = curve()
    assert exact[-1] < 0.5 * exact[0]
    assert found != exact
    np.testing.assert_allclose(found, exact, atol=0.1)


def test_bf16_nan_weight_gives_nan_loss(batch):
    net = network(dataclasses.replace(VARIANTS["bert"], **SIZES), vocab_size=301)
    weight = net.encoder.layers[1].feed_forward.expand.weight
    weight.set_data(weight.data() * np.nan)
    assert np.isnan(step(net, batch, bf16=True)[0][0]).all()


def test_bf16_unsupported_reason_names_what_is_missing(monkeypatch):
    processors = Path("/proc/cpuinfo")
    if processors.exists():
        here = "avx512_bf16" in processors.read_text("utf-8").split()
        lacking = "this processor does not have the AVX512_BF16 instructions"
        assert ops.bf16_unsupported_reason() == ("" if here else lacking)
    monkeypatch.setenv(ops.VARIABLE, "mxnet")
    ops.select()
    try:
        expected = "bf16 needs the compiled operators, which are not available (as chosen)"
        assert ops.bf16_unsupported_reason() == expected
    finally:
        monkeypatch.undo()
        ops.select()
