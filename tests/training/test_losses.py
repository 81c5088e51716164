"""The losses against NumPy, at their extremes, and in parts."""

import dataclasses

import numpy as np
import pytest
from support import reference_bert as reference

from gluon_bert.config import ModelConfig
from gluon_bert.model.bert import BERTModel
from gluon_bert.runtime import mx
from gluon_bert.training.device_batch import split_and_load
from gluon_bert.training.losses import cross_entropy, num_correct, pretraining_loss

VOCAB = 23
CONFIG = ModelConfig(num_layers=1, units=8, ffn_units=12, num_heads=2, dropout=0.0, max_positions=16)
LENGTHS = [3, 12, 7, 5, 12, 4, 9]
# MXNet's log_softmax on the CPU is oneDNN's, with an error of up to 5e-6 a row whatever the loss: one that
# should be 0 may come out as -1.4e-6.
ROW_ERROR = 5e-6


@pytest.fixture(scope="module")
def net():
    net = BERTModel(VOCAB, CONFIG)
    net.initialize(ctx=[mx.cpu(i) for i in range(4)])
    net.hybridize()
    reference.randomise(net)
    return net


@pytest.fixture(scope="module")
def batch():
    return reference.random_batch(LENGTHS, 12, VOCAB)


def scores_and_labels(rows, classes, scale=1.0):
    rng = np.random.default_rng(0)
    return (scale * rng.normal(size=(rows, classes))).astype(np.float32), rng.integers(0, classes, rows)


@pytest.mark.parametrize(("rows", "classes"), [(1, 2), (7, 2), (40, 1000)])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_cross_entropy_is_the_sum_over_rows(rows, classes, scale):
    scores, labels = scores_and_labels(rows, classes, scale)
    ours = cross_entropy(mx.nd.array(scores), mx.nd.array(labels))
    assert ours.shape == (1,)
    expected = reference.cross_entropy(scores, labels)
    assert ours.asscalar() == pytest.approx(expected, rel=1e-6, abs=ROW_ERROR * rows)


def test_cross_entropy_of_equal_scores_is_ln_classes():
    ours = cross_entropy(mx.nd.zeros((3, 10)), mx.nd.array([0, 4, 9]))
    assert ours.asscalar() == pytest.approx(3 * np.log(10), abs=3 * ROW_ERROR)


@pytest.mark.parametrize(("label", "loss"), [(0, 0.0), (1, 1e4), (2, 2e4)])
def test_cross_entropy_extreme_scores_stay_finite(label, loss):
    scores = mx.nd.array([[1e4, 0, -1e4]])
    scores.attach_grad()
    with mx.autograd.record():
        ours = cross_entropy(scores, mx.nd.array([label]))
    ours.backward()
    assert ours.asscalar() == pytest.approx(loss, rel=1e-6, abs=ROW_ERROR)
    expected = np.eye(3)[0] - np.eye(3)[label]  # softmax minus the label
    np.testing.assert_allclose(scores.grad.asnumpy()[0], expected, rtol=0, atol=ROW_ERROR)


@pytest.mark.parametrize(("rows", "classes"), [(1, 2), (300, 3)])
def test_num_correct_counts_highest_scores(rows, classes):
    scores, labels = scores_and_labels(rows, classes)
    ours = num_correct(mx.nd.array(scores), mx.nd.array(labels))
    assert ours.shape == (1,)
    assert ours.asscalar() == reference.hits(scores, labels)


@pytest.mark.parametrize("slice_size", [1, 3, 10_000])
def test_pretraining_loss_equals_the_numpy_reference(net, batch, slice_size, monkeypatch):
    # Slices with a smaller last one, and one slice for all.
    monkeypatch.setattr("gluon_bert.training.losses.CHUNK", slice_size)
    (shard,) = split_and_load(batch, [mx.cpu()], count_correct=True)
    loss = pretraining_loss(net, shard)
    ours = loss.losses
    values = reference.values(net)
    mlm, nsp, total = reference.losses(CONFIG, values, batch)
    assert ours["mlm"].value.shape == ours["nsp"].value.shape == loss.total.shape == (1,)
    assert ours["mlm"].value.asscalar() == pytest.approx(mlm, rel=1e-5)
    assert ours["nsp"].value.asscalar() == pytest.approx(nsp, rel=1e-5)
    assert loss.total.asscalar() == pytest.approx(total, rel=1e-5)
    _, mlm_scores, nsp_scores = reference.forward(CONFIG, values, batch)
    right = [
        reference.hits(mlm_scores, batch.masked_ids),
        reference.hits(nsp_scores, batch.next_sentence_labels),
    ]
    assert [each.correct.asscalar() for each in ours.values()] == right
    (shard,) = split_and_load(batch, [mx.cpu()])
    uncounted = pretraining_loss(net, shard).losses
    assert uncounted["mlm"].correct is None
    assert uncounted["nsp"].correct.asscalar() == right[1]


def test_slices_change_no_gradient(net, batch, monkeypatch):
    def gradients(slice_size):
        monkeypatch.setattr("gluon_bert.training.losses.CHUNK", slice_size)
        with mx.autograd.record():
            loss = pretraining_loss(net, *split_and_load(batch, [mx.cpu()]))
        loss.total.backward()
        return {name: p.grad().asnumpy() for name, p in net._collect_params_with_prefix().items()}

    whole, sliced = gradients(10_000), gradients(3)
    for name, gradient in whole.items():
        np.testing.assert_allclose(sliced[name], gradient, rtol=1e-4, atol=1e-7, err_msg=name)


@pytest.mark.parametrize(("mlm_weight", "nsp_weight"), [(0.0, 0.0), (0.25, 0.0), (0.0, 3.0), (0.25, 3.0)])
def test_total_weighs_the_two_losses(net, batch, mlm_weight, nsp_weight):
    (shard,) = split_and_load(batch, [mx.cpu()])
    loss = pretraining_loss(net, dataclasses.replace(shard, masked_weight=mlm_weight, pair_weight=nsp_weight))
    mlm, nsp, _ = reference.losses(CONFIG, reference.values(net), batch)
    assert loss.total.asscalar() == pytest.approx(mlm_weight * mlm + nsp_weight * nsp, rel=1e-5)


@pytest.mark.parametrize("num_rows", [1, 2, 7])
@pytest.mark.parametrize("num_shards", [1, 2, 3, 4])
def test_shards_of_a_batch_add_up_to_it(net, batch, num_rows, num_shards):
    batch = batch.rows(0, num_rows)
    contexts = [mx.cpu(i) for i in range(num_shards)]
    shards = split_and_load(batch, contexts)
    assert [shard.tokens.context for shard in shards] == contexts
    losses = [pretraining_loss(net, shard) for shard in shards]
    mlm, nsp, total = reference.losses(CONFIG, reference.values(net), batch)
    used = [(shard, loss) for shard, loss in zip(shards, losses) if shard.num_pairs]
    assert sum(loss.total.asscalar() for loss in losses) == pytest.approx(total, rel=1e-5)
    assert sum(loss.losses["mlm"].value.asscalar() for _, loss in used) == pytest.approx(mlm, rel=1e-5)
    assert sum(loss.losses["nsp"].value.asscalar() for _, loss in used) == pytest.approx(nsp, rel=1e-5)
    assert sum(shard.num_pairs for shard in shards) == num_rows
    assert sum(shard.num_masked for shard in shards) == len(batch.masked_ids)
