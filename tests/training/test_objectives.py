"""Objectives: masked words with next sentences, alone, or with sentence order; and a loss of the user."""

import json

import numpy as np
import pretrain
import pytest
from support import reference_bert as reference
from support.runs import SMALL_SIZES
from support.trainers import BERT, fit, small_data, trainer_on

from gluon_bert.config import NEGATIVE_PAIRS, Config, DataConfig
from gluon_bert.data.prepared import Documents
from gluon_bert.data.sentence_pairs import draw_pairs
from gluon_bert.data.vocab import Vocabulary
from gluon_bert.errors import InputError
from gluon_bert.inference.predictor import Predictor
from gluon_bert.run import load_run
from gluon_bert.runtime import mx
from gluon_bert.training.callbacks import Callback
from gluon_bert.training.device_batch import split_and_load
from gluon_bert.training.losses import (
    OBJECTIVES,
    LossSum,
    ShardLoss,
    masked_lm,
    mlm_and_sentence_order,
    mlm_only,
    objective_loss,
    pretraining_loss,
)

SMALL = [*SMALL_SIZES, "--num-layers", "1", "--batch-size", "32"]
SMALL += ["--num-steps", "4", "--log-every", "2", "--eval-every", "2", "--dropout", "0.1", "--min-freq", "1"]


@pytest.fixture(scope="module")
def data():
    return small_data()


def documents(num_documents=200, seed=0):
    """Documents whose tokens rise, so that the order of two segments can be seen."""
    rng = np.random.default_rng(seed)
    bounds = np.concatenate([[0], np.cumsum(rng.integers(2, 9, num_documents))])
    sentences = np.concatenate([[0], np.cumsum(rng.integers(1, 12, bounds[-1]))])
    return Documents(np.arange(5, 5 + sentences[-1], dtype=np.int32), sentences, bounds)


def drawn(objective, pairs, **changes):
    config = DataConfig(objective=objective, pairs=pairs, **changes)
    return draw_pairs(documents(), config, np.random.default_rng(0), Vocabulary.unk)


@pytest.mark.parametrize("pairs", ["sentences", "packed"])
def test_pairs_for_mlm_alone_are_all_in_order(pairs):
    found = drawn("mlm", pairs)
    assert found.is_next.all() and len(found) > 100
    assert (found.first[:, 1] <= found.second[:, 0]).all()


def test_each_objective_has_losses_and_pairs():
    assert OBJECTIVES.keys() == NEGATIVE_PAIRS.keys()


@pytest.mark.parametrize("pairs", ["sentences", "packed"])
@pytest.mark.parametrize("like", NEGATIVE_PAIRS)
def test_new_objective_has_the_pairs_it_names(monkeypatch, pairs, like):
    monkeypatch.setitem(NEGATIVE_PAIRS, "mine", NEGATIVE_PAIRS[like])
    for mine, its in zip(vars(drawn("mine", pairs)).values(), vars(drawn(like, pairs)).values()):
        np.testing.assert_array_equal(mine, its)


@pytest.mark.parametrize("pairs", ["sentences", "packed"])
def test_sop_negatives_are_swapped_neighbours(pairs):
    found, in_order = drawn("mlm+sop", pairs), drawn("mlm", pairs, random_next_prob=0.5)
    assert 0.4 < found.is_next.mean() < 0.6
    np.testing.assert_array_equal(found.first[:, 0] < found.second[:, 0], found.is_next)
    if pairs == "sentences":  # the same neighbours as without labels
        unswapped = np.where(found.is_next[:, None], found.first, found.second)
        np.testing.assert_array_equal(unswapped, in_order.first)
    owners = np.searchsorted(documents().documents, sentence_of(found.first), side="right")
    np.testing.assert_array_equal(
        owners, np.searchsorted(documents().documents, sentence_of(found.second), side="right")
    )


def sentence_of(segments):
    return np.searchsorted(documents().sentences, segments[:, 0], side="right") - 1


def test_random_next_prob_without_pairs_is_refused():
    from gluon_bert.config import check_group

    with pytest.raises(InputError, match=r"random.next.prob"):
        check_group(DataConfig(objective="mlm", random_next_prob=0.3))


