"""The run folder: create, read and load it. Writes no checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, Sequence, Tuple, Union

import numpy as np

from .checkpoint import (
    CHECKPOINTS,
    CONFIG,
    FORMAT,
    WEIGHTS,
    _path,
    best_step,
    find_checkpoint,
    read_checkpoint,
)
from .config import GROUPS, NEGATIVE_PAIRS, Config
from .data.tokenizer import EncodedText, Tokenizer
from .data.vocab import Normalization, Vocabulary
from .data.wordpiece import WordPieceVocabulary, load_vocabulary
from .errors import InputError
from .fileio import check_new_folder, remove_temporary_files, write_json
from .inference.attention import Attention, attention_of
from .inference.nearest_words import nearest_words
from .inference.predictor import Prediction, Predictor
from .inference.task_inputs import predict_tasks, task_input
from .model.bert import BERTModel
from .model.classifier import BERTForTask, task_of
from .model.head_names import checked_heads
from .model.parameters import set_weights
from .model.pooling import POOLINGS, Pooling
from .model.task import Task
from .runtime import mx

# Optional keys in config.json.
TASK, UNTRAINED, POOLING = "task", "untrained", "pooling"


# A text, or a pair of texts.
Text = Union[str, Tuple[str, str]]


@dataclass(frozen=True)
class Run:
    """A trained network with its vocabulary and configuration, as `load_run` and `pretrain` return it.

    net: a `BERTModel` or a `BERTForTask`. step: of its checkpoint. untrained: heads that no training has
    changed, keys of HEADS. pooling: how a text gets one vector, or None. folder: of the run.

    >>> run = load_run("runs/quick", checkpoint="best")                         # doctest: +SKIP
    >>> run.encode(["a crane is flying", ("it rained", "she left")]).shape
    (2, 128)
    >>> run.fill_mask("the <mask> is flying", top=2)
    [[('bird', 0.21), ('plane', 0.07)]]
    """

    net: Any
    vocab: Vocabulary
    config: Config
    step: int
    untrained: tuple[str, ...] = ()
    pooling: Pooling | None = None
    folder: Path | None = None

    def encode(
        self, texts: Iterable[Text], pooling: str | None = None, normalize: bool | None = None
    ) -> np.ndarray:
        """Return a vector of each text or pair: (N, C) float32. Texts that are too long are truncated.

        pooling: mean, cls or max over the tokens' vectors. normalize: to length 1. None: the run's setting,
        otherwise the mean without normalization.
        """
        own = self.pooling or Pooling()
        mode = own.mode if pooling is None else pooling
        if mode not in POOLINGS:
            raise InputError(f"pooling must be one of {', '.join(POOLINGS)}, got {mode!r}.")
        pool = Pooling(mode, own.normalize if normalize is None else normalize)
        rows = [pool(each.vectors) for each in self._predict(texts)]
        return np.stack(rows) if rows else np.zeros((0, self.config.model.units), np.float32)

    def token_vectors(self, text: Text) -> tuple[list[str], np.ndarray]:
        """Return the T tokens of a text or pair, with <cls> and <sep>, and their vectors: (T, C) float32."""
        found = next(self._predict([text]))
        return found.text.tokens, found.vectors

    def attention(self, text: Text) -> Attention:
        """Return the attention weights of a text or pair: (L, H, T, T); its `save` draws them.

        >>> run.attention("a crane is flying").save("attention.png")            # doctest: +SKIP
        """
        return attention_of(self.net, self._encoded(text))

    def nearest(self, word: str, top: int = 10) -> list[tuple[str, float]]:
        """Return the `top` tokens whose embeddings are nearest to that of a word, with their cosines."""
        embeddings = self.net.encoder.embeddings.tokens.weight
        return nearest_words(embeddings.data(embeddings.list_ctx()[0]).asnumpy(), self.reader, word, top)

    def fill_mask(self, text: Text, top: int = 5) -> list[list[tuple[str, float]]]:
        """Return for each <mask> of a text the `top` most probable tokens with their probabilities."""
        return next(self._predict([text])).fill_masks(self.vocab, top)

    def next_sentence(self, first: str, second: str) -> float:
        """Return the probability that the second text follows the first."""
        return next(self._predict([(first, second)])).next_sentence_probability

    def predict(self, texts: Iterable[Text]) -> list[dict[str, Any]]:
        """Return the JSON values that a fine-tuned network predicts for each text.

        {"label", "probabilities"} of classes, {"score"}, {"words", "tags", "entities"} of words, or
        {"answer", "start", "end", "score"} of a pair of a question and its context.
        """
        inputs = (task_input(self.task, self.reader, *_pair(each)) for each in _listed(texts))
        return [result.to_json() for result in predict_tasks(Predictor.of(self), inputs)]

    def _predict(self, texts: Iterable[Text]) -> Iterator[Prediction]:
        return Predictor.of(self).predict(map(self._encoded, _listed(texts)))

    def _encoded(self, text: Text) -> EncodedText:
        return self.reader.text(*_pair(text), truncate=True)

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Return the last logged figures: "train" of a window of steps, "validation" of an evaluation."""
        found: dict[str, dict[str, float]] = {}
        for line in (self._folder() / "log.jsonl").read_text("utf-8").splitlines():
            record = json.loads(line)
            if "validation" in record:
                found["validation"] = {"step": record["step"], **record["validation"]}
            elif any(name.endswith("_loss") for name in record):
                found["train"] = record
        return found

    @property
    def best_step(self) -> int | None:
        """Return the step of the best checkpoint; None without evaluations."""
        return best_step(self._folder())

    def _folder(self) -> Path:
        if self.folder is None:
            raise InputError("This run has no folder. Load one with load_run.")
        return self.folder

    @property
    def task(self) -> Task | None:
        """Return the task of a fine-tuned network, None for a pretrained one."""
        return task_of(self.net)

    @property
    def reader(self) -> Tokenizer:
        """Return the tokenizer, with the settings of training."""
        return Tokenizer(
            self.vocab, self.config.data.max_seq_length, Normalization.from_config(self.config.data)
        )


