"""Writes a network as an ONNX file and runs it with onnxruntime. Needs the extra `onnx`."""

from __future__ import annotations

import importlib
import json
import os
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Iterator

from ..data.tokenizer import PaddedBatch
from ..errors import InputError
from ..inference.predictor import Outputs
from ..runtime import mx
from .manifest import Manifest, input_names
from .mxnet_symbol import Graph, model_inputs, outputs_needed, outputs_of

FILE = "bert.onnx"

# onnxruntime's option: on processors without VNNI, int8 products that do not overflow.
PRECISE_INT8 = "session.x64quantprecision"
# The opset of the operators that MXNet's converter writes, although it assumes onnx's newest opset.
OPSET = 13
# The oldest version of the file format with this opset. Most runtimes read it.
IR_VERSION = 7

# The limit of a protobuf message, less the size of the graph itself.
MAX_BYTES = 2**31 - 2**24

INSTALL = "pip install -e '.[cpu,onnx]'"

# The names of the inputs' axes in the file, and a size of each for MXNet's own inference of shapes.
_AXES = {"tokens": "BT", "token_types": "BT", "valid_length": "B", "masked_positions": "BK"}
_SIZES = {"B": 2, "T": 4, "K": 2}


def package(name: str) -> Any:
    """Return the module onnx or onnxruntime; raise InputError with the remedy where it cannot be loaded."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"an export to ONNX needs the package {name} ({error}): {INSTALL}") from error


def onnx_versions() -> dict[str, str]:
    """Return the versions of onnx and onnxruntime."""
    return {name: metadata.version(name) for name in ("onnx", "onnxruntime")}


def save_onnx(folder: Path, graph: Graph, outputs: str) -> None:
    """Write a graph with these outputs as ONNX, with any batch size, length and number of masks.

    A text that is longer than the graph's positions is an error in ONNX as well, because the shapes do not
    match. Raise InputError if the weights are too large for a file.
    """
    onnx = package("onnx")
    size = sum(4 * array.size for array in graph.parameters.values())
    if size > MAX_BYTES:
        raise InputError(
            f"weights must be at most {MAX_BYTES / 1e9:.1f} GB for format=onnx, got {size / 1e9:.1f} GB. Use "
            "format=mxnet."
        )
    names = input_names(outputs)
    with _checked_as(OPSET):
        converted = _converter()().create_onnx_graph_proto(
            _convertible(graph.symbol),
            graph.parameters,
            [tuple(_SIZES[axis] for axis in _AXES[name]) for name in names],
            [onnx.TensorProto.FLOAT for _ in names],
            opset_version=OPSET,
            dynamic=True,
            dynamic_input_shapes=[tuple(_AXES[name]) for name in names],
        )
    _make_constants(converted, names)
    opset = onnx.helper.make_opsetid("", OPSET)
    model = onnx.helper.make_model(converted, opset_imports=[opset], ir_version=IR_VERSION)
    onnx.save(model, str(folder / FILE))
    onnx.checker.check_model(str(folder / FILE), full_check=True)


def _converter() -> Any:
    return importlib.import_module(f"{mx.__name__}.onnx.mx2onnx._export_onnx").MXNetGraph


def _convertible(symbol: Any) -> Any:
    """Return the same graph without the reshape code -4, which the converter does not know.

    (-4, -1, H, 0, 0) parts the first axis in two; read from the right, (-1, H, 0, 0) does the same.
    """
    graph = json.loads(symbol.tojson())
    for node in graph["nodes"]:
        if node["op"] == "Reshape" and node["attrs"]["shape"].startswith("(-4, -1, "):
            node["attrs"]["shape"] = node["attrs"]["shape"].replace("(-4, ", "(", 1)
            node["attrs"]["reverse"] = "True"
    return mx.sym.load_json(json.dumps(graph))


@contextmanager
def _checked_as(opset: int) -> Iterator[None]:
    """Make onnx check graphs with this opset.

    The converter checks its graph with the newest one and cannot set another. There some attributes of
    operators have become inputs.
    """
    context = package("onnx").checker.DEFAULT_CONTEXT
    newest = context.opset_imports
    context.opset_imports = {"": opset}
    try:
        yield
    finally:
        context.opset_imports = newest


def _make_constants(graph: Any, inputs: list[str]) -> None:
    """Remove the weights from the inputs, and weights that no node reads.

    The converter lists weights as inputs, too. A runtime precomputes nothing from a weight that is an input.
    """
    _keep(graph.input, [each for each in graph.input if each.name in inputs])
    read = {name for node in graph.node for name in node.input}
    _keep(graph.initializer, [each for each in graph.initializer if each.name in read])


def _keep(field: Any, items: list[Any]) -> None:
    del field[:]
    field.extend(items)


class OnnxNetwork:
    """An exported network read back by onnxruntime, on the CPU; a Backend.

    A graph with mask scores is held twice, with them and without them. onnxruntime computes a whole graph,
    whatever outputs are requested (only_execute_path_to_fetches has had no effect since 1.19 at the latest).
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._manifest = manifest
        onnx = package("onnx")
        path, without_masks = folder / FILE, tuple(n for n in manifest.output_names if n != "mask_scores")
        try:
            graphs: dict[tuple[str, ...], Any] = {manifest.output_names: str(path)}
            if without_masks not in graphs:
                graphs[without_masks] = _part(onnx.load(str(path)), without_masks)
            self._sessions = {outputs: session(graph) for outputs, graph in graphs.items()}
        # The errors of protobuf and onnxruntime have no other class in common.
        except Exception as error:
            raise InputError(f"{path}: cannot be read as ONNX ({_first_line(error)})") from error

    def __call__(self, texts: PaddedBatch) -> Outputs:
        """Return the outputs, float32."""
        outputs = outputs_needed(self._manifest, texts)
        results = self._sessions[outputs].run(list(outputs), model_inputs(texts, outputs))
        return outputs_of(dict(zip(outputs, results)), texts)


def session(model: Any) -> Any:
    """Return what runs a model, its path or its bytes, on the CPU."""
    runtime = package("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors only; its warnings concern its own optimizations
    options.add_session_config_entry(PRECISE_INT8, "1")
    # As many threads as MXNet has. By default each worker of a server would use all cores.
    options.intra_op_num_threads = _threads()
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _part(model: Any, outputs: tuple[str, ...]) -> bytes:
    """Return the part of an ONNX model that computes these outputs of texts without masks."""
    extractor = importlib.import_module("onnx.utils").Extractor(model)
    return extractor.extract_model(input_names("encoder"), list(outputs)).SerializeToString()


def _threads() -> int:
    # runtime.py has set it, unless the user did. A list is for nested loops, which do not occur here.
    return int(os.environ["OMP_NUM_THREADS"].split(",")[0])


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
