"""The encoder with output positions: the vectors and gradients there are those of the whole encoder."""

import dataclasses

import numpy as np
import pytest
from support import reference_bert as reference
from support.compiled_operators import BERT, VARIANTS, assert_same, compiled, multiply_bf16, network, run

from gluon_bert import ops
from gluon_bert.model.classifier import BERTForTask
from gluon_bert.model.task import Task
from gluon_bert.runtime import mx
from gluon_bert.training.device_batch import split_and_load
from gluon_bert.training.losses import pretraining_loss, task_loss

__all__ = ["compiled"]  # a fixture for all tests here, too

LENGTHS, LONGEST = [3, 45, 31, 5, 18, 45, 4] * 3, 45
# The first row has no outputs. The second has some twice, and one of the last row is padding.
POSITIONS = np.array(
    [[1, 1, 1, 2, 3, 4, 4, 5, 6, 9, 14, 20, 20], [0, 44, 44, 7, 0, 17, 2, 30, 0, 5, 2, 3, 9]]
)


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def net(request):
    return network(dataclasses.replace(request.param, dropout=0.3))


@pytest.fixture
def shard():
    return split_and_load(reference.random_batch(LENGTHS, LONGEST, 50), [mx.cpu()])[0]


def encode(net, shard, *positions):
    mx.random.seed(5)  # the same dropout each time
    arrays = (shard.tokens, shard.token_types, shard.valid_length)
    return net.encoder(*arrays, *(mx.nd.array(each) for each in positions))


def outputs_mask():
    """1 at the positions of real tokens, (B, T, 1)."""
    mask = np.zeros((len(LENGTHS), LONGEST, 1))
    mask[tuple(POSITIONS)] = 1
    return mask * (np.arange(LONGEST) < np.array(LENGTHS)[:, None])[..., None]


def vectors_and_gradients(net, shard, weight, *positions):
    """The vectors, and the gradients of their sum times `weight`."""
    net.collect_params().zero_grad()
    with mx.autograd.record():
        encoded = encode(net, shard, *positions)
        total = (encoded * mx.nd.array(weight)).sum()
    total.backward()
    return encoded.asnumpy(), reference.gradients(net)


def assert_outputs_of_the_whole(net, shard, tolerance=1e-5):
    mask = outputs_mask()
    weight = np.random.default_rng(0).normal(size=(*mask.shape[:2], net.config.units))
    vectors, gradients = vectors_and_gradients(net, shard, weight * mask)
    found, found_gradients = vectors_and_gradients(net, shard, weight, POSITIONS)
    np.testing.assert_array_equal(found, vectors * mask)
    for name, gradient in gradients.items():
        largest = np.abs(gradient).max()
        np.testing.assert_allclose(found_gradients[name], gradient, rtol=0, atol=tolerance * largest + 1e-12)


def test_vectors_and_gradients_equal_those_of_the_whole_encoder(net, shard):
    """The weight is not zero elsewhere, so gradients there are ignored."""
    assert_outputs_of_the_whole(net, shard)


def test_vectors_and_gradients_in_bf16_equal_those_of_the_whole_encoder(net, shard, monkeypatch):
    multiply_bf16(monkeypatch)
    assert_outputs_of_the_whole(net, shard)


@pytest.mark.parametrize("name", ["post", "pre"])
def test_recomputed_layers_give_the_same_bits(name, shard):
    net = network(dataclasses.replace(VARIANTS[name], dropout=0.3))
    weight = outputs_mask() * np.ones(net.config.units)
    kept = vectors_and_gradients(net, shard, weight, POSITIONS)
    with net.encoder.recomputing(seed=1):
        again = vectors_and_gradients(net, shard, weight, POSITIONS)
    np.testing.assert_array_equal(again[0], kept[0])
    for gradient_name, gradient in kept[1].items():
        np.testing.assert_array_equal(again[1][gradient_name], gradient)


def test_no_outputs_but_padding_give_zeros(net, shard):
    padding = np.array([[0, 3], [44, 20]])
    vectors, gradients = vectors_and_gradients(net, shard, np.ones((1, 1, 1)), padding)
    assert not vectors.any()
    assert not any(gradient.any() for gradient in gradients.values())


def test_positions_outside_the_batch_are_clipped(shard):
    net = network(BERT)
    outside, inside = np.array([[-3, 99], [-1, 99]]), np.array([[0, 20], [0, 44]])
    np.testing.assert_array_equal(encode(net, shard, outside).asnumpy(), encode(net, shard, inside).asnumpy())


def test_empty_rows_and_empty_positions_give_zeros(shard):
    net = network(BERT)
    shard.valid_length[1:3] = 0
    mask = outputs_mask()
    mask[1:3] = 0
    expected = encode(net, shard).asnumpy() * mask
    np.testing.assert_array_equal(encode(net, shard, POSITIONS).asnumpy(), expected)
    with mx.util.np_shape():  # which allows empty arrays
        assert not encode(net, shard, np.zeros((2, 0))).asnumpy().any()