def _listed(texts: Iterable[Text]) -> Iterable[Text]:
    """Return the texts; raise InputError if they are one string, which would be read as its characters."""
    if isinstance(texts, str):
        raise InputError(f"texts must be a list of texts, got the string {texts!r}. Put it in a list.")
    return texts


def _pair(text: Text) -> tuple[str, str | None]:
    if isinstance(text, str):
        return text, None
    if not isinstance(text, (tuple, list)) or [type(each) for each in text] != [str, str]:
        raise InputError(f"a text must be a string or a pair of strings, got {text!r}.")
    first, second = text
    return first, second


def check_new_run(folder: Path, option: str = "output") -> None:
    """Raise InputError, which names the option, if no new run can be written to a folder."""
    if (folder / CONFIG).exists():
        raise InputError(f"{option} must be a new folder, got {folder}, which has a run.")
    check_new_folder(folder, option)


def remove_unfinished_run(folder: Path) -> None:
    """Remove the files of a run that was killed before it wrote its config.json, and nothing else."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    visible = {name for name in names if not name.startswith(".")}
    if not visible <= {Vocabulary.FILE, WordPieceVocabulary.FILE, CHECKPOINTS}:
        return
    if CHECKPOINTS in names and any((folder / CHECKPOINTS).iterdir()):
        return
    remove_temporary_files(folder)
    for name in visible:
        (folder / name).rmdir() if name == CHECKPOINTS else (folder / name).unlink()


def create_run(
    folder: Path,
    config: Config,
    vocab: Vocabulary,
    environment: Mapping[str, Any] | None = None,
    task: Task | None = None,
    untrained: Sequence[str] = (),
    pooling: Pooling | None = None,
) -> None:
    """Create a run's folder with its configuration and vocabulary.

    environment: further values for repeating the run, such as versions and contexts. task: the task of a
    fine-tuned network. untrained, pooling: as in Run. Raise InputError if the folder has a run or cannot be
    written.
    """
    folder = Path(folder)
    check_new_run(folder)
    try:
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        vocab.save(folder / vocab.FILE)
        write_config(folder, config, environment or {}, task, untrained, pooling)
    except OSError as error:
        raise InputError(
            f"output must be a folder that can be written, got {folder} ({error.strerror or error})."
        ) from error


def write_config(
    folder: Path,
    config: Config,
    environment: Mapping[str, Any],
    task: Task | None = None,
    untrained: Sequence[str] = (),
    pooling: Pooling | None = None,
) -> None:
    """Write a run's config.json; `read_config`, `read_environment` and so on are the inverse."""
    content = {"format": FORMAT, **config.to_json(), "environment": environment}
    if task:
        content[TASK] = task.to_json()
    if untrained:
        content[UNTRAINED] = list(untrained)
    if pooling:
        content[POOLING] = pooling.to_json()
    write_json(folder / CONFIG, content)


