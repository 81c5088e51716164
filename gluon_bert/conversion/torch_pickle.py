"""The tensors in a file of torch.save, read without PyTorch and without running what the file says.

Such a file is a zip with a pickle, which may name any function to be called. Here the few that make tensors
are known, and each other one is refused before anything is called.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, Callable, Mapping

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
    "BoolStorage": np.dtype("?"),
}


class _Storage:
    """The type of a storage as it is named in the pickle."""

    def __init__(self, name: str) -> None:
        self.name = name


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The arrays by name, floating ones as float32 or as they are; InputError where it is anything else."""
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            reader = _Reader(archive, name[: -len("data.pkl")])
            content = reader.load()
    except zipfile.BadZipFile as error:
        raise InputError(
            f"{path}: is not a file that torch.save of PyTorch 1.6 or later wrote ({error}); save the "
            "weights as model.safetensors"
        ) from error
    except (OSError, ValueError, KeyError, IndexError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{path}: cannot be read as weights ({error})") from error
    if not isinstance(content, Mapping) or not all(isinstance(each, np.ndarray) for each in content.values()):
        raise InputError(f"{path}: holds something else than named tensors, the state_dict of a network")
    return dict(content)


class _Reader(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(io.BytesIO(archive.read(folder + "data.pkl")))
        self._archive, self._folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        """What a name in the pickle stands for, of those that tensors need; pickle calls this."""
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
        }
        if module == "torch" and name in _STORAGES:
            return _Storage(name)
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which weights do not need")
        return known[module, name]

    def persistent_load(self, pid: Any) -> np.ndarray:
        """The numbers of a storage, one after the other; pickle calls this."""
        kind, storage, key, _, count = pid
        if kind != "storage" or not isinstance(storage, _Storage):
            raise pickle.UnpicklingError(f"{kind!r} is no storage of numbers")
        content = self._archive.read(f"{self._folder}data/{key}")
        numbers = np.frombuffer(content, _STORAGES[storage.name], count)
        if storage.name == "BFloat16Storage":
            return (numbers.astype(np.uint32) << 16).view(np.float32)
        return numbers


def _tensor(storage: np.ndarray, offset: int, size: Any, stride: Any, *_: Any) -> np.ndarray:
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if offset < 0 or any(step < 0 for step in stride) or (0 not in size and last >= len(storage)):
        raise pickle.UnpicklingError("a tensor reaches outside its storage")
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides).copy()
