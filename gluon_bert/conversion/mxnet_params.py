"""Parameter files of two other BERTs for MXNet: GluonNLP 0.10's and D2L's. Imports neither package."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..config import ModelConfig, check_group
from ..errors import InputError, one_line
from ..fileio import atomic_folder
from ..model.parameters import weights_of
from ..presets import preset
from ..run import Run
from ..runtime import mx
from .converter import ConvertedModel, to_foreign_names, to_own_names, untrained_note
from .vocabularies import looks_cased, read_vocabulary
from .weight_names import D2L, GLUONNLP, WeightNames

PARAMETERS = "bert.params"
D2L_MAX_SEQ_LENGTH = 64
_TIED = "mlm.decoder.weight"


class PackageFormat(NamedTuple):
    """One of the two packages: the layout of its parameters, and settings that its files lack."""

    layout: WeightNames
    preset: str  # which has the same network, apart from the sizes
    heads: str  # how many attention heads its models have
    lowercase: bool | None  # whether its text is lower-cased; None: guess from the vocabulary


KINDS = {
    "gluonnlp": PackageFormat(GLUONNLP, "bert-tiny", "bert_12_768_12 has 12, bert_24_1024_16 has 16", None),
    "d2l": PackageFormat(D2L, "d2l", "D2L's model has 2", True),
}


def read_parameters(
    kind: str,
    path: Path,
    vocab_path: Path,
    num_heads: int | None,
    lowercase: bool | None = None,
) -> ConvertedModel:
    """Return the network in a file that `save_parameters` of the other package's BERTModel wrote.

    kind: a key of KINDS. The arrays give the sizes. The number of attention heads must be given. Other
    settings, such as dropout, are those of the published models. Raise InputError as `to_own_names` does.
    """
    layout, like, heads, default_case = KINDS[kind]
    if num_heads is None:
        raise InputError(
            f"num_heads must be given, as {path} does not say how many attention heads there are; {heads}"
        )
    arrays = _load(path)
    config = _config(arrays, layout, like, num_heads, path)
    tokens = arrays[layout.name("encoder.embeddings.tokens.weight")]
    decoder = arrays.pop(layout.name(_TIED), tokens) if config.tied_decoder else tokens
    if not np.array_equal(decoder, tokens):
        raise InputError(
            f"{path}: the decoder must share its weights with the embeddings, as in {kind}; they differ"
        )
    notes = [
        f"activation {config.activation}, LayerNorm epsilon {config.norm_epsilon:g} and dropout "
        f"{config.dropout:g} are those of {kind}'s models: the file does not say them"
    ]
    weights, untrained = to_own_names(arrays, layout, len(tokens), config, path, notes)
    vocab = read_vocabulary(vocab_path, len(tokens), notes)
    known = default_case if lowercase is None else lowercase
    tokenizer = {"lowercase": not looks_cased(vocab) if known is None else known}
    notes += untrained_note(untrained)
    # D2L's model has position embeddings for 1,000 tokens and is trained on pairs of at most 64.
    longest = D2L_MAX_SEQ_LENGTH if kind == "d2l" else None
    return ConvertedModel(weights, config, vocab, tokenizer, longest, untrained, notes=notes)


def write_parameters(kind: str, run: Run, folder: Path) -> list[str]:
    """Write bert.params and the vocabulary for the other package, the inverse of `read_parameters`.

    Untrained heads are left out. Return notes for the user. Raise InputError if its BERTModel cannot
    represent the network, or if the folder is not empty.
    """
    layout, like, _, _ = KINDS[kind]
    config, published = run.net.config, preset(like).model
    fixed = ["position", "activation", "norm", "embedding_norm", "tied_decoder"]
    # GluonNLP's encoder takes an epsilon; D2L's LayerNorm has MXNet's own.
    fixed += ["norm_epsilon"] if kind == "d2l" else []
    values = [(name, getattr(config, name), getattr(published, name)) for name in fixed]
    problems = [
        f"{kind} needs a run trained with {name}={theirs}, got {name}={ours}."
        for name, ours, theirs in values
        if ours != theirs
    ]
    if problems:
        raise InputError("\n".join(problems))
    weights = weights_of(run.net)
    if config.tied_decoder:
        weights[_TIED] = weights["encoder.embeddings.tokens.weight"]
    arrays = to_foreign_names(weights, layout, run.untrained)
    with atomic_folder(folder) as aside, mx.util.np_shape(kind == "d2l"):
        mx.nd.save(str(aside / PARAMETERS), {name: mx.nd.array(array) for name, array in arrays.items()})
        run.vocab.save(aside / run.vocab.FILE)
    notes = [
        f"{PARAMETERS} is for a BERTModel of {config.num_layers} layers, {config.units} units, "
        f"{config.ffn_units} in the feed-forward network, {config.num_heads} heads, {config.max_positions} "
        f"positions and LayerNorm epsilon {config.norm_epsilon:g}"
    ]
    return notes + ([f"left out, as untrained: {' '.join(run.untrained)}"] if run.untrained else [])


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        path.open("rb").close()
        arrays = _load_either(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (mx.MXNetError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as MXNet's parameters ({one_line(error)})") from error
    if not isinstance(arrays, dict):
        raise InputError(f"{path}: its arrays must have names. Write it with net.save_parameters.")
    return {name: array.asnumpy() for name, array in arrays.items()}


def _load_either(path: Path) -> Any:
    """Return the content of a file. A file written with NumPy's shapes can be read only with them."""
    try:
        return mx.nd.load(str(path))
    except mx.MXNetError as error:
        if "np shape semantics" not in str(error):
            raise
    with mx.util.np_shape(True):
        return mx.nd.load(str(path))


def _config(
    arrays: dict[str, np.ndarray], layout: WeightNames, like: str, num_heads: int, path: Path
) -> ModelConfig:
    """Return the network's configuration by the shapes of its arrays."""

    def shape(ours: str) -> tuple[int, ...]:
        name = layout.name(ours)
        if name not in arrays:
            found = " ".join(list(arrays)[:5])
            raise InputError(f"{path}: must have {name}; it is another network's and has {found} ...")
        return arrays[name].shape

    prefix = re.escape(layout.name("encoder.layers") + ".")
    layers = {int(m[1]) for m in (re.match(rf"{prefix}(\d+)\.", name) for name in arrays) if m}
    config = dataclasses.replace(
        preset(like).model,
        num_layers=len(layers),
        units=shape("encoder.embeddings.tokens.weight")[-1],
        ffn_units=shape("encoder.layers.0.feed_forward.expand.weight")[0],
        max_positions=shape("encoder.embeddings.positions.weight")[-2],
        num_heads=num_heads,
    )
    check_group(config)
    return config
