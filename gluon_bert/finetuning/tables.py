"""Labelled texts in TSV, CSV and JSONL files, a row each. Knows no vocabulary and no task."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, Iterator, Mapping, NamedTuple, Sequence

from ..errors import InputError

# The columns that are taken where none is named: texts, the first of these that are all there, and labels.
TEXT_COLUMNS = (
    ("text", "pair"),
    ("sentence1", "sentence2"),
    ("question", "sentence"),
    ("premise", "hypothesis"),
    ("text",),
    ("sentence",),
)
LABEL_COLUMNS = ("label", "score")
ENDINGS = (".tsv", ".csv", ".jsonl")

# Problems of a file that are told; what is wrong with one line is often so with all.
_MOST_TOLD = 10


class TableRow(NamedTuple):
    """A text or a pair of texts, its label if it has one, and where it was found."""

    where: str
    texts: tuple[str, ...]
    label: str | None


class Columns(NamedTuple):
    """Which columns of a table are read: one or two with texts, and that of the labels, if there is one."""

    texts: tuple[str, ...]
    label: str | None


def choose_columns(
    path: Path, flag: str, header: bool, texts: Sequence[str] = (), label: str | None = None
) -> Columns:
    """The columns of a table that are named, or that have names known for it; InputError says what there is.

    header: the first line names the columns; else they are numbered from 1.
    """
    names = _names(path, flag, header)
    there = f"it has {', '.join(names)}"
    named = [*texts, label] if label else texts
    problems = [f"{flag} {path}: has no column {name!r}; {there}" for name in named if name not in names]
    if not texts:
        texts = next((known for known in TEXT_COLUMNS if set(known) <= set(names)), ())
        if not texts:
            problems.append(
                f"{flag} {path}: say with --text which column has the texts, or which two; {there}"
            )
    if label is None:
        label = next((known for known in LABEL_COLUMNS if known in names and known not in texts), None)
        if label is None:
            problems.append(f"{flag} {path}: say with --label which column has the labels; {there}")
    if problems:
        raise InputError("\n".join(problems))
    return Columns(tuple(texts), label)


def read_table(
    path: Path, flag: str, header: bool, columns: Columns, labels_needed: bool = True
) -> list[TableRow]:
    """The rows of a UTF-8 file; InputError names each line that is none, and the first ten if there are more.

    labels_needed: every row must have a label; else a file without that column has none at all.
    """
    names = _names(path, flag, header)
    label = columns.label
    if not labels_needed and label not in names:
        label = None
    wanted = [*columns.texts, *([label] if label else [])]
    missing = [name for name in wanted if name not in names]
    if missing:
        raise InputError(
            f"{flag} {path}: has no column {' and '.join(map(repr, missing))}, as the training file has; it "
            f"has {', '.join(names)}"
        )
    rows, problems = [], []
    for where, fields in _rows(path, flag, header):
        problem = fields if isinstance(fields, str) else _problem(fields, wanted)
        if problem:
            problems.append(f"{where}: {problem}")
        elif not isinstance(fields, str):
            rows.append(
                TableRow(
                    where, tuple(fields[n].strip() for n in columns.texts), fields[label] if label else None
                )
            )
    if problems:
        more = len(problems) - _MOST_TOLD
        told = problems[:_MOST_TOLD] + ([f"{path}: and {more} more lines"] if more > 0 else [])
        raise InputError("\n".join(told))
    if not rows:
        raise InputError(f"{flag} {path}: has no row; a line for each text is needed")
    return rows


def _problem(fields: Mapping[str, str], wanted: Sequence[str]) -> str:
    absent = [name for name in wanted if name not in fields]
    if absent:
        return f"has no {' and no '.join(map(repr, absent))}"
    empty = [name for name in wanted if not fields[name].strip()]
    return f"column {' and '.join(map(repr, empty))} is empty" if empty else ""


def _names(path: Path, flag: str, header: bool) -> list[str]:
    """The names of a table's columns: of its first line, or 1, 2 and so on; of JSONL the first object's."""
    if path.suffix not in ENDINGS:
        raise InputError(f"{flag} {path}: must end in {', '.join(ENDINGS)}, which says how it is read")
    first = next(_lines(path, flag), None)
    if first is None:
        raise InputError(f"{flag} {path}: is empty")
    fields = first[1]
    if isinstance(fields, str):
        raise InputError(f"{first[0]}: {fields}")
    names = list(fields) if header or isinstance(fields, dict) else [str(i + 1) for i in range(len(fields))]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{first[0]}: names the column {twice[0]!r} twice")
    return names


def _rows(path: Path, flag: str, header: bool) -> Iterator[tuple[str, dict[str, str] | str]]:
    """Each row with where it stands: its fields by name, or what is wrong with it."""
    names = _names(path, flag, header)
    lines = _lines(path, flag)
    if header and path.suffix != ".jsonl":
        next(lines)
    for where, fields in lines:
        if isinstance(fields, list):
            if len(fields) != len(names):
                what = "the header has" if header else "the first line has"
                yield where, f"has {len(fields)} columns, where {what} {len(names)}"
                continue
            fields = dict(zip(names, fields))
        yield where, fields


def _lines(path: Path, flag: str) -> Iterator[tuple[str, list[str] | dict[str, str] | str]]:
    """Each line's fields, in order or by name, or what is wrong with it; empty lines are none of a table."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{flag} {path}: cannot be read ({error.strerror or error})") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}, line {number}: byte {content[error.start]:#04x} is not UTF-8; convert it first"
        ) from error
    lines = text.replace("\r\n", "\n").split("\n")
    if not lines[-1]:
        lines.pop()
    if path.suffix == ".csv":
        yield from _csv_lines(path, lines)
        return
    for number, line in enumerate(lines, 1):
        # A quotation mark in a TSV is one: its fields are never quoted.
        yield f"{path}, line {number}", line.split("\t") if path.suffix == ".tsv" else _object(line)


def _csv_lines(path: Path, lines: Sequence[str]) -> Iterator[tuple[str, list[str] | str]]:
    reader = csv.reader((line + "\n" for line in lines), strict=True)
    while True:
        start = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"{path}, line {start}", f"is no line of a CSV ({error})"
            return
        yield f"{path}, line {start}", [field.rstrip("\n") for field in fields]


def _object(line: str) -> dict[str, str] | str:
    """The fields of a JSON object as text; of other values than text and numbers none."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"is not JSON ({error})"
    if not isinstance(content, dict):
        return 'is no JSON object such as {"text": "...", "label": "..."}'
    return {name: _as_text(value) for name, value in content.items() if _as_text(value) is not None}


def _as_text(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, (str, int, float)) else None
