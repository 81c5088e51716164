"""The training loop: the same on any number of contexts, repeatable, able to learn, honest in its reports."""

import dataclasses
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
from support import reference_bert as reference
from support.trainers import (
    BERT,
    MODEL,
    NOISY,
    TRAIN,
    assert_same,
    first_whole_batch,
    fit,
    gradients_of,
    parameters,
    small_data,
    trainer_on,
)

from gluon_bert.errors import InputError
from gluon_bert.runtime import mx
from gluon_bert.training import state
from gluon_bert.training.callbacks import Callback
from gluon_bert.training.device_batch import split_and_load
from gluon_bert.training.losses import pretraining_loss
from gluon_bert.training.metrics import Meter, MetricSums, perplexity
from gluon_bert.training.state import Clock, best_of
from gluon_bert.training.trainer import Trainer

METRICS = ("mlm_loss", "nsp_loss", "mlm_accuracy", "nsp_accuracy")


def metrics(*values):
    return dict(zip(METRICS, values))


@pytest.fixture(scope="module")
def data():
    return small_data()


@pytest.fixture(scope="module")
def batch(data):
    return first_whole_batch(data)


# One context, two or four


@pytest.mark.parametrize("num_contexts", [2, 3, 4])
@pytest.mark.parametrize("num_rows", [8, 7, 3, 2, 1])
@pytest.mark.parametrize("model", [MODEL, BERT], ids=["d2l", "bert"])
def test_gradient_on_any_number_of_contexts_is_the_same(data, batch, model, num_rows, num_contexts):
    part = batch.rows(0, num_rows)
    one, many = (gradients_of(trainer_on(n, data, model, lr=0.0), part) for n in (1, num_contexts))
    assert max(np.abs(grad).max() for grad in one.values()) > 1e-2
    assert_same(many, one, 1e-5)


@pytest.mark.parametrize("num_contexts", [1, 4])
@pytest.mark.parametrize("num_rows", [7, 2, 1])
def test_gradient_of_the_previous_step_is_cleared(data, batch, num_rows, num_contexts):
    part = batch.rows(0, num_rows)
    fresh = gradients_of(trainer_on(1, data, lr=0.0), part)
    after = gradients_of(trainer_on(num_contexts, data, lr=0.0), batch, part)
    assert_same(after, fresh, 1e-5)


def test_gradient_is_that_of_the_mean_losses(data, batch):
    trainer = trainer_on(3, data, lr=0.0)
    gradient = gradients_of(trainer, batch)["mlm.decoder.bias"]
    # The derivative of a mean cross-entropy by the bias: mean softmax minus the labels' shares.
    _, scores, _ = reference.forward(MODEL, reference.values(trainer.net), batch)
    shares = np.bincount(batch.masked_ids, minlength=len(data.vocab)) / len(batch.masked_ids)
    expected = np.exp(reference.log_softmax(scores)).mean(axis=0) - shares
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-6)


def test_step_equals_adam(data, batch):
    trainer = trainer_on(2, data, lr=1e-3)
    before = reference.values(trainer.net)
    gradients = gradients_of(trainer, batch)
    for name, after in reference.values(trainer.net).items():
        # Kingma and Ba 2015, algorithm 1 at t = 1: the estimates' corrections leave g and |g|.
        first, root = 0.1 * gradients[name], np.sqrt(0.001 * gradients[name] ** 2)
        rate = 1e-3 * np.sqrt(1 - 0.999) / (1 - 0.9)
        expected = before[name] - rate * first / (root + 1e-8)
        np.testing.assert_allclose(after, expected, rtol=0, atol=1e-6, err_msg=name)


# The recipe of the original BERT, with a gradient that is always too long.
RECIPE = {"optimizer": "bertadam", "epsilon": 1e-6, "weight_decay": 0.1, "clip_norm": 0.05}