def gradients(loss, num_devices, data, **changes):
    trainer = trainer_on(num_devices, data, BERT, loss=loss, lr=0.0, **changes)
    reference.randomise(trainer.net)
    batch = next(b for b in data.train.epoch(0) if len(b) == 8)
    trainer.step(batch)
    trained = trainer._trained()
    return {name: p.list_grad()[0].asnumpy() for name, p in trained.items()}


def test_mlm_only_equals_pretraining_loss_without_nsp(data):
    def without_nsp(net, shard):
        both = pretraining_loss(net, shard)
        return ShardLoss(both.losses, both.losses["mlm"].share)

    ours, theirs = gradients(mlm_only, 1, data), gradients(without_nsp, 1, data)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        np.testing.assert_allclose(gradient, theirs[name], rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("objective", ["mlm+nsp", "mlm+sop"])
def test_nsp_weight_scales_the_gradients_of_the_pairs_alone(data, objective):
    whole, none, fifth = (gradients(objective_loss(objective, weight), 1, data) for weight in (1.0, 0.0, 0.2))
    assert np.abs(whole["nsp.dense.weight"]).max() > 0
    for name, gradient in fifth.items():
        expected = none[name] + 0.2 * (whole[name] - none[name])
        scale = max(np.abs(whole[name]).max(), 1e-2)
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-5 * scale, err_msg=name)


def test_nsp_weight_leaves_the_reported_losses_alone(data):
    trainer = trainer_on(1, data, BERT)
    (shard,) = split_and_load(next(data.train.epoch(0)), [mx.cpu()])
    plain, weighted = (objective_loss("mlm+nsp", weight)(trainer.net, shard) for weight in (1.0, 0.5))
    for name, loss in plain.losses.items():
        assert weighted.losses[name].value.asscalar() == loss.value.asscalar()
    mlm, nsp = (loss.share.asscalar() for loss in plain.losses.values())
    assert weighted.total.asscalar() == pytest.approx(mlm + nsp / 2, rel=1e-6)


def test_command_trains_with_the_nsp_weight(command):
    _, plain = command("--lr", "0.1", name="plain")
    _, halved = command("--lr", "0.1", "--nsp-weight", "0.5", name="halved")
    first, other = (json.loads((run / "log.jsonl").read_text().splitlines()[0]) for run in (plain, halved))
    assert first["nsp_loss"] != other["nsp_loss"]


def test_nsp_weight_without_pairs_is_refused():
    with pytest.raises(InputError, match='nsp_weight has no effect with objective="mlm"'):
        Config().replace(objective="mlm", nsp_weight=0.5).check()
    with pytest.raises(InputError, match=r"nsp_weight must be at least 0\.0, got nan"):
        Config().replace(nsp_weight=float("nan")).check()


def test_unknown_objective_is_refused():
    with pytest.raises(InputError, match=r"^objective must be one of mlm\+nsp, mlm, mlm\+sop, got foo.$"):
        Config().replace(objective="foo", random_next_prob=0.3, nsp_weight=0.5).check()


@pytest.mark.parametrize("changes", [{"num_devices": 3}, {"num_devices": 1, "micro_batch": 3}])
@pytest.mark.parametrize("loss", [mlm_only, mlm_and_sentence_order])
def test_losses_match_over_devices_and_micro_batches(data, loss, changes):
    one, other = gradients(loss, 1, data), gradients(loss, data=data, **changes)
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        scale = max(np.abs(gradient).max(), 1e-2)
        np.testing.assert_allclose(other[name], gradient, rtol=0, atol=1e-5 * scale, err_msg=name)


def test_unused_heads_keep_their_weights(data):
    trainer = trainer_on(1, data, BERT, loss=mlm_only, optimizer="adamw", weight_decay=0.1)
    before = reference.values(trainer.net)
    fit(trainer, data)
    after = reference.values(trainer.net)
    for name, value in after.items():
        assert (value == before[name]).all() == name.startswith(("nsp.", "pooler.")), name
    assert "nsp.dense.weight" not in "".join(trainer.snapshot().optimizer)


