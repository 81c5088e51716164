"""The folder of a run: its configuration, vocabulary and checkpoints, written and read back."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Sequence

import numpy as np

from .config import GROUPS, Config, write_json
from .data.texts import TextReader
from .data.vocab import Vocabulary
from .data.wordpiece import load_vocabulary
from .errors import BadInput, in_a_line
from .files import written_aside
from .model.bert import BERTModel
from .runtime import mx

CONFIG, CHECKPOINTS, BEST = "config.json", "checkpoints", "best.json"

# Raised when an older gluon_bert could not read what is written now.
FORMAT = 1

_NAME = "step-{:08d}.params"
_STEP = re.compile(r"step-(\d{8,})\.params")


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


def check_new(folder: Path) -> None:
    """Raise BadInput where no new run can be written; writes nothing."""
    if (folder / CONFIG).exists():
        raise BadInput(f"--output {folder}: holds a run already; name a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise BadInput(f"--output {folder}: is not empty; name a new folder")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise BadInput(f"--output {folder}: cannot be written, as {there} is no folder that can")


def create_run(
    folder: Path, config: Config, vocab: Vocabulary, facts: Mapping[str, Any] | None = None
) -> None:
    """Make a run's folder with its configuration and vocabulary.

    facts: what else it takes to repeat the run, such as versions and contexts. Raises BadInput where the
    folder holds a run already or cannot be written.
    """
    folder = Path(folder)
    check_new(folder)
    try:
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        vocab.save(folder / vocab.FILE)
        write_json(folder / CONFIG, {"format": FORMAT, **config.to_json(), "facts": facts or {}})
    except OSError as error:
        raise BadInput(f"--output {folder}: cannot be written ({error.strerror or error})") from error


def save_checkpoint(folder: Path, net: Any, step: int, *, best: bool = False, keep: int = 0) -> Path:
    """Write the weights after a step, whole or not at all; `load_run` is the inverse.

    best: they are the best so far, `load_run(folder, which="best")`. keep: of all checkpoints so many of the
    latest stay, and the best; 0: all. Whatever moment the process ends at, there are the latest and the best
    of before or of now: what gives way is deleted last.
    """
    path = _path(Path(folder), step)
    with written_aside(path, "wb") as file:
        net.save_parameters(file.name, deduplicate=True)
    if best:
        write_json(path.with_name(BEST), {"step": step})
    if keep:
        for old in set(steps(folder)[:-keep]) - {best_step(folder)}:
            _path(folder, old).unlink()
    return path


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, the latest last."""
    names = (_STEP.fullmatch(path.name) for path in (Path(folder) / CHECKPOINTS).glob("step-*.params"))
    return sorted(int(name[1]) for name in names if name)


def best_step(folder: Path) -> int | None:
    """The step of the best checkpoint, None where no evaluation has told; BadInput where it is unreadable."""
    path = Path(folder) / CHECKPOINTS / BEST
    try:
        return int(json.loads(path.read_text("utf-8"))["step"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
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


def read_config(path: Path) -> Config:
    """The configuration in a run's config.json; BadInput where it is none."""
    try:
        content = json.loads(path.read_text("utf-8"))
        groups = {name: content[name] for name in GROUPS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: cannot be read as a run's configuration ({error})") from error
    if content.get("format") != FORMAT:
        raise BadInput(f"{path}: format {content.get('format')}, where this gluon_bert reads {FORMAT}")
    return Config.from_json(groups, where=str(path))


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
    path = _path(folder, step)
    net = BERTModel(len(vocab), config.model)
    try:
        net.load_parameters(str(path), ctx=list(contexts or [mx.cpu()]))
    except (mx.MXNetError, AssertionError, ValueError, OSError) as error:
        # What MXNet says next is for programs: how to load a part of the parameters all the same.
        reason = in_a_line(error).split(" Please make sure")[0].split("Set allow_missing")[0].rstrip(" .")
        raise BadInput(
            f"{path}: cannot be read as the weights of this run ({reason}): it is damaged, or {CONFIG} or "
            f"{vocab.FILE} is another run's"
        ) from error
    _refuse_no_numbers(net, path)
    net.compile()
    return Run(net, vocab, config, step)


def _refuse_no_numbers(net: Any, path: Path) -> None:
    for name, parameter in net._collect_params_with_prefix().items():
        if not np.isfinite(parameter.list_data()[0].asnumpy()).all():
            raise BadInput(
                f"{path}: {name} holds values that are no numbers: the training had diverged, or the file is "
                "damaged; name another with --checkpoint"
            )


def _path(folder: Path, step: int) -> Path:
    return Path(folder) / CHECKPOINTS / _NAME.format(step)