@pytest.mark.parametrize("num_contexts", [1, 2])
def test_bertadam_step_warms_up_clips_and_decays(data, batch, num_contexts):
    plain = gradients_of(trainer_on(1, data, BERT, lr=0.0), batch)
    trainer = trainer_on(num_contexts, data, BERT, lr=1e-2, num_steps=10, warmup_ratio=0.4, **RECIPE)
    before = reference.values(trainer.net)
    gradients_of(trainer, batch)
    norm = norm_of(plain)
    assert norm > 10 * 0.05
    clipped = {name: grad * 0.05 / norm for name, grad in plain.items()}
    rate = 1e-2 / 4  # the first of four steps of warm-up
    for name, after in reference.values(trainer.net).items():
        m, v = 0.1 * clipped[name], 0.001 * clipped[name] ** 2
        decay = 0.1 if name.endswith("weight") else 0.0
        expected = before[name] - rate * (m / (np.sqrt(v) + 1e-6) + decay * before[name])
        np.testing.assert_allclose(after, expected, rtol=0, atol=1e-6, err_msg=name)


def norm_of(gradients):
    """The norm of all gradients of BERT, whose decoder's weight is the embedding's and counts once."""
    return np.sqrt(sum((grad**2).sum() for name, grad in gradients.items() if name != "mlm.decoder.weight"))


@pytest.mark.parametrize("optimizer", ["bertadam", "adamw", "lamb", "muon"])
def test_clipped_steps_match_on_one_to_four_contexts(data, optimizer):
    recipe = {**RECIPE, "optimizer": optimizer, "schedule": "linear", "num_steps": 8}
    one, *others = (trainer_on(n, data, BERT, **recipe) for n in (1, 2, 4))
    before = reference.values(one.net)
    run(one, data, 8)
    weights = reference.values(one.net)
    assert max(np.abs(weights[name] - before[name]).max() for name in weights) > 1e-3
    for other in others:
        run(other, data, 8)
        for name, value in reference.values(other.net).items():
            np.testing.assert_allclose(value, weights[name], rtol=0, atol=1e-5, err_msg=name)


def test_fit_tells_data_the_progress_of_the_run(data):
    class Batches(list):
        progress = None

        def __iter__(self):
            for batch in super().__iter__():
                seen.append(self.progress())
                yield batch

    seen = []
    trainer_on(2, data, num_steps=8).fit(Batches(islice(data.train.epoch(0), 3)))
    assert seen == [step / 8 for step in range(8)]


def test_step_does_not_wait_for_the_devices(data, batch, monkeypatch):
    trainer = trainer_on(2, data, BERT, **RECIPE)
    trainer.step(batch)

    def waited(*_):
        raise AssertionError("waited for a device")

    for name in ("asnumpy", "asscalar", "wait_to_read"):
        monkeypatch.setattr(mx.nd.NDArray, name, waited)
    monkeypatch.setattr(mx.nd, "waitall", waited)
    trainer.step(batch)


def run(trainer, data, num_steps):
    """The mean losses of each step."""
    totals = []
    for batch in islice(data.train.batches(), num_steps):
        _, losses = trainer.step(batch)
        totals.append(sum(loss.total.asscalar() for loss in losses))
    return totals


@pytest.mark.parametrize("model", [MODEL, BERT], ids=["d2l", "bert"])
def test_twenty_steps_match_on_one_to_four_contexts(data, model):
    one, *others = (trainer_on(n, data, model) for n in (1, 2, 3, 4))
    losses = run(one, data, 20)
    weights = reference.values(one.net)
    assert losses[-1] < losses[0]
    for other in others:
        np.testing.assert_allclose(run(other, data, 20), losses, rtol=1e-5)
        for name, value in reference.values(other.net).items():
            # A key's bias has no gradient but rounding errors, and Adam makes steps of any gradient.
            if not name.endswith("key.bias"):
                np.testing.assert_allclose(value, weights[name], rtol=0, atol=1e-4, err_msg=name)


