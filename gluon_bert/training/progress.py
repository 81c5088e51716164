"""Shows a run: a bar, lines or a live picture, log.jsonl, losses.png, the closing summary. Trains nothing."""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path
from typing import Any, Mapping, Sequence, TextIO

from tqdm import tqdm

from ..config import TrainConfig
from ..fileio import atomic_write
from ..npz import write_arrays
from .callbacks import Callback, TrainerLike
from .divergence import NonFiniteStep
from .live_plot import LivePlot, notebook_display
from .metrics import Metrics, perplexity
from .plots import References, draw_losses
from .run_log import LogFile
from .state import BestEvaluation, StepReport

log = logging.getLogger(__name__)


NONFINITE_BATCHES = "nonfinite-batches"


class ProgressLogger(Callback):
    """Shows a run on the screen, in log.jsonl and in losses.png.

    A terminal shows a progress bar. A notebook shows the growing picture of losses.png. Other outputs get one
    line per window. The log has one JSON object per line: a window of steps, or with the key `validation` an
    evaluation.

    references: baseline losses for the picture and the summary; None: none are shown.
    """

    def __init__(
        self, folder: Path | str, references: References | None = None, screen: TextIO | None = None
    ) -> None:
        self.folder, self.references = Path(folder), references
        self.step = 0
        self.best: BestEvaluation | None = None
        self.last: StepReport | None = None
        self.validation: Metrics | None = None
        # Looked up now, not at import: notebooks and tests replace the stream.
        self._screen = screen or sys.stderr
        self._config = TrainConfig()
        display = notebook_display()
        self._plot = LivePlot(display) if display and screen is None else None

    def on_fit_begin(self, trainer: TrainerLike) -> None:
        config, state = trainer.config, trainer.state
        self._config, self.step, self.best = config, state.step, state.best
        self._about = "~" if config.max_minutes else ""
        self.folder.mkdir(parents=True, exist_ok=True)
        # Lines after the checkpoint are cut off, because they will be logged again.
        self._log = LogFile(self.folder / "log.jsonl", state.log_bytes)
        self._bar = tqdm(
            total=config.num_steps or None,  # still unknown if max_minutes ends the run
            initial=self.step,
            bar_format="{n}/" + self._about + "{total} {bar}[{elapsed}<{remaining}{postfix}]",
            file=self._screen,
            disable=not self._screen.isatty(),
            dynamic_ncols=True,
            smoothing=0,  # the time left, at the pace of the whole run with its evaluations
        )

    def on_step(self, trainer: TrainerLike, step: int) -> None:
        self.step = step
        self._bar.update(1)

    def on_log(self, trainer: TrainerLike, report: StepReport) -> None:
        self.last = report
        scale = {} if report.loss_scale is None else {"loss_scale": report.loss_scale}
        self._note(
            {
                "step": report.step,
                **report.window,
                "lr": report.lr,
                "gradient_norm": report.gradient_norm,
                **scale,
                "pairs_per_second": report.pairs_per_second,
                "seconds": report.seconds,
            }
        )
        planned = math.ceil(report.planned_steps)
        self._bar.total = planned
        # Short enough for a terminal of 80 columns.
        self._bar.set_postfix_str(
            f"{format_briefly(report.window)} lr {report.lr:.2g} {report.pairs_per_second:.0f} pairs/s"
        )
        if self._plot:
            self._plot.draw(self._log.records, self.references)
        elif self._bar.disable:
            left = tqdm.format_interval(report.seconds_left)
            shown = (
                f"{format_metrics(report.window)}, lr {report.lr:.3g}, {report.pairs_per_second:.1f} pairs/s"
            )
            print(f"step {report.step}/{self._about}{planned}: {shown}, {left} left", file=self._screen)

    def on_evaluate(self, trainer: TrainerLike, step: int, metrics: Metrics, best: BestEvaluation) -> None:
        self.validation, self.best = metrics, best
        value = perplexity(metrics)
        self._note(
            {"step": step, "validation": {**metrics, **({} if value is None else {"perplexity": value})}}
        )
        line = f"validation after step {step}: {format_validation(metrics)}"
        if best.since:
            name = trainer.monitor if trainer.monitor in best.validation else next(iter(best.validation))
            line += f"; best: {_label(name)} {best.validation[name]:.3f} after step {best.step}"
        if self._plot:
            self._plot.draw(self._log.records, self.references)
        else:
            self._bar.write(line, file=self._screen)

    def on_non_finite(self, trainer: TrainerLike, found: NonFiniteStep) -> None:
        position = found.position._asdict() if found.position else None
        largest = {name: norm if math.isfinite(norm) else None for name, norm in found.largest()}
        about = {"what": found.what, "position": position, "largest_gradients": largest}
        self._note({"step": found.step, "non_finite": about})
        self._bar.write(str(found), file=self._screen)
        if self._config.save_nonfinite_batch and found.batch:
            self._save_batch(found.batch, found.step)

    def on_overflow(self, trainer: TrainerLike, step: int, scale: float) -> None:
        self._note({"step": step, "overflowed": {"loss_scale": scale}})
        self._bar.write(
            f"step {step} is skipped: float16 cannot hold the gradient of {scale:,.0f} times the loss. The "
            "next step uses half of that scale",
            file=self._screen,
        )

    def on_weight_drift(self, trainer: TrainerLike, step: int, ranks: Sequence[int]) -> None:
        workers = f"worker{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        self._bar.write(
            f"after step {step} the weights of {workers} differ from those of worker 0, as happens on "
            "different processors. Those of worker 0 are kept",
            file=self._screen,
        )

    def on_rollback(self, trainer: TrainerLike, found: NonFiniteStep) -> None:
        state = trainer.state
        self.step, self.best = state.step, state.best
        self._log.close()
        self._log = LogFile(self._log.path, state.log_bytes)
        self._note({"step": state.step, "rollback": {"from": found.step, "why": found.what}})
        self._bar.n = state.step
        self._bar.write(
            f"{found}; back to the checkpoint after step {state.step}, with other batches from there",
            file=self._screen,
        )

    def on_save_checkpoint(self, trainer: TrainerLike) -> None:
        """Sync the log to the disk, and record its size for the checkpoint; raise OSError if that fails."""
        trainer.state.log_bytes = self._log.synced()

    def on_fit_end(self, trainer: TrainerLike) -> None:
        """Close the log and draw losses.png, and the last picture in a notebook."""
        self._bar.close()
        self._log.close()
        if self._plot:
            self._plot.draw(self._log.records, self.references, last=True)
        if self._log.records:
            try:
                draw_losses(self.folder / "losses.png", self._log.records, self.references)
            except OSError as error:
                log.warning("%s: losses.png cannot be written (%s)", self.folder, error.strerror or error)

    def _note(self, record: Mapping[str, Any]) -> None:
        """Add a line to the log. With on_checkpoint_error=continue a full disk only delays it."""
        try:
            self._log.append(record)
        except OSError as error:
            if self._config.on_checkpoint_error == "stop":
                raise
            log.warning("%s: lines wait until they can be written (%s)", self._log.path, error.strerror)

    def _save_batch(self, batch: Any, step: int) -> None:
        """Write a batch for debugging; a failure does not end the run."""
        path = self.folder / NONFINITE_BATCHES / f"step-{step:08d}.npz"
        try:
            path.parent.mkdir(exist_ok=True)
            with atomic_write(path, "wb") as file:
                write_arrays(file, vars(batch))
        except OSError as error:
            log.warning("%s: cannot be written (%s)", path, error.strerror or error)
        else:
            self._bar.write(f"its batch is in {path}", file=self._screen)

    def summary(self, devices: Sequence[Any]) -> list[str]:
        """Return the closing lines: D2L's two, then further figures and the verdict."""
        if self.last is None:
            return []
        run, window = self.last.run, self.last.window
        means = ", ".join(f"{_label(name)} {run[name]:.3f}" for name in run if name.endswith("_loss"))
        lines = [
            f"{means} (means of {self.last.step} steps)",
            f"{self.last.run_pairs_per_second:.1f} sentence pairs/sec on {list(devices)}",
            f"last window: {format_metrics(window)}",
        ]
        if self.validation:
            lines.append(f"validation: {format_validation(self.validation)}")
        if self.best and self.best.evaluations > 1:
            lines.append(format_best(self.best))
        if self.best and self.best.out_of_patience(self._config.patience):
            lines.append(
                f"The run ended after step {self.step}: {self.best.since} evaluations in a row did not "
                f"improve on the best (patience {self._config.patience})."
            )
        return lines + self._compared()

    def _compared(self) -> list[str]:
        """Return the baselines of the MLM loss, and whether the model is better than word frequencies."""
        assert self.last is not None
        window, references = self.last.window, self.references
        if references is None or "mlm_loss" not in window:
            return []
        unigram = f"unigram {references.unigram:.3f}"
        if self.validation:
            unigram += f" ({references.validation_unigram:.3f} on validation)"
        lines = [f"baselines: MLM uniform {references.uniform:.3f} (ln V), {unigram}"]
        pairs = next((name for name in ("nsp", "sop") if f"{name}_loss" in window), None)
        if pairs:
            lines[0] += f"; {pairs.upper()} chance {references.chance:.3f} (ln 2)"
        reached, line = window["mlm_loss"], references.unigram
        if self.best and "mlm_loss" in self.best.validation:
            reached, line = self.best.validation["mlm_loss"], references.validation_unigram
        below = round(line - reached, 2)
        if below > 0:
            where = "on validation text " if self.best and "mlm_loss" in self.best.validation else ""
            lines.append(
                f"The MLM loss {where}is {below:.2f} nats below that of word frequencies: "
                f"{reached:.3f} instead of {line:.3f}. The network has learned from the words around a mask."
            )
        else:
            lines.append(
                f"The MLM loss, {reached:.3f}, is not yet below {line:.3f}. So far the model has at best "
                "learned how frequent words are, not what surrounds them. This is how BERT begins. "
                f"Train {self._longer()}."
            )
        return lines

    def _longer(self) -> str:
        """Return what would let the run go on, by what ended it."""
        if self.best and self.best.out_of_patience(self._config.patience):
            return "with more patience"
        return "for more steps" if self.step == self._config.num_steps else "for more minutes"


