"""Draws the losses of a run in a notebook while it trains. Trains nothing."""

from __future__ import annotations

import sys
import time
from typing import Any, Sequence

from .plots import References, losses_png

# Dots per inch of the picture; it stays in the notebook's file.
DPI = 72
# The largest share of the time that drawing takes while the run trains.
LARGEST_SHARE = 0.05


def notebook_display() -> Any:
    """Return the module IPython.display in a notebook's kernel, None elsewhere."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if not hasattr(shell, "kernel"):  # a shell in a terminal has none
        return None
    import IPython.display

    return IPython.display


class LivePlot:
    """A picture below a notebook's cell. Newer pictures replace it. display: from `notebook_display`."""

    def __init__(self, display: Any) -> None:
        self._display = display
        self._handle: Any = None
        self._last_end = -float("inf")
        self._seconds = 0.0

    def draw(
        self, records: Sequence[dict[str, Any]], references: References | None = None, last: bool = False
    ) -> None:
        """Draw the records of a log, unless that takes too large a share of the time. last: always draw."""
        began = time.perf_counter()
        if not last and self._seconds > LARGEST_SHARE * (began - self._last_end):
            return
        picture = losses_png(records, references, DPI)
        if picture is None:
            return
        image = self._display.Image(data=picture)
        if self._handle is None:
            self._handle = self._display.display(image, display_id=True)
        else:
            self._handle.update(image)
        self._last_end = time.perf_counter()
        self._seconds = self._last_end - began
