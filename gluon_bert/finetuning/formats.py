"""Chooses how the files of a task are read, by the kind of the task."""

from __future__ import annotations

from .dataset import TaskFiles, TaskFormat
from .sentences import SentenceFormat


def task_format(files: TaskFiles, kind: str) -> TaskFormat:
    """Return the reader of a task's files; kind: classification, regression or auto."""
    return SentenceFormat(kind)