def read_config(path: Path) -> Config:
    """Read the configuration in a run's config.json. Raise InputError if it is not valid."""
    content = _config_in(path)
    config = Config.from_json({name: content.get(name) for name in GROUPS}, where=str(path))
    try:
        config.check()
    except InputError as problem:
        lines = str(problem).splitlines()
        raise InputError("\n".join(f"{path}: {line}" for line in lines)) from problem
    return config


def read_environment(path: Path) -> dict[str, Any]:
    """Read the environment in a run's config.json: contexts, versions, the fingerprint of the text."""
    environment = _config_in(path).get("environment")
    return environment if isinstance(environment, dict) else {}


def _config_in(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as a run's configuration ({error})") from error
    if not isinstance(content, dict) or not GROUPS.keys() <= content.keys():
        raise InputError(f"{path}: must be a run's configuration with {', '.join(GROUPS)}")
    if content.get("format") != FORMAT:
        raise InputError(f"{path}: format must be {FORMAT}, got {content.get('format')}")
    return content


def read_task(path: Path) -> Task | None:
    """Read the task of a run from its config.json, None for a pretraining run."""
    content = _config_in(path)
    return Task.from_json(content[TASK], path) if TASK in content else None


def read_untrained(path: Path) -> tuple[str, ...]:
    """Return the untrained heads in a run's config.json; raise InputError for unknown ones."""
    content = _config_in(path)
    heads = checked_heads(content.get(UNTRAINED, []), path)
    data = content["data"]
    objective = data.get("objective") if isinstance(data, dict) else None
    masks_only = NEGATIVE_PAIRS.get(str(objective)) == "none"
    return tuple(dict.fromkeys([*heads, "pooler", "nsp"])) if masks_only else heads


def read_pooling(path: Path) -> Pooling | None:
    """Return the pooling in a run's config.json, or None."""
    content = _config_in(path)
    return Pooling.from_json(content[POOLING], path) if POOLING in content else None


def load_run(
    folder: Path | str, devices: Sequence[Any] | None = None, checkpoint: str | int = "latest"
) -> Run:
    """Load a run's checkpoint onto the devices, by default one CPU.

    checkpoint: latest, best, or a step. The best has the lowest MLM loss on validation text, or the best
    metric of a fine-tuned run. Raise InputError if something is missing or damaged.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} must be the folder of a run: it has no {CONFIG}.")
    config = read_config(folder / CONFIG)
    vocab = load_vocabulary(folder)
    step = find_checkpoint(folder, checkpoint)
    task = read_task(folder / CONFIG)
    net = BERTForTask(len(vocab), config.model, task) if task else BERTModel(len(vocab), config.model)
    net.initialize(mx.init.Zero(), ctx=list(devices or [mx.cpu()]))
    set_weights(net, read_checkpoint(folder, step, weights_only=True).weights, _path(folder, step) / WEIGHTS)
    net.hybridize()
    untrained, pooling = read_untrained(folder / CONFIG), read_pooling(folder / CONFIG)
    return Run(net, vocab, config, step, untrained, pooling, folder)
