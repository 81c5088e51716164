"""The learning rate over a run: its start, its peak, its end."""

import dataclasses
import math

import pytest

from gluon_bert.config import TrainConfig, preset
from gluon_bert.errors import BadInput
from gluon_bert.training.schedule import DECAYS, learning_rate, peak_step


def rates(num_steps, **changes):
    config = TrainConfig(lr=3e-4, **changes)
    return [learning_rate(config, step, num_steps) for step in range(1, num_steps + 1)]


def test_without_a_warm_up_constant_is_constant_to_the_last_bit():
    assert set(rates(1000)) == {3e-4}


def test_every_schedule_of_the_configuration_is_there():
    (field,) = (f for f in dataclasses.fields(TrainConfig) if f.name == "schedule")
    assert tuple(DECAYS) == field.metadata["choices"]


def test_linear_rises_and_falls_in_equal_parts():
    expected = [3e-4 * share for share in (0.25, 0.5, 0.75, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7)]
    assert rates(10, schedule="linear", warmup=0.4) == pytest.approx(expected, rel=1e-12)


def test_cosine_falls_along_half_a_wave():
    found = rates(7, schedule="cosine")
    assert found == pytest.approx([3e-4 * (1 + math.cos(math.pi * i / 7)) / 2 for i in range(7)], rel=1e-12)
    assert found[3] + found[4] == pytest.approx(3e-4)  # the middle of the way lies between them


def test_constant_rises_and_stays():
    assert rates(5, warmup=0.4) == [1.5e-4, 3e-4, 3e-4, 3e-4, 3e-4]


@pytest.mark.parametrize("warmup", [0.0, 0.01, 0.1, 1 / 3, 0.5, 1.0])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 10, 99, 1000, 4321])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_peak_is_the_asked_rate_at_one_step_and_no_step_has_none(schedule, num_steps, warmup):
    found = rates(num_steps, schedule=schedule, warmup=warmup)
    peak = peak_step(TrainConfig(warmup=warmup), num_steps)
    assert found[peak - 1] == 3e-4  # not approximately
    assert found.count(3e-4) == 1
    assert all(0 < rate <= 3e-4 for rate in found)
    assert found[:peak] == sorted(found[:peak])
    assert found[peak - 1 :] == sorted(found[peak - 1 :], reverse=True)
    assert len(set(found[:peak])) == peak and len(set(found[peak:])) == num_steps - peak


def test_the_step_after_the_last_would_have_none():
    found = rates(1000, schedule="linear", warmup=0.1)
    fall = found[-2] - found[-1]
    assert found[-1] == pytest.approx(fall)
    assert found[-1] == pytest.approx(3e-4 / 901)


def test_the_warm_up_grows_with_the_run():
    train = preset("bert-tiny").train
    assert [peak_step(train, num_steps) for num_steps in (1, 10, 1000)] == [1, 1, 100]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_step_after_the_end_is_refused_in_words(schedule):
    config = TrainConfig(schedule=schedule)
    with pytest.raises(BadInput, match=f"--num-steps 50: --schedule {schedule} ends there, before step 51"):
        learning_rate(config, 51, 50)
    assert learning_rate(TrainConfig(), 51, 50) == TrainConfig().lr


def test_steps_may_be_parts_of_a_step():
    config = TrainConfig(lr=1.0, schedule="linear", warmup=0.5)
    assert learning_rate(config, 1.5, 12.0) == 0.25
    assert learning_rate(config, 9.5, 12.0) == 0.5
