"""Reads the tensors of a torch.save file without PyTorch, and without running code from the file.

Such a file contains a pickle, which may call any function. Only the few functions that make tensors are
allowed. Any other name is an error, before anything is called.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any, Callable, Mapping

import numpy as np

from ..errors import InputError

# torch's names of storages -> how their bytes are read. NumPy has no bfloat16: it is the upper half of a
# float32.
_STORAGES: dict[str, np.dtype] = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype("<u2"),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("<i1"),
    "ByteStorage": np.dtype("<u1"),
    "BoolStorage": np.dtype("?"),
}
# Keys under which training scripts save the weights, beside the optimizer's state.
_NESTED = ("state_dict", "model_state_dict", "model", "module")
# How a file before PyTorch 1.6 begins: a number and the version of the format, a pickle each.
_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001

# The numbers of a storage, by its key, type and length.
_Storages = Callable[[str, np.dtype, int], np.ndarray]


class _Storage:
    """The type of a storage as it is named in the pickle."""

    def __init__(self, name: str) -> None:
        self.name = name


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays by name, bfloat16 as float32; raise InputError for any other content."""
    try:
        content = _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path)
    except (
        *(OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError, MemoryError),
        *(pickle.UnpicklingError, zipfile.BadZipFile, struct.error, OverflowError, RecursionError),
    ) as error:
        raise InputError(
            f"{path}: cannot be read as weights ({error}). Save them as model.safetensors."
        ) from error
    for name in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    if not isinstance(content, Mapping) or not all(isinstance(each, np.ndarray) for each in content.values()):
        raise InputError(f"{path}: must hold named tensors, the state_dict of a network, and nothing else")
    return {str(name): array for name, array in content.items()}


def _read_zip(path: Path) -> Any:
    """Return the content of a file of PyTorch 1.6 or later."""
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        folder = name[: -len("data.pkl")]

        def storage(key: str, dtype: np.dtype, count: int) -> np.ndarray:
            return np.frombuffer(archive.read(f"{folder}data/{key}"), dtype, count)

        return _Reader(io.BytesIO(archive.read(name)), storage).load()


def _read_legacy(path: Path) -> Any:
    """Return the content of a file of an older PyTorch: pickles, then the numbers of all storages."""
    with path.open("rb") as file:
        header = [_Reader(file, _no_storage).load() for _ in range(2)]
        if header != [_LEGACY_MAGIC, _LEGACY_VERSION]:
            raise ValueError("it does not begin as torch.save begins")
        _Reader(file, _no_storage).load()  # of the system that saved it
        start = file.tell()
        # The tensors name the storages and come before them, so the file is read twice.
        dtypes: dict[str, np.dtype] = {}

        def note(key: str, dtype: np.dtype, count: int) -> np.ndarray:
            dtypes[key] = dtype
            return np.broadcast_to(np.zeros(1, dtype), (count,))

        _Reader(file, note, with_tensors=False).load()
        storages = {key: _numbers(file, dtypes[key]) for key in _Reader(file, _no_storage).load()}
        file.seek(start)
        return _Reader(file, lambda key, dtype, count: storages[key][:count]).load()


def _numbers(file: IO[bytes], dtype: np.dtype) -> np.ndarray:
    (count,) = struct.unpack("<q", file.read(8))
    size = count * dtype.itemsize
    content = file.read(size) if count >= 0 else b""
    if count < 0 or len(content) != size:
        raise ValueError("it ends before its tensors do")
    return np.frombuffer(content, dtype)


def _no_storage(key: str, dtype: np.dtype, count: int) -> np.ndarray:
    raise pickle.UnpicklingError("a tensor is in the wrong place")


class _Reader(pickle.Unpickler):
    """Builds tensors from storages, and plain values. Refuses everything else."""

    def __init__(self, file: IO[bytes], storages: _Storages, with_tensors: bool = True) -> None:
        super().__init__(file)
        self._storages, self._with_tensors = storages, with_tensors

    def find_class(self, module: str, name: str) -> Any:
        """Return the object for a name in the pickle. Refuse names that tensors do not need."""
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor if self._with_tensors else lambda *_: None,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
        }
        if module == "torch" and name in _STORAGES:
            return _Storage(name)
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it needs {module}.{name}, which weights never need")
        return known[module, name]

    def persistent_load(self, pid: Any) -> np.ndarray:
        """Return the numbers of a storage, one after the other; pickle calls this."""
        # Older files have a sixth part: a view of another storage. Weights are never such views.
        kind, storage, key, _, count, *view = pid
        if kind != "storage" or not isinstance(storage, _Storage) or any(view):
            raise pickle.UnpicklingError(f"{kind!r} must be a storage of numbers")
        numbers = self._storages(key, _STORAGES[storage.name], count)
        if storage.name == "BFloat16Storage":
            return (numbers.astype(np.uint32) << 16).view(np.float32)
        return numbers


def _tensor(storage: np.ndarray, offset: int, size: Any, stride: Any, *_: Any) -> np.ndarray:
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if offset < 0 or any(step < 0 for step in stride) or (0 not in size and last >= len(storage)):
        raise pickle.UnpicklingError("a tensor reaches outside its storage")
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides).copy()
