"""Attention weights of a text, and their picture. Trains nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..data.tokenizer import EncodedText
from ..errors import InputError
from ..fileio import atomic_write
from ..runtime import mx

# The formats of a picture, by the ending of its file.
FORMATS = (".png", ".pdf", ".svg")
# Inches: of a token that has its name beside the picture, of the smallest picture of a head, of the largest
# figure.
_TOKEN, _SMALLEST_HEAD, _LARGEST_FIGURE = 0.13, 1.3, 40.0


class Attention(NamedTuple):
    """The attention weights of a text of T tokens.

    tokens: with <cls> and <sep>. weights: (L, H, T, T) float32: layer, head, the token that looks, the token
    that it looks at. The last axis sums to 1.
    """

    tokens: list[str]
    weights: np.ndarray

    def save(self, path: Path | str) -> None:
        """Draw the weights into a file, a row of pictures for each layer; raise InputError for other endings.

        A row of a picture is the token that looks, a column is the token that it looks at.
        """
        path = Path(path)
        check_picture(path)
        figure = _figure(self)
        with atomic_write(path, "wb") as file:
            figure.savefig(file, format=path.suffix[1:].lower(), dpi=100)


def attention_of(net: Any, text: EncodedText) -> Attention:
    """Return the attention weights of a text, computed on the network's first context."""
    context = net.encoder.embeddings.tokens.weight.list_ctx()[0]
    tokens, token_types, valid_length = (
        mx.nd.array(array, ctx=context, dtype=np.float32)
        for array in (text.ids[None], text.token_types[None], [len(text)])
    )
    weights = net.encoder.attention_weights(tokens, token_types, valid_length)
    return Attention(list(text.tokens), np.stack([each.asnumpy()[0] for each in weights]))


def check_picture(path: Path, flag: str = "path") -> None:
    """Raise InputError if no picture can be written to this file."""
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"{flag} must end in {', '.join(FORMATS)}, got {path}.")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InputError(f"{flag} must be a file in a folder that exists, got {path}.")


def _figure(attention: Attention) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    num_layers, num_heads, num_tokens, _ = attention.weights.shape
    side = min(max(_SMALLEST_HEAD, _TOKEN * num_tokens), _LARGEST_FIGURE / max(num_layers, num_heads))
    named = side >= _TOKEN * num_tokens
    labels = 0.07 * max(map(len, attention.tokens)) if named else 0.5
    figure = Figure(figsize=(num_heads * side + labels + 1.2, num_layers * side + labels + 0.6))
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained")
    grid = figure.subplots(num_layers, num_heads, squeeze=False, sharex=True, sharey=True)
    # The square root of a weight decides its shade: most weights are small.
    shades = PowerNorm(0.5, vmin=0, vmax=1)
    for (layer, head), axes in np.ndenumerate(grid):
        image = axes.imshow(
            attention.weights[layer, head], cmap="Blues", norm=shades, interpolation="nearest"
        )
        axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=7, pad=2)
        axes.tick_params(labelsize=6, length=1, pad=1)
        if named:
            axes.set_xticks(range(num_tokens), attention.tokens, rotation=90)
            axes.set_yticks(range(num_tokens), attention.tokens)
    figure.supxlabel("looks at", fontsize=8)
    figure.supylabel("this token", fontsize=8)
    bar = figure.colorbar(
        image, ax=grid, shrink=min(1.0, 2 / (num_layers * side)), aspect=15, fraction=0.02, pad=0.01
    )
    bar.ax.tick_params(labelsize=6)
    return figure
