"""Converts a network's graph to int8 and to bf16 by MXNet's own passes. Compares nothing."""

from __future__ import annotations

import importlib
import json
from typing import Any, Iterable

import numpy as np

from ..data.tokenizer import PaddedBatch
from ..errors import InputError
from ..runtime import mx
from .manifest import OUTPUTS
from .mxnet_symbol import Graph, model_inputs

# MXNet's name for oneDNN, its CPU library, in passes over a graph.
BACKEND = "MKLDNN_QUANTIZE"

# Operators that stay float32. With residual sums in int8 the vectors of a trained bert-tiny were off by 20 %
# instead of 0.8 %, and no faster.
FLOAT_OPERATORS = ("Embedding", "elemwise_add")

# MXNet's stand-in for bfloat16, which NumPy does not have.
BFLOAT16 = np.dtype([("bfloat16", np.uint16)])
# MXNet's number of bfloat16 in a symbol's JSON.
_BFLOAT16 = "12"


def to_int8(graph: Graph, outputs: str, calibration: Iterable[PaddedBatch]) -> Graph:
    """Return a graph with these outputs whose dense layers compute in int8.

    The calibration texts give the range of a layer's values. They must have all lengths, because the range
    for long texts is wrong for short ones.
    """
    quantization = _module("contrib.quantization")
    fused = graph.symbol.get_backend_symbol(BACKEND)
    settings: dict[str, Any] = {"calib_mode": "naive", "quantized_dtype": "int8", "logger": None}
    # A scale for each weight. With one for each of its rows (channel-wise) MXNet keeps the weights in float32
    # and makes int8 of them in every call: half as fast for a fifth less error.
    symbol, _, _, ranges = quantization.quantize_graph(
        fused,
        dict(graph.parameters),
        {},
        excluded_op_names=list(FLOAT_OPERATORS),
        quantize_granularity="tensor-wise",
        **settings,
    )
    for texts in calibration:
        inputs = {name: mx.nd.array(array) for name, array in model_inputs(texts, OUTPUTS[outputs]).items()}
        executor = fused.bind(mx.cpu(), {**graph.parameters, **inputs}, grad_req="null")
        executor.set_monitor_callback(ranges.collect, monitor_all=True)
        executor.forward(is_train=False)
        mx.nd.waitall()
    symbol, parameters, _ = quantization.calib_graph(symbol, dict(graph.parameters), {}, ranges, **settings)
    symbol = symbol.get_backend_symbol(BACKEND)
    # The passes drop the identities that gave the outputs their names.
    named = (mx.sym.identity(symbol[i], name=name) for i, name in enumerate(OUTPUTS[outputs]))
    return Graph(mx.sym.Group(list(named)), parameters)


def to_bf16(graph: Graph) -> Graph:
    """Return a graph whose dense layers compute in bfloat16 and keep their weights in it."""
    symbol, parameters, _ = _module("contrib.amp").convert_model(
        graph.symbol, dict(graph.parameters), {}, target_dtype="bfloat16"
    )
    return _with_cast_weights(Graph(symbol, parameters))


def _with_cast_weights(graph: Graph) -> Graph:
    """Return the graph with its weights cast beforehand, so that no call repeats it.

    MXNet's own option for that (cast_optional_params) fails where an embedding shares its weight with the
    decoder: here such a weight is kept in both types.
    """
    content = json.loads(graph.symbol.tojson(remove_amp_cast=False))
    nodes, parameters = content["nodes"], dict(graph.parameters)
    for number, node in enumerate(nodes):
        source = nodes[node["inputs"][0][0]]["name"] if node["op"] == "amp_cast" else None
        if source in graph.parameters:
            parameters[node["name"]] = mx.nd.amp_cast(parameters[source], dtype=BFLOAT16)
            node.update(op="null", inputs=[], attrs={"__dtype__": _BFLOAT16})
            content["arg_nodes"].append(number)
    content["arg_nodes"].sort()
    symbol = mx.sym.load_json(json.dumps(content))
    used = set(symbol.list_arguments())
    return Graph(symbol, {name: array for name, array in parameters.items() if name in used})


def check_bf16() -> None:
    """Raise InputError if MXNet cannot compute in bfloat16 on this CPU.

    The check computes a product: the CPU's own flags do not suffice, as DNNL_MAX_CPU_ISA may limit oneDNN.
    It needs AVX-512. Without AVX512_BF16 it gives the same results, but slower than in float32.
    """
    ones = mx.nd.amp_cast(mx.nd.ones((16, 16)), dtype=BFLOAT16)
    try:
        mx.nd.FullyConnected(ones, ones, no_bias=True, num_hidden=16).wait_to_read()
    except mx.MXNetError as error:
        raise InputError("bf16 needs a CPU with AVX-512. Export with format=mxnet or format=onnx.") from error


def check_int8() -> None:
    """Raise InputError if MXNet's int8 products are wrong on this CPU.

    Without VNNI oneDNN adds pairs of products in 16 bits, which two large ones overflow silently. The check
    computes a product, as `check_bf16` does.
    """
    width = 16
    tokens = mx.nd.full((1, width), 255, dtype=np.uint8)
    weight = mx.nd.full((1, width), 127, dtype=np.int8)
    bounds = [mx.nd.array([value]) for value in (0, 255, -127, 127)]
    products, *_ = mx.nd.contrib.quantized_fully_connected(
        tokens, weight, *bounds, num_hidden=1, no_bias=True, flatten=False
    )
    if products.asscalar() != 255 * 127 * width:
        raise InputError(
            "int8 needs a CPU with AVX512_VNNI; products overflow on this one. Export with format=mxnet or "
            "format=onnx."
        )


def _module(name: str) -> Any:
    return importlib.import_module(f"{mx.__name__}.{name}")
