"""What the benchmarks share: rates, the machine, the corpus."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Any, Mapping, Sequence

from gluon_bert import system
from gluon_bert.errors import InputError


def corpus_folder(name: str) -> Path:
    """Where the two files of --corpus are; WikiText-2 itself is downloaded once."""
    from gluon_bert.data.corpora.wikitext2 import FILES, wikitext2_folder

    folder = wikitext2_folder() if name == "wikitext-2" else Path(name).absolute()
    missing = [file for file in FILES if not (folder / file).is_file()]
    if missing:
        raise InputError(f"--corpus {name}: has no {' and no '.join(missing)}")
    return folder


def rates(answers: Sequence[Mapping[str, Any]], seconds: str = "seconds", of: str = "pairs") -> list[float]:
    """Pairs, or another work, a second of each round, by this clock."""
    return [answer[of] / answer[seconds] for answer in answers]


def machine() -> str:
    """The processor in a phrase, as far as it is known."""
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:  # no Linux
        names = []
    return f"{names[0] if names else platform.machine()}, {system.usable_cores()} cores"
