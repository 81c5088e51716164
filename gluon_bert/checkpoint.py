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
import os
import re
import shutil
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Sequence

import numpy as np

from .array_files import read_arrays, write_arrays
from .config import GROUPS, Config, write_json
from .data.texts import TextReader
from .data.vocab import Vocabulary
from .data.wordpiece import load_vocabulary
from .errors import BadInput
from .files import digest, folder_aside
from .model.bert import BERTModel
from .model.finetuned import FineTunedModel
from .model.task import Task
from .runtime import mx

log = logging.getLogger(__name__)

CONFIG, CHECKPOINTS, BEST = "config.json", "checkpoints", "best.json"
WEIGHTS, OPTIMIZER, STATE, MANIFEST = "weights.npz", "optimizer.npz", "state.json", "manifest.json"
TASK = "task"  # the key in config.json

# Raised when an older gluon_bert could not read what is written now.
FORMAT = 2

_NAME = "step-{:08d}"
_STEP = re.compile(r"step-([0-9]{8,15})")


class Run(NamedTuple):
    """A run read back from its folder: the network of one of its checkpoints, and what belongs to it."""

    net: Any
    vocab: Vocabulary
    config: Config
    step: int

    @property
    def reader(self) -> TextReader:
        """What makes texts into the network's inputs, as it was trained on them."""
        return TextReader(self.vocab, self.config.data.max_len, self.config.data.lowercase)


