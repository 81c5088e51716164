"""Compares the memory that a training needs with that of its devices. Trains nothing."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Iterator, Sequence

from .. import ops
from ..config import Config
from ..errors import InputError, OutOfGPUMemory, gpu_failure
from ..model.task import Task
from ..system import machine_memory, peak_memory
from .gpu_memory import GPUEstimate, check_gpu_memory, estimate_gpu_memory, memory_of, what_fits
from .resources import ResourceEstimate, Workload, check_memory, estimate_resources

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MemoryPlan:
    """What a training takes of its devices: CPUs or GPUs of one of several workers.

    task: of the network that is fine-tuned; None in pretraining.
    """

    config: Config
    vocab_size: int
    devices: Sequence[Any]
    num_workers: int = 1
    task: Task | None = None

    @property
    def on_gpus(self) -> bool:
        """Whether the memory is that of GPUs."""
        return bool(self.devices[0].device_type == "gpu")

    def check(self, ignore: bool = False) -> None:
        """Raise InputError, with settings that fit, if the memory is too small. ignore: only warn."""
        try:
            if self.on_gpus:
                check_gpu_memory(self._work, memory_of(self.devices)[0])
            else:
                limit = machine_memory(self.devices)
                if limit is not None:
                    check_memory(self._work, self._compiled, limit)
        except InputError as error:
            if not ignore:
                raise InputError(f"{error} To train anyway, use ignore_memory_estimate=True.") from error
            log.warning("%s It trains anyway (ignore_memory_estimate).", error)

    def describe(self) -> str:
        """Return two lines: the estimated memory, and the size of a step."""
        whole, batch_size = self._estimate(), self.config.train.batch_size
        if not self.on_gpus:
            return whole.format_memory(batch_size, machine_memory(self.devices))
        memory = self._gpu_estimate().format_memory(sum(memory_of(self.devices)))
        return f"{memory}\n{whole.format_step(batch_size)}"

    def outcome(self) -> str:
        """Compare the estimate with what was taken, in a line."""
        if self.on_gpus:
            return self._gpu_estimate().outcome(memory_of(self.devices)[1])
        peak = peak_memory()
        return self._estimate().outcome(peak) if peak else "memory taken: unknown on this system"

    @contextmanager
    def explain_out_of_memory(self) -> Iterator[None]:
        """Raise OutOfGPUMemory, which says what would fit, where a GPU has too little memory."""
        try:
            yield
        except Exception as error:
            if gpu_failure(error) != "out of memory":
                raise
            total = sum(memory_of(self.devices))
            raise OutOfGPUMemory(
                f"the GPU is out of memory. Each has {total / 1e9:.1f} GB, and the run needs about "
                f"{self._gpu_estimate().memory / 1e9:.1f} GB. " + what_fits(self._work, total)
            ) from error

    @property
    def _work(self) -> Workload:
        return Workload(self.config, self.vocab_size, len(self.devices), self.num_workers, self.task)

    @property
    def _compiled(self) -> bool:
        return ops.compiled(self.devices)

    def _estimate(self) -> ResourceEstimate:
        return estimate_resources(self._work, self._compiled)

    def _gpu_estimate(self) -> GPUEstimate:
        return estimate_gpu_memory(self._work)
