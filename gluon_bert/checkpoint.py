"""Write, read, verify and remove the checkpoints of a run.

    config.json, vocab.json     or vocab.txt
    checkpoints/
      step-00000100/            appears under this name when it is complete
        weights.npz             float32, by the structural names of parameters
        optimizer.npz           running means, float32, and the number of updates of each parameter, int64
        state.json              state of training: data, metrics, clock, best evaluation, log, loss scale
        manifest.json           size and SHA-256 of each file
      best.json                 the step of the best checkpoint

No random state is saved, because each draw depends only on the seed and its position.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any, Mapping, NamedTuple

import numpy as np

from .errors import InputError
from .fileio import atomic_folder, file_hash, write_json
from .model.parameters import weights_of
from .npz import read_arrays, write_arrays

log = logging.getLogger(__name__)

CONFIG, CHECKPOINTS, BEST = "config.json", "checkpoints", "best.json"
WEIGHTS, OPTIMIZER, STATE, MANIFEST = "weights.npz", "optimizer.npz", "state.json", "manifest.json"

# Increased when older versions of gluon_bert cannot read the new format.
FORMAT = 2

_NAME = "step-{:08d}"
_STEP = re.compile(r"step-([0-9]{8,15})")


class Snapshot(NamedTuple):
    """The content of a checkpoint, on the host.

    weights, optimizer: arrays by the structural names of parameters; names of the optimizer's have a suffix
    after a slash. state: plain values of the run at that step. optimizer and state are empty if only weights
    were saved.
    """

    step: int
    weights: Mapping[str, np.ndarray]
    optimizer: Mapping[str, np.ndarray] = {}
    state: Mapping[str, Any] = {}


def save_checkpoint(folder: Path, net: Any, step: int, *, best: bool = False, keep: int = 0) -> Path:
    """Write the weights after a step, atomically; `load_run` is the inverse.

    Options as in `write_checkpoint`.
    """
    return write_checkpoint(folder, Snapshot(step, weights_of(net)), best=best, keep=keep)


def write_checkpoint(folder: Path, snapshot: Snapshot, *, best: bool = False, keep: int = 0) -> Path:
    """Write a checkpoint, atomically; `read_checkpoint` is the inverse.

    best: mark it as the best so far. keep: the number of recent checkpoints to keep beside the best; 0: all.
    Old ones are deleted after the new one is on the disk. So after a crash a latest and a best checkpoint
    always exist.
    """
    path = _path(Path(folder), snapshot.step)
    with atomic_folder(path, replace=True) as aside:
        for name, arrays in ((WEIGHTS, snapshot.weights), (OPTIMIZER, snapshot.optimizer)):
            with (aside / name).open("wb") as file:
                write_arrays(file, arrays)
        write_json(aside / STATE, snapshot.state)
        described = {name: _described(aside / name) for name in (WEIGHTS, OPTIMIZER, STATE)}
        write_json(aside / MANIFEST, {"format": FORMAT, "step": snapshot.step, "files": described})
    if best:
        write_json(path.with_name(BEST), {"step": snapshot.step})
    if keep:
        for old in set(steps(folder)[:-keep]) - {best_step(folder)}:
            _remove(_path(Path(folder), old))
    return path


def read_checkpoint(folder: Path, step: int, weights_only: bool = False) -> Snapshot:
    """Read a checkpoint and compare it with its manifest. Raise InputError if it is damaged."""
    path = _path(Path(folder), step)
    _check_files(path)
    weights = read_arrays(path / WEIGHTS)
    if weights_only:
        return Snapshot(step, weights)
    state = _object_in(path / STATE)
    return Snapshot(step, weights, read_arrays(path / OPTIMIZER), state)


def latest_valid(folder: Path) -> Snapshot:
    """Return the latest valid checkpoint that can be resumed from.

    Log and skip each later one that is invalid. Raise InputError if there is none.
    """
    if not steps(folder):
        raise InputError(
            f"{folder} must have a checkpoint to resume from. Start a new run with its config.json."
        )
    for step in reversed(steps(folder)):
        try:
            snapshot = read_checkpoint(folder, step)
            if not snapshot.state:
                raise InputError(f"{_path(folder, step)}: has weights only, without the state of training")
            return snapshot
        except InputError as problem:
            log.warning("%s; the previous checkpoint is used", problem)
    raise InputError(
        f"{folder} must have a valid checkpoint to resume from. Start a new run with its config.json."
    )


def steps(folder: Path) -> list[int]:
    """Return the steps that have a checkpoint, in ascending order."""
    names = (_STEP.fullmatch(path.name) for path in (Path(folder) / CHECKPOINTS).glob("step-*"))
    return sorted(int(name[1]) for name in names if name)


def best_step(folder: Path) -> int | None:
    """Return the step of the best checkpoint, None without evaluations.

    Raise InputError if it is unreadable.
    """
    path = Path(folder) / CHECKPOINTS / BEST
    try:
        return int(json.loads(path.read_text("utf-8"))["step"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as the step of the best checkpoint ({error})") from error


def find_checkpoint(folder: Path, which: str | int = "latest") -> int:
    """Return the step of `latest`, `best` or a step.

    Raise InputError, which lists the checkpoints, for others.
    """
    there = steps(folder)
    if not there:
        raise InputError(
            f"{folder} must have a checkpoint. A run saves the first at an evaluation, every "
            "checkpoint_every steps or at its end."
        )
    named = {"latest": there[-1], **{str(step): step for step in there}}
    if str(which) not in named:
        best = best_step(folder)
        named.update({"best": best} if best in there else {})
    if str(which) not in named:
        raise InputError(f"checkpoint must be one of {', '.join(named)} in {folder}, got {which}.")
    return named[str(which)]


def _path(folder: Path, step: int) -> Path:
    return Path(folder) / CHECKPOINTS / _NAME.format(step)


def _described(path: Path) -> list[Any]:
    return [path.stat().st_size, file_hash(path)]


def _check_files(path: Path) -> None:
    """Compare a checkpoint's files with its manifest. Raise InputError for the first that differs."""
    content = _object_in(path / MANIFEST)
    if content.get("format") != FORMAT:
        raise InputError(f"{path / MANIFEST}: format must be {FORMAT}, got {content.get('format')}")
    described = content.get("files")
    if not isinstance(described, dict) or set(described) != {WEIGHTS, OPTIMIZER, STATE}:
        raise InputError(f"{path / MANIFEST}: must describe the files {WEIGHTS}, {OPTIMIZER} and {STATE}")
    for name, expected in described.items():
        # A link could lead out of the run's folder, and reading from a pipe would not end.
        if (path / name).is_symlink() or not (path / name).is_file():
            raise InputError(f"{path / name}: must be a regular file")
        try:
            found = _described(path / name)
        except OSError as error:
            raise InputError(f"{path / name}: cannot be read ({error.strerror or error})") from error
        if found != expected:
            raise InputError(f"{path / name}: is damaged: its content differs from {MANIFEST}")


def _object_in(path: Path) -> dict[str, Any]:
    if path.is_symlink() or not path.is_file():
        raise InputError(f"{path}: must be a regular file")
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: must be a JSON object")
    return content


def _remove(path: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that half of one is never read."""
    removed = path.with_name(f".{path.name}.part")
    path.replace(removed)
    shutil.rmtree(removed)
