"""The compiled operators: equal to MXNet's own and to NumPy, chosen, built and described."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from support import reference_bert as reference
from support.compiled_operators import (
    BERT,
    SMALL,
    VARIANTS,
    assert_same,
    compiled,
    network,
    run,
    step,
    tolerance_for,
)

from gluon_bert import ops
from gluon_bert.config import DISTANCE_BUCKETS
from gluon_bert.errors import InputError
from gluon_bert.model.relative_position import CLS_BUCKET, distance_buckets
from gluon_bert.ops import build
from gluon_bert.runtime import mx
from gluon_bert.training import losses as loss
from gluon_bert.training.device_batch import split_and_load
from gluon_bert.training.losses import pretraining_loss

# A fixture for all tests here.
__all__ = ["compiled"]


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_compiled_step_equals_mxnets(config):
    net, batch = network(config), reference.random_batch([3, 12, 7, 5, 12], 12, 50)
    assert_same(step(net, batch), step(net, batch, by_mxnet=True))


@pytest.mark.parametrize("seed", range(8))
def test_compiled_step_of_random_sizes_equals_mxnets(seed):
    """Sizes that fill no vector, no tile and no slice, and some that fill several."""
    rng = np.random.default_rng(seed)
    heads = int(rng.integers(1, 6))
    config = dataclasses.replace(
        VARIANTS[rng.choice(list(VARIANTS))],
        num_heads=heads,
        units=heads * int(rng.integers(1, 40)),
        ffn_units=int(rng.integers(1, 300)),
    )
    padded_to = int(rng.integers(6, 200))
    lengths = rng.integers(3, padded_to + 1, rng.integers(1, 12))
    vocab_size = int(rng.integers(5, 2000))
    net, batch = (
        network(config, vocab_size, seed),
        reference.random_batch(lengths, padded_to, vocab_size, seed),
    )
    theirs = step(net, batch, by_mxnet=True)
    assert_same(step(net, batch), theirs, tolerance_for(net, batch, theirs))


def test_tolerance_for_a_common_size_is_small():
    net, batch = network(BERT), reference.random_batch([3, 12, 7, 5, 12], 12, 50)
    assert tolerance_for(net, batch, step(net, batch, by_mxnet=True)) < 2e-5


def test_compiled_step_of_large_sizes_equals_mxnets():
    config = dataclasses.replace(BERT, num_layers=1, units=300, ffn_units=520, num_heads=3)
    net, batch = network(config, 700), reference.random_batch([9] * 300, 9, 700)
    assert len(batch.masked_ids) > 500
    assert_same(step(net, batch), step(net, batch, by_mxnet=True))


# Dropout


def factor(index, rate, key, place):
    """What elements of these numbers are multiplied by, as `elementwise.h` has it."""
    mask = (1 << 64) - 1
    z = (key + (place + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    z ^= z >> 31
    first, second = np.uint32(z & 0xFFFFFFFF), np.uint32(z >> 32)
    x = index.astype(np.uint32) ^ first
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    x = (x ^ (x >> 16) ^ second) * np.uint32(0x9E3779B1)
    x ^= x >> 15
    return np.where((x >> 8) >= int(np.float32(rate) * (1 << 24)), 1 / (1 - rate), 0.0)


def test_dropout_factors_are_independent_halves():
    kept = np.stack([factor(np.arange(1 << 16), 0.5, 12345, place) > 0 for place in range(8)]).astype(float)
    assert np.abs(kept.mean(axis=1) - 0.5).max() < 0.01
    for shift in (1, 2, 16, 128, 4096):
        both = (kept[:, shift:] - 0.5) * (kept[:, :-shift] - 0.5)
        assert np.abs(both.mean(axis=1)).max() < 0.005
    assert np.abs(np.corrcoef(kept) - np.eye(8)).max() < 0.02


@pytest.mark.parametrize("name", ["post", "bert", "pre", "relative"])
def test_compiled_dropout_equals_reference(name):
    config = dataclasses.replace(VARIANTS[name], dropout=0.3)
    net, batch = network(config), reference.random_batch([3, 12, 7], 12, 50)
    mx.random.seed(7)
    high, low = (int(each * (1 << 24)) for each in mx.nd.random.uniform(shape=(2,)).asnumpy())
    key = high << 24 | low

    def drop(place, x):
        return x * factor(np.arange(x.size), 0.3, key, place).reshape(x.shape)

    mx.random.seed(7)
    (_, _, total, _), gradients = step(net, batch)
    values = reference.values(net)
    assert total[0] == pytest.approx(reference.losses(config, values, batch, drop)[2], rel=1e-5)
    rng = np.random.default_rng(0)
    for array_name, array in values.items():
        direction = rng.normal(size=array.shape)
        original, slope = array.copy(), 0.0
        for sign in (1, -1):
            array[...] = original + sign * 1e-5 * direction  # in place: a tied array has two names
            slope += sign * reference.losses(config, values, batch, drop)[2] / 2e-5
        array[...] = original
        expected = pytest.approx(slope, rel=1e-3, abs=1e-5)
        assert (gradients[array_name] * direction).sum() == expected, array_name


STEPS = """
import json, sys
sys.path[:0] = ["tests"]
import dataclasses
from gluon_bert.runtime import mx
from support import reference_bert as reference
from support.compiled_operators import BERT, network, step
net = network(dataclasses.replace(BERT, dropout=0.3, units=24, num_heads=3))
mx.random.seed(3)
batch = reference.random_batch([40, 9, 33, 64] * 8, 64, 50)
found = [step(net, batch), step(net, batch), step(net, batch, bf16=True)]
sums = [[float(losses[2][0]), sum(abs(g).sum() for g in grads.values())] for losses, grads in found]
print(json.dumps(sums))
"""


def assert_close(ours, theirs):
    """Sums in another order; in bfloat16 some numbers are then rounded to the other side."""
    np.testing.assert_allclose(ours[:2], theirs[:2], rtol=1e-5)
    np.testing.assert_allclose(ours[2], theirs[2], rtol=2e-4)


def test_seed_repeats_dropout_on_any_number_of_threads():
    one, again, three = (run(STEPS, OMP_NUM_THREADS=threads) for threads in ("1", "1", "3"))
    assert one == again
    assert one[0] != one[1]
    assert_close(three, one)


MUON = """
import hashlib, json
import numpy as np
from gluon_bert import ops
from gluon_bert.runtime import mx
assert not ops.describe().startswith("MXNet")
rng = np.random.default_rng(0)
SHAPES = [(150, 300), (200, 200), (300, 150)]
arrays = [[mx.nd.array(rng.normal(size=shape)) for shape in SHAPES * 8] for _ in range(3)]
ops.muon_step(*arrays, mx.nd.ones((1,)), False, rate=0.1, decay=0.1, momentum=0.9)
changed = arrays[0] + arrays[2]
print(json.dumps([hashlib.sha256(array.asnumpy().tobytes()).hexdigest() for array in changed]))
"""


def test_muon_step_is_the_same_on_any_number_of_threads():
    one, *others = (run(MUON, OMP_NUM_THREADS=threads) for threads in ("1", "3", "3"))
    assert others == [one, one]


@pytest.mark.parametrize("bf16", [False, True])
def test_peak_matmul_flops_grow_with_repeats(bf16):
    assert ops.peak_matmul_flops(2, bf16) == 2 * ops.peak_matmul_flops(1, bf16) > 1e6
    assert ops.peak_matmul_flops(1, bf16) == (1 + bf16) * ops.peak_matmul_flops(1)


@pytest.mark.slow
def test_avx512_vectors_give_the_same_step(tmp_path):
    """Those of AVX-512, which the compiler spells out where the processor has none; -O1, or it takes long."""
    wider = tmp_path / "wider"
    wider.write_text('#!/bin/sh\nexec c++ -D__AVX512F__=1 "$@" -O1\n', "utf-8")
    wider.chmod(0o755)
    other = run(STEPS, CXX=str(wider), MXNET_HOME=str(tmp_path), GLUON_BERT_OPERATORS="compiled")
    assert_close(other, run(STEPS))


# What gradients meet


def test_grad_req_add_adds_gradients():
    net, batch = network(BERT), reference.random_batch([3, 12, 7], 12, 50)
    once = step(net, batch)[1]
    net.collect_params().setattr("grad_req", "add")
    for _ in range(3):
        _, added = step(net, batch)
    for name, gradient in once.items():
        np.testing.assert_allclose(added[name], 3 * gradient, rtol=1e-4, atol=1e-6, err_msg=name)


def test_grad_req_add_with_two_passes_adds_both():
    """Of the words of a tied decoder, too, which two operators use in each pass."""
    net = network(BERT)
    batches = [
        reference.random_batch(lengths, 12, 50, seed=i) for i, lengths in enumerate(([3, 12], [9, 5, 7]))
    ]
    one, other = (step(net, batch)[1] for batch in batches)
    net.collect_params().setattr("grad_req", "add")
    with mx.autograd.record():
        totals = [pretraining_loss(net, *split_and_load(batch, [mx.cpu()])).total for batch in batches]
    mx.autograd.backward(totals)
    for name, gradient in reference.gradients(net).items():
        np.testing.assert_allclose(gradient, one[name] + other[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_mixed_grad_req_is_refused():
    net, batch = network(SMALL), reference.random_batch([3, 12], 12, 50)
    net.encoder.layers[0].collect_params().setattr("grad_req", "add")
    with pytest.raises(InputError, match="grad_req must be the same for all"):
        step(net, batch)


def test_grad_req_null_leaves_other_gradients():
    net, batch = network(SMALL), reference.random_batch([3, 12, 7], 12, 50)
    expected = step(net, batch)[1]
    net.encoder.embeddings.collect_params().setattr("grad_req", "null")
    net.encoder.layers[0].collect_params().setattr("grad_req", "null")
    (shard,) = split_and_load(batch, [mx.cpu()])
    with mx.autograd.record():
        total = pretraining_loss(net, shard).total
    total.backward()
    for name, parameter in net._collect_params_with_prefix().items():
        if parameter.grad_req != "null":
            np.testing.assert_allclose(parameter.grad().asnumpy(), expected[name], rtol=1e-5, atol=1e-7)


def test_second_forward_leaves_first_gradients():
    net = network(BERT)
    one, other = (
        reference.random_batch(lengths, 12, 50, seed=i) for i, lengths in enumerate(([3, 12], [9, 5, 7]))
    )
    expected = step(net, one)[1]
    shards = [split_and_load(each, [mx.cpu()])[0] for each in (one, other)]
    with mx.autograd.record():
        totals = [pretraining_loss(net, shard).total for shard in shards]
    totals[0].backward(retain_graph=True)
    totals[0].backward()
    for name, gradient in reference.gradients(net).items():
        np.testing.assert_array_equal(gradient, expected[name], err_msg=name)


def test_nan_weight_gives_nan_loss():
    net, batch = network(SMALL), reference.random_batch([3, 12, 7], 12, 50)
    weight = net.encoder.layers[1].feed_forward.expand.weight
    weight.set_data(weight.data() * np.nan)
    assert np.isnan(step(net, batch)[0][0]).all()


def test_large_scores_give_finite_losses():
    net, batch = network(SMALL), reference.random_batch([3, 12, 7], 12, 50)
    net.mlm.decoder.weight.set_data(net.mlm.decoder.weight.data() * 1e4)
    losses, gradients = step(net, batch)
    assert all(np.isfinite(each).all() for each in (*losses, *gradients.values()))
    np.testing.assert_allclose(losses[0], step(net, batch, by_mxnet=True)[0][0], rtol=1e-5)


def test_mlm_loss_without_masked_words_is_zero(monkeypatch):
    monkeypatch.setattr(ops, "masked_loss", None)  # which wants one at least
    net, batch = network(SMALL), reference.random_batch([3, 12], 12, 50)
    (shard,) = split_and_load(batch, [mx.cpu()])
    none = dataclasses.replace(shard, arrays={**shard.arrays, "masked_ids": []})
    encoded = net.encoder(shard.tokens, shard.token_types, shard.valid_length)
    assert loss.masked_lm(net, encoded, none).value == 0


# Which side computes


def test_export_contains_mxnets_operators_only(tmp_path):
    net, batch = network(BERT), reference.random_batch([3, 12], 12, 50)
    arrays = [mx.nd.array(a, dtype=np.float32) for a in (batch.tokens, batch.token_types, batch.valid_length)]
    encoded = net.encoder(*arrays)
    net.encoder.export(str(tmp_path / "encoder"))
    assert "gluon_bert_" not in (tmp_path / "encoder-symbol.json").read_text("utf-8")
    files = (
        str(tmp_path / "encoder-symbol.json"),
        ["data0", "data1", "data2"],
        str(tmp_path / "encoder-0000.params"),
    )
    with mx.AttrScope(__dtype__="0"):  # float32, or it warns
        served = mx.gluon.SymbolBlock.imports(*files)(*arrays)
    np.testing.assert_allclose(served[0, :3].asnumpy(), encoded[0, :3].asnumpy(), rtol=1e-4, atol=1e-5)


def test_blocks_not_hybridized_use_mxnets_operators():
    net = network(SMALL)
    array = mx.nd.zeros((1, 3))
    assert ops.use_compiled(net.encoder, array)
    net.hybridize(active=False)
    assert not ops.use_compiled(net.encoder, array)
    assert not ops.use_compiled(net.encoder, mx.sym.var("tokens"))


def message(**variables):
    code = "import json; from gluon_bert import ops; print(json.dumps(ops.select()))"
    return run(code, **variables)


def test_missing_compiler_falls_back_with_a_reason(tmp_path):
    elsewhere = {"MXNET_HOME": str(tmp_path), "GLUON_BERT_OPERATORS": "auto"}
    assert message(CXX="no-such-compiler", **elsewhere) == (
        "MXNet's own (no C++ compiler was found (no-such-compiler))"
    )
    broken = tmp_path / "broken"
    broken.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "x.cc:1: error: not today"; exit 1\n', "utf-8"
    )
    broken.chmod(0o755)
    assert message(CXX=str(broken), **elsewhere) == f"MXNet's own ({broken} fails: x.cc:1: error: not today)"
    assert not list((tmp_path / "gluon_bert" / "operators").iterdir())
    (tmp_path / "file").touch()
    assert "is not writable" in message(**{**elsewhere, "MXNET_HOME": str(tmp_path / "file")})


def test_select_chooses_operators(monkeypatch):
    assert message(GLUON_BERT_OPERATORS="mxnet") == "MXNet's own (as chosen)"
    with pytest.raises(InputError, match="operators must be one of auto, compiled, mxnet, got quick"):
        ops.select("quick")
    monkeypatch.setenv(ops.VARIABLE, "quick")
    with pytest.raises(InputError, match="GLUON_BERT_OPERATORS must be one of"):
        ops.select()
    monkeypatch.undo()
    assert ops.select() == "compiled for this processor"


def test_select_compiled_without_compiler_raises(tmp_path):
    code = "from gluon_bert import ops; ops.select('compiled')"
    environment = {**os.environ, "CXX": "no-such-compiler", "MXNET_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    assert b"InputError: the compiled operators are not available: no C++ compiler was found" in done.stderr


def test_library_is_built_once_per_flags(monkeypatch, tmp_path):
    path = build.built_library()
    monkeypatch.setattr(build, "_build", lambda *_: pytest.fail("built again"))
    assert build.built_library() == path
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    with pytest.raises(pytest.fail.Exception):
        build.built_library()


# Relative positions


def test_relative_bias_equals_reference_in_every_bucket():
    """In 200 tokens: NumPy, MXNet's operators and the compiled ones agree on each distance's bucket."""
    config = dataclasses.replace(BERT, num_layers=1, position="relative-bias")
    net, batch = network(config), reference.random_batch([200, 3], 200, 50)
    (shard,) = split_and_load(batch, [mx.cpu()])
    inputs = (shard.tokens, shard.token_types, shard.valid_length)
    expected = reference.encode(config, reference.values(net), batch)
    real = np.arange(200) < batch.valid_length[:, None]
    compiled_result = net.encoder(*inputs).asnumpy()
    net.hybridize(active=False)
    for found in (compiled_result, net.encoder(*inputs).asnumpy()):
        np.testing.assert_allclose(found[real], expected[real], rtol=1e-4, atol=1e-4)
    buckets = distance_buckets(mx.nd, shard.tokens).asnumpy()
    assert set(buckets.ravel()) == set(range(DISTANCE_BUCKETS))
    assert (buckets[0] == CLS_BUCKET).all() and (buckets[:, 0] == CLS_BUCKET).all()
