"""A file of texts, a line each, to a file of vectors; either may be larger than memory. Asks no network."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Iterator, NamedTuple

import numpy as np

from ..errors import InputError
from ..fileio import atomic_write, decode_utf8
from .predictor import Prediction

# Between the two texts of a pair.
SEPARATOR = "||"


class Line(NamedTuple):
    """A text or a pair of texts, and where it was found."""

    where: str
    first: str
    second: str | None

    @property
    def given(self) -> tuple[str, ...]:
        """The texts, one or two."""
        return (self.first,) if self.second is None else (self.first, self.second)


def parse_line(where: str, text: str) -> Line:
    """A text, or two with || between them; InputError where one is missing.

    >>> parse_line("line 1", "it rained || she left").given
    ('it rained', 'she left')
    """
    parts = [part.strip() for part in text.split(SEPARATOR)]
    if len(parts) > 2:
        raise InputError(f"{where}: {len(parts)} texts with {SEPARATOR} between them, where two make a pair")
    if not all(parts):
        what = "is empty" if len(parts) == 1 else "one text of the pair is empty"
        raise InputError(f"{where}: {what}; a word at least is needed")
    return Line(where, parts[0], parts[1] if len(parts) == 2 else None)


def read_lines(path: Path, flag: str = "--input") -> Iterator[Line]:
    """The texts of a UTF-8 file, which a flag names; InputError says which line is none."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(_lines(file), 1):
                yield parse_line(f"{path}, line {number}", decode_utf8(line, str(path), number))
    except OSError as error:
        raise InputError(f"{flag} {path}: cannot be read ({error.strerror or error})") from error


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file, which end in \\n, \\r\\n or \\r, without these."""
    for line in file:
        line = line[:-1] if line.endswith(b"\n") else line
        yield from (line[:-1] if line.endswith(b"\r") else line).split(b"\r")


def count_lines(path: Path, flag: str = "--input") -> int:
    """How many texts a file has, after a look at each; InputError where a line is none, or none is there."""
    count = sum(1 for _ in read_lines(path, flag))
    if not count:
        raise InputError(f"{flag} {path}: is empty; a text a line is needed")
    return count


class VectorFile:
    """The arrays of an .npz that grow text by text, on disk rather than in memory.

    For N texts: cls, mean and, if there, pooled and embeddings (N, C) float32; truncated (N,) int32, tokens that were cut
    off. With token vectors: vectors (sum of T, C) float32, and starts (N + 1,) int64, where each text's
    begin.
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
        """Put everything into an .npz."""
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
    """An array on disk to whose first axis rows are appended."""

    def __init__(self, path: Path, with_config: np.ndarray) -> None:
        self._file = path.open("w+b")
        self._dtype, self._row_shape = with_config.dtype, with_config.shape[1:]
        self._rows = 0

    def append(self, rows: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(rows, dtype=self._dtype).tobytes())
        self._rows += len(rows)

    def write(self, entry: IO[bytes]) -> None:
        """Write what np.save would, and be closed."""
        shape = (self._rows, *self._row_shape)
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(entry, header)
        self._file.seek(0)
        shutil.copyfileobj(self._file, entry, 1 << 20)
        self._file.close()


@contextmanager
def vector_file(path: Path, token_vectors: bool = False) -> Iterator[VectorFile]:
    """An .npz to fill with vectors, which is there, whole, when the block ends without an error."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        vectors = VectorFile(Path(scratch), token_vectors)
        yield vectors
        with atomic_write(path, "wb") as file:
            vectors.write(file)
