"""Reads labelled texts from TSV, CSV and JSONL files, one per row. Knows no vocabulary and no task."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, NamedTuple, Sequence, Union

from ..errors import InputError
from ..fileio import SURROGATE, decode_utf8

log = logging.getLogger(__name__)

# The default columns: the first of these entries that the file has, for texts and for labels.
TEXT_COLUMNS = (
    ("text", "pair"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("premise", "hypothesis"),
    ("text",),
    ("sentence",),
)
LABEL_COLUMNS = ("label", "score", "gold_label", "is_duplicate")
ENDINGS = (".tsv", ".csv", ".jsonl")
QUOTING = ("auto", "none", "minimal")

# Maximum number of problems to show, because one problem often occurs in all lines.
_MAX_SHOWN = 10
# A field in quotation marks with doubled quotation marks inside, as programs write it.
_QUOTED = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?')
# Whole numbers as programs write them: 1, 1.0, 1.; not 01, which may be a name.
_WHOLE = re.compile(r"([+-]?(?:0|[1-9]\d*))(?:\.0*)?", re.ASCII)

# The fields of a row, in order or by name, or its problem.
_Fields = Union["list[str]", "dict[str, str]", str]


class TableRow(NamedTuple):
    """A text or a pair of texts, its label or None, and its place in the file."""

    where: str
    texts: tuple[str, ...]
    label: str | None


class Columns(NamedTuple):
    """The columns of a table: one or two with texts, and one with labels or None."""

    texts: tuple[str, ...]
    label: str | None


def choose_columns(
    path: Path,
    role: str,
    header: bool,
    texts: Sequence[str] = (),
    label: str | None = None,
    quoting: str = "auto",
) -> Columns:
    """Return the named columns, or by default those with known names.

    Raise InputError, which lists the columns.
    header: the first line names the columns. Otherwise they are numbered from 1. quoting: see `read_table`.
    """
    names = _Table(path, role, header, quoting).names
    there = f"it has the columns {', '.join(map(repr, names))}"
    named = [*texts, label] if label else texts
    problems = [f"{role} {path}: has no column {name!r}; {there}" for name in named if name not in names]
    if not texts:
        texts = next((known for known in TEXT_COLUMNS if set(known) <= set(names)), ())
        if not texts:
            problems.append(
                f"{role} {path}: text_columns must name the column with the texts, or both of pairs; {there}"
            )
    if len(set(texts)) < len(texts) or label in texts:
        named = ", ".join(map(repr, [*texts, label]))
        problems.append(f"{role} {path}: text_columns and label must be distinct columns, got {named}")
    if label is None:
        label = next((known for known in LABEL_COLUMNS if known in names and known not in texts), None)
        if label is None:
            problems.append(f"{role} {path}: label must name the column with the labels; {there}")
    if problems:
        raise InputError("\n".join(problems))
    return Columns(tuple(texts), label)


def read_table(
    path: Path,
    role: str,
    header: bool,
    columns: Columns,
    labels_needed: bool = True,
    quoting: str = "auto",
) -> list[TableRow]:
    """Read the rows of a UTF-8 file.

    Raise InputError with the wrong lines and columns, ten at most. Labels are stripped, and 1.0 is the label
    1. labels_needed: every row must have a label. Otherwise a file without that column has no labels.
    quoting: of a TSV. minimal reads fields in quotation marks as pandas writes them, none keeps all quotation
    marks, auto chooses.
    """
    table = _Table(path, role, header, quoting)
    table.log_reading()
    label = columns.label
    if not labels_needed and label not in table.names:
        label = None
    wanted = [*columns.texts, *([label] if label else [])]
    missing = [name for name in wanted if name not in table.names]
    if missing:
        raise InputError(
            f"{role} {path}: has no column {' and '.join(map(repr, missing))}, as the training file has; it "
            f"has the columns {', '.join(map(repr, table.names))}"
        )
    rows, problems = [], []
    for where, fields in table.rows():
        problem = fields if isinstance(fields, str) else _problem(fields, wanted)
        if problem:
            problems.append(f"{where}: {problem}")
        elif not isinstance(fields, str):
            texts = tuple(fields[name].strip() for name in columns.texts)
            rows.append(TableRow(where, texts, same_label(fields[label]) if label else None))
    if problems:
        raise InputError("\n".join(first_lines(problems, str(path))))
    if not rows:
        raise InputError(f"{role} {path}: must have a line for each text, got none")
    return rows


def text_lines(path: Path, role: str) -> list[str]:
    """Return the lines of a UTF-8 file without blank lines at its end. Raise InputError if it is empty."""
    try:
        text = decode_utf8(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"{role} {path}: cannot be read ({error.strerror or error})") from error
    # Not splitlines, which also splits at characters such as U+2028. NUL characters carry no text.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise InputError(f"{role} {path}: is empty")
    return lines


def same_label(label: str) -> str:
    """Return the label without surrounding blanks; equal whole numbers become equal.

    >>> [same_label(each) for each in (" yes ", "1.0", "1", "-0", "1.5", "01")]
    ['yes', '1', '1', '0', '1.5', '01']
    """
    label = label.strip()
    whole = _WHOLE.fullmatch(label)
    return str(int(whole[1])) if whole else label


def first_lines(problems: Sequence[str], path: str) -> list[str]:
    """Return the first problems of a file, and a line with the number of the others."""
    more = len(problems) - _MAX_SHOWN
    return [*problems[:_MAX_SHOWN], *([f"{path}: and {more} more lines"] if more > 0 else [])]


def _problem(fields: Mapping[str, str], wanted: Sequence[str]) -> str:
    absent = [name for name in wanted if name not in fields]
    if absent:
        return f"has no {' and no '.join(map(repr, absent))}"
    empty = [name for name in wanted if not fields[name].strip()]
    if empty:
        return f"column {' and '.join(map(repr, empty))} is empty"
    halves = [name for name in wanted if SURROGATE.search(fields[name])]
    return f"column {halves[0]!r} holds half a surrogate pair, which is not a character" if halves else ""


class _Table:
    """A file's column names and rows. Reads the file once."""

    def __init__(self, path: Path, role: str, header: bool, quoting: str) -> None:
        self._path, self._ending = path, path.suffix.lower()
        if self._ending not in ENDINGS:
            raise InputError(
                f"{role} {path}: must end in .tsv, .csv or .jsonl, got {path.suffix or 'no ending'!r}"
            )
        lines = text_lines(path, role)
        # Excel begins a CSV file with a line such as "sep=;".
        said = _SEPARATOR_LINE.fullmatch(lines[0]) if self._ending == ".csv" and len(lines) > 1 else None
        self._before = 1 if said else 0  # lines before the header
        self._lines = lines[self._before :]
        self._separator = said[1] if said else _separator(self._lines[0], self._ending)
        self._notes: list[str] = []
        self._quoted = self._ending == ".csv" or (self._ending == ".tsv" and self._is_quoted(quoting))
        self._header = header and self._ending != ".jsonl"
        self.names = self._names()

    def log_reading(self) -> None:
        """Log how the file is read, if its ending does not say so."""
        if self._ending == ".csv" and self._separator != ",":
            log.info("%s: fields are separated by %r", self._path, self._separator)
        for note in self._notes:
            log.warning("%s: %s", self._path, note)

    def rows(self) -> Iterator[tuple[str, dict[str, str] | str]]:
        """Yield the place of each row with its fields by name, or with its problem."""
        numbered = self._numbered_fields()
        if self._header:
            next(numbered)
        for number, fields in numbered:
            if isinstance(fields, list):
                if len(fields) != len(self.names):
                    what = "the header has" if self._header else "the first line has"
                    fields = f"has {len(fields)} columns, where {what} {len(self.names)}"
                else:
                    fields = dict(zip(self.names, fields))
            yield f"{self._path}, line {number}", fields

    def _names(self) -> list[str]:
        """Return the column names: of the first line or object, or 1, 2 and so on."""
        number, fields = next(self._numbered_fields())
        where = f"{self._path}, line {number}"
        if isinstance(fields, str):
            raise InputError(f"{where}: {fields}")
        if self._header or isinstance(fields, dict):
            names = [name.strip() for name in fields]
        else:
            names = [str(i + 1) for i in range(len(fields))]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InputError(f"{where}: names the column {twice[0]!r} twice")
        return names

    def _numbered_fields(self) -> Iterator[tuple[int, _Fields]]:
        if self._quoted:
            for number, fields in _quoted_fields(self._lines, self._separator):
                yield number + self._before, fields
            return
        for number, line in enumerate(self._lines, 1):
            if not line.strip():
                yield number, "is blank; remove the line"
            else:
                yield number, line.split("\t") if self._ending == ".tsv" else _object(line)

    def _is_quoted(self, quoting: str) -> bool:
        """Return whether the fields of this TSV are quoted."""
        if quoting != "auto":
            return quoting == "minimal"
        suspects = [
            number
            for number, line in enumerate(self._lines, 1)
            if any(map(_QUOTED.fullmatch, line.split("\t")))
        ]
        found = list(_quoted_fields(self._lines, "\t"))
        sound = len({len(fields) if isinstance(fields, list) else -1 for _, fields in found}) == 1
        multi_line = sound and any("\n" in field or "\t" in field for _, fields in found for field in fields)
        if sound and (suspects or multi_line):
            self._notes.append("fields in quotation marks are read as quoted (quoting=none changes that)")
            return True
        if suspects:
            self._notes.append(
                f"line {suspects[0]}: a field looks quoted, but not all fields are; quotation marks are kept "
                "(quoting=minimal changes that)"
            )
        return False


