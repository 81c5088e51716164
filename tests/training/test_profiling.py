"""Load balance and utilization of contexts, from counts and from a profile."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from support.trainers import first_whole_batch, small_data, trainer_on

from gluon_bert.runtime import mx
from gluon_bert.training.profiling import LoadBalance, device_utilization


def shards(*given):
    return [SimpleNamespace(num_tokens=tokens, num_masked=count) for tokens, count in given]


def test_load_balance_divides_by_the_largest_share():
    evenness = LoadBalance()
    assert all(map(math.isnan, evenness.shares()))
    evenness.add(shards((10, 4), (30, 4)))
    evenness.add(shards((30, 4), (10, 2)))  # in all both have the same tokens, and yet wait half of the time
    assert evenness.shares() == (pytest.approx(40 / 60), pytest.approx(7 / 8))
    message = "load of the contexts: on average 66.7 % of the tokens and 87.5 % of the masked tokens of the"
    assert str(evenness).startswith(message)


@pytest.mark.parametrize("micro_batch", [0, 4])
def test_trainer_counts_tokens_of_each_context(micro_batch):
    data = small_data()
    batch = first_whole_batch(data)
    trainer = trainer_on(2, data, micro_batch=micro_batch)
    trainer.step(batch)
    at_once = micro_batch or len(batch)
    tokens = batch.valid_length.reshape(-1, 2, at_once // 2).sum(axis=2)  # by part and context
    predictions = np.bincount(batch.masked_positions[0]).reshape(tokens.shape + (-1,)).sum(axis=2)
    expected = [given.mean(axis=1).sum() / given.max(axis=1).sum() for given in (tokens, predictions)]
    assert trainer.load_balance.shares() == pytest.approx(tuple(expected))
    assert expected[0] < 1


def test_load_balance_counts_a_context_without_rows():
    data = small_data()
    batch = first_whole_batch(data)
    trainer = trainer_on(3, data)
    trainer.step(batch.rows(0, 1))
    assert trainer.load_balance.shares() == pytest.approx((1 / 3, 1 / 3))


def told_of(contexts, tmp_path, names, *spans):
    """What a trace like MXNet's tells: devices' names, and operators on them from a time to another."""
    events = [
        {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}
        for pid, name in enumerate(names)
    ]
    for pid, begin, end in spans:
        common = {"cat": "operator", "name": "dot", "pid": pid}
        events += [{**common, "ph": "B", "ts": begin}, {**common, "ph": "E", "ts": end}]
    events.append({"cat": "MXNET_C_API", "ph": "b", "name": "MXInvoke", "pid": 99, "ts": 1})
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}), "utf-8")
    return device_utilization(tmp_path / "trace.json", contexts)


def test_device_utilization_measures_each_and_all_at_once(tmp_path):
    ms = 1000
    # The second context of a machine with one core has another device's name; the first works twice at once.
    # A third one is of something else in the process.
    names = ["cpu/0", "cpu pinned/", "cpu shared/"]
    spans = [
        (0, 0, 10 * ms),
        (0, 2 * ms, 4 * ms),
        (1, 6 * ms, 15 * ms),
        (2, 1 * ms, 30 * ms),
        (0, 20 * ms, 21 * ms),
    ]
    message = told_of([mx.cpu(0), mx.cpu(1)], tmp_path, names, *spans)
    assert dict(message.contexts) == pytest.approx({"cpu/0": 0.011, "cpu/1": 0.009})
    assert (message.any, message.all) == (pytest.approx(0.016), pytest.approx(0.004))
    assert (
        str(message) == "at work: cpu/0 0.01 s, cpu/1 0.01 s; any of them 0.02 s, all at once 0.00 s of that"
    )


def test_device_utilization_counts_gpus_before_cpus(tmp_path):
    names = ["cpu/0", "gpu/0", "gpu/1", "cpu pinned/"]
    message = told_of([mx.gpu(0), mx.gpu(1)], tmp_path, names, (0, 0, 9), (1, 0, 4), (2, 2, 6), (3, 0, 9))
    assert dict(message.contexts) == pytest.approx({"gpu/0": 4e-6, "gpu/1": 4e-6})
    assert (message.any, message.all) == (pytest.approx(6e-6), pytest.approx(2e-6))
