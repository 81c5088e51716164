"""The learning rate of a step, and the length of a run. Pure functions of steps and seconds."""

from __future__ import annotations

import math

from ..config import TrainConfig
from ..errors import InputError

# Factor of the peak, by the share of the way from the peak to the step after the last.
DECAYS = {
    "constant": lambda way: 1.0,
    "linear": lambda way: 1.0 - way,
    "cosine": lambda way: 0.5 + 0.5 * math.cos(math.pi * way),  # Loshchilov and Hutter 2017, equation 5
}


def planned_steps(config: TrainConfig, step: int, finished: int, elapsed: float) -> float:
    """Return the expected number of steps of the run when `step` begins; it may be a fraction.

    This is `num_steps`, or the number that `max_minutes` allow at the pace so far: `finished` steps took
    `elapsed` seconds, with evaluations. Later steps may still be queued on a device. With this number the
    learning rate follows the share of the time that has passed.

    >>> planned_steps(TrainConfig(num_steps=0, max_minutes=1.0), step=13, finished=10, elapsed=20.0)
    30.0
    """
    num_steps = config.num_steps or math.inf
    if not config.max_minutes:
        return num_steps
    # Before the first step is finished, guess one second per step. It affects the warm-up only.
    pace = elapsed / finished if finished else 1.0
    return min(num_steps, max(step, 60 * config.max_minutes / pace))


def learning_rate(config: TrainConfig, step: float, num_steps: float) -> float:
    """Return the learning rate of a step in a run of `num_steps`. The first step is 1.

    It rises linearly over the warm-up to `lr` at `peak_step`. Then it decays, to 0 at the step after the
    last. Steps may be fractions.

    >>> config = TrainConfig(lr=1.0, schedule="linear", warmup_ratio=0.4)
    >>> [learning_rate(config, step, 5) for step in (1, 2, 3, 4, 5)]
    [0.5, 1.0, 0.75, 0.5, 0.25]

    Raise InputError for a step after the last, unless the rate is constant.
    """
    if step > num_steps and config.schedule != "constant":
        raise InputError(
            f'num_steps must be at least {step} with schedule="{config.schedule}", got {num_steps}.'
        )
    peak = peak_step(config, num_steps)
    if step <= peak:
        return config.lr * (step / peak)
    # At least 1, for a constant rate without a limit on steps.
    way = max(1, num_steps + 1 - peak)
    return config.lr * DECAYS[config.schedule]((step - peak) / way)


def peak_step(config: TrainConfig, num_steps: float) -> int:
    """Return the step whose learning rate is `lr`: the last of the warm-up, or the first without warm-up.

    >>> peak_step(TrainConfig(warmup_ratio=0.1), 1000), peak_step(TrainConfig(warmup_ratio=0.0), 1000)
    (100, 1)
    """
    return max(1, round(config.warmup_ratio * num_steps))
