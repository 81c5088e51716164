"""Checks a configuration against devices and data before the first step. Changes nothing."""

from __future__ import annotations

from typing import Any, Sequence

from .. import ops
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


def check_precision(precision: str, devices: Sequence[Any]) -> None:
    """Raise InputError if these devices cannot multiply matrices in `precision`."""
    on_cpus = any(device.device_type == "cpu" for device in devices)
    if precision == "fp16" and on_cpus:
        raise InputError(
            "precision must be fp32 or bf16 on a CPU, got fp16. MXNet multiplies in float16 on GPUs only"
        )
    if precision == "bf16" and not on_cpus:
        raise InputError(
            "precision must be fp32 or fp16 on a GPU, got bf16. MXNet has no bfloat16 matmul there"
        )
    if precision == "bf16" and ops.bf16_unsupported_reason():
        raise InputError(f"precision must be fp32 here, got bf16: {ops.bf16_unsupported_reason()}")
