"""The encoder's vectors of a text that is given as tokens."""

from __future__ import annotations

from typing import Any, Sequence

import numpy as np

from gluon_bert.data.tokenizer import Tokenizer
from gluon_bert.data.vocab import Normalization, Vocabulary
from gluon_bert.runtime import mx


def encode(
    net: Any, vocab: Vocabulary, tokens_a: Sequence[str], tokens_b: Sequence[str] | None = None
) -> Any:
    """Return the vectors of a text or a pair of tokens: (1, T, C) float32, with <cls> and <sep>."""
    text = Tokenizer(vocab, net.config.max_positions, Normalization(lowercase=False)).tokens(
        tokens_a, tokens_b
    )
    context = net.pooler.dense.weight.list_ctx()[0]
    inputs = ([text.ids], [text.token_types], [len(text)])
    return net.encoder(*(mx.nd.array(each, ctx=context, dtype=np.float32) for each in inputs))
