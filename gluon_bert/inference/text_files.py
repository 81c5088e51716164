"""Read texts from a file, one per line, and write vectors to a file. Either may exceed the memory."""

from __future__ import annotations

import shutil
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Iterator, NamedTuple

import numpy as np

from ..errors import InputError
from ..fileio import atomic_write, decode_utf8, temporary_folder
from .predictor import Prediction

# Between the two texts of a pair.
SEPARATOR = "||"


class Line(NamedTuple):
    """A text or a pair of texts, with the place where it was found."""

    where: str
    first: str
    second: str | None

    @property
    def given(self) -> tuple[str, ...]:
        """Return the one or two texts."""
        return (self.first,) if self.second is None else (self.first, self.second)


def parse_line(where: str, text: str) -> Line:
    """Parse a text, or a pair with || between the texts. Raise InputError for empty texts.

    >>> parse_line("line 1", "it rained || she left").given
    ('it rained', 'she left')
    """
    parts = [part.strip() for part in text.split(SEPARATOR)]
    if len(parts) > 2:
        raise InputError(
            f"{where}: must have at most two texts with {SEPARATOR} between them, got {len(parts)}"
        )
    if not all(parts):
        what = "the text" if len(parts) == 1 else "each text of the pair"
        raise InputError(f"{where}: {what} must have at least one word, got an empty text")
    return Line(where, parts[0], parts[1] if len(parts) == 2 else None)


def read_lines(path: Path, option: str = "input") -> Iterator[Line]:
    """Yield the texts of a UTF-8 file. Raise InputError, which names the line or the option."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(_lines(file), 1):
                yield parse_line(f"{path}, line {number}", decode_utf8(line, str(path), number))
    except OSError as error:
        raise InputError(
            f"{option} must be a file that can be read, got {path} ({error.strerror or error})."
        ) from error


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines of a file without their ends: \\n, \\r\\n or \\r."""
    for line in file:
        line = line[:-1] if line.endswith(b"\n") else line
        yield from (line[:-1] if line.endswith(b"\r") else line).split(b"\r")


def count_lines(path: Path, option: str = "input") -> int:
    """Return the number of texts in a file after parsing each. Raise InputError for a bad line or no text."""
    count = sum(1 for _ in read_lines(path, option))
    if not count:
        raise InputError(f"{option} must have one text per line, got {path}, which is empty.")
    return count


class VectorFile:
    """Writes the arrays of an .npz text by text, on disk.

    For N texts: cls, mean, pooled and embeddings (N, C) float32, the last two if the network has them;
    truncated (N,) int32, the number of truncated tokens. With token vectors: vectors (sum of T, C) float32,
    and starts (N + 1,) int64, the first row of each text.
    """

    def __init__(self, scratch: Path, token_vectors: bool) -> None:
        self._scratch, self._token_vectors = scratch, token_vectors
        self._arrays: dict[str, _Growing] = {}
        self._rows = 0

    def add(self, answer: Prediction) -> None:
        """Append the vectors of a text."""
        self._append("cls", answer.cls[None])
        self._append("mean", answer.mean[None])
        if answer.pooled is not None:
            self._append("pooled", answer.pooled[None])
        if answer.embedding is not None:
            self._append("embeddings", answer.embedding[None])
        self._append("truncated", np.array([answer.text.truncated], dtype=np.int32))
        if self._token_vectors:
            self._append("starts", np.array([self._rows], dtype=np.int64))
            self._append("vectors", answer.vectors)
            self._rows += len(answer.vectors)

    def write(self, file: IO[bytes]) -> None:
        """Write all arrays as an .npz."""
        if self._token_vectors:
            self._append("starts", np.array([self._rows], dtype=np.int64))
        with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
            for name, array in self._arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    array.write(entry)

    def _append(self, name: str, rows: np.ndarray) -> None:
        if name not in self._arrays:
            self._arrays[name] = _Growing(self._scratch / name, rows)
        self._arrays[name].append(rows)


class _Growing:
    """An array on disk that grows along its first axis."""

    def __init__(self, path: Path, like: np.ndarray) -> None:
        self._file = path.open("w+b")
        self._dtype, self._row_shape = like.dtype, like.shape[1:]
        self._rows = 0

    def append(self, rows: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(rows, dtype=self._dtype).tobytes())
        self._rows += len(rows)

    def write(self, entry: IO[bytes]) -> None:
        """Write the array as np.save does, and close the file."""
        shape = (self._rows, *self._row_shape)
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(entry, header)
        self._file.seek(0)
        shutil.copyfileobj(self._file, entry, 1 << 20)
        self._file.close()


@contextmanager
def vector_file(path: Path, token_vectors: bool = False) -> Iterator[VectorFile]:
    """Open an .npz for vectors. It appears when the block ends without an error."""
    with temporary_folder(path) as scratch:
        vectors = VectorFile(scratch, token_vectors)
        yield vectors
        with atomic_write(path, "wb") as file:
            vectors.write(file)
