"""Workers share batches, sum gradients and compare facts. All tests run in one process."""

import numpy as np
import pytest
from support import reference_bert as reference
from support.trainers import assert_same, first_whole_batch, small_data, trainer_on

from gluon_bert.data.batch import worker_rows
from gluon_bert.distributed.communicator import Communicator, weights_hash
from gluon_bert.distributed.join import run_environment
from gluon_bert.errors import InputError
from gluon_bert.presets import preset
from gluon_bert.runtime import mx
from gluon_bert.training.device_batch import split_and_load
from gluon_bert.training.metrics import Meter, MetricSums
from gluon_bert.training.trainer import dropout_seed


@pytest.fixture(scope="module")
def data():
    return small_data()


@pytest.fixture(scope="module")
def batch(data):
    return first_whole_batch(data)


def worker(rank, count):
    """A worker whose gradients are not summed."""
    communicator = Communicator()
    communicator.rank, communicator.count = rank, count
    return communicator


@pytest.mark.parametrize("num_rows", [8, 7, 3, 1])
@pytest.mark.parametrize(("count", "contexts"), [(2, 1), (3, 1), (2, 2)])
def test_gradients_of_workers_sum_to_that_of_one(data, batch, num_rows, count, contexts):
    part = batch.rows(0, num_rows)

    def gradients(rank, count, contexts):
        trainer = trainer_on(contexts, data, lr=0.0)
        trainer.communicator = worker(rank, count)
        trainer.step(batch)  # its gradients must not be added to those of the next step
        trainer.step(part)
        return reference.gradients(trainer.net)

    whole = gradients(0, 1, 1)
    parts = [gradients(rank, count, contexts) for rank in range(count)]
    assert max(np.abs(gradient).max() for gradient in whole.values()) > 1e-2
    assert_same({name: np.sum([each[name] for each in parts], axis=0) for name in whole}, whole, 1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 11])
def test_shares_of_workers_cover_the_batch(batch, count):
    shares = [worker_rows(batch, rank, count) for rank in range(count)]
    for name in ("tokens", "masked_ids", "next_sentence_labels", "valid_length"):
        together = np.concatenate([getattr(share, name) for share in shares])
        np.testing.assert_array_equal(together, getattr(batch, name), err_msg=name)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    shards = [s for share in shares for s in split_and_load(share, [mx.cpu(0), mx.cpu(1)], whole=batch)]
    assert sum(shard.num_masked * shard.masked_weight for shard in shards) == pytest.approx(1)
    assert sum(shard.num_pairs * shard.pair_weight for shard in shards) == pytest.approx(1)


def test_dropout_seed_differs_by_rank_and_step():
    assert dropout_seed(5, 7, 0) == dropout_seed(5, 7)
    assert len({dropout_seed(5, step, rank) for step in range(10) for rank in range(10)}) == 100


def test_meter_of_root_holds_all_totals():
    totals = MetricSums({"mlm_loss": 5.5, "nsp_loss": 2.0}, {"mlm_loss": 7.0, "nsp_loss": 4.0}, 4.0)
    assert Meter.of(totals, mx.cpu(1)).totals() == totals
    cleared = Meter.of(totals, mx.cpu(1)).cleared().totals()
    assert list(cleared.sums) == list(totals.sums) and not cleared.to_array().any()


class RecordingCommunicator(Communicator):
    """A worker that gathers what another one gathered before."""

    count = 2

    def __init__(self, other=None):
        self.other, self.gathered = other, []

    def all_gather(self, content):
        self.gathered.append(content)
        if self.other is None:
            return [content, content]
        return [self.other.gathered[len(self.gathered) - 1], content]


def test_check_same_on_all_names_differing_options():
    config = preset("d2l")
    elsewhere = config.replace(corpus=["/elsewhere"], vocab_file="other.txt")
    other = config.replace(lr=0.5, clip_norm=1.0)
    root = RecordingCommunicator()
    root.check_same_on_all(run_environment(config, "a"))
    RecordingCommunicator(root).check_same_on_all(run_environment(elsewhere, "a"))
    with pytest.raises(
        InputError, match=r"^clip_norm, lr and the text of the corpus must be the same on all workers"
    ):
        RecordingCommunicator(root).check_same_on_all(run_environment(other, "b"))
    with pytest.raises(InputError, match="different versions of gluon_bert"):
        RecordingCommunicator(root).check_same_on_all({**run_environment(config, "a"), "--new": 1})


def test_weights_hash_depends_on_each_bit():
    weights = {"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float32)}
    changed = {**weights, "b": np.array([0, 0, 0, 1e-45], np.float32)}
    assert weights_hash(weights) == weights_hash(dict(reversed(list(weights.items()))))
    assert weights_hash(weights) != weights_hash(changed)


def test_ranks_differing_from_root_are_returned():
    root = RecordingCommunicator()
    assert root.ranks_differing_from_root("a") == []
    assert RecordingCommunicator(root).ranks_differing_from_root("a") == []
    assert RecordingCommunicator(root).ranks_differing_from_root("b") == [1]
    assert Communicator().ranks_differing_from_root("a") == []


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_sum_values_keeps_the_shape(shape):
    assert np.shape(Communicator().sum_values(np.ones(shape))) == shape
