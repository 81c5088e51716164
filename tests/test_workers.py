"""What workers share and agree on, tried in one process; tests/test_launch.py starts real ones."""

import threading
import time

import numpy as np
import pretrain
import pytest
import reference
from test_trainer import assert_same, batch, data, trainer_on  # noqa: F401 (fixtures)

from gluon_bert.distributed.communicator import Communicator, weights_hash
from gluon_bert.distributed.join import check_enough, check_sharing, rank_and_size, run_environment
from gluon_bert.errors import InputError
from gluon_bert.presets import preset
from gluon_bert.runtime import mx
from gluon_bert.training.device_batch import split_and_load
from gluon_bert.training.metrics import Meter, MetricSums
from gluon_bert.training.trainer import dropout_seed
from gluon_bert.training.watchdog import watched


def worker(rank, count):
    """A worker whose gradients nobody adds to others'."""
    workers = Communicator()
    workers.rank, workers.count = rank, count
    return workers


@pytest.mark.parametrize("num_rows", [8, 7, 3, 1])
@pytest.mark.parametrize(("count", "contexts"), [(2, 1), (3, 1), (2, 2)])
def test_the_gradients_of_all_workers_add_up_to_that_of_one(data, batch, num_rows, count, contexts):  # noqa: F811
    part = batch.rows(0, num_rows)

    def gradients(rank, count, contexts):
        trainer = trainer_on(contexts, data, lr=0.0)
        trainer.workers = worker(rank, count)
        trainer.step(batch)  # of which nothing may be left
        trainer.step(part)
        return reference.gradients(trainer.net)

    whole = gradients(0, 1, 1)
    parts = [gradients(rank, count, contexts) for rank in range(count)]
    assert max(np.abs(gradient).max() for gradient in whole.values()) > 1e-2
    assert_same({name: np.sum([each[name] for each in parts], axis=0) for name in whole}, whole, 1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 11])
def test_the_shares_of_a_batch_are_the_batch(batch, count):  # noqa: F811
    shares = [batch.share(rank, count) for rank in range(count)]
    for name in ("tokens", "masked_ids", "next_sentence_labels", "valid_length"):
        together = np.concatenate([getattr(share, name) for share in shares])
        np.testing.assert_array_equal(together, getattr(batch, name), err_msg=name)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    shards = [s for share in shares for s in split_and_load(share, [mx.cpu(0), mx.cpu(1)], whole=batch)]
    assert sum(shard.num_masked * shard.mlm_weight for shard in shards) == pytest.approx(1)
    assert sum(shard.num_pairs * shard.nsp_weight for shard in shards) == pytest.approx(1)


def test_each_worker_has_a_dropout_of_its_own_and_the_first_that_of_a_run_alone():
    assert dropout_seed(5, 7, 0) == dropout_seed(5, 7)
    assert len({dropout_seed(5, step, rank) for step in range(10) for rank in range(10)}) == 100


def test_the_meter_that_the_first_worker_gets_has_all_totals():
    totals = MetricSums(np.array([5.5, 2.0, 3.0, 1.0]), np.array([7.0, 4.0, 7.0, 4.0]))
    got = Meter.of(totals, mx.cpu(1)).totals()
    np.testing.assert_array_equal(got.sums, totals.sums)
    np.testing.assert_array_equal(got.counts, totals.counts)


# Comparing


class Beside(Communicator):
    """A worker that sees what another one gathers at the same place."""

    count = 2

    def __init__(self, other=None):
        self.other, self.gathered = other, []

    def all_gather(self, content):
        self.gathered.append(content)
        if self.other is None:
            return [content, content]
        return [self.other.gathered[len(self.gathered) - 1], content]


def test_what_differs_is_named_and_what_may_differ_is_not_compared(tmp_path):
    config = preset("d2l")
    elsewhere = config.replace(corpus=["/elsewhere"], vocab_file="other.txt")
    other = config.replace(lr=0.5, clip_norm=1.0)
    first = Beside()
    first.check_same_on_all(run_environment(config, "a"))
    Beside(first).check_same_on_all(run_environment(elsewhere, "a"))
    with pytest.raises(
        InputError, match="worker 0 in --clip-norm, --lr and the text of --corpus: all workers"
    ):
        Beside(first).check_same_on_all(run_environment(other, "b"))
    with pytest.raises(InputError, match="different versions of gluon_bert"):
        Beside(first).check_same_on_all({**run_environment(config, "a"), "--new": 1})