@pytest.mark.parametrize(
    ("wrong", "type_"), [(lambda loss: loss, "NDArray"), (lambda loss: {"mlm": loss}, "mlm: NDArray")]
)
def test_own_loss_of_another_type_is_refused(data, wrong, type_):
    trainer = trainer_on(1, data, BERT, loss=lambda net, shard: wrong(shard.tokens.sum()))
    with pytest.raises(InputError, match=f"loss must return a LossSum for each name, got {type_}. Return"):
        trainer.step(next(iter(data.train)))


def test_own_loss_reaches_metrics_and_callbacks(data):
    def spread(net, shard):
        encoded = net.encoder(shard.tokens, shard.token_types, shard.valid_length)
        size = LossSum(encoded.square().mean(axis=(1, 2)).sum(), shard.num_pairs, shard.pair_weight)
        return {"mlm": masked_lm(net, encoded, shard), "size": size}

    class Kept(Callback):
        def on_evaluate(self, trainer, step, metrics, best):
            self.metrics = metrics

    kept, trainer = Kept(), trainer_on(2, data, BERT, loss=spread)
    report = fit(trainer, data, kept)
    assert list(report.window) == ["mlm_loss", "size_loss", "mlm_accuracy"] == list(kept.metrics)


def test_sop_loss_has_the_values_of_nsp_under_its_name(data):
    trainer = trainer_on(1, data, BERT)
    (shard,) = split_and_load(next(data.train.epoch(0)), [mx.cpu()])
    nsp, sop = pretraining_loss(trainer.net, shard), mlm_and_sentence_order(trainer.net, shard)
    assert sop.losses["sop"].value.asscalar() == nsp.losses["nsp"].value.asscalar()
    assert list(sop.losses) == ["mlm", "sop"]


@pytest.mark.parametrize(
    ("objective", "names"), [("mlm", ["mlm_loss"]), ("mlm+sop", ["mlm_loss", "sop_loss"])]
)
def test_command_trains_and_resumes_each_objective(command, capsys, objective, names):
    status, whole = command("--objective", objective)
    assert status == 0
    records = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [name for name in records[0] if name.endswith("_loss")] == names
    assert "NSP" not in capsys.readouterr().out
    assert (whole / "losses.png").stat().st_size > 1000
    _, parts = command("--objective", objective, "--num-steps", "2", name="parts")
    assert pretrain.main(["--resume", str(parts), "--num-steps", "4"]) == 0
    ours, theirs = (reference.values(load_run(folder).net, np.float32) for folder in (parts, whole))
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    assert pretrain.main(["--resume", str(parts), "--objective", "mlm+nsp"]) == 2


def test_next_sentence_of_an_mlm_run_is_one_clear_error(command):
    _, folder = command("--objective", "mlm")
    predictor = Predictor.of(load_run(folder))
    (answer,) = predictor.predict([predictor.reader.text("the crane", "it lifts")])
    with pytest.raises(InputError, match="the next-sentence head must be trained first"):
        _ = answer.next_sentence_probability
    predictor.predict([predictor.reader.text("the <mask>")])


# Any iterable of batches


def test_fit_reads_a_list_of_batches_epoch_by_epoch(data):
    batches = list(data.train.epoch(0))[:3]
    trainer = trainer_on(1, data, num_steps=7)
    assert trainer.fit(batches, validation=batches[:1]).step == 7
    assert trainer.state.position == (2, 1)
    again = trainer_on(1, data, num_steps=4)
    again.fit(batches)
    resumed = trainer_on(1, data, num_steps=7)
    resumed.restore(again.snapshot())
    resumed.fit(batches)
    for name, value in reference.values(trainer.net).items():
        np.testing.assert_array_equal(reference.values(resumed.net)[name], value, err_msg=name)


def test_fit_refuses_a_generator_that_ends(data):
    batches = list(data.train.epoch(0))[:3]
    with pytest.raises(InputError, match="data must yield batches in every epoch, got none in epoch 1"):
        trainer_on(1, data, num_steps=7).fit(iter(batches))


def test_fit_refuses_validation_without_batches(data):
    with pytest.raises(InputError, match="validation must yield batches"):
        trainer_on(1, data, num_steps=1).fit(data.train, validation=[])
