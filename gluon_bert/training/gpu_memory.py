"""Estimates the memory of each GPU before a run, and compares it with the memory that is free.

The counts of arrays come from peaks of MXNet's memory pool on simulated GPUs (tests/simulated_cuda).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Sequence

from ..config import ModelConfig
from ..errors import InputError
from ..runtime import mx
from .resources import ActivationSizes, Workload, largest_shard, settings_that_fit

FLOAT, HALF = 4, 2  # bytes
# MXNet's pool rounds large blocks up to a multiple of this size.
BLOCK = 2**21
# The estimate was up to this factor above the peak. Runs are refused only beyond it.
TOO_HIGH = 1.1


@dataclass(frozen=True)
class GPUEstimate:
    """The estimated memory of one GPU in bytes: weights, gradients and optimizer; and activations.

    CUDA takes 0.5 to 1 GB more, which the simulation does not show.
    """

    model: float
    activations: float
    micro_batch_size: int

    @property
    def memory(self) -> float:
        """Return the expected peak of MXNet's memory pool."""
        return self.model + self.activations

    def format_memory(self, total: float) -> str:
        """Return a line on the estimate."""
        return (
            f"memory expected: {_gigabytes(self.memory)} of {_gigabytes(total)} on each GPU: weights, "
            f"gradients and optimizer {_gigabytes(self.model)}, activations {_gigabytes(self.activations)}; "
            "CUDA takes 0.5 to 1 GB more"
        )

    def outcome(self, used: float) -> str:
        """Compare the estimate with what is in use on the fullest GPU."""
        return f"GPU memory in use: {_gigabytes(used)}, {_gigabytes(self.memory)} expected"


def estimate_gpu_memory(work: Workload) -> GPUEstimate:
    """Estimate what each of a worker's GPUs takes."""
    config, train, num_gpus = work.config, work.config.train, work.num_devices
    micro_batch_size, sizes = largest_shard(work)
    half = train.precision == "fp16"
    # The weights, their gradients and two states of the optimizer. With several GPUs the kvstore spreads its
    # copy of the weights, the sum, and the gradients of the other GPUs over all.
    copies = 4 + ((num_gpus + 1) / num_gpus if num_gpus > 1 else 0)
    model = copies * _parameters(work)
    if train.optimizer == "muon":
        # The encoder's matrices have one state less. A step allocates arrays of 3.4 times their size.
        model += 2.4 * config.model.num_layers * _matrices(config.model, FLOAT)
    return GPUEstimate(
        model,
        _activations(sizes, train.recompute, half) + _heads(sizes, half),
        micro_batch_size,
    )


def check_gpu_memory(work: Workload, free: float) -> None:
    """Raise InputError, with settings that fit, if a run needs more than the free bytes of each GPU."""
    expected = estimate_gpu_memory(work).memory
    if expected <= TOO_HIGH * free:
        return
    raise InputError(
        f"the run needs about {_gigabytes(expected)} of each GPU with "
        f"batch_size={work.config.train.batch_size} and max_seq_length={work.config.data.max_seq_length}, "
        f"and {_gigabytes(free)} are free. {what_fits(work, free)}"
    )


def what_fits(work: Workload, free: float) -> str:
    """Return a sentence with settings that fit in the free bytes."""

    def memory(**changes: Any) -> float:
        return estimate_gpu_memory(work.with_train(**changes)).memory

    most = estimate_gpu_memory(work)
    return settings_that_fit(
        memory, range(work.num_devices, most.micro_batch_size + 1), min(free, most.memory)
    )


def memory_of(contexts: Sequence[Any]) -> tuple[float, float]:
    """Return the least free bytes and the most used bytes of these GPUs, from CUDA."""
    found = [mx.context.gpu_memory_info(context.device_id) for context in contexts]
    return float(min(free for free, _ in found)), float(max(total - free for free, total in found))


def _parameters(work: Workload) -> float:
    """Return the bytes of all weights, each matrix in blocks of the pool."""
    model, vocab_size, task = work.config.model, work.vocab_size, work.task
    c, f = model.units, model.ffn_units
    tables = [vocab_size * c] * (1 if model.tied_decoder or task else 2) + [model.max_positions * c]
    heads = [c * c] * (not task.scores_tokens if task else 2)
    matrices = tables + ([c * c] * 4 + [c * f] * 2) * model.num_layers + heads
    rest = work.num_parameters - sum(matrices)
    return sum(_block(FLOAT * size) for size in matrices) + FLOAT * rest


def _matrices(model: ModelConfig, size: int) -> float:
    """Return the bytes of the matrices of one layer, for values of a given size."""
    return 4 * _block(size * model.units**2) + 2 * _block(size * model.units * model.ffn_units)


def _activations(sizes: ActivationSizes, recompute: bool, half: bool) -> float:
    """Return the peak memory of the encoder in bytes.

    Of each layer it keeps streams (tokens, C), hidden arrays (tokens, F) and attention scores (B * H, T, T).
    """
    model, drops = sizes.model, sizes.model.dropout > 0
    stream, hidden = sizes.tokens * model.units, sizes.tokens * model.ffn_units
    scores = model.num_heads * sizes.length * sizes.tokens
    full, short = _block(FLOAT * stream), _block(HALF * stream)
    if half:
        activation = {"relu": 0.5, "gelu": 1.0, "gelu_tanh": 6.5}[model.activation]
        layer = (2.4 + 2 * drops) * full + 3 * short + _block(3 * HALF * stream)
        layer += activation * _block(FLOAT * hidden)
        layer += _block(FLOAT * scores) + (1 + drops) * _block(HALF * scores)
        # A float16 copy of the weights; and of their gradients, those of one layer at a time.
        copy = _matrices(model, HALF)
        layer += copy
        passing = copy + 8 * full + 4 * _block(FLOAT * scores) + 3 * _block(3 * HALF * stream)
    else:
        activation = {"relu": 1.0, "gelu": 2.0, "gelu_tanh": 7.0}[model.activation]
        layer = (8.25 + 2 * drops) * full + activation * _block(FLOAT * hidden)
        layer += (1 + 2 * drops) * _block(FLOAT * scores)
        passing = 8 * full + 4 * _block(FLOAT * scores)
    if recompute:  # one layer, and what enters each
        return layer + passing + (model.num_layers + 1) * full
    return model.num_layers * layer + passing


def _heads(sizes: ActivationSizes, half: bool) -> float:
    """Return the bytes of the scores of 256 masked words, and of the decoder's gradients of each 256.

    fp16 adds up these gradients in float16, and keeps a float16 copy of the decoder's weight. A fine-tuned
    network has no decoder.
    """
    if not sizes.num_masked:
        return 0.0
    slices, tied = -(-sizes.num_masked // 256), sizes.model.tied_decoder
    table = sizes.words * sizes.model.units
    scores = sizes.words * (sizes.num_masked + 3 * min(sizes.num_masked, 256))
    if half:
        tables = (1 + tied) * _block(FLOAT * table) + (1 + min(slices, 8)) * _block(HALF * table)
    else:
        tables = min(slices + tied, 8) * _block(FLOAT * table)
    return FLOAT * scores + tables


def _block(size: float) -> float:
    """Return the size of the block that the pool allocates for a number of bytes."""
    return -(-size // BLOCK) * BLOCK if size >= BLOCK else size


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
