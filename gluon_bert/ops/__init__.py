"""Chooses and calls the operators of the network: compiled ones on a CPU with a C++ compiler, or MXNet's own.

All calls of compiled operators go through this file. They compute hybridized blocks on a CPU. They never
enter a graph, so an export contains MXNet's operators only. Both kinds give the same results, except that
they draw different dropout.
"""

from __future__ import annotations

import ctypes
import logging
import os
from functools import lru_cache
from typing import Any, Mapping, Sequence

from ..config import ModelConfig
from ..errors import InputError, one_line
from ..runtime import mx
from .build import BuildError, built_library

# The environment variable that chooses the operators if no flag does.
VARIABLE = "GLUON_BERT_OPERATORS"
CHOICES = ("auto", "compiled", "mxnet")

log = logging.getLogger(__name__)


def select(name: str | None = None, contexts: Sequence[Any] = ()) -> str:
    """Choose the operators of this process, build them if necessary, and return their description.

    name: one of CHOICES; None takes the variable GLUON_BERT_OPERATORS, or auto. contexts: where they compute
    (default: a CPU); nothing is built for GPUs. Raise InputError if `compiled` is not possible.
    """
    if name is not None:
        _check_choice(name, "operators")
        os.environ[VARIABLE] = name  # for the processes that this one starts, too
    _unavailable_reason.cache_clear()
    return describe(contexts)


def describe(contexts: Sequence[Any] = ()) -> str:
    """Describe the operators for these contexts (default: a CPU), with the reason if they are MXNet's."""
    if any(context.device_type != "cpu" for context in contexts):
        return "MXNet's own"
    reason = _unavailable_reason()
    return f"MXNet's own ({reason})" if reason else "compiled for this processor"


def compiled(contexts: Sequence[Any]) -> bool:
    """Return whether the compiled operators can compute on these contexts."""
    return all(context.device_type == "cpu" for context in contexts) and not _unavailable_reason()


def parse_description(description: str) -> str | None:
    """Return the argument of `select` for the operators in a text of `describe`; None for compiled ones.

    >>> parse_description("MXNet's own (no compiler was found)"), parse_description("compiled for this
    processor") ('mxnet', None)
    """
    return "mxnet" if description.startswith("MXNet's") else None


def use_compiled(block: Any, array: Any) -> bool:
    """Return whether the compiled operators compute this block's result for this array."""
    return (
        block._active
        and isinstance(array, mx.nd.NDArray)
        and array.context.device_type == "cpu"
        and not _unavailable_reason()
    )


def encode(
    config: ModelConfig,
    parameters: Sequence[Any],
    tokens: Any,
    token_types: Any,
    valid_length: Any,
    output_positions: Any = None,
    recompute: bool = False,
    bf16: bool = False,
) -> Any:
    """Compute `Encoder`: (B, T) tokens to (B, T, C) vectors. Vectors of padding are zeros.

    parameters: the encoder's gluon Parameters in the order in which it uses them. output_positions: as for
    `Encoder`; the vectors elsewhere are zeros, and their gradients are ignored. recompute: the backward
    pass computes each layer again, to the same bits, instead of keeping its values. bf16: matrix products,
    forward and backward, round their factors to bfloat16 and sum in float32. Other operations are float32.
    """
    rate = config.dropout if mx.autograd.is_training() else 0.0
    # The key comes from MXNet's generator, so MXNet's seed repeats the dropout.
    key = mx.nd.random.uniform if rate else mx.nd.zeros
    reads_all = output_positions is None
    positions = mx.nd.zeros((2, 1), ctx=tokens.context) if reads_all else output_positions
    return mx.nd.gluon_bert_encoder(
        *(array.astype("float32", copy=False) for array in (tokens, token_types, valid_length)),
        key(shape=(2,), ctx=tokens.context),
        positions.astype("float32", copy=False),
        *_arrays(parameters, tokens.context),
        select=int(not reads_all),
        recompute=int(recompute),
        layers=config.num_layers,
        heads=config.num_heads,
        ffn_units=config.ffn_units,
        pre=int(config.norm == "pre"),
        embedding_norm=int(config.embedding_norm),
        relative=int(config.position == "relative-bias"),
        dropout=rate,
        **_common(config, parameters, bf16),
    )


def masked_loss(
    config: ModelConfig,
    parameters: Sequence[Any],
    encoded: Any,
    masked_positions: Any,
    masked_ids: Any,
    bf16: bool = False,
) -> tuple[Any, Any]:
    """Return the sum of the masked words' losses in nats and how many have the highest score, both (1,).

    encoded (B, T, C), masked_positions (2, M) and masked_ids (M,) as in Batch, M at least 1. parameters: the
    MLM head's in the order in which it uses them. The scores of all words are never in memory at once. bf16:
    see `encode`.
    """
    loss, num_correct = mx.nd.gluon_bert_masked_loss(
        encoded,
        masked_positions,
        masked_ids,
        *_arrays(parameters, encoded.context),
        **_common(config, parameters, bf16),
    )
    return loss, num_correct


