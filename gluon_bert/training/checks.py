"""Checks a configuration against devices and data before the first step. Changes nothing."""

from __future__ import annotations

from ..config import TrainConfig
from ..errors import InputError


def check_evaluable(config: TrainConfig, has_validation: bool) -> None:
    """Raise InputError if the end of a run depends on evaluations and there is no validation text."""
    if config.patience and not has_validation:
        raise InputError(
            f"patience must be 0 without enough validation text, got {config.patience}. Increase "
            "validation_fraction, or set patience to 0"
        )


def check_micro_batch(config: TrainConfig, num_devices: int) -> None:
    """Raise InputError if a batch cannot be computed in parts of `micro_batch` on these devices."""
    size, whole = config.micro_batch, config.batch_size
    if not size or num_devices <= size <= whole:
        return
    allowed = f"0 or between {num_devices} and {whole}" if num_devices <= whole else "0"
    devices = f"{num_devices} device{'s' if num_devices > 1 else ''}"
    raise InputError(f"micro_batch must be {allowed} (batch_size={whole}, {devices}), got {size}")