def check_new(folder: Path, flag: str = "--output") -> None:
    """Raise BadInput where no new run can be written, naming the flag; writes nothing."""
    if (folder / CONFIG).exists():
        raise BadInput(f"{flag} {folder}: holds a run already; name a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise BadInput(f"{flag} {folder}: is not empty; name a new folder")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise BadInput(f"{flag} {folder}: cannot be written, as {there} is no folder that can")


def create_run(
    folder: Path,
    config: Config,
    vocab: Vocabulary,
    facts: Mapping[str, Any] | None = None,
    task: Task | None = None,
) -> None:
    """Make a run's folder with its configuration and vocabulary.

    facts: what else it takes to repeat the run, such as versions and contexts. task: what the network is
    fine-tuned for. Raises BadInput where the
    folder holds a run already or cannot be written.
    """
    folder = Path(folder)
    check_new(folder)
    try:
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        vocab.save(folder / vocab.FILE)
        write_config(folder, config, facts or {}, task)
    except OSError as error:
        raise BadInput(f"--output {folder}: cannot be written ({error.strerror or error})") from error


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

    best: it is the best so far, `load_run(folder, which="best")`. keep: of all checkpoints so many of the
    latest stay, and the best; 0: all. Whatever moment the process or the machine ends at, there are the
    latest and the best of before or of now: what gives way is deleted last, when the new one is on the disk.
    """
    path = _path(Path(folder), snapshot.step)
    with folder_aside(path, replace=True) as aside:
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
    """A checkpoint that `write_checkpoint` wrote, compared with its manifest; BadInput if it is damaged."""
    path = _path(Path(folder), step)
    _check_files(path)
    weights = read_arrays(path / WEIGHTS)
    if weights_only:
        return Snapshot(step, weights)
    state = _object_in(path / STATE)
    return Snapshot(step, weights, read_arrays(path / OPTIMIZER), state)


def latest_whole(folder: Path) -> Snapshot:
    """The latest checkpoint that is whole and can be gone on from; each later one is told, and stays there.

    Raises BadInput where there is none.
    """
    if not steps(folder):
        raise BadInput(f"{folder}: has no checkpoint to go on from; begin the run anew with --config")
    for step in reversed(steps(folder)):
        try:
            snapshot = read_checkpoint(folder, step)
            if not snapshot.state:
                raise BadInput(f"{_path(folder, step)}: has the weights only")
            return snapshot
        except BadInput as problem:
            log.warning("%s; the checkpoint before it is used", problem)
    raise BadInput(f"{folder}: none of its checkpoints can be gone on from; begin anew with --config")


def weights_of(net: Any) -> dict[str, np.ndarray]:
    """A copy of the network's weights on the host, float32, by structural names. Waits for the devices.

    A weight that two blocks share is there once, under its first name.
    """
    return {name: parameter.list_data()[0].asnumpy() for name, parameter in named_parameters(net).items()}


def set_weights(net: Any, weights: Mapping[str, np.ndarray], where: Path | str) -> None:
    """Give an initialized network these weights, on all its contexts; BadInput where they are another's.

    The inverse of `weights_of`.
    """
    parameters = named_parameters(net)
    problems = [f"{name} is missing" for name in parameters.keys() - weights.keys()]
    problems += [f"there is no {name}" for name in weights.keys() - parameters.keys()]
    for name in parameters.keys() & weights.keys():
        expected, found = tuple(parameters[name].shape), weights[name].shape
        if expected != found or weights[name].dtype != np.float32:
            problems.append(f"{name} is {weights[name].dtype} {found}, not float32 {expected}")
        elif not np.isfinite(weights[name]).all():
            problems.append(f"{name} holds values that are no numbers")
    if problems:
        raise BadInput(
            f"{where}: cannot be read as the weights of this run ({min(problems)}): it is damaged, or "
            f"{CONFIG} or the vocabulary is another run's; name another with --checkpoint"
        )
    put_weights(net, weights)


def put_weights(net: Any, weights: Mapping[str, np.ndarray]) -> None:
    """Give those parameters of an initialized network that are named these values, on all its contexts."""
    parameters = named_parameters(net)
    for name, array in weights.items():
        parameters[name].set_data(mx.nd.array(array, dtype=np.float32))


def named_parameters(net: Any) -> dict[str, Any]:
    """The network's parameters by structural names, such as "encoder.layers.0.attend.query.weight"."""
    names: dict[Any, str] = {}
    for name, parameter in net._collect_params_with_prefix().items():
        names.setdefault(parameter, name)
    return {name: parameter for parameter, name in names.items()}


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, the latest last."""
    names = (_STEP.fullmatch(path.name) for path in (Path(folder) / CHECKPOINTS).glob("step-*"))
    return sorted(int(name[1]) for name in names if name)


def best_step(folder: Path) -> int | None:
    """The step of the best checkpoint, None where no evaluation has told; BadInput where it is unreadable."""
    path = Path(folder) / CHECKPOINTS / BEST
    try:
        return int(json.loads(path.read_text("utf-8"))["step"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise BadInput(f"{path}: cannot be read as the step of the best checkpoint ({error})") from error


def find_checkpoint(folder: Path, which: str | int = "latest") -> int:
    """The step of the checkpoint `latest`, `best` or of that step; BadInput tells which ones there are."""
    there = steps(folder)
    if not there:
        raise BadInput(
            f"{folder}: the run has no checkpoint yet: it keeps one with its first evaluation or at its end"
        )
    named = {"latest": there[-1], **{str(step): step for step in there}}
    if str(which) not in named:
        best = best_step(folder)
        named.update({"best": best} if best in there else {})
    if str(which) not in named:
        raise BadInput(f"--checkpoint {which}: {folder} has none of that name; it has {', '.join(named)}")
    return named[str(which)]


def write_config(folder: Path, config: Config, facts: Mapping[str, Any], task: Task | None = None) -> None:
    """Write a run's config.json; `read_config`, `read_facts` and `read_task` are the inverse."""
    content = {"format": FORMAT, **config.to_json(), "facts": facts}
    write_json(folder / CONFIG, {**content, TASK: task.to_json()} if task else content)


def read_config(path: Path) -> Config:
    """The configuration in a run's config.json, which can be used; BadInput where it is none."""
    content = _config_in(path)
    config = Config.from_json({name: content.get(name) for name in GROUPS}, where=str(path))
    try:
        config.check()
    except BadInput as problem:
        raise BadInput(f"{path}: {problem}") from problem
    return config


def read_facts(path: Path) -> dict[str, Any]:
    """What else a run's config.json says: contexts, versions, the text's fingerprint."""
    facts = _config_in(path).get("facts")
    return facts if isinstance(facts, dict) else {}


def _config_in(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: cannot be read as a run's configuration ({error})") from error
    if not isinstance(content, dict) or not GROUPS.keys() <= content.keys():
        raise BadInput(f"{path}: cannot be read as a run's configuration: it has not {', '.join(GROUPS)}")
    if content.get("format") != FORMAT:
        raise BadInput(f"{path}: format {content.get('format')}, where this gluon_bert reads {FORMAT}")
    return content


def read_task(path: Path) -> Task | None:
    """What the run of a config.json was fine-tuned for, None where it was pretrained."""
    content = _config_in(path)
    return Task.from_json(content[TASK], path) if TASK in content else None


def load_run(folder: Path, contexts: Sequence[Any] | None = None, which: str | int = "latest") -> Run:
    """Read a run's checkpoint onto the contexts, by default one CPU; BadInput says what is missing.

    which: the latest, the best by the MLM loss on held-out text, or that of a step.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise BadInput(f"{folder}: is no run: it has no {CONFIG}; name a folder that pretrain.py wrote")
    config = read_config(folder / CONFIG)
    vocab = load_vocabulary(folder)
    step = find_checkpoint(folder, which)
    task = read_task(folder / CONFIG)
    net = FineTunedModel(len(vocab), config.model, task) if task else BERTModel(len(vocab), config.model)
    net.initialize(mx.init.Zero(), ctx=list(contexts or [mx.cpu()]))
    set_weights(net, read_checkpoint(folder, step, weights_only=True).weights, _path(folder, step) / WEIGHTS)
    net.compile()
    return Run(net, vocab, config, step)


def _path(folder: Path, step: int) -> Path:
    return Path(folder) / CHECKPOINTS / _NAME.format(step)


def _described(path: Path) -> list[Any]:
    return [path.stat().st_size, digest(path)]


def _check_files(path: Path) -> None:
    """Compare a checkpoint's files with its manifest; BadInput says which one is not what it says."""
    content = _object_in(path / MANIFEST)
    if content.get("format") != FORMAT:
        raise BadInput(f"{path / MANIFEST}: format {content.get('format')}, where this reads {FORMAT}")
    described = content.get("files")
    if not isinstance(described, dict) or set(described) != {WEIGHTS, OPTIMIZER, STATE}:
        raise BadInput(f"{path / MANIFEST}: does not describe the files {WEIGHTS}, {OPTIMIZER}, {STATE}")
    for name, expected in described.items():
        # A link could lead out of the run's folder, and reading from a pipe would not end.
        if (path / name).is_symlink() or not (path / name).is_file():
            raise BadInput(f"{path / name}: is missing, or no regular file")
        try:
            found = _described(path / name)
        except OSError as error:
            raise BadInput(f"{path / name}: cannot be read ({error.strerror or error})") from error
        if found != expected:
            raise BadInput(f"{path / name}: is damaged, it has not the content that {MANIFEST} says")


def _object_in(path: Path) -> dict[str, Any]:
    if path.is_symlink() or not path.is_file():
        raise BadInput(f"{path}: is missing, or no regular file")
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise BadInput(f"{path}: is no JSON object")
    return content


def _remove(path: Path) -> None:
    """Remove a checkpoint, which loses its name first: a half of one is never taken for a whole."""
    going = path.with_name(f".{path.name}.part")
    path.replace(going)
    shutil.rmtree(going)