def test_positions_of_another_type_are_cast(shard):
    net = network(BERT)
    inputs = (shard.tokens, shard.token_types, shard.valid_length)
    found = net.encoder(*inputs, mx.nd.array(POSITIONS, dtype="int32")).asnumpy()
    np.testing.assert_array_equal(found, encode(net, shard, POSITIONS).asnumpy())


@pytest.mark.parametrize("shape", [(1, 4), (3, 2), (4,)])
def test_positions_of_another_shape_are_refused(shard, shape):
    with pytest.raises(mx.MXNetError, match=r"output_positions must be of shape \(2, N\)"):
        encode(network(BERT), shard, np.zeros(shape)).wait_to_read()


@pytest.mark.parametrize("num_contexts", [1, 3])
def test_heads_get_the_losses_and_gradients_of_the_whole_encoder(net, num_contexts, monkeypatch):
    """Also on contexts without rows of their own, whose gradients are zero."""
    contexts = [mx.cpu(i) for i in range(num_contexts)]
    net.collect_params().reset_ctx(contexts)
    shards = split_and_load(reference.random_batch([9, 12], 12, 50), contexts)

    def step():
        mx.random.seed(5)
        with mx.autograd.record():
            totals = [pretraining_loss(net, shard).total for shard in shards]
        mx.autograd.backward(totals)
        parameters = net.collect_params().items()
        gradients = {(name, i): p.grad(c).asnumpy() for name, p in parameters for i, c in enumerate(contexts)}
        return [total.asnumpy() for total in totals], gradients

    found = step()
    operator = ops.encode
    monkeypatch.setattr(
        ops, "encode", lambda *arrays, **settings: operator(*arrays[:5], **settings)
    )  # without positions
    assert_same(found, step())


INFERENCE = """
import json, sys
sys.path[:0] = ["tests"]
import dataclasses
import numpy as np
from gluon_bert.runtime import mx
from support import reference_bert as reference
from support.compiled_operators import VARIANTS, network
net = network(dataclasses.replace(VARIANTS[%r], num_layers=%d))
batch = reference.random_batch([40, 9, 33, 64] * 20, 64, 50)
arrays = (batch.tokens, batch.token_types, batch.valid_length)
inputs = [mx.nd.array(each, dtype="float32") for each in arrays]
rows = np.arange(80)
positions = np.array([[*rows, *rows], [0] * 80 + [8] * 80])
whole = net.encoder(*inputs).asnumpy()
found = [net.encoder(*inputs, mx.nd.array(positions)).asnumpy() for _ in range(5)]
print(json.dumps([np.array_equal(each[tuple(positions)], whole[tuple(positions)]) for each in found]))
"""


@pytest.mark.parametrize(("name", "num_layers"), [("bert", 4), ("relative-pre", 2), ("pre", 1)])
def test_inference_on_several_threads_gives_the_vectors_of_the_whole_encoder(name, num_layers):
    """Nothing is kept, so a layer's output may replace its input, but not the last layer's."""
    assert run(INFERENCE % (name, num_layers), OMP_NUM_THREADS="3") == [True] * 5


def test_mxnets_operators_give_the_vectors_at_output_positions(shard, monkeypatch):
    net = network(BERT)
    expected = encode(net, shard, POSITIONS).asnumpy()
    monkeypatch.setattr(ops, "use_compiled", lambda *_: False)
    found = encode(net, shard, POSITIONS).asnumpy()
    np.testing.assert_allclose(found * outputs_mask(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["classification", "tagging"])
def test_task_loss_equals_mxnets(kind, shard, monkeypatch):
    net = BERTForTask(50, BERT, Task(kind, pairs=True, labels=("no", "yes", "maybe")))
    net.initialize(seed=0)
    net.hybridize()
    shape = (len(LENGTHS),) if kind == "classification" else (len(LENGTHS), LONGEST)
    targets = mx.nd.array(np.random.default_rng(0).integers(0, 3, shape))
    shard = dataclasses.replace(shard, arrays={**shard.arrays, "targets": targets}, label_weight=0.01)
    if kind == "tagging":
        real = np.arange(LONGEST) < np.array(LENGTHS)[:, None]
        targets[:] = mx.nd.array(np.where(real, targets.asnumpy(), -1))

    def step():
        with mx.autograd.record():
            total = task_loss(net, shard).total
        total.backward()
        return [total.asnumpy()], reference.gradients(net)

    found = step()
    monkeypatch.setattr(ops, "use_compiled", lambda *_: False)
    assert_same(found, step())