def test_contexts_hold_the_same_weights_after_steps(data):
    trainer = trainer_on(3, data, NOISY)
    before = reference.values(trainer.net)
    run(trainer, data, 5)
    for name, parameter in parameters(trainer).items():
        first, *others = (value.asnumpy() for value in parameter.list_data())
        assert (first != before[name]).any(), name
        for other in others:
            np.testing.assert_array_equal(other, first, err_msg=name)


def test_contexts_draw_their_own_dropout(data, batch):
    trainer = trainer_on(2, data, NOISY)
    same_rows = batch.rows(0, 1)
    with mx.autograd.record():
        losses = [pretraining_loss(trainer.net, *split_and_load(same_rows, [ctx])) for ctx in trainer.devices]
    one, other = (loss.losses["mlm"].value.asscalar() for loss in losses)
    assert one != other


# Learning


def test_eight_examples_are_overfitted(data, batch):
    trainer = trainer_on(1, data, dataclasses.replace(BERT, units=32), lr=3e-3)
    for _ in range(200):
        _, (loss,) = trainer.step(batch)
    assert loss.total.asscalar() < 0.05
    learnt = trainer.evaluate([batch])
    assert learnt["mlm_loss"] + learnt["nsp_loss"] < 0.05
    assert (learnt["mlm_accuracy"], learnt["nsp_accuracy"]) == (1.0, 1.0)


@pytest.mark.parametrize("model", [NOISY, dataclasses.replace(MODEL, dropout=0.3)], ids=["bert", "d2l"])
def test_seed_repeats_steps_bit_for_bit(data, model):
    def trained(seed):
        trainer = trainer_on(1, data, model, seed=seed)
        progress = fit(trainer, data)
        return progress, reference.values(trainer.net, np.float32)

    (progress, weights), (again, same), (_, other) = trained(1), trained(1), trained(2)
    assert (progress.window, progress.run) == (again.window, again.run)
    for name, value in weights.items():
        np.testing.assert_array_equal(value, same[name], err_msg=name)
    assert any((value != other[name]).any() for name, value in weights.items())


# Evaluation


@pytest.mark.parametrize("num_contexts", [1, 2, 4])
def test_evaluation_is_the_mean_without_dropout(data, num_contexts):
    trainer = trainer_on(num_contexts, data, NOISY)
    reference.randomise(trainer.net)
    values, batches = reference.values(trainer.net), list(data.validation.epoch(0))
    assert len({len(b) for b in batches}) > 1  # or a mean of the batches' means would do as well
    sums = np.zeros(4)
    for batch in batches:
        _, mlm_scores, nsp_scores = reference.forward(NOISY, values, batch)
        both = ((mlm_scores, batch.masked_ids), (nsp_scores, batch.next_sentence_labels))
        sums += [f(*each) for f in (reference.cross_entropy, reference.hits) for each in both]
    counts = [sum(len(b.masked_ids) for b in batches), sum(len(b) for b in batches)] * 2
    averages = trainer.evaluate(iter(batches))
    assert averages == pytest.approx(dict(zip(METRICS, sums / counts)), rel=1e-5)
    assert trainer.evaluate(batches) == averages
    for name, value in reference.values(trainer.net).items():
        np.testing.assert_array_equal(value, values[name], err_msg=name)


# fit and its reporter


class Recorder(Callback):
    """A callback that records its events, in order."""

    def __init__(self):
        self.calls, self.progresses, self.validation, self.best = [], [], [], None

    def on_step(self, trainer, step):
        self.calls.append(("on_step", step))

    def on_log(self, trainer, progress):
        self.calls.append(("on_log", progress.step))
        self.progresses.append(progress)

    def on_evaluate(self, trainer, step, validation, best):
        self.calls.append(("on_evaluate", step))
        self.validation.append(validation)
        self.best = best

    def steps(self, name):
        return [step for call, step in self.calls if call == name]