def _label(name: str) -> str:
    """Return the name of a metric for a person: mlm_loss -> MLM loss."""
    first, _, kind = name.partition("_")
    return f"{first.upper() if len(first) == 3 and kind else first} {kind}".strip()


def format_metrics(metrics: Metrics) -> str:
    """Return metrics for a person, each loss with its accuracy.

    >>> format_metrics({"mlm_loss": 7.0, "nsp_loss": 0.7, "mlm_accuracy": 0.051})
    'MLM loss 7.000 (5.1 % correct), NSP loss 0.700'
    """
    parts = []
    for name, value in metrics.items():
        loss = name[: -len("accuracy")] + "loss" if name.endswith("_accuracy") else ""
        if loss in metrics:
            continue
        accuracy = metrics.get(name[: -len("loss")] + "accuracy") if name.endswith("_loss") else None
        shown = "" if accuracy is None else f" ({accuracy:.1%} correct)".replace("%", " %")
        parts.append(f"{_label(name)} {value:.3f}{shown}")
    return ", ".join(parts)


def format_briefly(metrics: Metrics) -> str:
    """Return the losses and accuracies in few letters, such as "MLM 7.000 (5%) NSP 0.700 (50%)"."""
    parts = []
    for name, value in metrics.items():
        if name.endswith("_loss"):
            stem = name[: -len("_loss")]
            accuracy = metrics.get(f"{stem}_accuracy")
            parts.append(f"{_label(name)[:-5]} {value:.3f}{'' if accuracy is None else f' ({accuracy:.0%})'}")
    return " ".join(parts)


def format_validation(metrics: Metrics) -> str:
    """Return the metrics of an evaluation for a person."""
    value = perplexity(metrics)
    return format_metrics(metrics) + ("" if value is None else f", perplexity {value:,.1f}")


def format_best(best: BestEvaluation) -> str:
    """Return a line about the best of several evaluations, and how to load its weights."""
    if not best.since:
        return f"This was the best of {best.evaluations} evaluations."
    shown = format_validation(best.validation)
    return f"best of {best.evaluations} evaluations, after step {best.step}: {shown} (checkpoint best)"
