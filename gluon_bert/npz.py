"""Writes named arrays to .npz files, and reads untrusted ones without pickle."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import IO, Any, Mapping

import numpy as np

from .errors import InputError

# All that is written, and all that is read: what NumPy puts before an array's values, format 1.0.
_DTYPES: dict[bytes, Any] = {name: np.dtype(name.decode()) for name in (b"<f4", b"<u2", b"<i4", b"<i8")}
_MAGIC = b"\x93NUMPY\x01\x00"
_HEADER = re.compile(
    rb"\{'descr': '(<f4|<u2|<i4|<i8)', 'fortran_order': False, "
    rb"'shape': \((|[0-9]+,|[0-9]+(?:, [0-9]+)+)\), \} *\n"
)


def write_arrays(file: IO[bytes], arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays of float32, uint16, int32 or int64 under their names; `read_arrays` is the inverse."""
    with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        for name, array in arrays.items():
            assert array.dtype.str.encode() in _DTYPES, (name, array.dtype)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.asarray(array, order="C"), (1, 0), allow_pickle=False)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of a file that `write_arrays` wrote. Raise InputError if it is invalid or damaged.

    Reading takes no more memory than the file's size, even if its header claims more. Nothing in it is
    executed.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            arrays: dict[str, np.ndarray] = {}
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise InputError(f"{path}: declares more bytes than it has")
            for entry in archive.infolist():
                name, ending = entry.filename[:-4], entry.filename[-4:]
                if ending != ".npy" or name in arrays or entry.compress_type != zipfile.ZIP_STORED:
                    raise InputError(f"{path}: {entry.filename!r} in it is not an array of this package")
                arrays[name] = _array(archive, entry)
            return arrays
    except InputError:
        raise
    # zipfile raises many exceptions for a damaged archive.
    except (OSError, EOFError, ValueError, OverflowError, RuntimeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: cannot be read as arrays ({error or type(error).__name__})") from error
    except Exception as error:
        if type(error).__module__ not in ("zlib", "struct"):
            raise
        raise InputError(f"{path}: cannot be read as arrays ({error})") from error


def mapped_array(path: Path) -> np.ndarray:
    """Map the array of a file of `numpy.save` into memory. Raise ValueError for other types."""
    with path.open("rb") as file:
        beginning = file.read(10)
        dtype, shape, offset = _described(beginning + file.read(_header_size(beginning)))
    return np.memmap(path, dtype, "r", offset, shape)


def _array(archive: zipfile.ZipFile, entry: Any) -> np.ndarray:
    content = archive.read(entry)
    dtype, shape, offset = _described(content)
    return np.frombuffer(content, dtype, offset=offset).reshape(shape)


def _header_size(beginning: bytes) -> int:
    return int.from_bytes(beginning[8:10], "little")


def _described(content: bytes) -> tuple[Any, tuple[int, ...], int]:
    """Return the type, the shape and the offset of the values of an array, from the beginning of its file.

    NumPy's own reader evaluates the header as Python and may raise any exception.
    """
    offset = 10 + _header_size(content)
    header = _HEADER.fullmatch(content[10:offset])
    if content[:8] != _MAGIC or not header:
        raise ValueError("it does not begin with an array header")
    return _DTYPES[header[1]], tuple(int(axis) for axis in header[2].split(b",") if axis.strip()), offset
