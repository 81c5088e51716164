"""Step -> learning rate, and how long a run is. Pure functions: they know no optimizer and read no clock."""

from __future__ import annotations

import math

from ..config import TrainConfig
from ..errors import InputError

# What is left of the peak, by the share of the way from the peak to the step after the last.
DECAYS = {
    "constant": lambda way: 1.0,
    "linear": lambda way: 1.0 - way,
    "cosine": lambda way: 0.5 + 0.5 * math.cos(math.pi * way),  # Loshchilov and Hutter 2017, equation 5
}


def planned_steps(config: TrainConfig, step: int, finished: int, elapsed: float) -> float:
    """How many steps the run will have, as far as one can tell when `step` begins; maybe a fraction.

    That is `num_steps`, or as many as `max_minutes` have room for at the pace so far: `finished` steps took
    `elapsed` seconds, evaluations included, while those between may still be queued on a device. Planned
    on this, the learning rate follows the share of the time that is gone, and the last step is the one that
    will use up the time.

    >>> planned_steps(TrainConfig(num_steps=0, max_minutes=1.0), step=13, finished=10, elapsed=20.0)
    30.0
    """
    num_steps = config.num_steps or math.inf
    if not config.max_minutes:
        return num_steps
    # Before any is finished the pace is not known: a second, a guess that matters to the warm-up alone.
    pace = elapsed / finished if finished else 1.0
    return min(num_steps, max(step, 60 * config.max_minutes / pace))


def learning_rate(config: TrainConfig, step: float, num_steps: float) -> float:
    """The learning rate of a step, the first of which is 1, in a run of `num_steps`.

    It rises in equal parts over the warm-up, is `lr` itself at `peak_step`, and then falls so that the
    step after the last would have 0: none that is made has. Steps may be any unit, whole or not.

    >>> config = TrainConfig(lr=1.0, schedule="linear", warmup_ratio=0.4)
    >>> [learning_rate(config, step, 5) for step in (1, 2, 3, 4, 5)]
    [0.5, 1.0, 0.75, 0.5, 0.25]

    Raises InputError for a step after the last, where a decayed rate would be 0 or less.
    """
    if step > num_steps and config.schedule != "constant":
        raise InputError(
            f"--num-steps {num_steps}: --schedule {config.schedule} ends there, before step {step}"
        )
    peak = peak_step(config, num_steps)
    if step <= peak:
        return config.lr * (step / peak)
    # At least 1 where there is no limit on steps and no plan, which only a constant rate goes with.
    way = max(1, num_steps + 1 - peak)
    return config.lr * DECAYS[config.schedule]((step - peak) / way)


def peak_step(config: TrainConfig, num_steps: float) -> int:
    """The last step of the warm-up, the one whose learning rate is `lr`; without a warm-up the first.

    >>> peak_step(TrainConfig(warmup_ratio=0.1), 1000), peak_step(TrainConfig(warmup_ratio=0.0), 1000)
    (100, 1)
    """
    return max(1, round(config.warmup_ratio * num_steps))