@pytest.mark.parametrize(
    ("num_steps", "log_every", "eval_every", "logged", "evaluated"),
    [
        (7, 3, 2, [2, 3, 4, 6, 7], [2, 4, 6, 7]),
        (6, 3, 3, [3, 6], [3, 6]),
        (4, 1, 0, [1, 2, 3, 4], [4]),
        (2, 10, 10, [2], [2]),
    ],
)
def test_callback_gets_steps_windows_and_evaluations(
    data, num_steps, log_every, eval_every, logged, evaluated
):
    trainer = trainer_on(1, data, num_steps=num_steps, log_every=log_every, eval_every=eval_every)
    recorder = Recorder()
    last = fit(trainer, data, recorder)
    assert recorder.steps("on_step") == list(range(1, num_steps + 1))
    assert recorder.steps("on_log") == logged
    assert recorder.steps("on_evaluate") == evaluated
    order = ["on_step", "on_log", "on_evaluate"]
    assert recorder.calls == sorted(recorder.calls, key=lambda call: (call[1], order.index(call[0])))
    assert last == recorder.progresses[-1]
    # The last evaluation is that of the network as it is left.
    assert recorder.validation[-1] == trainer.evaluate(data.validation.epoch(0))


def test_fit_without_validation_evaluates_nothing(data):
    recorder = Recorder()
    fit(trainer_on(1, data, eval_every=3), data._replace(validation=None), recorder)
    assert recorder.steps("on_log") == [3, 6, 7]
    assert recorder.steps("on_evaluate") == []


def test_callbacks_and_evaluations_change_no_weights(data):
    silent, message = trainer_on(1, data, NOISY), trainer_on(1, data, NOISY, log_every=1, eval_every=1)
    mx.random.seed(5)
    fit(silent, data)
    mx.random.seed(5)
    fit(message, data, Recorder())
    ours = reference.values(message.net)
    for name, value in reference.values(silent.net).items():
        np.testing.assert_array_equal(value, ours[name], err_msg=name)


class Remembering(Trainer):
    """A trainer that remembers the sums and the counts of its steps."""

    def __init__(self, *args):
        super().__init__(*args)
        self.sums, self.counts = [], []

    def step(self, batch, count_correct=False):
        shards, losses = super().step(batch, count_correct)
        sums = np.zeros(4)
        for shard, loss in zip(shards, losses):
            if shard.num_pairs:
                sums += [loss.losses[name].value.asscalar() for name in ("mlm", "nsp")] + [
                    0.0 if each.correct is None else each.correct.asscalar() for each in loss.losses.values()
                ]
        self.sums.append(sums)
        self.counts.append(np.array([len(batch.masked_ids), len(batch)] * 2))
        return shards, losses


@pytest.mark.parametrize("num_contexts", [1, 3])
def test_metrics_are_means_over_predictions_and_pairs(data, num_contexts):
    plain = trainer_on(num_contexts, data, NOISY, num_steps=20, log_every=6)
    trainer, recorder = Remembering(plain.net, plain.config, plain.devices), Recorder()
    fit(trainer, data, recorder)
    sums, counts = np.array(trainer.sums), np.array(trainer.counts)
    assert len(set(counts[:, 1])) > 1  # batches of different sizes
    logged = recorder.steps("on_log")
    assert logged == [6, 12, 18, 20]
    for progress, start in zip(recorder.progresses, [0, *logged]):
        window = slice(start, progress.step)
        for averages, part in ((progress.window, window), (progress.run, slice(0, progress.step))):
            means = sums[part].sum(axis=0) / counts[part].sum(axis=0)
            losses = [averages["mlm_loss"], averages["nsp_loss"]]
            np.testing.assert_allclose(losses, means[:2], rtol=1e-5)
            assert averages["nsp_accuracy"] == pytest.approx(means[3])
        # Hits among the predictions are counted in the steps that are logged.
        last = progress.step - 1
        assert progress.window["mlm_accuracy"] == pytest.approx(sums[last, 2] / counts[last, 2])
        seen = [step - 1 for step in logged if step <= progress.step]
        hits = sums[seen].sum(axis=0) / counts[seen].sum(axis=0)
        assert progress.run["mlm_accuracy"] == pytest.approx(hits[2])


