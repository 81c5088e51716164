"""The operators that compute the network: compiled ones on a CPU that has a C++ compiler, or MXNet's own.

This is the one door to the compiled operators. Whoever asks `compute(block, array)` is told whether they
compute here: on a CPU, for a hybridized block, where they could be built, and never in a graph, so that what
is exported has MXNet's operators only. Both sides compute the same; their draws of dropout differ.
"""

from __future__ import annotations

import ctypes
import logging
import os
from functools import lru_cache
from typing import Any, Sequence

from ..config import ModelConfig
from ..errors import InputError, one_line
from ..runtime import mx
from .build import BuildError, built_library

# Which operators a process may use, where no flag says so.
VARIABLE = "GLUON_BERT_OPERATORS"
CHOICES = ("auto", "compiled", "mxnet")

log = logging.getLogger(__name__)


def select(name: str | None = None) -> str:
    """Decide for this process which operators it may use, and make them ready; returns what `in_use` says.

    name: one of CHOICES; None: as the variable GLUON_BERT_OPERATORS says, else auto. InputError where compiled
    ones are asked for and cannot be had.
    """
    if name is not None:
        _check_choice(name, "--operators")
        os.environ[VARIABLE] = name  # for the processes that this one starts, too
    _unavailable_reason.cache_clear()
    return describe()


def describe(contexts: Sequence[Any] = ()) -> str:
    """In a phrase, which operators compute on these contexts (on a CPU), and where it is MXNet's, why."""
    if any(context.device_type != "cpu" for context in contexts):
        return "MXNet's own"
    reason = _unavailable_reason()
    return f"MXNet's own ({reason})" if reason else "compiled for this processor"


def compiled(contexts: Sequence[Any]) -> bool:
    """Whether the compiled operators may compute on these contexts."""
    return all(context.device_type == "cpu" for context in contexts) and not _unavailable_reason()


def parse_description(description: str) -> str | None:
    """What `choose` takes to have the operators again that `in_use` described so; None for compiled ones.

    >>> choice_of("MXNet's own (no compiler was found)"), choice_of("compiled for this processor")
    ('mxnet', None)
    """
    return "mxnet" if description.startswith("MXNet's") else None


def use_compiled(block: Any, array: Any) -> bool:
    """Whether the compiled operators compute what this block makes of an array."""
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
    recompute: bool = False,
    bf16: bool = False,
) -> Any:
    """What `Encoder` computes, (B, T) tokens to (B, T, C) vectors; those of padding are zeros.

    parameters: those of the encoder in the order in which it computes, as gluon Parameters. recompute: the
    backward pass computes each layer again, to the same bits, rather than have its values kept. bf16: what
    products of matrices multiply, forward and backward, is rounded to bfloat16 and summed in float32; the
    rest is float32 as ever.
    """
    rate = config.dropout if mx.autograd.is_training() else 0.0
    # MXNet's generator decides, so its seed repeats the dropout; the operator counts from there.
    key = mx.nd.random.uniform if rate else mx.nd.zeros
    return mx.nd.gluon_bert_encoder(
        *(array.astype("float32", copy=False) for array in (tokens, token_types, valid_length)),
        key(shape=(2,), ctx=tokens.context),
        *_arrays(parameters, tokens.context),
        recompute=int(recompute),
        layers=config.num_layers,
        heads=config.num_heads,
        ffn_units=config.ffn_units,
        pre=int(config.norm == "pre"),
        embedding_norm=int(config.embedding_norm),
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
    """The sum of the masked words' losses in nats and how many have the highest score, both (1,).

    encoded (B, T, C), masked_positions (2, M) and masked_ids (M,) as in Batch, M at least 1. parameters: those of the
    MLM head in the order in which it computes. The scores of all words are never in memory at once. bf16: as
    for `encode`.
    """
    loss, hits = mx.nd.gluon_bert_masked_loss(
        encoded,
        masked_positions,
        masked_ids,
        *_arrays(parameters, encoded.context),
        **_common(config, parameters, bf16),
    )
    return loss, hits


def peak_matmul_flops(repeats: int) -> float:
    """Multiply matrices that stay in the caches, on all cores; returns the floating-point operations of it.

    With a clock beside it that is the most that compiled operators can reach; 0 where there are none.
    """
    if _unavailable_reason():
        return 0.0
    function = _library().gluon_bert_peak_matmul_flops
    function.restype = ctypes.c_double
    return float(function(repeats))


def bf16_unsupported_reason() -> str:
    """In a phrase, why products of bfloat16 would not be faster here than those of float32, or nothing.

    Operators that are asked for them compute them all the same, where the processor cannot with float32's.
    """
    reason = _unavailable_reason()
    if reason:
        return f"only compiled operators multiply bfloat16, and there are none ({reason})"
    function = _library().gluon_bert_bf16_unsupported_reason
    function.restype = ctypes.c_char_p
    return str(function().decode())


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(built_library()))


def _common(config: ModelConfig, parameters: Sequence[Any], bf16: bool) -> dict[str, Any]:
    # repr, since MXNet would print six digits of a float.
    return {
        "activation": config.activation,
        "epsilon": repr(config.norm_epsilon),
        "keep": int(mx.autograd.is_recording()),
        "add": int(_add_up(parameters)),
        "bf16": int(bf16),
    }


def _arrays(parameters: Sequence[Any], context: Any) -> list[Any]:
    """The parameters' arrays; where their gradients are added up, leaves of this call alone.

    An operator from outside is not told whether it shall fill a gradient or add to it, and would add to what
    MXNet makes where an array has several gradients. A leaf has one: the parameter's own, added to in place.
    """
    arrays = [parameter.data(context) for parameter in parameters]
    if not (_add_up(parameters) and mx.autograd.is_recording()):
        return arrays
    leaves = [array.detach() for array in arrays]
    for parameter, array, leaf in zip(parameters, arrays, leaves):
        if parameter.grad_req == "add":
            mx.autograd.mark_variables([leaf], [parameter.grad(context)], "add")
            array._fresh_grad = True  # which gluon's Trainer asks for, and a leaf's gradient does not tell
    return leaves


def _add_up(parameters: Sequence[Any]) -> bool:
    """Whether the parameters' gradients are added up; those of one call all are, or none."""
    wanted = {parameter.grad_req for parameter in parameters} - {"null"}
    if len(wanted) > 1:
        raise InputError(
            "some parameters have grad_req add and others write: give them all the same, or null"
        )
    return wanted == {"add"}


@lru_cache(maxsize=None)
def _unavailable_reason() -> str:
    """Load the compiled operators; returns why there are none, or nothing."""
    asked = os.environ.get(VARIABLE, "auto")
    _check_choice(asked, VARIABLE)
    if asked == "mxnet":
        return "as asked for"
    if hasattr(mx.nd, "gluon_bert_encoder"):  # loaded earlier in this process
        return ""
    try:
        mx.library.load(str(built_library()), verbose=False)
    except (BuildError, mx.MXNetError, OSError) as error:
        reason = str(error) if isinstance(error, BuildError) else one_line(error)
        if asked == "compiled":
            raise InputError(f"the compiled operators cannot be had: {reason}") from error
        log.info("computing with MXNet's own operators, which take several times as long: %s", reason)
        return reason
    return ""


def _check_choice(name: str, where: str) -> None:
    if name not in CHOICES:
        raise InputError(f"{where} {name}: must be one of {', '.join(CHOICES)}")
