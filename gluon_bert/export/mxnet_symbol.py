"""Traces a network as a symbol of MXNet's own operators, and runs it again from its files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Sequence

import numpy as np

from ..data.tokenizer import PaddedBatch
from ..errors import InputError, one_line
from ..inference.predictor import Outputs
from ..runtime import mx
from .manifest import OUTPUTS, Manifest, input_names

# The file names that Module.load and MXNet's model servers expect for a model "bert" at epoch 0.
SYMBOL, PARAMETERS = "bert-symbol.json", "bert-0000.params"

# MXNet's number of this type in a symbol's JSON.
FLOAT32 = "0"


class Graph(NamedTuple):
    """A network as MXNet serves it: its symbol, and its parameters by their names in it."""

    symbol: Any
    parameters: dict[str, Any]


def trace(net: Any, outputs: str, max_seq_length: int) -> Graph:
    """Return the graph of a network for texts of at most `max_seq_length` tokens, with any batch size.

    outputs: a key of OUTPUTS. A longer text is an error of the graph, which has no more positions.
    """
    with mx.name.NameManager():  # so that equal networks have equal names, also after other traces
        net = _shortened(net, max_seq_length)
        tokens, token_types, valid_length = (mx.sym.var(name) for name in input_names("encoder"))
        results = {"encoded": net.encoder(tokens, token_types, valid_length)}
        if outputs == "all":
            results["pooled"] = net.pooler(results["encoded"])
            results["mask_scores"] = net.mlm(results["encoded"], _places(mx.sym.var("masked_positions")))
            results["next_scores"] = net.nsp(results["pooled"])
        elif outputs == "task":
            results["pooled"] = net.pooler(results["encoded"])
            results["task_scores"] = net.head(results["pooled"])
        elif outputs == "token-task":
            results["token_scores"] = net.scores(results["encoded"])
        symbol = mx.sym.Group([mx.sym.identity(results[name], name=name) for name in OUTPUTS[outputs]])
    used = set(symbol.list_arguments())
    parameters = {name: p.data(mx.cpu()) for name, p in net.collect_params().items() if name in used}
    return Graph(symbol, parameters)


def _places(positions: Any) -> Any:
    """Return row and position of each mask, (2, B, K), from the positions, (B, K).

    Every input of the graph has the batch as its first axis, as Module and the model servers require.
    """
    rows = mx.sym.contrib.arange_like(positions, axis=0).expand_dims(1)
    return mx.sym.stack(mx.sym.broadcast_like(rows, positions), positions)


def _shortened(net: Any, max_seq_length: int) -> Any:
    """Copy a network to the CPU, without dropout, with the first `max_seq_length` position embeddings."""
    config = dataclasses.replace(net.config, max_positions=max_seq_length, dropout=0.0)
    copy = net.with_config(config, prefix="bert_")
    copy.initialize(ctx=mx.cpu())
    originals = net._collect_params_with_prefix()
    for name, parameter in copy._collect_params_with_prefix().items():
        original = originals[name]
        data = original.data(original.list_ctx()[0]).as_in_context(mx.cpu())
        parameter.set_data(data[:max_seq_length] if name == "encoder.embeddings.positions.weight" else data)
    return copy


def save_graph(folder: Path, graph: Graph) -> None:
    """Write the symbol and the parameters; `load_graph` is the inverse."""
    # By default MXNet leaves out the casts of a graph in low precision when it saves.
    graph.symbol.save(str(folder / SYMBOL), remove_amp_cast=False)
    arrays = {f"arg:{name}": array for name, array in graph.parameters.items()}
    mx.nd.save(str(folder / PARAMETERS), arrays)


def load_graph(folder: Path) -> Graph:
    """Return the graph that `save_graph` wrote."""
    try:
        arrays = mx.nd.load(str(folder / PARAMETERS))
        symbol = mx.sym.load(str(folder / SYMBOL))
    except mx.MXNetError as error:
        raise InputError(f"{folder}: cannot be read as a graph ({one_line(error)})") from error
    return Graph(symbol, {name.split(":", 1)[1]: array for name, array in arrays.items()})


def model_inputs(texts: PaddedBatch, outputs: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the inputs of a graph with these outputs, float32, by name."""
    arrays = {"tokens": texts.tokens, "token_types": texts.token_types, "valid_length": texts.valid_length}
    if "mask_scores" in outputs:
        rows, positions = texts.masked_positions
        arrays["masked_positions"] = np.zeros(
            (len(texts.valid_length), np.bincount(rows).max()), dtype=np.int32
        )
        arrays["masked_positions"][rows, _place_in_row(rows)] = positions
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def outputs_of(results: Mapping[str, np.ndarray], texts: PaddedBatch) -> Outputs:
    """Return a graph's results, with the scores of the masks that exist: (B, K, V) -> (M, V)."""
    if "mask_scores" in results:
        rows = texts.masked_positions[0]
        results = {**results, "mask_scores": results["mask_scores"][rows, _place_in_row(rows)]}
    return Outputs(**results)


