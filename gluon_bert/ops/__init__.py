"""The operators that compute the network: compiled ones on a CPU that has a C++ compiler, or MXNet's own.

This is the one door to the compiled operators. Whoever asks `compute(block, array)` is told whether they
compute here: on a CPU, for a hybridized block, where they could be built, and never in a graph, so that what
is exported has MXNet's operators only. Both sides compute the same; their draws of dropout differ.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Iterator, Sequence

from ..config import ModelConfig
from ..errors import BadInput, in_a_line
from ..runtime import mx
from .build import CannotBuild, built_library

# Which operators a process may use, where no flag says so.
VARIABLE = "GLUON_BERT_OPERATORS"
CHOICES = ("auto", "compiled", "mxnet")

log = logging.getLogger(__name__)


class _Mode(threading.local):
    adds_up = False


_mode = _Mode()


@contextmanager
def adding_up() -> Iterator[None]:
    """Let compiled operators add gradients to the parameters' own, where grad_req is "add", as MXNet's do.

    It saves a second copy of the parameters and of their gradients. It holds for what is recorded in this
    block, and asks for two things, or gradients are wrong: a parameter is used by one call of `encode` or
    `masked_loss` a context, but for the words' vectors of a tied decoder, and the backward pass is that of
    `autograd.backward`, not of `autograd.grad`.
    """
    _mode.adds_up = True
    try:
        yield
    finally:
        _mode.adds_up = False


def choose(name: str | None = None) -> str:
    """Decide for this process which operators it may use, and make them ready; returns what `in_use` says.

    name: one of CHOICES; None: as the variable GLUON_BERT_OPERATORS says, else auto. BadInput where compiled
    ones are asked for and cannot be had.
    """
    if name is not None:
        _refuse_unknown(name, "--operators")
        os.environ[VARIABLE] = name  # for the processes that this one starts, too
    _loaded.cache_clear()
    return in_use()


def in_use(contexts: Sequence[Any] = ()) -> str:
    """In a phrase, which operators compute on these contexts (on a CPU), and where it is MXNet's, why."""
    if any(context.device_type != "cpu" for context in contexts):
        return "MXNet's own"
    reason = _loaded()
    return f"MXNet's own ({reason})" if reason else "compiled for this processor"


def choice_of(description: str) -> str | None:
    """What `choose` takes to have the operators again that `in_use` described so; None for compiled ones.

    >>> choice_of("MXNet's own (no compiler was found)"), choice_of("compiled for this processor")
    ('mxnet', None)
    """
    return "mxnet" if description.startswith("MXNet's") else None


def compute(block: Any, array: Any) -> bool:
    """Whether the compiled operators compute what this block makes of an array."""
    return (
        block._active
        and isinstance(array, mx.nd.NDArray)
        and array.context.device_type == "cpu"
        and not _loaded()
    )


def encode(
    config: ModelConfig,
    parameters: Sequence[Any],
    tokens: Any,
    segments: Any,
    lengths: Any,
    recompute: bool = False,
) -> Any:
    """What `Encoder` computes, (B, T) tokens to (B, T, C) vectors; those of padding are zeros.

    parameters: those of the encoder in the order in which it computes, as gluon Parameters. recompute: the
    backward pass computes each layer again, to the same bits, rather than have its values kept.
    """
    rate = config.dropout if mx.autograd.is_training() else 0.0
    # MXNet's generator decides, so its seed repeats the dropout; the operator counts from there.
    key = mx.nd.random.uniform if rate else mx.nd.zeros
    return mx.nd.gluon_bert_encoder(
        *(array.astype("float32", copy=False) for array in (tokens, segments, lengths)),
        key(shape=(2,), ctx=tokens.context),
        *_arrays(config, parameters, parameters[0], tokens.context),
        recompute=int(recompute),
        layers=config.num_layers,
        heads=config.num_heads,
        ffn_units=config.ffn_units,
        pre=int(config.norm == "pre"),
        embedding_norm=int(config.embedding_norm),
        dropout=rate,
        **_common(config, parameters),
    )


def masked_loss(
    config: ModelConfig, parameters: Sequence[Any], encoded: Any, predictions: Any, labels: Any
) -> tuple[Any, Any]:
    """The sum of the masked words' losses in nats and how many have the highest score, both (1,).

    encoded (B, T, C), predictions (2, M) and labels (M,) as in Batch, M at least 1. parameters: those of the
    MLM head in the order in which it computes. The scores of all words are never in memory at once.
    """
    loss, hits = mx.nd.gluon_bert_masked_loss(
        encoded,
        predictions,
        labels,
        *_arrays(config, parameters, parameters[-2], encoded.context),
        **_common(config, parameters),
    )
    return loss, hits


def products(repeats: int) -> float:
    """Multiply matrices that stay in the caches, on all cores; returns the floating-point operations of it.

    With a clock beside it that is the most that compiled operators can reach; 0 where there are none.
    """
    if _loaded():
        return 0.0
    function = ctypes.CDLL(str(built_library())).gluon_bert_products
    function.restype = ctypes.c_double
    return float(function(repeats))


def _common(config: ModelConfig, parameters: Sequence[Any]) -> dict[str, Any]:
    adds = _adds(parameters)
    # repr, since MXNet would print six digits of a float.
    return {
        "activation": config.activation,
        "epsilon": repr(config.norm_epsilon),
        "keep": int(mx.autograd.is_recording()),
        "add": int(adds),
        "add_words": int(adds and not config.tied_decoder),
    }


def _arrays(config: ModelConfig, parameters: Sequence[Any], words: Any, context: Any) -> list[Any]:
    # An operator from outside fills a gradient where MXNet's own would add to it. So it is told to add, where
    # it may, or identity does that. The words of a tied decoder have two gradients, which MXNet adds up first.
    filled = {words} if config.tied_decoder else set()
    if not _adds(parameters):
        filled = set(parameters)
    return [
        mx.nd.identity(p.data(context)) if p.grad_req == "add" and p in filled else p.data(context)
        for p in parameters
    ]


def _adds(parameters: Sequence[Any]) -> bool:
    """Whether an operator is to add to its parameters' gradients."""
    return _mode.adds_up and all(parameter.grad_req in ("add", "null") for parameter in parameters)


@lru_cache(maxsize=None)
def _loaded() -> str:
    """Load the compiled operators; returns why there are none, or nothing."""
    asked = os.environ.get(VARIABLE, "auto")
    _refuse_unknown(asked, VARIABLE)
    if asked == "mxnet":
        return "as asked for"
    if hasattr(mx.nd, "gluon_bert_encoder"):  # loaded earlier in this process
        return ""
    try:
        mx.library.load(str(built_library()), verbose=False)
    except (CannotBuild, mx.MXNetError, OSError) as error:
        reason = str(error) if isinstance(error, CannotBuild) else in_a_line(error)
        if asked == "compiled":
            raise BadInput(f"the compiled operators cannot be had: {reason}") from error
        log.info("computing with MXNet's own operators, which take several times as long: %s", reason)
        return reason
    return ""


def _refuse_unknown(name: str, where: str) -> None:
    if name not in CHOICES:
        raise BadInput(f"{where} {name}: must be one of {', '.join(CHOICES)}")
