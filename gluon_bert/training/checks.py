"""Checks a configuration against devices and data before the first step. Changes nothing."""

from __future__ import annotations

from typing import Any, Sequence

from .. import ops
from ..config import TrainConfig
from ..data.loader import PretrainingData
from ..errors import InputError


def check_evaluable(config: TrainConfig, data: PretrainingData) -> None:
    """Raise InputError where the end of a run depends on evaluations and there is no text for them."""
    if config.patience and not data.validation:
        raise InputError(
            f"--patience {config.patience}: there is too little validation text to evaluate on; --validation-fraction "
            "asks for more, --patience 0 does without"
        )


def check_micro_batch(config: TrainConfig, num_contexts: int) -> None:
    """Raise InputError where a batch cannot be computed in parts of `micro_batch` on so many contexts."""
    size, whole = config.micro_batch, config.batch_size
    if not size or num_contexts <= size <= whole:
        return
    on = f"{num_contexts} contexts" if num_contexts > 1 else "one context"
    would_do = (
        f"{num_contexts} to {whole} would do, or 0"
        if num_contexts <= whole
        else f"0 would do, or --batch-size {num_contexts} at least"
    )
    raise InputError(f"--micro-batch {size}: of --batch-size {whole} on {on} {would_do}")


def check_precision(config: TrainConfig, contexts: Sequence[Any]) -> None:
    """Raise InputError where matrices cannot be multiplied in `precision` on these contexts."""
    on_cpus = any(context.device_type == "cpu" for context in contexts)
    if config.precision == "fp16" and on_cpus:
        raise InputError(
            "--precision fp16: MXNet multiplies in float16 on GPUs only; on a CPU fp32 would do, or bf16 "
            "where the processor has it"
        )
    if config.precision == "bf16" and not on_cpus:
        raise InputError("--precision bf16: MXNet has no products of bfloat16 on GPUs; fp16 or fp32 would do")
    if config.precision == "bf16" and ops.bf16_unsupported_reason():
        raise InputError(f"--precision bf16: {ops.bf16_unsupported_reason()}; fp32 would do")
