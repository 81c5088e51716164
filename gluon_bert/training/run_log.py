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

log = logging.getLogger(__name__)

# Keys of the log's lines that are not losses.
EVENTS = {"non_finite", "rollback", "overflowed"}


class LogFile:
    """A JSON object per line. Only whole lines are ever on the disk.

    num_bytes: how much of an existing file to keep; the rest is cut off. records: the objects of the kept
    lines and of the lines added since. Raise InputError if a kept line is invalid.
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
        """Add a line. After an OSError no part of it is written; the next call writes it too."""
        self.records.append(dict(record))
        self._unwritten += json.dumps(nan_to_null(record)).encode() + b"\n"
        self._write()

    def synced(self) -> int:
        """Sync all lines to the disk and return their size in bytes; raise OSError if that fails."""
        self._write()
        os.fsync(self._file.fileno())
        return self._num_bytes

    def _write(self) -> None:
        lines = self._unwritten
        try:
            written = self._file.write(lines)
            if written != len(lines):  # the disk is full, or a limit is reached, after a part of it
                self._file.write(lines[written:])  # says so
        except OSError:
            self._file.truncate(self._num_bytes)
            self._file.seek(self._num_bytes)
            raise
        self._num_bytes, self._unwritten = self._num_bytes + len(lines), b""

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()


def _records_in(content: bytes, path: Path) -> list[dict[str, Any]]:
    """Return the records of whole lines; null in a metric, as JSON has no NaN, becomes NaN."""
    records = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise ValueError("step must be an integer")
            if not record.keys() & EVENTS:
                metrics = record.get("validation", record)
                for name, value in metrics.items():
                    if not (value is None or isinstance(value, (int, float))):
                        raise ValueError(f"{name} must be a number")
                    metrics[name] = math.nan if value is None else value
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{path}, line {number}: is not a line of a run's log ({error}). Move the file away; a new "
                "log will begin"
            ) from error
        records.append(record)
    return records
