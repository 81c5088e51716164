"""Shared by tests of runs: flags of a small network, and the records of a run's log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SIZES = ("--units", "16", "--ffn-units", "32", "--max-seq-length", "16")
SMALL_SIZES = ("--preset", "d2l", *SIZES)
SMALL_NETWORK = (*SMALL_SIZES, "--batch-size", "64", "--dropout", "0.3")


def log_of(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the records of a run's log, all or those that have the key `kind`."""
    records = map(json.loads, (folder / "log.jsonl").read_text("utf-8").splitlines())
    return [record for record in records if kind is None or kind in record]
