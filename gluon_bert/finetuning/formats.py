"""Chooses how the files of a task are read: by the kind of the task, or by the training file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Callable

from ..errors import InputError
from ..model.task import KINDS
from .dataset import TaskFiles, TaskFormat
from .question_answering import ENDINGS as SQUAD_ENDINGS
from .question_answering import QuestionFormat
from .sentences import SentenceFormat
from .tables import ENDINGS as TABLE_ENDINGS
from .tagging import CONLL_ENDINGS, TaggingFormat

# Task formats by the kind of the task; auto: classes or a score, by the labels.
FORMATS: dict[str, Callable[[], TaskFormat]] = {
    "auto": lambda: SentenceFormat("auto"),
    "classification": lambda: SentenceFormat("classification"),
    "regression": lambda: SentenceFormat("regression"),
    "tagging": TaggingFormat,
    "question-answering": QuestionFormat,
}


def task_format(files: TaskFiles, kind: str) -> TaskFormat:
    """Return the reader of a task's files.

    kind: one of the task's, or auto: CoNLL files, and JSONL files with tokens, are for tagging; SQuAD files
    are for question answering; tables are for classes or a score. Raise InputError if the options are for
    another kind of file.
    """
    if kind not in ("auto", *KINDS):
        raise InputError(f"task must be auto or one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "auto":
        kind = _kind_of(Path(files.train))
    is_table = kind not in ("tagging", "question-answering")
    if not is_table and (files.text_columns or files.label or not files.header or files.quoting != "auto"):
        raise InputError(
            f"text_columns, label, header and quoting must be omitted: they are for tables, not for {kind}"
        )
    return FORMATS[kind]()


def _kind_of(path: Path) -> str:
    """Return the kind of task that a training file is for; "auto" for a table."""
    ending = path.suffix.lower()
    if ending in CONLL_ENDINGS or (ending == ".jsonl" and _has_tokens(path)):
        return "tagging"
    if ending in SQUAD_ENDINGS:
        return "question-answering"
    if ending not in TABLE_ENDINGS:
        known = [*TABLE_ENDINGS, *CONLL_ENDINGS, *SQUAD_ENDINGS]
        raise InputError(f"train {path}: must end in {', '.join(known)}, got {ending or 'no ending'!r}")
    return "auto"


def _has_tokens(path: Path) -> bool:
    """Return whether the first line of a JSONL file has tokens rather than a text."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            first = json.loads(file.readline())
    except (OSError, ValueError, RecursionError):
        return False  # the reader of the file says what is wrong
    return isinstance(first, dict) and "tokens" in first
