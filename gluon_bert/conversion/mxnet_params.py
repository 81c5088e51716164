"""Parameter files of two other BERTs for MXNet: GluonNLP 0.10's and the book's. Imports neither package."""

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
from .converter import ConvertedModel, to_foreign_names, to_own_names
from .vocabularies import read_vocabulary
from .weight_names import D2L, GLUONNLP, WeightNames

PARAMETERS = "bert.params"
_TIED = "mlm.decoder.weight"


class PackageFormat(NamedTuple):
    """One of the two: how its parameters are laid out, and what no file says of its network."""

    layout: WeightNames
    preset: str  # whose network it is, but for the sizes
    heads: str  # where one finds how many heads there are
    lowercase: bool | None  # whether its text is; None: as the vocabulary tells


KINDS = {
    "gluonnlp": PackageFormat(GLUONNLP, "bert-tiny", "bert_12_768_12 has 12, bert_24_1024_16 has 16", None),
    "d2l": PackageFormat(D2L, "d2l", "the book's model has 2", True),
}


def read_parameters(
    kind: str,
    path: Path,
    vocab_path: Path,
    num_heads: int | None,
    lowercase: bool | None = None,
    init_missing_heads: bool = False,
) -> ConvertedModel:
    """The network in a file that `save_parameters` of the other package's BERTModel wrote.

    kind: a key of KINDS. The sizes are those of the arrays; the number of heads must be said. What is left,
    such as dropout, is what the published models have. Raises InputError as `translate` does.
    """
    layout, like, heads, default_case = KINDS[kind]
    if num_heads is None:
        raise InputError(f"--num-heads: {path} does not say how many attention heads there are; {heads}")
    arrays = _load(path)
    config = _config(arrays, layout, like, num_heads, path)
    tokens = arrays[layout.name("encoder.embeddings.tokens.weight")]
    decoder = arrays.pop(layout.name(_TIED), tokens) if config.tied_decoder else tokens
    if not np.array_equal(decoder, tokens):
        raise InputError(
            f"{path}: the decoder's weights are not those of the embeddings, as they are in {kind}"
        )
    weights = to_own_names(arrays, layout, len(tokens), config, path, init_missing_heads)
    notes = [
        f"activation {config.activation}, LayerNorm epsilon {config.norm_epsilon:g} and dropout "
        f"{config.dropout:g} are those of {kind}'s models: the file does not say them"
    ]
    vocab = read_vocabulary(vocab_path, len(tokens), notes)
    known = default_case if lowercase is None else lowercase
    return ConvertedModel(weights, config, vocab, not vocab.is_cased() if known is None else known, notes)


def write_parameters(kind: str, run: Run, folder: Path) -> list[str]:
    """Write bert.params and the vocabulary for the other package, the inverse of `read_parameters`.

    Returns what a user should know. Raises InputError where its BERTModel has no place for the network, or
    where the folder is taken.
    """
    layout, like, _, _ = KINDS[kind]
    config, published = run.net.config, preset(like).model
    fixed = ["activation", "norm", "embedding_norm", "tied_decoder"]
    # GluonNLP's encoder takes an epsilon; the book's LayerNorm has MXNet's own.
    fixed += ["norm_epsilon"] if kind == "d2l" else []
    problems = [
        f"--to {kind}: its BERT has {name} {getattr(published, name)}, this run {getattr(config, name)}"
        for name in fixed
        if getattr(config, name) != getattr(published, name)
    ]
    if problems:
        raise InputError("\n".join(problems))
    weights = weights_of(run.net)
    if config.tied_decoder:
        weights[_TIED] = weights["encoder.embeddings.tokens.weight"]
    arrays = to_foreign_names(weights, layout)
    with atomic_folder(folder) as aside, mx.util.np_shape(kind == "d2l"):
        mx.nd.save(str(aside / PARAMETERS), {name: mx.nd.array(array) for name, array in arrays.items()})
        run.vocab.save(aside / run.vocab.FILE)
    return [
        f"{PARAMETERS} is read by a BERTModel of {config.num_layers} layers, {config.units} units, "
        f"{config.ffn_units} in the feed-forward network, {config.num_heads} heads, {config.max_positions} "
        f"positions and LayerNorm epsilon {config.norm_epsilon:g}"
    ]


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        path.open("rb").close()
        arrays = _load_either(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (mx.MXNetError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as MXNet's parameters ({one_line(error)})") from error
    if not isinstance(arrays, dict):
        raise InputError(f"{path}: its arrays have no names; write it with net.save_parameters")
    return {name: array.asnumpy() for name, array in arrays.items()}


def _load_either(path: Path) -> Any:
    """What is in a file, which MXNet reads only with NumPy's shapes if it was written so, as by the book."""
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
    """The network's configuration by the shapes of its arrays."""

    def shape(ours: str) -> tuple[int, ...]:
        name = layout.name(ours)
        if name not in arrays:
            found = " ".join(list(arrays)[:5])
            raise InputError(f"{path}: has no {name}: it is another network's; it has {found} ...")
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