def adam_step(
    weight: Any, gradient: Any, mean: Any, variance: Any, scale: Any, skip: bool, **step: float
) -> None:
    """Take Adam's step of one parameter in place, in one pass.

    weight, gradient, mean, variance: of one shape. scale (1,): the gradient's factor. skip: do nothing if it
    is not finite. step: rate, correction, beta1, beta2, epsilon and decay, as native/adam.h describes.
    """
    mx.nd.gluon_bert_adam(weight, gradient, mean, variance, scale, **_step_attributes(skip, step))


def muon_step(
    weights: Sequence[Any],
    gradients: Sequence[Any],
    momenta: Sequence[Any],
    scale: Any,
    skip: bool,
    **step: float,
) -> None:
    """Take Muon's step of matrices in place.

    scale, skip: as for `adam_step`. step: rate, decay and momentum, as native/muon.h describes.
    """
    arrays = [array for matrix in zip(weights, gradients, momenta) for array in matrix]
    mx.nd.gluon_bert_muon(*arrays, scale, count=len(weights), **_step_attributes(skip, step))


def peak_matmul_flops(repeats: int, bf16: bool = False) -> float:
    """Multiply matrices that stay in the caches, on all cores. Return the floating-point operations.

    The result per second is the peak of the compiled operators, in float32 or bfloat16. Return 0 without
    compiled operators.
    """
    if _unavailable_reason():
        return 0.0
    function = _library().gluon_bert_peak_matmul_flops
    function.restype = ctypes.c_double
    return float(function(repeats, int(bf16)))


def multiply_repeatedly(
    rows: int, columns: int, depth: int, transposed: bool = False, bf16: bool = False, repeats: int = 1
) -> float:
    """Multiply a matrix (rows, depth) by a packed one (depth, columns) several times; return the CPU seconds.

    transposed: the first matrix is the transpose of a row-major one, as in gradients of weights. The compiled
    operators must be available.
    """
    function = _library().gluon_bert_multiply_repeatedly
    function.restype = ctypes.c_double
    return float(function(rows, columns, depth, int(transposed), int(bf16), repeats))


def bf16_unsupported_reason() -> str:
    """Return why bfloat16 products are not faster than float32 here, or an empty string.

    The compiled operators compute bfloat16 products on every processor.
    """
    reason = _unavailable_reason()
    if reason:
        return f"bf16 needs the compiled operators, which are not available ({reason})"
    function = _library().gluon_bert_bf16_unsupported_reason
    function.restype = ctypes.c_char_p
    return str(function().decode())


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(built_library()))


def _step_attributes(skip: bool, step: Mapping[str, float]) -> dict[str, Any]:
    return {"skip": int(skip), **{name: _all_digits(value) for name, value in step.items()}}


def _all_digits(value: float) -> str:
    """Return a number as text. MXNet would print six digits of a float."""
    return repr(float(value))


def _common(config: ModelConfig, parameters: Sequence[Any], bf16: bool) -> dict[str, Any]:
    return {
        "activation": config.activation,
        "epsilon": _all_digits(config.norm_epsilon),
        "keep": int(mx.autograd.is_recording()),
        "add": int(_accumulates(parameters)),
        "bf16": int(bf16),
    }


def _arrays(parameters: Sequence[Any], context: Any) -> list[Any]:
    """Return the parameters' arrays; if gradients accumulate, as leaves of this call alone.

    MXNet does not pass the gradient request (write or add) to an external operator. If an array had several
    gradients, the operator would add to a temporary one. A leaf has one gradient: the parameter's own, to
    which the operator adds in place.
    """
    arrays = [parameter.data(context) for parameter in parameters]
    if not (_accumulates(parameters) and mx.autograd.is_recording()):
        return arrays
    leaves = [array.detach() for array in arrays]
    for parameter, array, leaf in zip(parameters, arrays, leaves):
        if parameter.grad_req == "add":
            mx.autograd.mark_variables([leaf], [parameter.grad(context)], "add")
            array._fresh_grad = True  # gluon's Trainer needs it; a leaf's gradient does not set it
    return leaves


def _accumulates(parameters: Sequence[Any]) -> bool:
    """Return whether the parameters' gradients accumulate; raise InputError if only some do."""
    wanted = {parameter.grad_req for parameter in parameters} - {"null"}
    if len(wanted) > 1:
        raise InputError(
            "grad_req must be the same for all parameters (or null), got add and write. Set one of them."
        )
    return wanted == {"add"}


@lru_cache(maxsize=None)
def _unavailable_reason() -> str:
    """Load the compiled operators; return why that failed, or an empty string."""
    asked = os.environ.get(VARIABLE, "auto")
    _check_choice(asked, VARIABLE)
    if asked == "mxnet":
        return "as chosen"
    if hasattr(mx.nd, "gluon_bert_encoder"):  # loaded earlier in this process
        return ""
    try:
        mx.library.load(str(built_library()), verbose=False)
    except (BuildError, mx.MXNetError, OSError) as error:
        reason = str(error) if isinstance(error, BuildError) else one_line(error)
        if asked == "compiled":
            raise InputError(f"the compiled operators are not available: {reason}") from error
        log.info("using MXNet's own operators, which are several times slower: %s", reason)
        return reason
    return ""


def _check_choice(name: str, where: str) -> None:
    if name not in CHOICES:
        raise InputError(f"{where} must be one of {', '.join(CHOICES)}, got {name}.")
