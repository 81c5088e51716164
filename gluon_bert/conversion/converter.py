"""Arrays under another package's names to a network's own, all problems at once; and a network to a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Mapping

import numpy as np

from ..checkpoint import save_checkpoint
from ..config import Config, DataConfig, ModelConfig
from ..data.vocab import Vocabulary
from ..data.wordpiece import WordPieceVocabulary
from ..errors import InputError
from ..fileio import atomic_folder
from ..model.bert import BERTModel
from ..model.parameters import named_parameters, put_weights
from ..presets import preset
from ..run import check_new_run, create_run, load_run
from ..runtime import mx, versions
from .weight_names import WeightNames

# What stands on the encoder; a published file may lack one as a whole.
HEADS = ("pooler", "mlm", "nsp")


@dataclass(frozen=True)
class ConvertedModel:
    """A network from elsewhere in our terms.

    weights: float32 arrays by our names. max_seq_length: the longest text it is to take. notes: what a user should
    know of the conversion, a sentence each.
    """

    weights: Mapping[str, np.ndarray]
    model: ModelConfig
    vocab: Vocabulary
    lowercase: bool
    notes: list[str] = field(default_factory=list)


def shapes(vocab_size: int, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The parameters of a network by their names, each once."""
    found = named_parameters(BERTModel(vocab_size, config))
    return {name: tuple(parameter.shape) for name, parameter in found.items()}


def network(weights: Mapping[str, np.ndarray], vocab_size: int, config: ModelConfig, seed: int = 0) -> Any:
    """A network on the CPU with these weights; heads that are not among them are drawn from the seed.

    The inverse of `checkpoint.weights_of`.
    """
    net = BERTModel(vocab_size, config)
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
    init_missing_heads: bool = False,
) -> dict[str, np.ndarray]:
    """Another package's arrays as our weights, in float32.

    init_missing_heads: leave out the heads that are missing as a whole. Raises one InputError that lists every missing
    and every unexpected name and every other shape.
    """
    wanted = {layout.name(name): (name, shape) for name, shape in shapes(vocab_size, config).items()}
    missing = [name for name in wanted if name not in arrays]
    unexpected = sorted(name for name in arrays if name not in wanted)
    problems = [f"missing: {' '.join(missing)}"] if missing else []
    if init_missing_heads:
        whole = [head for head in HEADS if _lacks_whole(head, wanted, missing)]
        missing = [name for name in missing if wanted[name][0].split(".")[0] not in whole]
        problems = [f"missing: {' '.join(missing)}"] if missing else []
    elif missing and all(wanted[name][0].split(".")[0] in HEADS for name in missing):
        problems = [f"{problems[0]}; --init-missing-heads yes draws heads that are missing as a whole anew"]
    problems += [f"unexpected: {' '.join(unexpected)}"] if unexpected else []
    weights = {}
    for theirs, (ours, shape) in wanted.items():
        if theirs not in arrays:
            continue
        array = arrays[theirs]
        if layout.to_theirs(ours, np.empty(shape, np.bool_)).shape != array.shape:
            problems.append(f"{theirs} is {array.shape}, where the network as configured has {shape}")
        elif not np.isfinite(array).all():
            problems.append(f"{theirs} holds values that are no numbers")
        else:
            weights[ours] = np.ascontiguousarray(layout.to_ours(ours, array), dtype=np.float32)
    if problems:
        raise InputError("\n".join(f"{where}: {problem}" for problem in problems))
    return weights


def _lacks_whole(head: str, wanted: Mapping[str, Any], missing: list[str]) -> bool:
    own = [theirs for theirs, (ours, _) in wanted.items() if ours.split(".")[0] == head]
    return all(name in missing for name in own)


def to_foreign_names(weights: Mapping[str, np.ndarray], layout: WeightNames) -> dict[str, np.ndarray]:
    """Our weights under another package's names; the inverse of `translate`."""
    return {
        layout.name(name): np.ascontiguousarray(layout.to_theirs(name, array))
        for name, array in weights.items()
    }


def save_run(foreign: ConvertedModel, folder: Path, max_seq_length: int, source: Mapping[str, Any]) -> Config:
    """Write a network from elsewhere as a run whose only checkpoint is step 0, whole or not at all.

    source: where it came from, for config.json. The run's settings of data and training are those of the
    preset that is like it; it has no corpus.
    """
    check_new_run(folder)
    config = _config(foreign, max_seq_length)
    net = network(foreign.weights, len(foreign.vocab), foreign.model)
    with atomic_folder(folder) as aside:
        create_run(aside, config, foreign.vocab, {"converted_from": source, "versions": versions()})
        save_checkpoint(aside, net, step=0)
        load_run(aside)
    return config


def _config(foreign: ConvertedModel, max_seq_length: int) -> Config:
    like: Config = preset("bert-tiny" if foreign.model.embedding_norm else "d2l")
    defaults = DataConfig()
    wordpiece = isinstance(foreign.vocab, WordPieceVocabulary)
    base = Config(model=foreign.model, data=like.data, train=like.train)
    config = base.replace(
        tokenizer="wordpiece" if wordpiece else defaults.tokenizer,
        lowercase=foreign.lowercase,
        max_seq_length=max_seq_length,
        num_buckets=min(like.data.num_buckets, max_seq_length),
    )
    config.check()
    return config.replace(corpus=())
