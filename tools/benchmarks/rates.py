"""Rates of rounds, the machine and the corpus of a benchmark."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Any, Mapping, Sequence

from gluon_bert import system
from gluon_bert.errors import InputError


def corpus_folder(name: str) -> Path:
    """Return the folder with the two files of --corpus; download WikiText-2 once."""
    from gluon_bert.data.corpora.wikitext2 import FILES, wikitext2_folder

    folder = wikitext2_folder() if name == "wikitext-2" else Path(name).absolute()
    missing = [file for file in FILES if not (folder / file).is_file()]
    if missing:
        raise InputError(
            f"--corpus must have the files {' and '.join(FILES)}, but {name} lacks {' and '.join(missing)}"
        )
    return folder


def rates(rounds: Sequence[Mapping[str, Any]], seconds: str = "seconds", of: str = "pairs") -> list[float]:
    """Return for each round the pairs, or other units, per second of a clock."""
    return [each[of] / each[seconds] for each in rounds]


def machine() -> str:
    """Return the processor's name and the number of cores."""
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:  # not on Linux
        names = []
    return f"{names[0] if names else platform.machine()}, {system.usable_cores()} cores"
