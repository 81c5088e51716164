"""What the user sees of a run: a progress bar or lines, log.jsonl, losses.png, the closing summary."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Sequence, TextIO

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

from ..array_files import write_arrays
from ..config import TrainConfig, without_nan
from ..data.batch import Batch
from ..data.loader import Data
from ..errors import BadInput
from ..files import written_aside
from .meters import Averages, Best, Progress
from .standing import Standing
from .trainer import Reporter
from .trouble import Trouble

log = logging.getLogger(__name__)


BAD_BATCHES = "bad-batches"
# Keys of the log's lines that hold no losses.
EVENTS = {"went_wrong", "went_back", "overflowed"}


class References(NamedTuple):
    """Losses in nats that say how far a run is, each that of a model which knows only so much."""

    uniform: float  # ln V: the size of the vocabulary
    unigram: float  # the entropy of the words' frequencies in the training text
    held_out_unigram: float  # what a model of those frequencies loses on the held-out text; NaN without one
    coin: float  # ln 2: next sentence or not, one half each

    @classmethod
    def of(cls, data: Data) -> References:
        """The references for a text."""
        return cls(math.log(len(data.vocab)), data.unigram_loss, data.held_out_unigram_loss, math.log(2))


class Report(Reporter):
    """Tells of a run on the screen, in log.jsonl and in losses.png.

    On a terminal there is a progress bar; elsewhere a plain line per window. The log has a JSON object a
    line: a window of steps, or (with the key `held_out`) an evaluation.

    step, best, log_bytes: where a resumed run stands, and how long its log was then. What was logged after
    that will be logged again, and is cut off.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        data: Data,
        screen: TextIO | None = None,
        step: int = 0,
        best: Best | None = None,
        log_bytes: int = 0,
    ) -> None:
        self.folder, self.references = Path(folder), References.of(data)
        self.step, self.best = step, best
        self.last: Progress | None = None
        self.held_out: Averages | None = None
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

    def progressed(self, progress: Progress) -> None:
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

    def evaluated(self, step: int, held_out: Averages, best: Best) -> None:
        self.held_out, self.best = held_out, best
        averages = {**held_out._asdict(), "perplexity": held_out.perplexity}
        self._note({"step": step, "held_out": averages})
        told = f"held-out text after step {step}: {held_out_in_words(held_out)}"
        if best.since:
            told += f"; the best was MLM loss {best.held_out.mlm_loss:.3f} after step {best.step}"
        self._bar.write(told, file=self._screen)

    def went_wrong(self, trouble: Trouble) -> None:
        position = trouble.position._asdict() if trouble.position else None
        largest = {name: norm if math.isfinite(norm) else None for name, norm in trouble.largest()}
        about = {"what": trouble.what, "position": position, "largest_gradients": largest}
        self._note({"step": trouble.step, "went_wrong": about})
        self._bar.write(trouble.in_words(), file=self._screen)
        if self._config.debug_batch and trouble.batch:
            self._keep(trouble.batch, trouble.step)

    def overflowed(self, step: int, scale: float) -> None:
        self._note({"step": step, "overflowed": {"loss_scale": scale}})
        self._bar.write(
            f"step {step} is skipped: float16 cannot hold the gradient of {scale:,.0f} times the loss; half "
            "of that is next",
            file=self._screen,
        )

    def drifted(self, step: int, ranks: Sequence[int]) -> None:
        who = f"worker{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        self._bar.write(
            f"after step {step} the weights of {who} are not those of worker 0, as where processors are not "
            "of one kind; those of worker 0 are kept",
            file=self._screen,
        )

    def went_back(self, standing: Standing, trouble: Trouble) -> None:
        self.step, self.best = standing.step, standing.best
        self._log.close()
        self._log = LogFile(self._log.path, standing.log_bytes)
        self._note({"step": standing.step, "went_back": {"from": trouble.step, "why": trouble.what}})
        self._bar.n = standing.step
        self._bar.write(
            f"{trouble.in_words()}; back to the checkpoint after step {standing.step}, and on with other "
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
            if self._config.full_disk == "stop":
                raise
            log.warning("%s: lines wait until they can be written (%s)", self._log.path, error.strerror)

    def _keep(self, batch: Batch, step: int) -> None:
        """Write a batch for debugging; that it cannot be ends no run."""
        path = self.folder / BAD_BATCHES / f"step-{step:08d}.npz"
        try:
            path.parent.mkdir(exist_ok=True)
            with written_aside(path, "wb") as file:
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
        if self.held_out:
            lines.append(f"held-out text: {held_out_in_words(self.held_out)}")
        if self.best and self.best.evaluations > 1:
            lines.append(best_in_words(self.best))
        if self.best and self.best.exhausts(self._config.patience):
            lines.append(
                f"The run ended after step {self.step}: {self.best.since} evaluations in a row were no "
                f"better than the best (--patience {self._config.patience})."
            )
        frequencies = f"{references.unigram:.3f} = entropy of the words' frequencies"
        if self.held_out:
            frequencies += f" ({references.held_out_unigram:.3f} on the held-out text)"
        lines.append(
            f"for comparison: MLM {references.uniform:.3f} = ln V, all words alike; MLM {frequencies}; "
            f"NSP {references.coin:.3f} = ln 2, a coin"
        )
        reached, line = window.mlm_loss, references.unigram
        if self.best:
            reached, line = self.best.held_out.mlm_loss, references.held_out_unigram
        if not reached < line:
            lines.append(
                f"The MLM loss, {reached:.3f}, is still above {line:.3f}: so far the model has "
                "at best learnt how frequent words are, not what surrounds them. This is how BERT begins; "
                f"more steps are needed ({self._what_ended_it()})."
            )
        return lines

    def _what_ended_it(self) -> str:
        if self.best and self.best.exhausts(self._config.patience):
            return "--patience"
        return "--num-steps" if self.step == self._config.num_steps else "--max-minutes"


class LogFile:
    """An object a line, of which only whole lines are ever on the disk.

    records: those that are there, by what a log of so many bytes holds and what came since. Raises BadInput
    where it holds something else.
    """

    def __init__(self, path: Path, num_bytes: int = 0) -> None:
        self.path = path
        self._file = path.open("r+b" if path.exists() else "w+b", buffering=0)
        found = path.stat().st_size
        if found < num_bytes:
            log.warning("%s: has %d bytes, not %d: lines of it are lost", path, found, num_bytes)
        content = self._file.read(num_bytes)
        self._num_bytes = content.rfind(b"\n") + 1
        self.records = _records_in(content[: self._num_bytes], path)
        self._unwritten = b""
        self._file.truncate(self._num_bytes)
        self._file.seek(self._num_bytes)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line, whole or, with an OSError, not at all: then it comes with the next."""
        self.records.append(dict(record))
        self._unwritten += json.dumps(without_nan(record)).encode() + b"\n"
        self._write()

    def synced(self) -> int:
        """How many bytes are on the disk by now: all, or it is an OSError."""
        self._write()
        os.fsync(self._file.fileno())
        return self._num_bytes

    def _write(self) -> None:
        lines = self._unwritten
        try:
            written = self._file.write(lines)
            if written != len(lines):  # the disk is full, or a limit reached, in the middle of it
                self._file.write(lines[written:])  # says so
        except OSError:
            self._file.truncate(self._num_bytes)
            self._file.seek(self._num_bytes)
            raise
        self._num_bytes, self._unwritten = self._num_bytes + len(lines), b""

    def close(self) -> None:
        """Close the file; once more does no harm."""
        self._file.close()


def _records_in(content: bytes, path: Path) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            record = json.loads(line)
            if isinstance(record["step"], int) and record.keys() & EVENTS:
                records.append(record)
                continue
            of_losses = record.get("held_out", record)
            numbers = [record["step"], *(of_losses[name] for name in Averages._fields)]
            if not all(value is None or isinstance(value, (int, float)) for value in numbers):
                raise ValueError("a loss is no number")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadInput(
                f"{path}, line {number}: is no line of a run's log ({error}); move the file away, and "
                "the log begins anew"
            ) from error
        for name in Averages._fields:  # JSON has no word for NaN
            of_losses[name] = math.nan if of_losses[name] is None else of_losses[name]
        records.append(record)
    return records


def in_words(averages: Averages) -> str:
    """Losses and accuracies for a person.

    >>> in_words(Averages(7.0, 0.7, 0.051, 0.5))
    'MLM loss 7.000 (5.1 % right), NSP loss 0.700 (50.0 % right)'
    """
    return (
        f"MLM loss {averages.mlm_loss:.3f} ({averages.mlm_accuracy:.1%} right), "
        f"NSP loss {averages.nsp_loss:.3f} ({averages.nsp_accuracy:.1%} right)"
    ).replace("%", " %")


def held_out_in_words(averages: Averages) -> str:
    """What an evaluation gave, for a person."""
    return f"{in_words(averages)}, perplexity {averages.perplexity:,.1f}"


def best_in_words(best: Best) -> str:
    """Which evaluation was the best of several, and where its weights are."""
    if not best.since:
        return f"This was the best of {best.evaluations} evaluations."
    told = held_out_in_words(best.held_out)
    return f"the best of {best.evaluations} evaluations, after step {best.step}: {told} (--checkpoint best)"


def draw_losses(path: Path, records: Sequence[dict[str, Any]], references: References) -> None:
    """Draw the two losses over the steps, with the best evaluation and the reference lines, as a PNG."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    mlm, nsp = figure.subplots(1, 2)
    trained = [r for r in records if "mlm_loss" in r]
    held_out = [r for r in records if "held_out" in r]
    for axes, name, title in ((mlm, "mlm_loss", "Masked language model"), (nsp, "nsp_loss", "Next sentence")):
        curve(axes, [(r["step"], r[name]) for r in trained], "training", "tab:blue")
        if held_out:
            curve(axes, [(r["step"], r["held_out"][name]) for r in held_out], "held-out text", "tab:orange")
        if len(held_out) > 1:
            best = min(held_out, key=lambda r: r["held_out"]["mlm_loss"])
            step, value = best["step"], best["held_out"][name]
            label = f"best checkpoint, step {step}"
            axes.plot(step, value, "*", color="tab:red", ms=11, zorder=3, label=label)
        axes.set(title=title, xlabel="optimizer step", ylabel="loss [nats]", xlim=(0, None))
        axes.grid(alpha=0.3)
    mlm.axhline(references.uniform, color="grey", ls=":", label=f"ln V = {references.uniform:.2f}")
    alone = "word frequencies alone"
    mlm.axhline(references.unigram, color="tab:blue", ls="--", label=f"{alone} = {references.unigram:.2f}")
    if held_out:
        value = references.held_out_unigram
        mlm.axhline(value, color="tab:orange", ls="--", label=f"{alone}, held out = {value:.2f}")
    nsp.axhline(references.coin, color="grey", ls="--", label=f"a coin, ln 2 = {references.coin:.2f}")
    for axes in (mlm, nsp):
        # Small, or the wide legend takes the width from the curves.
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "ncol": 2, "columnspacing": 1.0}
        axes.legend(**place, fontsize="small", frameon=False)
    with written_aside(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)


def curve(axes: Any, points: Sequence[tuple[int, float]], label: str, color: str) -> None:
    """Draw losses over steps, with a mark each as long as the marks can be told apart."""
    marker = "o" if len(points) <= 60 else ""
    steps, losses = zip(*points) if points else ((), ())
    axes.plot(steps, losses, "-", marker=marker, ms=4, color=color, label=label)
