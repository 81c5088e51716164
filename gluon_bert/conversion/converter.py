"""Another package's arrays as a network's own, all problems at once; and a converted network as a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterable, Mapping, NamedTuple

import numpy as np

from ..checkpoint import save_checkpoint
from ..config import Config, DataConfig, ModelConfig
from ..data.vocab import Vocabulary
from ..data.wordpiece import WordPieceVocabulary
from ..errors import InputError, join_words
from ..fileio import atomic_folder
from ..model.bert import BERTModel
from ..model.classifier import BERTForTask
from ..model.head_names import HEADS
from ..model.parameters import named_parameters, put_weights
from ..model.pooling import Pooling
from ..model.task import Task
from ..presets import preset
from ..run import check_new_run, create_run, load_run
from ..runtime import mx, versions
from .weight_names import WeightNames


class OwnWeights(NamedTuple):
    """float32 arrays by our names, and the heads that another package's file did not have."""

    weights: Mapping[str, np.ndarray]
    untrained: tuple[str, ...]


@dataclass(frozen=True)
class ConvertedModel:
    """A network of another package in our terms.

    weights: float32 arrays by our names. tokenizer: fields of DataConfig that say how text is split.
    max_seq_length: the longest text that the files allow, None if they give no limit. untrained: heads
    without weights. pooling: how a text gets one vector. task: what a fine-tuned network answers. notes:
    sentences for the user about the conversion.
    """

    weights: Mapping[str, np.ndarray]
    model: ModelConfig
    vocab: Vocabulary
    tokenizer: Mapping[str, Any]
    max_seq_length: int | None = None
    untrained: tuple[str, ...] = ()
    pooling: Pooling | None = None
    task: Task | None = None
    notes: list[str] = field(default_factory=list)


def new_network(vocab_size: int, config: ModelConfig, task: Task | None = None) -> Any:
    """Return a network without weights, for pretraining or for a task."""
    return BERTForTask(vocab_size, config, task) if task else BERTModel(vocab_size, config)


def shapes(vocab_size: int, config: ModelConfig, task: Task | None = None) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a network's parameters by their names, each once."""
    found = named_parameters(new_network(vocab_size, config, task))
    return {name: tuple(parameter.shape) for name, parameter in found.items()}


def network(
    weights: Mapping[str, np.ndarray],
    vocab_size: int,
    config: ModelConfig,
    seed: int = 0,
    task: Task | None = None,
) -> Any:
    """Return a network on the CPU with these weights; heads that are not among them are drawn from the seed.

    The inverse of `weights_of`.
    """
    net = new_network(vocab_size, config, task)
    net.initialize(ctx=[mx.cpu()], seed=seed)
    net.hybridize()
    put_weights(net, weights)
    return net


def to_own_names(
    arrays: Mapping[str, np.ndarray],
    layout: WeightNames,
    vocab_size: int,
    config: ModelConfig,
    where: object,
    notes: list[str] | None = None,
    task: Task | None = None,
) -> OwnWeights:
    """Return another package's arrays as our weights, in float32.

    Heads may be missing as a whole. Arrays outside the encoder that we have no place for are left out, and a
    note names them. Raise one InputError that lists every missing and unexpected name and every other shape.
    """
    notes = [] if notes is None else notes
    wanted = {layout.name(name): (name, shape) for name, shape in shapes(vocab_size, config, task).items()}
    heads = () if task and task.scores_tokens else ("pooler",) if task else tuple(HEADS)
    untrained = tuple(head for head in heads if not _names_of(head, wanted) & arrays.keys())
    optional = {name for head in untrained for name in _names_of(head, wanted)}
    missing = [name for name in wanted if name not in arrays and name not in optional]
    others = sorted(name for name in arrays if name not in wanted)
    unexpected = [name for name in others if layout.is_of_encoder(name)]
    left_out = [name for name in others if not layout.is_of_encoder(name)]
    problems = [f"missing: {' '.join(missing)}"] if missing else []
    problems += [f"unexpected: {' '.join(unexpected)}"] if unexpected else []
    weights = {}
    for theirs, (ours, shape) in wanted.items():
        if theirs in arrays:
            problems += _problems_of(theirs, arrays[theirs], layout.foreign_shape(ours, shape))
            if not problems:
                weights[ours] = np.ascontiguousarray(layout.to_ours(ours, arrays[theirs]), dtype=np.float32)
    if problems:
        raise InputError("\n".join(f"{where}: {problem}" for problem in problems))
    if left_out:
        notes.append(f"left out, because they are not in BERT's encoder and heads: {_shortened(left_out)}")
    return OwnWeights(weights, untrained)


def _names_of(head: str, wanted: Mapping[str, tuple[str, Any]]) -> set[str]:
    return {theirs for theirs, (ours, _) in wanted.items() if ours.split(".")[0] == head}


def _problems_of(name: str, array: np.ndarray, shape: tuple[int, ...]) -> list[str]:
    if array.shape != shape:
        return [f"{name} must be {shape} in the network as configured, got {array.shape}"]
    return [] if np.isfinite(array).all() else [f"{name} contains NaN or infinite values"]


def _shortened(names: list[str], shown: int = 6) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return " ".join(names[:shown]) + more


def to_foreign_names(
    weights: Mapping[str, np.ndarray], layout: WeightNames, without: Iterable[str] = ()
) -> dict[str, np.ndarray]:
    """Return our weights under another package's names, without some heads; the inverse of `to_own_names`."""
    left_out = set(without)
    return {
        layout.name(name): np.ascontiguousarray(layout.to_theirs(name, array))
        for name, array in weights.items()
        if name.split(".")[0] not in left_out
    }


def save_run(
    converted: ConvertedModel, folder: Path, max_seq_length: int, source: Mapping[str, Any]
) -> Config:
    """Write a converted network as a run whose only checkpoint is step 0, whole or not at all.

    source: the origin, for config.json. The network leaves some settings open. A similar preset gives these.
    The run has no corpus.
    """
    check_new_run(folder)
    config = _config(converted, max_seq_length)
    net = network(converted.weights, len(converted.vocab), converted.model, task=converted.task)
    with atomic_folder(folder) as aside:
        environment = {"converted_from": source, "versions": versions()}
        create_run(
            aside,
            config,
            converted.vocab,
            environment,
            converted.task,
            untrained=converted.untrained,
            pooling=converted.pooling,
        )
        save_checkpoint(aside, net, step=0)
        load_run(aside)
    return config


def _config(converted: ConvertedModel, max_seq_length: int) -> Config:
    like: Config = preset("bert-tiny" if converted.model.embedding_norm else "d2l")
    defaults = DataConfig()
    wordpiece = isinstance(converted.vocab, WordPieceVocabulary)
    base = Config(model=converted.model, data=like.data, train=like.train)
    config = base.replace(
        **converted.tokenizer,
        tokenizer="wordpiece" if wordpiece else defaults.tokenizer,
        max_seq_length=max_seq_length,
        num_buckets=min(like.data.num_buckets, max_seq_length),
    )
    config.check()
    return config.replace(corpus=())


def untrained_note(untrained: Iterable[str]) -> list[str]:
    """Return the sentence about heads that a file did not have, empty if it had all."""
    names = [HEADS[head] for head in untrained]
    if not names:
        return []
    return [
        f"not in the file, so untrained: {join_words(names)}. "
        "Commands refuse to use an untrained head until it is trained."
    ]
