"""The learning rate over a run: its start, its peak, its end."""

import dataclasses
import math

import pytest

from gluon_bert.config import TrainConfig
from gluon_bert.errors import InputError
from gluon_bert.presets import preset
from gluon_bert.training.lr_schedule import DECAYS, learning_rate, peak_step, planned_steps


def rates(num_steps, **changes):
    config = TrainConfig(lr=3e-4, **changes)
    return [learning_rate(config, step, num_steps) for step in range(1, num_steps + 1)]


def test_constant_without_warmup_is_exactly_lr():
    assert set(rates(1000)) == {3e-4}


def test_every_schedule_of_the_config_exists():
    (field,) = (f for f in dataclasses.fields(TrainConfig) if f.name == "schedule")
    assert tuple(DECAYS) == field.metadata["choices"]


def test_linear_rises_and_falls_in_equal_parts():
    expected = [3e-4 * share for share in (0.25, 0.5, 0.75, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7)]
    assert rates(10, schedule="linear", warmup_ratio=0.4) == pytest.approx(expected, rel=1e-12)


def test_cosine_falls_along_half_a_wave():
    found = rates(7, schedule="cosine")
    assert found == pytest.approx([3e-4 * (1 + math.cos(math.pi * i / 7)) / 2 for i in range(7)], rel=1e-12)
    assert found[3] + found[4] == pytest.approx(3e-4)  # the middle of the way lies between them


def test_constant_rises_and_stays():
    assert rates(5, warmup_ratio=0.4) == [1.5e-4, 3e-4, 3e-4, 3e-4, 3e-4]


@pytest.mark.parametrize("warmup", [0.0, 0.01, 0.1, 1 / 3, 0.5, 1.0])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 10, 99, 1000, 4321])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_peak_is_lr_and_no_step_has_0(schedule, num_steps, warmup):
    found = rates(num_steps, schedule=schedule, warmup_ratio=warmup)
    peak = peak_step(TrainConfig(warmup_ratio=warmup), num_steps)
    assert found[peak - 1] == 3e-4  # not approximately
    assert found.count(3e-4) == 1
    assert all(0 < rate <= 3e-4 for rate in found)
    assert found[:peak] == sorted(found[:peak])
    assert found[peak - 1 :] == sorted(found[peak - 1 :], reverse=True)
    assert len(set(found[:peak])) == peak and len(set(found[peak:])) == num_steps - peak


def test_step_after_the_last_would_have_0():
    found = rates(1000, schedule="linear", warmup_ratio=0.1)
    fall = found[-2] - found[-1]
    assert found[-1] == pytest.approx(fall)
    assert found[-1] == pytest.approx(3e-4 / 901)


def test_warmup_grows_with_the_run():
    train = preset("bert-tiny").train
    assert [peak_step(train, num_steps) for num_steps in (1, 10, 1000)] == [1, 1, 100]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_step_after_the_end_is_refused(schedule):
    config = TrainConfig(schedule=schedule)
    with pytest.raises(InputError, match=f'num_steps must be at least 51 with schedule="{schedule}", got 50'):
        learning_rate(config, 51, 50)
    assert learning_rate(TrainConfig(), 51, 50) == TrainConfig().lr


def test_fractions_of_steps_are_allowed():
    config = TrainConfig(lr=1.0, schedule="linear", warmup_ratio=0.5)
    assert learning_rate(config, 1.5, 12.0) == 0.25
    assert learning_rate(config, 9.5, 12.0) == 0.5


# A run that the clock ends


def made_in(config, seconds_of):
    """(seconds gone at its end, learning rate) of every step of a run; seconds_of(step) each takes."""
    made, elapsed = [], 0.0
    for step in range(1, 100_000):
        planned = planned_steps(config, step, step - 1, elapsed)
        rate = learning_rate(config, step, planned)
        elapsed += seconds_of(step)
        made.append((elapsed, rate))
        if step >= planned:
            return made
    raise AssertionError("the run does not end")


TEN_MINUTES = TrainConfig(num_steps=0, max_minutes=10.0, lr=1.0, schedule="linear", warmup_ratio=0.1)
PACES = {
    "steady": lambda step: 1.0,
    "slow at first": lambda step: 8.0 if step == 1 else 1.0,
    "slower and slower": lambda step: 0.5 + step / 300,
    "with evaluations": lambda step: 31.0 if step % 50 == 0 else 1.0,
    "tired after half": lambda step: 1.0 if step < 300 else 3.0,
}


@pytest.mark.parametrize("pace", PACES)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_max_minutes_rate_follows_time_at_any_pace(pace, schedule):
    config = dataclasses.replace(TEN_MINUTES, schedule=schedule)
    made = made_in(config, PACES[pace])
    longest = max(PACES[pace](step) for step in range(1, len(made) + 1))
    assert made[-1][0] == pytest.approx(600, abs=longest + 2)
    assert 0 < made[-1][1] < 0.02
    assert all(0 < rate <= 1 for _, rate in made)
    for seconds, rate in made[10:]:
        # By the schedule at the time at which the step ends, but for what one evaluation may shift.
        expected = learning_rate(config, min(seconds, 600), 600)
        assert rate == pytest.approx(expected, abs=2 * longest / 60), seconds


def test_max_minutes_at_a_steady_pace_equals_num_steps():
    by_steps = dataclasses.replace(TEN_MINUTES, num_steps=300, max_minutes=0.0)
    expected = [learning_rate(by_steps, step, 300) for step in range(1, 301)]
    found = [rate for _, rate in made_in(TEN_MINUTES, lambda step: 2.0)]
    assert found[1:] == pytest.approx(expected[1:])
    assert found[0] == 1 / 60  # of a pace that is not known yet


def test_first_of_two_limits_ends_the_schedule():
    for num_steps, expected in ((200, 200), (900, 600)):
        made = made_in(dataclasses.replace(TEN_MINUTES, num_steps=num_steps), lambda step: 1.0)
        assert len(made) == expected
        assert made[-1][1] == pytest.approx(1 / (expected + 1 - expected // 10))


def test_planned_steps_without_minutes_ignores_the_clock():
    config = TrainConfig(num_steps=70)
    assert {planned_steps(config, step, step - 1, 10.0**step) for step in range(1, 71)} == {70}


def test_planned_steps_ends_when_the_time_is_used():
    assert planned_steps(TEN_MINUTES, 5, 4, 5000.0) == 5
    assert learning_rate(TEN_MINUTES, 5, 5) > 0


def test_planned_steps_counts_finished_steps_only():
    # Of 12 steps that were queued 10 are done, in 20 seconds: 10 minutes have room for 300.
    assert planned_steps(TEN_MINUTES, 13, 10, 20.0) == 300