def _separator(header: str, ending: str) -> str:
    """Return the separator: a tab in TSV, in CSV a comma or the semicolon of the first line."""
    if ending == ".tsv":
        return "\t"
    outside = re.sub(r'"(?:[^"]|"")*"', "", header)
    return next((each for each in (",", ";", "\t", "|") if each in outside), ",")


def _quoted_fields(lines: Iterable[str], separator: str) -> Iterator[tuple[int, _Fields]]:
    """Yield rows. Fields in quotation marks may have several lines."""
    csv.field_size_limit(sys.maxsize)  # Python's limit is 131,072 characters
    reader = csv.reader(io.StringIO("\n".join(lines), newline=""), delimiter=separator, strict=True)
    while True:
        start = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            end = str(error) == "unexpected end of data"
            yield (
                start,
                (
                    "has a quotation mark that opens a field and is never closed"
                    if end
                    else "must end a field after its closing quotation mark; write marks inside it twice"
                ),
            )
            return
        yield start, fields or "is blank; remove the line"


def _object(line: str) -> dict[str, str] | str:
    """Return the text and number fields of a JSON object as text, or the problem of the line."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"is not JSON ({error})"
    if not isinstance(content, dict):
        return 'must be a JSON object such as {"text": "...", "label": "..."}'
    texts = {name.strip(): _as_text(value) for name, value in content.items()}
    return {name: text for name, text in texts.items() if text is not None}


def _as_text(value: Any) -> str | None:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, (str, int, float)) else None
