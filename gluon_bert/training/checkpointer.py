"""Writes checkpoints in a thread while the training continues. Callers decide when."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Callable, NamedTuple

from ..checkpoint import Snapshot, latest_valid, steps, write_checkpoint
from ..config import TrainConfig
from ..errors import InputError
from .callbacks import Callback, TrainerLike

log = logging.getLogger(__name__)


class CheckpointTiming(NamedTuple):
    """The cost of checkpoints: their number, the seconds the training waited, the seconds of writing."""

    written: int = 0
    waited: float = 0.0
    writing: float = 0.0


class ReadOnlyCheckpointer(Callback):
    """Reads the checkpoints of a run's folder, on a worker that does not write them."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def latest_checkpoint(self) -> Snapshot | None:
        """Return the latest valid checkpoint; raise InputError if this worker does not see the folder."""
        if not self.folder.is_dir():
            raise InputError(
                f"output must be a folder that all workers share, to roll back to a checkpoint; worker does "
                f"not see {self.folder}"
            )
        return latest_valid(self.folder) if steps(self.folder) else None


class AsyncCheckpointer(Callback):
    """Writes checkpoints to a run's folder.

    The training waits for the copy to the host, and for an unfinished previous checkpoint.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder, self.timing = Path(folder), CheckpointTiming()
        self._config = TrainConfig()
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future[float] | None = None
        self._failure: OSError | None = None  # of the latest checkpoint, which then does not exist

    def on_fit_begin(self, trainer: TrainerLike) -> None:
        self._config = trainer.config
        self._thread = ThreadPoolExecutor(1)

    def on_checkpoint(self, trainer: TrainerLike) -> None:
        """Copy the run's state and start to write it; raise OSError as `on_checkpoint_error` says."""
        assert self._thread is not None
        trainer.wait()  # for queued steps, whose time is not counted as a checkpoint's
        began = time.perf_counter()
        self._attempt(self._finish_pending)
        self._attempt(lambda: self._start(trainer))
        self.timing = self.timing._replace(waited=self.timing.waited + time.perf_counter() - began)

    def latest_checkpoint(self) -> Snapshot | None:
        """Return the latest valid checkpoint on the disk, or None."""
        self._attempt(self._finish_pending)
        return latest_valid(self.folder) if steps(self.folder) else None

    def on_fit_end(self, trainer: TrainerLike) -> None:
        """Wait until the last checkpoint is on the disk; raise OSError if it is not."""
        assert self._thread is not None
        try:
            self._attempt(self._finish_pending)
            if self._failure:
                raise self._failure
        finally:
            self._thread.shutdown()

    def _start(self, trainer: TrainerLike) -> None:
        assert self._thread is not None
        snapshot, best = trainer.snapshot(), trainer.state.best
        is_best = best is not None and best.step == snapshot.step
        self._pending = self._thread.submit(self._write, snapshot, is_best)

    def _write(self, snapshot: Snapshot, best: bool) -> float:
        began = time.perf_counter()
        write_checkpoint(self.folder, snapshot, best=best, keep=self._config.keep_checkpoints)
        return time.perf_counter() - began

    def _finish_pending(self) -> None:
        """Wait for the checkpoint that is being written; raise its error."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            seconds = pending.result()
            written, waited, writing = self.timing
            self.timing = CheckpointTiming(written + 1, waited, writing + seconds)

    def _attempt(self, part: Callable[[], None]) -> None:
        """Do a part of the work on a checkpoint.

        Raise its OSError unless `on_checkpoint_error` is continue.
        """
        try:
            part()
        except OSError as error:
            kept = steps(self.folder)
            left = (
                f"the checkpoint after step {kept[-1]} is kept" if kept else "the run has no checkpoint yet"
            )
            log.warning("a checkpoint could not be written (%s); %s", error.strerror or error, left)
            self._failure = error
            if self._config.on_checkpoint_error == "stop":
                raise
        else:
            self._failure = None


def format_checkpoint_timing(timing: CheckpointTiming, seconds: float) -> str:
    """Return a line on the cost of the checkpoints, as a share of the seconds of training."""
    share = timing.waited / seconds if seconds else 0.0
    return (
        f"checkpoints: {timing.written}; the training waited {timing.waited:.2f} s for them ({share:.1%} of "
        f"its time); writing took {timing.writing:.2f} s"
    ).replace("%", " %")
