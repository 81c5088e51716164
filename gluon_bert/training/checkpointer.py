"""Checkpoints written while the training goes on: copied in its time, written in that of a thread."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Callable, NamedTuple

from ..checkpoint import Snapshot, latest_valid, steps, write_checkpoint
from ..config import TrainConfig
from ..errors import InputError
from .callbacks import Saver
from .progress import ProgressLogger
from .trainer import Trainer

log = logging.getLogger(__name__)


class CheckpointTiming(NamedTuple):
    """What checkpoints took: how many, the seconds that the training waited, the seconds of their writing."""

    written: int = 0
    waited: float = 0.0
    writing: float = 0.0


class ReadOnlyCheckpointer(Saver):
    """The checkpoints in the folder of a run, for a worker beside the one that writes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def latest(self) -> Snapshot | None:
        """The latest whole checkpoint; InputError where this worker does not see the folder."""
        if not self.folder.is_dir():
            raise InputError(
                f"--output {self.folder}: is not there for this worker; going back to a checkpoint needs a "
                "folder that all workers share"
            )
        return latest_valid(self.folder) if steps(self.folder) else None


class AsyncCheckpointer(Saver):
    """Keeps checkpoints in the folder of a run, each with the log as long as it is then.

    The training waits for the copy to the host, and for the one before where that is still being written.
    """

    def __init__(self, folder: Path, config: TrainConfig, report: ProgressLogger) -> None:
        self.folder, self.cost = Path(folder), CheckpointTiming()
        self._config, self._report = config, report
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[float] | None = None
        self._failure: OSError | None = None  # of the last checkpoint, which is then not there

    def save(self, trainer: Trainer) -> None:
        """Copy the run's state and begin to write it; OSError, by `on_checkpoint_error`, where that failed."""
        trainer.wait()  # for its steps, which is not what a checkpoint costs
        began = time.perf_counter()
        self._see_to(self._finish_pending)
        if self._see_to(lambda: self._note_log(trainer)):
            snapshot = trainer.snapshot()
            best = trainer.state.best
            is_best = best is not None and best.step == snapshot.step
            self._pending = self._thread.submit(self._write, snapshot, is_best)
        self.cost = self.cost._replace(waited=self.cost.waited + time.perf_counter() - began)

    def latest(self) -> Snapshot | None:
        """The latest whole checkpoint on the disk, None where there is none."""
        self._see_to(self._finish_pending)
        return latest_valid(self.folder) if steps(self.folder) else None

    def close(self) -> None:
        """Wait until the last checkpoint is on the disk; OSError where it is not."""
        try:
            self._see_to(self._finish_pending)
            if self._failure:
                raise self._failure
        finally:
            self._thread.shutdown()

    def _note_log(self, trainer: Trainer) -> None:
        trainer.state.log_bytes = self._report.synced()

    def _write(self, snapshot: Snapshot, best: bool) -> float:
        began = time.perf_counter()
        write_checkpoint(self.folder, snapshot, best=best, keep=self._config.keep_checkpoints)
        return time.perf_counter() - began

    def _finish_pending(self) -> None:
        """Wait for the checkpoint that is being written; raises what went wrong there."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            seconds = pending.result()
            written, waited, writing = self.cost
            self.cost = CheckpointTiming(written + 1, waited, writing + seconds)

    def _see_to(self, part: Callable[[], None]) -> bool:
        """Do a part of the work on a checkpoint; returns whether it succeeded, or raises, by `on_checkpoint_error`."""
        try:
            part()
        except OSError as error:
            kept = steps(self.folder)
            stays = f"the one after step {kept[-1]} stays" if kept else "there is none yet"
            log.warning("a checkpoint could not be written (%s); %s", error.strerror or error, stays)
            self._failure = error
            if self._config.on_checkpoint_error == "stop":
                raise
            return False
        self._failure = None
        return True


def format_checkpoint_timing(cost: CheckpointTiming, seconds: float) -> str:
    """What the checkpoints of so many seconds of training took, for a person."""
    share = cost.waited / seconds if seconds else 0.0
    return (
        f"checkpoints, {cost.written}: the training waited {cost.waited:.2f} s for them ({share:.1%} of its "
        f"time), while {cost.writing:.2f} s went into writing them"
    ).replace("%", " %")
