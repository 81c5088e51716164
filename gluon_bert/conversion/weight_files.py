"""Arrays by name from the weight files of a folder: safetensors and PyTorch's, whole or in shards."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Callable, Mapping

import numpy as np

from ..errors import InputError
from ..fileio import read_json
from .torch_pickle import read_tensors

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
_INDEX = ".index.json"
# Endings of files that may hold weights which are not read.
_OTHER_WEIGHTS = (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".safetensors")

# How a git-lfs pointer begins. Git leaves it in place of a large file that was not downloaded.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

# safetensors' names of types -> how their bytes are read.
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "BOOL": "?"}


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """Return all arrays of a folder; raise InputError if it has none, or one cannot be read."""
    readers: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
        SAFETENSORS: read_safetensors,
        PICKLED: read_tensors,
    }
    for name, read in readers.items():
        for files in (_shards(folder, name), [name] if (folder / name).is_file() else []):
            if files:
                for file in files:
                    check_downloaded(folder / file)
                return {name: array for file in files for name, array in read(folder / file).items()}
    others = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in _OTHER_WEIGHTS)
    raise InputError(
        f"{folder}: must hold {SAFETENSORS} or {PICKLED}, or their shards with an index, "
        f"got {', '.join(others) or 'no weights'}"
    )


def _shards(folder: Path, name: str) -> list[str]:
    """Return the names of the files that an index lists; empty without an index."""
    path = folder / f"{name}{_INDEX}"
    if not path.is_file():
        return []
    check_downloaded(path)
    places = read_json(path).get("weight_map")
    if not isinstance(places, Mapping) or not all(isinstance(file, str) for file in places.values()):
        raise InputError(f"{path}: 'weight_map' must give a file for each array")
    files = sorted(set(places.values()))
    outside = [file for file in files if Path(file).name != file]
    if outside:
        raise InputError(f"{path}: {outside[0]!r} must be a file of this folder")
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise InputError(f"{folder}: {' and '.join(missing)} must be there too. {path.name} lists them.")
    return files


def check_downloaded(path: Path) -> None:
    """Raise InputError if git-lfs has left a pointer in place of the file."""
    try:
        with path.open("rb") as file:
            is_pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    if is_pointer:
        raise InputError(
            f"{path}: is a git-lfs pointer, not the file itself. Run `git lfs pull` in its folder."
        )


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a file; bfloat16 becomes float32."""
    safetensors = safetensors_package()
    try:
        tensors = safetensors.deserialize(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except safetensors.SafetensorError as error:
        raise InputError(f"{path}: cannot be read as safetensors ({error})") from error
    return {name: _array(tensor, f"{path}: {name}") for name, tensor in tensors}


def _array(tensor: Mapping[str, Any], where: str) -> np.ndarray:
    if tensor["dtype"] not in _DTYPES:
        raise InputError(
            f"{where} must be of type {', '.join(_DTYPES)}, got {tensor['dtype']}. Convert the network from "
            "before it was quantized."
        )
    array = np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
    if tensor["dtype"] == "BF16":  # which NumPy lacks: the upper half of a float32
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array


def safetensors_package() -> Any:
    """Return the package safetensors; raise InputError with the remedy where it is missing."""
    try:
        importlib.import_module("safetensors.numpy")
        return importlib.import_module("safetensors")
    except ImportError as error:
        raise InputError(
            "model.safetensors needs the package safetensors: pip install -e '.[convert]'"
        ) from error
