"""The losses of a run as a picture. Reads no log."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any, NamedTuple, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..data.loader import PretrainingData
from ..fileio import atomic_write


class References(NamedTuple):
    """Baseline losses in nats, of models without context."""

    uniform: float  # ln V: all words are equally likely
    unigram: float  # the entropy of the words' frequencies in the training text
    validation_unigram: float  # the loss of these frequencies on the validation text; NaN without one
    chance: float  # ln 2: next sentence or not, equally likely

    @classmethod
    def of(cls, data: PretrainingData) -> References:
        """Return the baselines of a text."""
        return cls(math.log(len(data.vocab)), data.unigram_loss, data.validation_unigram_loss, math.log(2))


# The titles of known losses; others have their name.
TITLES = {"mlm_loss": "Masked language model", "nsp_loss": "Next sentence", "sop_loss": "Sentence order"}


def draw_losses(path: Path, records: Sequence[dict[str, Any]], references: References | None = None) -> None:
    """Write the picture of `losses_png` to a file, if there are losses."""
    picture = losses_png(records, references)
    if picture is not None:
        with atomic_write(path, "wb") as file:
            file.write(picture)


def losses_png(
    records: Sequence[dict[str, Any]], references: References | None = None, dpi: int = 120
) -> bytes | None:
    """Return a PNG of the losses over steps, with the best evaluation and the baselines; None without losses.

    records: of a log, as `run_log.LogFile` has them. dpi: dots per inch of 5 by 4.6 inches for each loss.
    """
    trained = [r for r in records if _losses_in(r)]
    validation = [r for r in records if "validation" in r]
    names = list(dict.fromkeys(name for r in trained for name in _losses_in(r)))
    names = names or list(dict.fromkeys(name for r in validation for name in r["validation"]))[:1]
    if not names:
        return None
    figure = Figure(figsize=(5 * len(names), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(all_axes, names):
        curve(axes, [(r["step"], r[name]) for r in trained if name in r], "training", "tab:blue")
        evaluated = [r for r in validation if name in r["validation"]]
        if evaluated:
            points = [(r["step"], r["validation"][name]) for r in evaluated]
            curve(axes, points, "validation text", "tab:orange")
        if len(evaluated) > 1:
            best = min(evaluated, key=lambda r: r["validation"].get("mlm_loss", r["validation"][name]))
            step, value = best["step"], best["validation"][name]
            label = f"best checkpoint, step {step}"
            axes.plot(step, value, "*", color="tab:red", ms=11, zorder=3, label=label)
        axes.set(title=TITLES.get(name, name), xlabel="optimizer step", ylabel="loss [nats]", xlim=(0, None))
        axes.grid(alpha=0.3)
        if references:
            _draw_baselines(axes, name, references, bool(validation))
            if name == "mlm_loss":
                _draw_crossing(axes, trained, references.unigram)
        # Small, because a wide legend would narrow the curves.
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "ncol": 2, "columnspacing": 1.0}
        axes.legend(**place, fontsize="small", frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    return content.getvalue()


def _losses_in(record: dict[str, Any]) -> list[str]:
    return [name for name in record if name.endswith("_loss")]


def _draw_baselines(axes: Any, name: str, references: References, validated: bool) -> None:
    """Draw the baselines of a loss as horizontal lines."""
    if name == "mlm_loss":
        axes.axhline(references.uniform, color="grey", ls=":", label=f"ln V = {references.uniform:.2f}")
        label = "unigram"
        axes.axhline(
            references.unigram, color="tab:blue", ls="--", label=f"{label} = {references.unigram:.2f}"
        )
        if validated:
            value = references.validation_unigram
            axes.axhline(value, color="tab:orange", ls="--", label=f"{label}, validation = {value:.2f}")
    if name in ("nsp_loss", "sop_loss"):
        axes.axhline(
            references.chance, color="grey", ls="--", label=f"chance, ln 2 = {references.chance:.2f}"
        )


def _draw_crossing(axes: Any, trained: Sequence[dict[str, Any]], unigram: float) -> None:
    """Mark the first training loss after which all are below that of word frequencies, if any."""
    above = [i for i, r in enumerate(trained) if not (r.get("mlm_loss") or math.inf) < unigram]
    first = above[-1] + 1 if above else 0
    if first < len(trained):
        step = trained[first]["step"]
        label = f"below word frequencies from step {step:,}"
        axes.plot(step, unigram, "v", color="tab:green", ms=9, zorder=3, label=label)


def curve(axes: Any, points: Sequence[tuple[int, float]], label: str, color: str) -> None:
    """Draw losses over steps, with a mark for each while there are few."""
    marker = "o" if len(points) <= 60 else ""
    steps, losses = zip(*points) if points else ((), ())
    axes.plot(steps, losses, "-", marker=marker, ms=4, color=color, label=label)
