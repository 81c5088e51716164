"""What the user sees of a run: a progress bar or lines, log.jsonl, losses.png, the closing summary."""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path
from typing import Any, Mapping, Sequence, TextIO

from tqdm import tqdm

from ..config import TrainConfig
from ..data.batch import Batch
from ..data.loader import PretrainingData
from ..fileio import atomic_write
from ..npz import write_arrays
from .callbacks import Reporter
from .divergence import NonFiniteStep
from .metrics import Metrics
from .plots import References, draw_losses
from .run_log import LogFile
from .state import BestEvaluation, StepReport, TrainState

log = logging.getLogger(__name__)


NONFINITE_BATCHES = "nonfinite-batches"


class ProgressLogger(Reporter):
    """Tells of a run on the screen, in log.jsonl and in losses.png.

    On a terminal there is a progress bar; elsewhere a plain line per window. The log has a JSON object a
    line: a window of steps, or (with the key `validation`) an evaluation.

    step, best, log_bytes: where a resumed run stands, and how long its log was then. What was logged after
    that will be logged again, and is cut off.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        data: PretrainingData,
        screen: TextIO | None = None,
        step: int = 0,
        best: BestEvaluation | None = None,
        log_bytes: int = 0,
    ) -> None:
        self.folder, self.references = Path(folder), References.of(data)
        self.step, self.best = step, best
        self.last: StepReport | None = None
        self.validation: Metrics | None = None
        self._config = config
        self._about = "~" if config.max_minutes else ""
        # Looked up now, not at import: notebooks and tests put another stream in its place.
        self._screen = screen or sys.stderr
        self.folder.mkdir(parents=True, exist_ok=True)
        self._log = LogFile(self.folder / "log.jsonl", log_bytes)
        self._bar = tqdm(
            total=config.num_steps or None,  # not known yet where the minutes end the run
            initial=step,
            bar_format="{n}/" + self._about + "{total} {bar}[{elapsed}<{remaining}{postfix}]",
            file=self._screen,
            disable=not self._screen.isatty(),
            dynamic_ncols=True,
            smoothing=0,  # what is left, at the pace of the whole run, evaluations and all
        )

    def stepped(self, step: int) -> None:
        self.step = step
        self._bar.update(1)

    def progressed(self, progress: StepReport) -> None:
        self.last = progress
        scale = {} if progress.loss_scale is None else {"loss_scale": progress.loss_scale}
        self._note(
            {
                "step": progress.step,
                **progress.window._asdict(),
                "lr": progress.lr,
                "gradient_norm": progress.gradient_norm,
                **scale,
                "pairs_per_second": progress.pairs_per_second,
                "seconds": progress.seconds,
            }
        )
        window, planned = progress.window, math.ceil(progress.planned_steps)
        self._bar.total = planned
        # Short enough for a terminal of 80 columns.
        self._bar.set_postfix_str(
            f"MLM {window.mlm_loss:.3f} ({window.mlm_accuracy:.0%}) NSP {window.nsp_loss:.3f} "
            f"({window.nsp_accuracy:.0%}) lr {progress.lr:.2g} {progress.pairs_per_second:.0f} pairs/s"
        )
        if self._bar.disable:
            left = tqdm.format_interval(progress.seconds_left)
            told = f"{in_words(window)}, lr {progress.lr:.3g}, {progress.pairs_per_second:.1f} pairs/s"
            print(f"step {progress.step}/{self._about}{planned}: {told}, {left} left", file=self._screen)

    def evaluated(self, step: int, validation: Metrics, best: BestEvaluation) -> None:
        self.validation, self.best = validation, best
        averages = {**validation._asdict(), "perplexity": validation.perplexity}
        self._note({"step": step, "validation": averages})
        told = f"validation text after step {step}: {format_validation(validation)}"
        if best.since:
            told += f"; the best was MLM loss {best.validation.mlm_loss:.3f} after step {best.step}"
        self._bar.write(told, file=self._screen)

    def on_non_finite(self, trouble: NonFiniteStep) -> None:
        position = trouble.position._asdict() if trouble.position else None
        largest = {name: norm if math.isfinite(norm) else None for name, norm in trouble.largest()}
        about = {"what": trouble.what, "position": position, "largest_gradients": largest}
        self._note({"step": trouble.step, "non_finite": about})
        self._bar.write(trouble.in_words(), file=self._screen)
        if self._config.save_nonfinite_batch and trouble.batch:
            self._keep(trouble.batch, trouble.step)

    def overflowed(self, step: int, scale: float) -> None:
        self._note({"step": step, "overflowed": {"loss_scale": scale}})
        self._bar.write(
            f"step {step} is skipped: float16 cannot hold the gradient of {scale:,.0f} times the loss; half "
            "of that is next",
            file=self._screen,
        )

    def on_weight_drift(self, step: int, ranks: Sequence[int]) -> None:
        who = f"worker{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        self._bar.write(
            f"after step {step} the weights of {who} are not those of worker 0, as where processors are not "
            "of one kind; those of worker 0 are kept",
            file=self._screen,
        )

    def on_rollback(self, state: TrainState, trouble: NonFiniteStep) -> None:
        self.step, self.best = state.step, state.best
        self._log.close()
        self._log = LogFile(self._log.path, state.log_bytes)
        self._note({"step": state.step, "rollback": {"from": trouble.step, "why": trouble.what}})
        self._bar.n = state.step
        self._bar.write(
            f"{trouble.in_words()}; back to the checkpoint after step {state.step}, and on with other "
            "batches",
            file=self._screen,
        )

    def synced(self) -> int:
        """How many bytes the log has, all of which are on the disk now."""
        return self._log.synced()

    def _note(self, record: Mapping[str, Any]) -> None:
        """Add a line to the log; where that is asked for, a full disk only delays it."""
        try:
            self._log.append(record)
        except OSError as error:
            if self._config.on_checkpoint_error == "stop":
                raise
            log.warning("%s: lines wait until they can be written (%s)", self._log.path, error.strerror)

    def _keep(self, batch: Batch, step: int) -> None:
        """Write a batch for debugging; that it cannot be ends no run."""
        path = self.folder / NONFINITE_BATCHES / f"step-{step:08d}.npz"
        try:
            path.parent.mkdir(exist_ok=True)
            with atomic_write(path, "wb") as file:
                write_arrays(file, vars(batch))
        except OSError as error:
            log.warning("%s: cannot be written (%s)", path, error.strerror or error)
        else:
            self._bar.write(f"its batch is in {path}", file=self._screen)

    def close(self) -> None:
        """Close the log and draw losses.png; once more does no harm."""
        self._bar.close()
        self._log.close()
        if self._log.records:
            try:
                draw_losses(self.folder / "losses.png", self._log.records, self.references)
            except OSError as error:
                log.warning("%s: no picture of the losses (%s)", self.folder, error.strerror or error)

    def summary(self, contexts: Sequence[Any]) -> list[str]:
        """The closing lines: the book's two, then what they leave open."""
        if self.last is None:
            return []
        run, window, references = self.last.run, self.last.window, self.references
        lines = [
            f"MLM loss {run.mlm_loss:.3f}, NSP loss {run.nsp_loss:.3f} (means of {self.last.step} steps)",
            f"{self.last.run_pairs_per_second:.1f} sentence pairs/sec on {list(contexts)}",
            f"last window: {in_words(window)}",
        ]
        if self.validation:
            lines.append(f"validation text: {format_validation(self.validation)}")
        if self.best and self.best.evaluations > 1:
            lines.append(format_best(self.best))
        if self.best and self.best.out_of_patience(self._config.patience):
            lines.append(
                f"The run ended after step {self.step}: {self.best.since} evaluations in a row were no "
                f"better than the best (--patience {self._config.patience})."
            )
        frequencies = f"{references.unigram:.3f} = entropy of the words' frequencies"
        if self.validation:
            frequencies += f" ({references.held_out_unigram:.3f} on the validation text)"
        lines.append(
            f"for comparison: MLM {references.uniform:.3f} = ln V, all words alike; MLM {frequencies}; "
            f"NSP {references.coin:.3f} = ln 2, a coin"
        )
        reached, line = window.mlm_loss, references.unigram
        if self.best:
            reached, line = self.best.validation.mlm_loss, references.held_out_unigram
        if not reached < line:
            lines.append(
                f"The MLM loss, {reached:.3f}, is still above {line:.3f}: so far the model has "
                "at best learnt how frequent words are, not what surrounds them. This is how BERT begins; "
                f"more steps are needed ({self._what_ended_it()})."
            )
        return lines

    def _what_ended_it(self) -> str:
        if self.best and self.best.out_of_patience(self._config.patience):
            return "--patience"
        return "--num-steps" if self.step == self._config.num_steps else "--max-minutes"


def in_words(averages: Metrics) -> str:
    """Losses and accuracies for a person.

    >>> in_words(Averages(7.0, 0.7, 0.051, 0.5))
    'MLM loss 7.000 (5.1 % right), NSP loss 0.700 (50.0 % right)'
    """
    return (
        f"MLM loss {averages.mlm_loss:.3f} ({averages.mlm_accuracy:.1%} right), "
        f"NSP loss {averages.nsp_loss:.3f} ({averages.nsp_accuracy:.1%} right)"
    ).replace("%", " %")


def format_validation(averages: Metrics) -> str:
    """What an evaluation gave, for a person."""
    return f"{in_words(averages)}, perplexity {averages.perplexity:,.1f}"


def format_best(best: BestEvaluation) -> str:
    """Which evaluation was the best of several, and where its weights are."""
    if not best.since:
        return f"This was the best of {best.evaluations} evaluations."
    told = format_validation(best.validation)
    return f"the best of {best.evaluations} evaluations, after step {best.step}: {told} (--checkpoint best)"