# Meters


def test_meter_counts_mlm_hits_only_on_request(data, batch):
    trainer, meter = trainer_on(2, data), Meter()
    small = batch.rows(0, 1)  # leaves a context without rows of its own
    added = []
    for each, count_hits in ((batch, False), (batch, True), (small, True), (small, False)):
        shards = split_and_load(each, trainer.devices, count_correct=count_hits)
        meter.add(shards, [pretraining_loss(trainer.net, shard) for shard in shards])
        _, mlm_scores, nsp_scores = reference.forward(MODEL, reference.values(trainer.net), each)
        mlm, nsp, _ = reference.losses(MODEL, reference.values(trainer.net), each)
        right = [
            reference.hits(mlm_scores, each.masked_ids),
            reference.hits(nsp_scores, each.next_sentence_labels),
        ]
        counts = np.array([len(each.masked_ids), len(each)])
        asked = np.array([count_hits, True])
        added.append([[mlm, nsp, *(right * asked)], [*counts, *(counts * asked)]])
    sums, counts = np.sum(added, axis=0)
    totals = meter.totals()
    assert totals.sums == pytest.approx(dict(zip(METRICS, sums)), rel=1e-5)
    assert totals.counts == dict(zip(METRICS, counts))
    assert totals.num_pairs == 18
    assert totals.averages() == pytest.approx(dict(zip(METRICS, sums / counts)), rel=1e-5)
    # Asking changes nothing.
    assert meter.totals().sums == totals.sums


def test_metrics_without_counts_are_absent(recwarn):
    assert Meter().totals().averages() == {}
    sums = {"mlm_loss": 6.0, "nsp_loss": 1.0, "mlm_accuracy": 0.0}
    counts = {"mlm_loss": 3.0, "nsp_loss": 2.0, "mlm_accuracy": 0.0}
    assert MetricSums(sums, counts).averages() == {"mlm_loss": 2.0, "nsp_loss": 0.5}
    assert not recwarn.list


def test_clock_leaves_out_stopped_time(monkeypatch):
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(state, "time", SimpleNamespace(perf_counter=lambda: now.seconds))

    def window(num_pairs):
        return MetricSums({}, {}, num_pairs)

    clock = Clock()
    now.seconds += 10
    first = clock.progress(3, 12.0, window(50), 0.1, 2.0)
    assert (first.pairs_per_second, first.run_pairs_per_second, first.seconds) == (5.0, 5.0, 10.0)
    now.seconds += 2
    with clock.stopped():
        now.seconds += 1000
    now.seconds += 3
    second = clock.progress(6, 12.0, window(20), 0.2, 3.0)
    assert (second.pairs_per_second, second.seconds) == (4.0, 15.0)
    assert second.run_pairs_per_second == pytest.approx(70 / 15)
    assert (first.step, first.lr, first.gradient_norm) == (3, 0.1, 2.0)
    assert (second.step, second.lr, second.gradient_norm) == (6, 0.2, 3.0)
    assert (first.seconds_left, second.seconds_left) == (30.0, 1015.0)
    assert clock.elapsed() == 1015.0


