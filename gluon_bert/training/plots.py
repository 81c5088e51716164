"""losses.png: the losses of a run as a picture. Reads no log."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..data.loader import PretrainingData
from ..fileio import atomic_write


class References(NamedTuple):
    """Losses in nats that say how far a run is, each that of a model which knows only so much."""

    uniform: float  # ln V: the size of the vocabulary
    unigram: float  # the entropy of the words' frequencies in the training text
    held_out_unigram: float  # what a model of those frequencies loses on the validation text; NaN without one
    coin: float  # ln 2: next sentence or not, one half each

    @classmethod
    def of(cls, data: PretrainingData) -> References:
        """The references for a text."""
        return cls(math.log(len(data.vocab)), data.unigram_loss, data.validation_unigram_loss, math.log(2))


def draw_losses(path: Path, records: Sequence[dict[str, Any]], references: References) -> None:
    """Draw the two losses over the steps, with the best evaluation and the reference lines, as a PNG."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    mlm, nsp = figure.subplots(1, 2)
    trained = [r for r in records if "mlm_loss" in r]
    validation = [r for r in records if "validation" in r]
    for axes, name, title in ((mlm, "mlm_loss", "Masked language model"), (nsp, "nsp_loss", "Next sentence")):
        curve(axes, [(r["step"], r[name]) for r in trained], "training", "tab:blue")
        if validation:
            curve(
                axes,
                [(r["step"], r["validation"][name]) for r in validation],
                "validation text",
                "tab:orange",
            )
        if len(validation) > 1:
            best = min(validation, key=lambda r: r["validation"]["mlm_loss"])
            step, value = best["step"], best["validation"][name]
            label = f"best checkpoint, step {step}"
            axes.plot(step, value, "*", color="tab:red", ms=11, zorder=3, label=label)
        axes.set(title=title, xlabel="optimizer step", ylabel="loss [nats]", xlim=(0, None))
        axes.grid(alpha=0.3)
    mlm.axhline(references.uniform, color="grey", ls=":", label=f"ln V = {references.uniform:.2f}")
    alone = "word frequencies alone"
    mlm.axhline(references.unigram, color="tab:blue", ls="--", label=f"{alone} = {references.unigram:.2f}")
    if validation:
        value = references.held_out_unigram
        mlm.axhline(value, color="tab:orange", ls="--", label=f"{alone}, held out = {value:.2f}")
    nsp.axhline(references.coin, color="grey", ls="--", label=f"a coin, ln 2 = {references.coin:.2f}")
    for axes in (mlm, nsp):
        # Small, or the wide legend takes the width from the curves.
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "ncol": 2, "columnspacing": 1.0}
        axes.legend(**place, fontsize="small", frameon=False)
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)


def curve(axes: Any, points: Sequence[tuple[int, float]], label: str, color: str) -> None:
    """Draw losses over steps, with a mark each as long as the marks can be told apart."""
    marker = "o" if len(points) <= 60 else ""
    steps, losses = zip(*points) if points else ((), ())
    axes.plot(steps, losses, "-", marker=marker, ms=4, color=color, label=label)