def test_weights_that_differ_in_a_bit_have_another_digest():
    weights = {"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float32)}
    changed = {**weights, "b": np.array([0, 0, 0, 1e-45], np.float32)}
    assert weights_hash(weights) == weights_hash(dict(reversed(list(weights.items()))))
    assert weights_hash(weights) != weights_hash(changed)


def test_the_workers_that_are_unlike_the_first_are_told():
    first = Beside()
    assert first.ranks_differing_from_root("a") == []
    assert Beside(first).ranks_differing_from_root("a") == []
    assert Beside(first).ranks_differing_from_root("b") == [1]
    assert Communicator().ranks_differing_from_root("a") == []


# Bad input


@pytest.fixture
def place(monkeypatch):
    def set_place(**variables):
        for name in ("DMLC_ROLE", "DMLC_TASK_ID", "DMLC_NUM_WORKER"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(f"DMLC_{name}", value)

    set_place()
    return set_place


def test_the_place_of_a_worker_is_in_the_environment(place):
    assert rank_and_size("device") == (0, 1)
    place(ROLE="worker", TASK_ID="2", NUM_WORKER="4")
    assert rank_and_size("dist_sync") == (2, 4)


@pytest.mark.parametrize(
    ("kvstore", "variables", "told"),
    [
        ("dist_async", {}, "--kvstore dist_async: its workers do not wait for each other"),
        ("dist_fast", {}, "--kvstore dist_fast: must be one of device, dist_sync"),
        ("dist_sync", {}, "which of how many workers this is; start the workers with tools/launch.py"),
        ("dist_sync", {"ROLE": "worker", "TASK_ID": "one", "NUM_WORKER": "2"}, "tools/launch.py"),
        ("dist_sync", {"ROLE": "worker", "TASK_ID": "2", "NUM_WORKER": "2"}, "tools/launch.py"),
        ("dist_sync", {"ROLE": "server", "TASK_ID": "0", "NUM_WORKER": "2"}, "tools/launch.py"),
        ("device", {"ROLE": "worker"}, "--kvstore: is needed by a worker of several"),
    ],
)
def test_a_kvstore_that_cannot_be_is_refused(place, capsys, tmp_path, kvstore, variables, told):
    place(**variables)
    assert pretrain.main(["--kvstore", kvstore, "--output", str(tmp_path / "run")]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--batch-size", "30"], "--batch-size 30: 4 workers share each batch evenly; 28 or 32 would do"),
        (["--batch-size", "3"], "--batch-size 3: 4 workers share each batch evenly; 4 would do"),
        (["--max-minutes", "5"], "--max-minutes 5: workers have no common clock; --num-steps ends their run"),
        (["--step-timeout", "-1"], "--step-timeout -1.0: must be at least 0"),
        (["--step-timeout", "nan"], "--step-timeout nan: must be at least 0"),
    ],
)
def test_flags_that_workers_cannot_share_are_refused(place, capsys, tmp_path, flags, told):
    place(ROLE="worker", TASK_ID="1", NUM_WORKER="4")
    given = ["--kvstore", "dist_sync", "--output", str(tmp_path / "run"), "--corpus", str(tmp_path / "no")]
    assert pretrain.main([*given, *flags]) == 2
    assert told in capsys.readouterr().err


def test_all_workers_must_know_the_folder(place, capsys):
    place(ROLE="worker", TASK_ID="0", NUM_WORKER="2")
    assert pretrain.main(["--kvstore", "dist_sync"]) == 2
    assert "--kvstore dist_sync: --output has to name the run's folder" in capsys.readouterr().err


def test_less_text_than_workers_is_refused():
    check_enough(4, 4)
    with pytest.raises(InputError, match="has 3 sentence pairs, which is less than the 4 workers"):
        check_enough(3, 4)


def test_what_one_process_may_do_stays_allowed():
    check_sharing(preset("d2l").replace(batch_size=7, max_minutes=1.0), 1)


# The watchdog


def test_the_watchdog_ends_what_is_silent():
    ended = threading.Event()
    with watched(0.05, ended.set):
        assert ended.wait(5)
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}


def test_the_watchdog_lets_live_what_is_heard_and_is_gone_afterwards():
    ended = []
    with watched(0.5, lambda: ended.append(1)) as alive:
        for _ in range(10):
            time.sleep(0.1)
            alive()
    assert not ended and "watchdog" not in {thread.name for thread in threading.enumerate()}
    with watched(0, lambda: ended.append(1)) as alive:
        alive()
        assert "watchdog" not in {thread.name for thread in threading.enumerate()}


def test_every_step_and_every_batch_of_an_evaluation_are_heard(data):  # noqa: F811
    trainer, heard = trainer_on(1, data, num_steps=3), []
    trainer.alive = lambda: heard.append(trainer.state.step)
    trainer.fit(data)
    batches = len(list(data.validation.epoch(0)))
    assert [heard.count(step) for step in (1, 2, 3)] == [1, 1, batches + 1]
