"""Makes dense layers of an ONNX file compute in int8, by onnxruntime's quantizer. Compares no texts."""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import numpy as np

from ..data.tokenizer import PaddedBatch
from .mxnet_symbol import model_inputs
from .onnx_graph import FILE, package, session

# The shares of the dense layers that may stay in float32, those with the largest errors first.
KEPT_SHARES = (0.0, 1 / 12, 1 / 6, 1 / 4, 1 / 3, 1 / 2)


class DenseLayer(NamedTuple):
    """A dense layer of an ONNX graph: its node's name, its input's name, and its weight (outputs, inputs)."""

    name: str
    input: str
    weight: np.ndarray


def quantize(
    folder: Path,
    outputs: Sequence[str],
    calibration: Sequence[PaddedBatch],
    is_close: Callable[[], bool],
) -> int:
    """Replace the file of `save_onnx` by one with dense layers in int8; return how many stay float32.

    Weights have a scale for each output (channel). The range of a layer's inputs is that of the batch, found
    in each call. If it reduces errors, outliers of the inputs are moved to the weights first. The layers with
    the largest errors on the calibration texts stay in float32: as few as possible until `is_close`, which
    reads the folder, returns True, and at most half of all layers.
    """
    onnx = package("onnx")
    model = _named(onnx.load(str(folder / FILE)))
    model, errors = _smoothed_where_better(model, outputs, calibration)
    ordered = sorted(errors, key=lambda name: -errors[name])
    for share in KEPT_SHARES:
        kept = ordered[: int(share * len(ordered))]
        _write_quantized(model, folder, kept)
        if is_close():
            break
    return len(kept)


def layer_errors(
    model: Any, layers: Sequence[DenseLayer], outputs: Sequence[str], calibration: Sequence[PaddedBatch]
) -> dict[str, float]:
    """Return what int8 changes in each layer's results, in units of their length, by the layers' names."""
    squares: dict[str, np.ndarray] = {layer.name: np.zeros(2) for layer in layers}
    for found in _layer_inputs(model, layers, outputs, calibration):
        for layer in layers:
            x = found[layer.input]
            exact = x @ layer.weight.T
            change = _rounded_inputs(x) @ _rounded_weight(layer.weight).T - exact
            squares[layer.name] += [np.square(change).sum(), np.square(exact).sum()]
    return {name: float(np.sqrt(change / max(exact, 1e-30))) for name, (change, exact) in squares.items()}


