"""Tokens to vectors with a pretrained network. Trains nothing, reads no files."""

from __future__ import annotations

from typing import Any, Sequence

import numpy as np

from .data.vocab import Vocabulary
from .errors import BadInput
from .runtime import mx


def encode(
    net: Any, vocab: Vocabulary, tokens_a: Sequence[str], tokens_b: Sequence[str] | None = None
) -> Any:
    """The vectors of a text or of a pair: lists of tokens -> (1, T, C) float32, dropout off.

    Position 0 is <cls>; the others follow as in `<cls> a <sep> b <sep>`. A token outside the vocabulary
    counts as <unk>. Raises BadInput above the network's number of positions.

    >>> encode(net, vocab, ["a", "crane", "is", "flying"]).shape        # doctest: +SKIP
    (1, 6, 128)
    """
    if isinstance(tokens_a, str) or isinstance(tokens_b, str):
        raise BadInput("encode takes lists of tokens: split the text first, such as text.split()")
    segment_a = [vocab.cls, *vocab.ids(tokens_a), vocab.sep]
    segment_b = [] if tokens_b is None else [*vocab.ids(tokens_b), vocab.sep]
    ids = segment_a + segment_b
    if len(ids) > net.config.max_positions:
        raise BadInput(f"{len(ids)} tokens: the network has {net.config.max_positions} positions")
    segments = [0] * len(segment_a) + [1] * len(segment_b)
    context = net.nsp.dense.weight.list_ctx()[0]
    inputs = ([ids], [segments], [len(ids)])
    return net.encoder(*(mx.nd.array(each, ctx=context, dtype=np.float32) for each in inputs))
