"""Micro-batches and recomputed layers: the same gradients with either kind of operators; bad input."""

import dataclasses

import numpy as np
import pretrain
import pytest
from support import reference_bert as reference
from support.trainers import (
    BERT,
    MODEL,
    NOISY,
    assert_same,
    gradients_of,
    random_batch,
    small_data,
    trainer_on,
)

from gluon_bert import ops
from gluon_bert.data.batch import Batch, micro_batches
from gluon_bert.errors import InputError
from gluon_bert.model.gradient_checkpointing import CheckpointedForward, Segment
from gluon_bert.runtime import mx
from gluon_bert.training import trainer as trainers
from gluon_bert.training.device_batch import split_and_load
from gluon_bert.training.trainer import dropout_seed

PRE = dataclasses.replace(BERT, norm="pre", num_layers=3)
MODELS = {"d2l": MODEL, "bert": BERT, "pre": PRE}
RELATIVE = dataclasses.replace(NOISY, dropout=0.0, position="relative-bias")


@pytest.fixture(scope="module")
def data():
    return small_data()


@pytest.fixture(params=["compiled", "mxnet"])
def operators(request, monkeypatch):
    """Return either kind of operators; skip the compiled ones if they are not available."""
    if request.param == "mxnet":
        monkeypatch.setattr(ops, "use_compiled", lambda *_: False)
    elif ops.describe() != "compiled for this processor":
        pytest.skip(f"the operators are {ops.describe()}")
    return request.param


def weights_after(data, num_steps, num_contexts=1, model=BERT, **changes):
    """The weights after some steps, on batches of either length of the buckets."""
    trainer = trainer_on(num_contexts, data, model, **changes)
    steps = [batch for _, batch in zip(range(num_steps), data.train.epoch(0))]
    assert len({batch.tokens.shape[1] for batch in steps}) == 2
    for batch in steps:
        trainer.step(batch)
    return reference.values(trainer.net)


# In parts


def test_micro_batches_have_rows_and_weights_of_batch():
    batch = random_batch(8)
    parts = micro_batches(batch, 3)
    assert [len(part) for part in parts] == [3, 3, 2]
    assert [len(part) for part in micro_batches(batch, 0)] == [8]
    for name in ("tokens", "token_types", "valid_length", "masked_ids", "next_sentence_labels"):
        together = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(together, getattr(batch, name), err_msg=name)
    shards = [s for part in parts for s in split_and_load(part, [mx.cpu(0), mx.cpu(1)], whole=batch)]
    assert sum(s.pair_weight * s.num_pairs for s in shards) == pytest.approx(1)
    assert sum(s.masked_weight * s.num_masked for s in shards) == pytest.approx(1)


@pytest.mark.parametrize("num_contexts", [1, 2])
@pytest.mark.parametrize("micro_batch", [2, 3, 8])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_gradient_of_micro_batches_is_that_of_batch(data, operators, model, micro_batch, num_contexts):
    batch = random_batch()
    whole = gradients_of(trainer_on(1, data, model, lr=0.0), batch)
    assert max(np.abs(gradient).max() for gradient in whole.values()) > 1e-2
    # After another batch, which must leave nothing.
    parts = trainer_on(num_contexts, data, model, lr=0.0, micro_batch=micro_batch)
    assert_same(gradients_of(parts, random_batch(5, seed=1), batch), whole, 1e-5)


@pytest.mark.parametrize("num_contexts", [1, 2])
@pytest.mark.parametrize("optimizer", ["bertadam", "muon"])
def test_clipped_micro_batch_steps_give_same_weights(data, operators, optimizer, num_contexts):
    recipe = {"optimizer": optimizer, "clip_norm": 0.1, "weight_decay": 0.01, "warmup_ratio": 0.3}
    whole = weights_after(data, 6, **recipe)
    parts = weights_after(data, 6, num_contexts, micro_batch=3, recompute=True, **recipe)
    for name, value in parts.items():
        # A key's bias has only rounding errors as gradient. Adam turns them into steps.
        if not name.endswith("key.bias"):
            np.testing.assert_allclose(value, whole[name], rtol=0, atol=2e-5, err_msg=name)


def test_micro_batches_make_one_update(data):
    trainer = trainer_on(1, data, micro_batch=2)
    for _ in range(3):
        shards, losses = trainer.step(random_batch())
    assert len(shards) == len(losses) == 4
    updates = trainer.snapshot().optimizer["encoder.embeddings.tokens.weight/updates"]
    assert (trainer.state.step, int(updates[0])) == (3, 3)


def test_losses_of_micro_batches_are_those_of_batch(data, operators):
    batch = random_batch()
    _, (whole,) = trainer_on(1, data, BERT).step(batch)
    _, parts = trainer_on(1, data, BERT, micro_batch=3).step(batch)
    for name in ("mlm", "nsp"):
        total = sum(part.losses[name].value.asscalar() for part in parts)
        assert total == pytest.approx(whole.losses[name].value.asscalar(), rel=1e-5)
    assert sum(part.total.asscalar() for part in parts) == pytest.approx(whole.total.asscalar(), rel=1e-5)


def test_evaluation_in_micro_batches_is_the_same(data, operators):
    whole, parts = (
        trainer_on(2, data, BERT, micro_batch=n).evaluate(data.validation.epoch(0)) for n in (0, 3)
    )
    assert parts == pytest.approx(whole, rel=1e-5)