def _layer_inputs(
    model: Any, layers: Sequence[DenseLayer], outputs: Sequence[str], calibration: Sequence[PaddedBatch]
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the inputs of the layers for each batch, by their names: (N, C)."""
    onnx = package("onnx")
    names = list(dict.fromkeys(layer.input for layer in layers))
    extended = onnx.ModelProto()
    extended.CopyFrom(model)
    known = {each.name for each in (*extended.graph.output, *extended.graph.input)}
    extended.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in names
        if name not in known
    )
    run = session(extended.SerializeToString()).run
    for texts in calibration:
        inputs = model_inputs(texts, outputs)
        computed = [name for name in names if name not in inputs]
        found = {**inputs, **dict(zip(computed, run(computed, inputs) if computed else []))}
        yield {name: found[name].reshape(-1, found[name].shape[-1]) for name in names}


def _smoothed_where_better(
    model: Any, outputs: Sequence[str], calibration: Sequence[PaddedBatch]
) -> tuple[Any, dict[str, float]]:
    """Smooth the inputs of dense layers if that reduces their errors; return the model and all errors."""
    layers = _dense_layers(model)
    largest: dict[str, np.ndarray] = {}
    for found in _layer_inputs(model, layers, outputs, calibration):
        for name, x in found.items():
            largest[name] = np.maximum(largest.get(name, 0.0), np.abs(x).max(axis=0))
    before = layer_errors(model, layers, outputs, calibration)
    smooth = _smoothed(model, layers, largest)
    after = layer_errors(smooth, _dense_layers(smooth), outputs, calibration)

    def worst(errors: dict[str, float], name: str) -> float:
        return max(errors[layer.name] for layer in layers if layer.input == name)

    better = {name: columns for name, columns in largest.items() if worst(after, name) < worst(before, name)}
    errors = {layer.name: (after if layer.input in better else before)[layer.name] for layer in layers}
    return _smoothed(model, layers, better), errors


def _smoothed(model: Any, layers: Sequence[DenseLayer], largest: dict[str, np.ndarray]) -> Any:
    """Return the same network, in which some inputs of dense layers have no columns of outliers.

    largest: of these inputs, by their names, the largest absolute value of each column.

    The columns of the inputs are divided by a scale, and those of the weights multiplied (SmoothQuant, Xiao
    et al. 2022, section 4, with alpha 0.5): both then have the same largest values.
    """
    onnx = package("onnx")
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    weights = {each.name: each for each in graph.initializer}
    nodes = {node.name: node for node in graph.node}
    for name, columns in largest.items():
        readers = [layer for layer in layers if layer.input == name]
        weight = np.max([np.abs(layer.weight).max(axis=0) for layer in readers], axis=0)
        scale = np.sqrt(np.maximum(columns, 1e-5) / np.maximum(weight, 1e-5)).astype(np.float32)
        graph.initializer.append(onnx.numpy_helper.from_array(1 / scale, f"{name}_scale"))
        place = next(i for i, node in enumerate(graph.node) if node.name in {each.name for each in readers})
        scaled = f"{name}_scaled"
        graph.node.insert(place, onnx.helper.make_node("Mul", [name, f"{name}_scale"], [scaled], name=scaled))
        for layer in readers:
            node = nodes[layer.name]
            array = onnx.numpy_helper.from_array((layer.weight * scale).T.copy(), node.input[1])
            weights[node.input[1]].CopyFrom(array)
            node.input[0] = scaled
    return copy


def _rounded_inputs(x: np.ndarray) -> np.ndarray:
    """Return the inputs of a layer as 8 bits hold them: 256 steps over their range, with 0 among them."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = (high - low) / 255 or 1.0
    zero = np.round(-low / step)
    return (np.clip(np.round(x / step) + zero, 0, 255) - zero) * step


def _rounded_weight(weight: np.ndarray) -> np.ndarray:
    """Return a weight as int8 holds it, with a scale for each output."""
    step = np.maximum(np.abs(weight).max(axis=1, keepdims=True), 1e-30) / 127
    return np.round(weight / step) * step


def _named(model: Any) -> Any:
    """Return the model with dense layers as products and sums, each product with the name of its result."""
    _copy_shared_weights(model)
    wrapped = package("onnxruntime.quantization.onnx_model").ONNXModel(model)
    wrapped.replace_gemm_with_matmul()
    for node in wrapped.model.graph.node:
        if node.op_type == "MatMul":
            node.name = node.output[0]
    return wrapped.model


def _copy_shared_weights(model: Any) -> None:
    """Give each dense layer its own weight. The tied decoder shares that of the embeddings."""
    graph = model.graph
    weights = {each.name: each for each in graph.initializer}
    uses = Counter(name for node in graph.node for name in node.input)
    for node in graph.node:
        name = node.input[1] if node.op_type == "Gemm" else ""
        if name in weights and uses[name] > 1:
            copy = graph.initializer.add()
            copy.CopyFrom(weights[name])
            copy.name = node.input[1] = f"{name}_of_{node.output[0]}"
            uses[name] -= 1


def _dense_layers(model: Any) -> list[DenseLayer]:
    """Return the products of a matrix with a constant weight."""
    onnx = package("onnx")
    weights = {each.name: each for each in model.graph.initializer}
    return [
        DenseLayer(node.name, node.input[0], onnx.numpy_helper.to_array(weights[node.input[1]]).T)
        for node in model.graph.node
        if node.op_type == "MatMul" and node.input[1] in weights
    ]


def _write_quantized(model: Any, folder: Path, kept: Sequence[str]) -> None:
    quantization, onnx = package("onnxruntime.quantization"), package("onnx")
    copy = onnx.ModelProto()
    copy.CopyFrom(model)  # the quantizer changes its argument
    path = folder / FILE
    with _quiet():
        quantization.quantize_dynamic(
            copy,
            str(path),
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=list(kept),
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out the quantizer's advice to preprocess the model, which changes nothing here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