def _place_in_row(rows: np.ndarray) -> np.ndarray:
    """Return how many entries of the same row precede each entry: [0, 0, 2] -> [0, 1, 0]."""
    return np.arange(len(rows)) - np.searchsorted(rows, rows)


def outputs_needed(manifest: Manifest, texts: PaddedBatch) -> tuple[str, ...]:
    """Return the outputs to compute; mask scores, which are costly, only where there is a mask."""
    return tuple(n for n in manifest.output_names if n != "mask_scores" or texts.masked_positions.size)


def part_of(symbol: Any, outputs: Sequence[str]) -> Any:
    """Return the part of a graph that computes these outputs."""
    return mx.sym.Group([symbol[f"{name}_output"] for name in outputs])


class BlockNetwork:
    """An exported network read back by `gluon.SymbolBlock.imports`; a Backend."""

    def __init__(self, folder: Path, manifest: Manifest, context: Any | None = None) -> None:
        self._manifest, self._context = manifest, context or mx.cpu()
        without_masks = tuple(name for name in manifest.output_names if name != "mask_scores")
        # Without types of the inputs SymbolBlock treats every parameter as float32, and warns.
        with mx.AttrScope(__dtype__=FLOAT32):
            try:
                whole = mx.gluon.SymbolBlock.imports(
                    str(folder / SYMBOL), manifest.input_names, str(folder / PARAMETERS), ctx=self._context
                )
            except (mx.MXNetError, AssertionError, ValueError) as error:
                raise InputError(f"{folder}: cannot be read as a graph ({one_line(error)})") from error
            part = mx.gluon.SymbolBlock(
                part_of(mx.sym.load(str(folder / SYMBOL)), without_masks),
                [mx.sym.var(name) for name in input_names("encoder")],
                params=whole.collect_params(),
            )
        self._blocks = {without_masks: part, manifest.output_names: whole}

    def __call__(self, texts: PaddedBatch) -> Outputs:
        """Return the outputs on the host."""
        outputs = outputs_needed(self._manifest, texts)
        inputs = (mx.nd.array(array, ctx=self._context) for array in model_inputs(texts, outputs).values())
        results = self._blocks[outputs](*inputs)
        results = results if isinstance(results, (list, tuple)) else [results]
        return outputs_of(dict(zip(outputs, (each.asnumpy() for each in results))), texts)


class ModuleNetwork:
    """An exported network read back by `mx.mod.Module`, as MXNet's model servers do; a Backend."""

    def __init__(self, folder: Path, manifest: Manifest, context: Any | None = None) -> None:
        self._manifest, self._context = manifest, context or mx.cpu()
        self._graph = load_graph(folder)

    def __call__(self, texts: PaddedBatch) -> Outputs:
        """Return the outputs on the host. Binds anew each time, so use it for comparisons only."""
        outputs = outputs_needed(self._manifest, texts)
        inputs = model_inputs(texts, outputs)
        symbol = part_of(self._graph.symbol, outputs)
        module = mx.mod.Module(symbol, list(inputs), label_names=None, context=self._context)
        module.bind([(name, array.shape) for name, array in inputs.items()], for_training=False)
        module.set_params(self._graph.parameters, {}, allow_extra=True)
        module.forward(mx.io.DataBatch([mx.nd.array(each) for each in inputs.values()]), is_train=False)
        results = (each.asnumpy() for each in module.get_outputs())
        return outputs_of(dict(zip(outputs, results)), texts)
