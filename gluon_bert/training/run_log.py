"""log.jsonl: one JSON record a line, whole lines only. Draws nothing."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any, Mapping

from ..errors import InputError
from ..fileio import nan_to_null
from .metrics import Metrics

log = logging.getLogger(__name__)

# Keys of the log's lines that hold no losses.
EVENTS = {"non_finite", "rollback", "overflowed"}


class LogFile:
    """An object a line, of which only whole lines are ever on the disk.

    records: those that are there, by what a log of so many bytes holds and what came since. Raises InputError
    where it holds something else.
    """

    def __init__(self, path: Path, num_bytes: int = 0) -> None:
        self.path = path
        self._file = path.open("r+b" if path.exists() else "w+b", buffering=0)
        found = path.stat().st_size
        if found < num_bytes:
            log.warning("%s: has %d bytes, not %d: lines of it are lost", path, found, num_bytes)
        content = self._file.read(num_bytes)
        self._num_bytes = content.rfind(b"\n") + 1
        self.records = _records_in(content[: self._num_bytes], path)
        self._unwritten = b""
        self._file.truncate(self._num_bytes)
        self._file.seek(self._num_bytes)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line, whole or, with an OSError, not at all: then it comes with the next."""
        self.records.append(dict(record))
        self._unwritten += json.dumps(nan_to_null(record)).encode() + b"\n"
        self._write()

    def synced(self) -> int:
        """How many bytes are on the disk by now: all, or it is an OSError."""
        self._write()
        os.fsync(self._file.fileno())
        return self._num_bytes

    def _write(self) -> None:
        lines = self._unwritten
        try:
            written = self._file.write(lines)
            if written != len(lines):  # the disk is full, or a limit reached, in the middle of it
                self._file.write(lines[written:])  # says so
        except OSError:
            self._file.truncate(self._num_bytes)
            self._file.seek(self._num_bytes)
            raise
        self._num_bytes, self._unwritten = self._num_bytes + len(lines), b""

    def close(self) -> None:
        """Close the file; once more does no harm."""
        self._file.close()


def _records_in(content: bytes, path: Path) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            record = json.loads(line)
            if isinstance(record["step"], int) and record.keys() & EVENTS:
                records.append(record)
                continue
            of_losses = record.get("validation", record)
            numbers = [record["step"], *(of_losses[name] for name in Metrics._fields)]
            if not all(value is None or isinstance(value, (int, float)) for value in numbers):
                raise ValueError("a loss is no number")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{path}, line {number}: is no line of a run's log ({error}); move the file away, and "
                "the log begins anew"
            ) from error
        for name in Metrics._fields:  # JSON has no word for NaN
            of_losses[name] = math.nan if of_losses[name] is None else of_losses[name]
        records.append(record)
    return records
