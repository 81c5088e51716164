"""Makes a classification task from WikiText: the kind of section that a paragraph is from. Trains nothing."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from gluon_bert.errors import InputError
from gluon_bert.finetuning.tables import TableRow

# Kinds of sections that are frequent in many articles, with the words of their headings.
KINDS = {
    "background": ("background",),
    "career": ("career",),
    "description": ("description", "characteristics"),
    "history": ("history",),
    "life": ("life", "biography"),
    "plot": ("plot", "synopsis"),
    "production": ("production", "development", "writing", "recording"),
    "reception": ("reception",),
}
_HEADING = re.compile(r"((?:= )+)(.*?)(?: =)+")
# Shorter paragraphs are captions or lines of lists.
_MIN_WORDS = 20


def section_rows(path: Path) -> list[TableRow]:
    """Return the paragraphs of a WikiText file in sections of one of KINDS, labelled with the kind.

    Subsections belong to their section. Headings are left out. Raise InputError if the file cannot be read or
    has no such section.
    """
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as WikiText ({error})") from error
    rows, kind = [], None
    for number, line in enumerate(map(str.strip, lines), 1):
        heading = _HEADING.fullmatch(line)
        if heading and heading[1].count("=") <= 2:
            kind = _kind(heading[2]) if heading[1].count("=") == 2 else None
        elif kind and not heading and len(line.split()) >= _MIN_WORDS:
            rows.append(TableRow(f"{path}, line {number}", (line,), kind))
    if not rows:
        raise InputError(f"{path} must have a section whose heading names one of {', '.join(KINDS)}")
    return rows


def _kind(heading: str) -> str | None:
    """Return the kind that a heading names, or None if it names none or several.

    >>> _kind("Early life"), _kind("Life and career"), _kind("Themes")
    ('life', None, None)
    """
    words = set(heading.lower().split())
    kinds = [kind for kind, names in KINDS.items() if words & set(names)]
    return kinds[0] if len(kinds) == 1 else None


def sample(rows: list[TableRow], size: int, seed: int) -> list[TableRow]:
    """Draw rows by a seed. A smaller sample of the same seed is a part of a larger one.

    Raise InputError if there are too few rows.
    """
    if size > len(rows):
        raise InputError(
            f"--sizes must be at most {len(rows)}, the number of labelled paragraphs, got {size}"
        )
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[i] for i in order[:size]]