def test_micro_batches_draw_own_seeded_dropout(data, operators):
    row = random_batch(1)
    twice = Batch(
        *(np.repeat(getattr(row, name), 2, axis=0) for name in ("tokens", "token_types", "valid_length")),
        np.concatenate([row.masked_positions, row.masked_positions + [[1], [0]]], axis=1).astype(np.int32),
        *(np.concatenate([getattr(row, name)] * 2) for name in ("masked_ids", "next_sentence_labels")),
    )
    for recompute in (False, True):
        runs = [trainer_on(1, data, NOISY, micro_batch=1, recompute=recompute) for _ in range(2)]
        (one, other), again = (
            [loss.losses["mlm"].value.asscalar() for loss in run.step(twice)[1]] for run in runs
        )
        assert one != other and [one, other] == again
        for name, value in reference.values(runs[0].net).items():
            np.testing.assert_array_equal(value, reference.values(runs[1].net)[name], err_msg=name)


def test_first_micro_batch_draws_as_the_whole_batch():
    assert dropout_seed(5, 3) == dropout_seed(5, 3, part=0) != dropout_seed(5, 3, part=1)


@pytest.mark.parametrize("bad_part", [0, 2])
def test_nonfinite_micro_batch_skips_the_whole_step(data, bad_part):
    trainer = trainer_on(2, data, BERT, micro_batch=3, on_nonfinite="skip")
    trainer.step(random_batch())
    before, right = reference.values(trainer.net), trainer.loss
    numbers = iter(range(6))

    def wrong(net, shard):
        loss = right(net, shard)
        bad = next(numbers) == 2 * bad_part
        return loss._replace(total=loss.total * np.nan) if bad else loss

    trainer.loss = wrong
    trainer.step(random_batch())
    for name, value in reference.values(trainer.net).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    trainer.loss = right
    trainer.step(random_batch())
    after = reference.values(trainer.net)
    assert all(np.isfinite(value).all() for value in after.values())
    assert any((value != before[name]).any() for name, value in after.items())


def test_second_trainer_of_a_net_need_not_accumulate(data):
    first, batch = trainer_on(1, data, lr=0.0, micro_batch=2), random_batch()
    expected = gradients_of(first, batch)
    again = trainers.Trainer(first.net, dataclasses.replace(first.config, micro_batch=0), first.devices)
    assert_same(gradients_of(again, batch, batch), expected, 1e-5)


# Computed twice


@pytest.mark.parametrize("model", [*MODELS.values(), NOISY, RELATIVE], ids=[*MODELS, "dropout", "relative"])
def test_recompute_compiled_gives_the_same_bits(data, model):
    if ops.describe() != "compiled for this processor":
        pytest.skip(f"the operators are {ops.describe()}")
    kept, again = (
        trainer_on(2, data, model, lr=0.0, micro_batch=4, recompute=recompute) for recompute in (False, True)
    )
    batch = random_batch()
    expected = gradients_of(kept, batch)
    for name, gradient in gradients_of(again, batch).items():
        np.testing.assert_array_equal(gradient, expected[name], err_msg=name)


@pytest.mark.parametrize("num_contexts", [1, 2])
@pytest.mark.parametrize("model", [*MODELS.values(), RELATIVE], ids=[*MODELS, "relative"])
def test_recompute_gives_the_same_gradients(data, operators, model, num_contexts):
    batch = random_batch()
    kept = gradients_of(trainer_on(1, data, model, lr=0.0), batch)
    again = trainer_on(num_contexts, data, model, lr=0.0, recompute=True)
    assert_same(gradients_of(again, random_batch(5, seed=1), batch), kept, 1e-5)


class WholeGraph(CheckpointedForward):
    """A tape that records everything in one graph, with the same dropout."""

    def forward(self, blocks):
        seeds = self._seeds.spawn(1)[0].generate_state(len(blocks)) >> 1
        result = None
        for (block, inputs), seed in zip(blocks, seeds.tolist()):
            result = Segment(block, result, inputs, seed).compute()
        return result

    def backward(self):
        pass


@pytest.mark.parametrize("num_contexts", [1, 2])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_recompute_repeats_dropout(data, monkeypatch, norm, num_contexts):
    monkeypatch.setattr(ops, "use_compiled", lambda *_: False)
    model = dataclasses.replace(NOISY, num_layers=3, norm=norm)
    batch = random_batch()
    again, plain = (trainer_on(num_contexts, data, model, lr=0.0, recompute=True) for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr("gluon_bert.model.encoder.CheckpointedForward", WholeGraph)
        expected = gradients_of(plain, batch)
    assert_same(gradients_of(again, batch), expected, 1e-6)


# Bad input


@pytest.mark.parametrize(
    ("micro_batch", "num_contexts", "message"),
    [
        (9, 1, "micro_batch must be 0 or between 1 and 8 (batch_size=8, 1 device), got 9"),
        (1, 3, "micro_batch must be 0 or between 3 and 8 (batch_size=8, 3 devices), got 1"),
        (4, 9, "micro_batch must be 0 (batch_size=8, 9 devices), got 4"),
    ],
)
def test_micro_batch_out_of_range_is_refused(data, micro_batch, num_contexts, message):
    with pytest.raises(InputError) as refused:
        trainer_on(num_contexts, data, micro_batch=micro_batch)
    assert str(refused.value) == message


def test_command_refuses_before_reading_or_writing(tmp_path, capsys):
    flags = ["--corpus", str(tmp_path / "none"), "--output", str(tmp_path / "run"), "--micro-batch", "1000"]
    assert pretrain.main(flags) == 2
    assert "must be 0 or between 1 and 64 (--batch-size 64, 1 device), got 1000" in capsys.readouterr().err
    assert pretrain.main([*flags[:-1], "-1"]) == 2
    assert "--micro-batch must be at least 0, got -1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
