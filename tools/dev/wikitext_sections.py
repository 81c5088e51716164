"""A task made of WikiText: from which kind of section of an article is a paragraph? Trains nothing."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from gluon_bert.errors import InputError
from gluon_bert.finetuning.tables import TableRow

# Words of a section's heading -> its kind, of those that are frequent in many articles.
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
# A shorter paragraph is a caption or a line of a list.
_FEWEST_WORDS = 20


def section_rows(path: Path) -> list[TableRow]:
    """The paragraphs of a WikiText file whose section has one of KINDS, with that as their label.

    A section is one of an article's own; those within it count as its parts. The heading is no part of the
    text. InputError where the file cannot be read or has no such section.
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
        elif kind and not heading and len(line.split()) >= _FEWEST_WORDS:
            rows.append(TableRow(f"{path}, line {number}", (line,), kind))
    if not rows:
        raise InputError(f"{path}: has no section whose heading names one of {', '.join(KINDS)}")
    return rows


def _kind(heading: str) -> str | None:
    """The one kind that a heading names, None where it names none or several.

    >>> _kind("Early life"), _kind("Life and career"), _kind("Themes")
    ('life', None, None)
    """
    words = set(heading.lower().split())
    kinds = [kind for kind, names in KINDS.items() if words & set(names)]
    return kinds[0] if len(kinds) == 1 else None


def sample(rows: list[TableRow], size: int, seed: int) -> list[TableRow]:
    """So many of the rows, drawn from the seed; a smaller sample of the same seed is a part of a larger one.

    InputError where there are fewer.
    """
    if size > len(rows):
        raise InputError(f"--sizes {size}: the training text has {len(rows)} labelled paragraphs")
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[i] for i in order[:size]]
