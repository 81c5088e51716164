"""The folder of a run: its configuration, vocabulary and checkpoints, written and read back.

    config.json, vocab.json     or vocab.txt
    checkpoints/
      step-00000100/            whole, or not there under this name
        weights.npz             float32, under the parameters' structural names
        optimizer.npz           its running means, float32, and how often each parameter was updated, int64
        state.json              where the run stands: data, meters, clock, best evaluation, log, loss scale
        manifest.json           of each of them the bytes and the SHA-256
      best.json                 the step of the best one

No random state is kept, as there is none: each draw comes from the seed and the place it is drawn for.
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

# Raised when an older gluon_bert could not read what is written now.
FORMAT = 2

_NAME = "step-{:08d}"
_STEP = re.compile(r"step-([0-9]{8,15})")


class Snapshot(NamedTuple):
    """What a checkpoint holds, on the host.

    weights, optimizer: arrays by the parameters' structural names, the latter with what it is behind a slash.
    state: plain values, of the run at that step. The last two are empty where only weights were kept.
    """

    step: int
    weights: Mapping[str, np.ndarray]
    optimizer: Mapping[str, np.ndarray] = {}
    state: Mapping[str, Any] = {}


def save_checkpoint(folder: Path, net: Any, step: int, *, best: bool = False, keep: int = 0) -> Path:
    """Write the weights after a step, whole or not at all; `load_run` is the inverse.

    The options are those of `write_checkpoint`.
    """
    return write_checkpoint(folder, Snapshot(step, weights_of(net)), best=best, keep=keep)


def write_checkpoint(folder: Path, snapshot: Snapshot, *, best: bool = False, keep: int = 0) -> Path:
    """Write a checkpoint, whole or not at all; `read_checkpoint` is the inverse.

    best: it is the best so far, `load_run(folder, checkpoint="best")`. keep: of all checkpoints so many of the
    latest stay, and the best; 0: all. Whatever moment the process or the machine ends at, there are the
    latest and the best of before or of now: what gives way is deleted last, when the new one is on the disk.
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
    """A checkpoint that `write_checkpoint` wrote, compared with its manifest; InputError if it is damaged."""
    path = _path(Path(folder), step)
    _check_files(path)
    weights = read_arrays(path / WEIGHTS)
    if weights_only:
        return Snapshot(step, weights)
    state = _object_in(path / STATE)
    return Snapshot(step, weights, read_arrays(path / OPTIMIZER), state)


def latest_valid(folder: Path) -> Snapshot:
    """The latest checkpoint that is whole and can be gone on from; each later one is told, and stays there.

    Raises InputError where there is none.
    """
    if not steps(folder):
        raise InputError(f"{folder}: has no checkpoint to go on from; begin the run anew with --config")
    for step in reversed(steps(folder)):
        try:
            snapshot = read_checkpoint(folder, step)
            if not snapshot.state:
                raise InputError(f"{_path(folder, step)}: has the weights only")
            return snapshot
        except InputError as problem:
            log.warning("%s; the checkpoint before it is used", problem)
    raise InputError(f"{folder}: none of its checkpoints can be gone on from; begin anew with --config")


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, the latest last."""
    names = (_STEP.fullmatch(path.name) for path in (Path(folder) / CHECKPOINTS).glob("step-*"))
    return sorted(int(name[1]) for name in names if name)


def best_step(folder: Path) -> int | None:
    """The step of the best checkpoint, None where no evaluation has told; InputError where it is unreadable."""
    path = Path(folder) / CHECKPOINTS / BEST
    try:
        return int(json.loads(path.read_text("utf-8"))["step"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as the step of the best checkpoint ({error})") from error


def find_checkpoint(folder: Path, which: str | int = "latest") -> int:
    """The step of the checkpoint `latest`, `best` or of that step; InputError tells which ones there are."""
    there = steps(folder)
    if not there:
        raise InputError(
            f"{folder}: the run has no checkpoint yet: it keeps one with its first evaluation or at its end"
        )
    named = {"latest": there[-1], **{str(step): step for step in there}}
    if str(which) not in named:
        best = best_step(folder)
        named.update({"best": best} if best in there else {})
    if str(which) not in named:
        raise InputError(f"--checkpoint {which}: {folder} has none of that name; it has {', '.join(named)}")
    return named[str(which)]


def _path(folder: Path, step: int) -> Path:
    return Path(folder) / CHECKPOINTS / _NAME.format(step)


def _described(path: Path) -> list[Any]:
    return [path.stat().st_size, file_hash(path)]


def _check_files(path: Path) -> None:
    """Compare a checkpoint's files with its manifest; InputError says which one is not what it says."""
    content = _object_in(path / MANIFEST)
    if content.get("format") != FORMAT:
        raise InputError(f"{path / MANIFEST}: format {content.get('format')}, where this reads {FORMAT}")
    described = content.get("files")
    if not isinstance(described, dict) or set(described) != {WEIGHTS, OPTIMIZER, STATE}:
        raise InputError(f"{path / MANIFEST}: does not describe the files {WEIGHTS}, {OPTIMIZER}, {STATE}")
    for name, expected in described.items():
        # A link could lead out of the run's folder, and reading from a pipe would not end.
        if (path / name).is_symlink() or not (path / name).is_file():
            raise InputError(f"{path / name}: is missing, or no regular file")
        try:
            found = _described(path / name)
        except OSError as error:
            raise InputError(f"{path / name}: cannot be read ({error.strerror or error})") from error
        if found != expected:
            raise InputError(f"{path / name}: is damaged, it has not the content that {MANIFEST} says")


def _object_in(path: Path) -> dict[str, Any]:
    if path.is_symlink() or not path.is_file():
        raise InputError(f"{path}: is missing, or no regular file")
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: is no JSON object")
    return content


def _remove(path: Path) -> None:
    """Remove a checkpoint, which loses its name first: a half of one is never taken for a whole."""
    going = path.with_name(f".{path.name}.part")
    path.replace(going)
    shutil.rmtree(going)
