"""Writes the curves of a run as event files of TensorBoard. Trains and draws nothing."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any, Callable, Mapping

from ..errors import InputError
from .callbacks import Callback, TrainerLike
from .divergence import NonFiniteStep
from .metrics import Metrics, perplexity
from .state import BestEvaluation, StepReport

log = logging.getLogger(__name__)

# The folder for event files in a run, with folders for training and validation below it.
TENSORBOARD = "tensorboard"
NAMES = TRAIN, VALIDATION = "train", "validation"


class TensorBoardLogger(Callback):
    """Writes event files for TensorBoard, through the package tensorboardX.

    A window of steps has its losses, accuracies, learning rate, gradient norm and sentence pairs per second.
    Training and validation have the same tags in two folders, so that TensorBoard draws them in one chart.
    A resumed run continues its curves: TensorBoard drops earlier entries of repeated steps.

    folder: for the event files, such as `tensorboard` in a run's folder. sentences: returns a text in
    Markdown, which is written at the first step and with each evaluation.

    Raise InputError without tensorboardX. A full disk ends the event files with a warning, not the run.
    """

    def __init__(self, folder: Path | str, sentences: Callable[[], str] | None = None) -> None:
        check_tensorboard()
        self.folder, self._sentences = Path(folder), sentences
        self._files: dict[str, _EventFile] = {}

    def on_fit_begin(self, trainer: TrainerLike) -> None:
        self._open(trainer.state.step)
        if not trainer.state.step:
            self._write_sentences(0)

    def on_log(self, trainer: TrainerLike, report: StepReport) -> None:
        scale = {} if report.loss_scale is None else {"training/loss_scale": report.loss_scale}
        figures = {
            "training/learning_rate": report.lr,
            "training/gradient_norm": report.gradient_norm,
            "training/pairs_per_second": report.pairs_per_second,
        }
        self._write_scalars(TRAIN, report.step, {**report.window, **figures, **scale})

    def on_evaluate(self, trainer: TrainerLike, step: int, metrics: Metrics, best: BestEvaluation) -> None:
        value = perplexity(metrics)
        self._write_scalars(VALIDATION, step, {**metrics, **({} if value is None else {"perplexity": value})})
        self._write_sentences(step)

    def on_rollback(self, trainer: TrainerLike, found: NonFiniteStep) -> None:
        self._close()
        self._open(trainer.state.step)

    def on_fit_end(self, trainer: TrainerLike) -> None:
        self._close()

    def _open(self, step: int) -> None:
        self._attempt(
            lambda: self._files.update((name, _EventFile(self.folder / name, step)) for name in NAMES)
        )

    def _write_scalars(self, name: str, step: int, values: Mapping[str, float]) -> None:
        def write(file: _EventFile) -> None:
            file.add_scalars(step, {tag_of(metric): value for metric, value in values.items()})

        self._write(name, write)

    def _write_sentences(self, step: int) -> None:
        text = self._sentences() if self._sentences else ""
        if text:
            self._write(VALIDATION, lambda file: file.add_text(step, "masked_sentences", text))

    def _write(self, name: str, action: Callable[[_EventFile], None]) -> None:
        file = self._files.get(name)
        if file is not None:
            self._attempt(lambda: action(file))

    def _close(self) -> None:
        files = list(self._files.values())
        self._files.clear()
        for file in files:
            self._attempt(file.close)

    def _attempt(self, action: Callable[[], Any]) -> None:
        """Do it; after an OSError warn and write nothing more."""
        try:
            action()
        except OSError as error:
            self._files.clear()
            log.warning("%s: event files end here (%s)", self.folder, error.strerror or error)


def check_tensorboard() -> None:
    """Raise InputError if the package that writes event files is missing."""
    try:
        import tensorboardX  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"tensorboard needs the package tensorboardX ({error}). Run pip install -e '.[tensorboard]'."
        ) from error


def tag_of(metric: str) -> str:
    """Return TensorBoard's name of a metric, which it groups by the part before the slash.

    >>> tag_of("mlm_loss"), tag_of("perplexity")
    ('loss/mlm', 'perplexity')
    """
    stem, _, kind = metric.rpartition("_")
    return f"{kind}/{stem}" if stem and kind in ("loss", "accuracy") else metric


class _EventFile:
    """Writes an event file in this thread, so that errors are raised here and events appear at once.

    step: the number of finished steps. TensorBoard drops later steps of older files in the folder.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files in the order of their names; these begin with a time in seconds.
        self._writer = EventsWriter(str(folder / "events"), filename_suffix=f".{time.time_ns()}")
        if step:
            self._add(step + 1, session_log=SessionLog(status=SessionLog.START))
        self._writer.flush()

    def add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers by their tags, without non-finite ones, which cannot be drawn."""
        from tensorboardX import summary

        for tag, value in values.items():
            if math.isfinite(value):
                self._add(step, summary=summary.scalar(tag, value))
        self._writer.flush()

    def add_text(self, step: int, tag: str, text: str) -> None:
        """Write a text in Markdown."""
        from tensorboardX import summary

        self._add(step, summary=summary.text(tag, text))
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def _add(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))
