"""The run folder: create, read and load it. Writes no checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Sequence

from .checkpoint import CHECKPOINTS, CONFIG, FORMAT, WEIGHTS, _path, find_checkpoint, read_checkpoint
from .config import GROUPS, Config
from .data.tokenizer import Tokenizer
from .data.vocab import Normalization, Vocabulary
from .data.wordpiece import load_vocabulary
from .errors import InputError
from .fileio import check_new_folder, write_json
from .model.bert import BERTModel
from .model.classifier import BERTForTask, task_of
from .model.head_names import checked_heads
from .model.parameters import set_weights
from .model.pooling import Pooling
from .model.task import Task
from .runtime import mx

# Keys in config.json, which are there where they apply.
TASK, UNTRAINED, POOLING = "task", "untrained", "pooling"


class Run(NamedTuple):
    """A run read back from its folder: the network of one of its checkpoints, and what belongs to it.

    untrained: the heads, keys of HEADS, that no training has changed. pooling: how a text gets one vector,
    None where the run does not say it.
    """

    net: Any
    vocab: Vocabulary
    config: Config
    step: int
    untrained: tuple[str, ...] = ()
    pooling: Pooling | None = None

    @property
    def task(self) -> Task | None:
        """What the network was fine-tuned for, None for a pretrained one."""
        return task_of(self.net)

    @property
    def reader(self) -> Tokenizer:
        """What makes texts into the network's inputs, as it was trained on them."""
        return Tokenizer(
            self.vocab, self.config.data.max_seq_length, Normalization.from_config(self.config.data)
        )


def check_new_run(folder: Path, flag: str = "--output") -> None:
    """Raise InputError where no new run can be written, naming the flag; write nothing."""
    if (folder / CONFIG).exists():
        raise InputError(f"{flag} {folder}: holds a run already; name a new folder")
    check_new_folder(folder, flag)


def create_run(
    folder: Path,
    config: Config,
    vocab: Vocabulary,
    facts: Mapping[str, Any] | None = None,
    task: Task | None = None,
    untrained: Sequence[str] = (),
    pooling: Pooling | None = None,
) -> None:
    """Make a run's folder with its configuration and vocabulary.

    facts: what else it takes to repeat the run, such as versions and contexts. task: what the network is
    fine-tuned for. untrained, pooling: as in Run. Raises InputError where the folder holds a run already or
    cannot be written.
    """
    folder = Path(folder)
    check_new_run(folder)
    try:
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        vocab.save(folder / vocab.FILE)
        write_config(folder, config, facts or {}, task, untrained, pooling)
    except OSError as error:
        raise InputError(f"--output {folder}: cannot be written ({error.strerror or error})") from error


def write_config(
    folder: Path,
    config: Config,
    facts: Mapping[str, Any],
    task: Task | None = None,
    untrained: Sequence[str] = (),
    pooling: Pooling | None = None,
) -> None:
    """Write a run's config.json; `read_config`, `read_environment` and so on are the inverse."""
    content = {"format": FORMAT, **config.to_json(), "facts": facts}
    if task:
        content[TASK] = task.to_json()
    if untrained:
        content[UNTRAINED] = list(untrained)
    if pooling:
        content[POOLING] = pooling.to_json()
    write_json(folder / CONFIG, content)


def read_config(path: Path) -> Config:
    """The configuration in a run's config.json, which can be used; InputError where it is none."""
    content = _config_in(path)
    config = Config.from_json({name: content.get(name) for name in GROUPS}, where=str(path))
    try:
        config.check()
    except InputError as problem:
        raise InputError(f"{path}: {problem}") from problem
    return config


def read_environment(path: Path) -> dict[str, Any]:
    """What else a run's config.json says: contexts, versions, the text's fingerprint."""
    facts = _config_in(path).get("facts")
    return facts if isinstance(facts, dict) else {}


def _config_in(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as a run's configuration ({error})") from error
    if not isinstance(content, dict) or not GROUPS.keys() <= content.keys():
        raise InputError(f"{path}: cannot be read as a run's configuration: it has not {', '.join(GROUPS)}")
    if content.get("format") != FORMAT:
        raise InputError(f"{path}: format {content.get('format')}, where this gluon_bert reads {FORMAT}")
    return content


def read_task(path: Path) -> Task | None:
    """What the run of a config.json was fine-tuned for, None where it was pretrained."""
    content = _config_in(path)
    return Task.from_json(content[TASK], path) if TASK in content else None


def read_untrained(path: Path) -> tuple[str, ...]:
    """Return the heads that the run of a config.json has without training; InputError for unknown ones."""
    content = _config_in(path)
    heads = checked_heads(content.get(UNTRAINED, []), path)
    data = content["data"]
    masks_only = isinstance(data, dict) and data.get("objective") == "mlm"
    return tuple(dict.fromkeys([*heads, "pooler", "nsp"])) if masks_only else heads


def read_pooling(path: Path) -> Pooling | None:
    """Return how the run of a config.json makes one vector of a text, None where it does not say it."""
    content = _config_in(path)
    return Pooling.from_json(content[POOLING], path) if POOLING in content else None


def load_run(folder: Path, contexts: Sequence[Any] | None = None, which: str | int = "latest") -> Run:
    """Read a run's checkpoint onto the contexts, by default one CPU; InputError says what is missing.

    which: the latest, the best by the MLM loss on validation text, or that of a step.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder}: is no run: it has no {CONFIG}; name a folder that pretrain.py wrote")
    config = read_config(folder / CONFIG)
    vocab = load_vocabulary(folder)
    step = find_checkpoint(folder, which)
    task = read_task(folder / CONFIG)
    net = BERTForTask(len(vocab), config.model, task) if task else BERTModel(len(vocab), config.model)
    net.initialize(mx.init.Zero(), ctx=list(contexts or [mx.cpu()]))
    set_weights(net, read_checkpoint(folder, step, weights_only=True).weights, _path(folder, step) / WEIGHTS)
    net.hybridize()
    untrained, pooling = read_untrained(folder / CONFIG), read_pooling(folder / CONFIG)
    return Run(net, vocab, config, step, untrained, pooling)