def test_fit_does_not_count_evaluations_as_training_time(data, monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(state, "time", SimpleNamespace(perf_counter=lambda: now.seconds))

    class Slow(Trainer):
        def step(self, batch, count_correct=False):
            now.seconds += 1
            return super().step(batch, count_correct)

        def evaluate(self, batches):
            now.seconds += 100
            return super().evaluate(batches)

    plain, recorder = trainer_on(1, data, eval_every=2), Recorder()
    fit(Slow(plain.net, plain.config, plain.devices), data, recorder)
    assert recorder.steps("on_evaluate") == [2, 4, 6, 7]
    assert [progress.seconds for progress in recorder.progresses] == [2.0, 3.0, 4.0, 6.0, 7.0]
    assert recorder.progresses[-1].seconds_left == 0


def test_queued_steps_before_evaluation_count_as_training(data, monkeypatch):
    # Steps that take their time only when they are waited for, as on a device.
    now = SimpleNamespace(seconds=0.0, queued=0)

    def wait_for_all():
        now.seconds += 10 * now.queued
        now.queued = 0

    class Queueing(Trainer):
        def step(self, batch, count_correct=False):
            now.queued += 1
            return super().step(batch, count_correct)

        def evaluate(self, batches):
            wait_for_all()
            now.seconds += 1000
            return super().evaluate(batches)

    monkeypatch.setattr(state, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    monkeypatch.setattr(mx.nd, "waitall", wait_for_all)
    plain, recorder = trainer_on(1, data, log_every=7, eval_every=2), Recorder()
    fit(Queueing(plain.net, plain.config, plain.devices), data, recorder)
    assert recorder.progresses[-1].seconds == 70.0


def test_nonfinite_loss_stops_the_run(data):
    trainer, recorder = trainer_on(1, data, lr=1e3, log_every=1), Recorder()
    bias = trainer.net.nsp.dense.bias
    bias.set_data(mx.nd.array([np.nan, 0]))
    with pytest.raises(
        InputError, match=r"lr=1000 has diverged: at step 1 \(epoch 0, batch 0\) the gradient is not finite"
    ):
        fit(trainer, data, recorder)
    assert recorder.steps("on_log") == []


def test_nonfinite_gradient_stops_the_run(data):
    class Overflowing(Trainer):
        def _gradients(self):
            gradients = super()._gradients()
            gradients[0][0][:] = np.inf
            return gradients

    plain = trainer_on(1, data, BERT, log_every=1, **RECIPE)
    trainer = Overflowing(plain.net, plain.config, plain.devices)
    with pytest.raises(InputError, match=r"at step 1 \(epoch 0, batch 0\) the gradient is not finite"):
        fit(trainer, data)


def test_report_has_learning_rate_and_gradient_norm(data):
    changes = {**RECIPE, "schedule": "linear", "warmup_ratio": 0.5, "num_steps": 8, "log_every": 2}
    trainer, recorder = trainer_on(2, data, BERT, **changes), Recorder()
    fit(trainer, data, recorder)
    assert [p.lr for p in recorder.progresses] == pytest.approx([5e-4, 1e-3, 6e-4, 2e-4])
    batches = list(islice(data.train.batches(), 2))
    again = trainer_on(1, data, BERT, **changes)
    again.step(batches[0])
    frozen = Trainer(again.net, dataclasses.replace(TRAIN, lr=0.0), again.devices)
    assert recorder.progresses[0].gradient_norm == pytest.approx(
        norm_of(gradients_of(frozen, batches[1])), rel=1e-4
    )


def test_step_after_the_end_of_a_decay_is_refused(data, batch):
    trainer = trainer_on(1, data, num_steps=2, schedule="linear")
    trainer.step(batch)
    trainer.step(batch)
    with pytest.raises(InputError, match=r"num_steps must be at least 3 with schedule=.linear., got 2"):
        trainer.step(batch)


# The end of a run: steps, minutes, patience


class Ticking(Trainer):
    """A trainer with its own clock, by which steps and evaluations take a given time."""

    def __init__(self, plain, now, step_seconds=1.0, evaluation_seconds=0.0):
        super().__init__(plain.net, plain.config, plain.devices)
        self.now, self.step_seconds, self.evaluation_seconds = now, step_seconds, evaluation_seconds

    def step(self, batch, count_correct=False):
        self.now.seconds += self.step_seconds
        return super().step(batch, count_correct)

    def evaluate(self, batches):
        self.now.seconds += self.evaluation_seconds
        return super().evaluate(batches)


@pytest.fixture
def now(monkeypatch):
    """A clock that advances only when a test does it."""
    now = SimpleNamespace(seconds=500.0)
    monkeypatch.setattr(state, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


BY_THE_CLOCK = {"num_steps": 0, "max_minutes": 0.5, "log_every": 1, "schedule": "linear", "warmup_ratio": 0.2}


@pytest.mark.parametrize(("step_seconds", "num_steps"), [(1.0, 30), (3.0, 10), (0.5, 60)])
def test_max_minutes_ends_the_run_and_its_schedule(data, now, step_seconds, num_steps):
    trainer, recorder = Ticking(trainer_on(1, data, **BY_THE_CLOCK), now, step_seconds), Recorder()
    last = fit(trainer, data, recorder)
    assert recorder.steps("on_step") == list(range(1, num_steps + 1))
    assert (last.step, last.planned_steps, last.seconds, last.seconds_left) == (num_steps, num_steps, 30.0, 0)
    assert recorder.steps("on_evaluate") == [num_steps]
    rates = [progress.lr for progress in recorder.progresses]
    assert max(rates) == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-3 / (num_steps + 1 - num_steps / 5))
    assert [p.seconds_left for p in recorder.progresses[1:]] == pytest.approx(
        [30.0 - p.seconds for p in recorder.progresses[1:]]
    )


def test_max_minutes_includes_evaluations(data, now):
    plain = trainer_on(1, data, **BY_THE_CLOCK, eval_every=5)
    trainer, recorder = Ticking(plain, now, evaluation_seconds=5.0), Recorder()
    last = fit(trainer, data, recorder)
    # 15 steps of a second and 3 evaluations of five; what finds the time gone is the schedule's last step.
    assert recorder.steps("on_evaluate") == [5, 10, 15, 16]
    assert now.seconds == 500 + 30 + 1 + 5
    assert last.lr < 1e-3 * 0.1
    assert (last.step, last.seconds, last.seconds_left) == (16, 16.0, 0.0)


def test_first_of_two_limits_ends_the_run(data, now):
    for num_steps, expected in ((8, 8), (100, 30)):
        plain = trainer_on(1, data, **{**BY_THE_CLOCK, "num_steps": num_steps})
        last = fit(Ticking(plain, now), data)
        assert last.step == expected
        assert 0 < last.lr < 2e-4


def test_own_loop_without_a_limit_needs_a_constant_rate(data, batch):
    trainer = trainer_on(1, data, num_steps=0, max_minutes=1.0)
    for _ in range(3):
        trainer.step(batch)
    assert trainer._optimizer.learning_rate == 1e-3
    trainer = trainer_on(1, data, num_steps=0, max_minutes=1.0, schedule="linear")
    with pytest.raises(InputError, match=r"num_steps must be at least 1 with schedule=.linear., got 0"):
        trainer.step(batch)


def test_queued_steps_count_when_done(data, now, monkeypatch):
    # A device that works on a step only when it is waited for; the host waits for the third before.
    queue, wait_to_read = [], mx.nd.NDArray.wait_to_read

    def wait_for_one(array):
        now.seconds += queue.pop(0) if queue else 0
        wait_to_read(array)

    def wait_for_all():
        now.seconds += sum(queue)
        queue.clear()

    class Queueing(Trainer):
        def step(self, batch, count_correct=False):
            queue.append(1.0)
            return super().step(batch, count_correct)

    monkeypatch.setattr(mx.nd.NDArray, "wait_to_read", wait_for_one)
    monkeypatch.setattr(mx.nd, "waitall", wait_for_all)
    plain = trainer_on(1, data, **{**BY_THE_CLOCK, "log_every": 1000})
    last = fit(Queueing(plain.net, plain.config, plain.devices), data)
    assert (last.step, last.seconds) == (30, 30.0)


def evaluating_to(plain, *mlm_losses):
    """A trainer whose evaluations give these MLM losses, and better and better NSP losses."""

    script = [metrics(loss, 0.7 / number, 0.1, 0.5) for number, loss in enumerate(mlm_losses, 1)]

    class Scripted(Trainer):
        def evaluate(self, batches):
            return script.pop(0)

    return Scripted(plain.net, plain.config, plain.devices)


@pytest.mark.parametrize(
    ("patience", "ended", "best"),
    [(1, 6, 4), (2, 14, 10), (3, 20, 16), (0, 20, 16)],
)
@pytest.mark.parametrize("message", [True, False])
def test_patience_ends_the_run_without_improvement(data, patience, ended, best, message):
    plain = trainer_on(1, data, num_steps=20, eval_every=2, patience=patience)
    #          step 2    4    6    8   10   12   14   16   18   20
    losses = [5.0, 4.0, 4.5, 3.9, 3.8, 3.8, 3.9, 3.0, 3.1, 3.2]
    recorder = Recorder()
    last = fit(evaluating_to(plain, *losses), data, *([recorder] if message else []))
    assert last.step == ended
    if message:
        assert recorder.steps("on_step") == list(range(1, ended + 1))
        assert (recorder.best.step, recorder.best.evaluations) == (best, ended // 2)
        assert recorder.best.validation == metrics(min(losses[: ended // 2]), 0.7 / (best / 2), 0.1, 0.5)
        assert recorder.best.since == (ended - best) // 2


def test_best_evaluation_has_the_lowest_mlm_loss():
    first = best_of(None, 10, metrics(5.0, 0.1, 0.9, 0.9))
    assert first == (10, metrics(5.0, 0.1, 0.9, 0.9), 1, 0)
    second = best_of(first, 20, metrics(4.9, 0.9, 0.1, 0.1))
    assert second == (20, metrics(4.9, 0.9, 0.1, 0.1), 2, 0)
    third = best_of(second, 30, metrics(4.9, 0.0, 1.0, 1.0))
    assert third == second._replace(evaluations=3, since=1)
    assert not first.out_of_patience(0) and not third.out_of_patience(2) and third.out_of_patience(1)


def test_patience_without_validation_is_refused(data):
    trainer = trainer_on(1, data, eval_every=2, patience=1)
    with pytest.raises(InputError, match="patience must be 0 without enough validation text, got 1"):
        fit(trainer, data._replace(validation=None))
    assert trainer.state.step == 0


def test_nonfinite_evaluation_stops_before_the_report(data):
    trainer, recorder = evaluating_to(trainer_on(1, data), float("nan")), Recorder()
    with pytest.raises(
        InputError, match=r"lr=0\.001 has diverged: at step 7 the loss on the validation text is not finite"
    ):
        fit(trainer, data, recorder)
    assert recorder.steps("on_evaluate") == []


def test_validation_without_masks_is_not_divergence(data):
    class Wordless(Trainer):
        def evaluate(self, batches):
            return {"nsp_loss": 0.7, "nsp_accuracy": 0.5}

    plain, recorder = trainer_on(1, data), Recorder()
    fit(Wordless(plain.net, plain.config, plain.devices), data, recorder)
    assert recorder.steps("on_evaluate") == [7]


def test_perplexity_is_e_to_the_mlm_loss(recwarn):
    assert perplexity(metrics(np.log(50.0), 9.0)) == pytest.approx(50)
    assert perplexity(metrics(1e4)) == np.inf
    assert not recwarn.list


def test_interrupt_ends_between_steps_or_in_evaluation(data):
    trainer = trainer_on(1, data)

    class Interrupting(Recorder):
        def on_step(self, trainer, step):
            super().on_step(trainer, step)
            trainer.interrupted = step == 3

    recorder = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        fit(trainer, data, recorder)
    assert recorder.steps("on_step") == [1, 2, 3]
    trainer.interrupted = True
    seen = []
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate(seen.append(batch) or batch for batch in data.validation.epoch(0))
    assert len(seen) == 1


def test_trainer_on_other_contexts_is_refused(data):
    net = trainer_on(1, data).net
    with pytest.raises(
        InputError, match=r"devices must be those of the network, \[cpu\(0\)\], got \[cpu\(0\), cpu\(1\)\]"
    ):
        Trainer(net, TRAIN, [mx.cpu(0), mx.cpu(1)])
