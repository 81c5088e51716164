"""Multi-head self-attention over padded sequences. Contains no other part of a layer."""

from __future__ import annotations

from typing import Any

from ..config import ModelConfig
from ..runtime import mx
from .dropout import Dropout
from .precision import Dense, MixedPrecisionBlock
from .relative_position import RelativeBias

# Added to the scores of padding. It is far below any real score, and finite, so that nothing becomes NaN.
PADDING_SCORE = -1e9


def padding_scores(F: Any, tokens: Any, valid_length: Any, num_heads: int) -> Any:
    """Return the values to add to attention scores so that no position attends to padding, (B * H, T, T).

    It has a value for every head and query. A broadcast sum would need a reduction in its backward pass,
    which takes longer than the softmax.

    tokens: (B, T), for its shape. valid_length: (B,), real tokens per row. Both are float32.
    """
    positions = F.contrib.arange_like(tokens, axis=1)  # (T,)
    padded = F.broadcast_greater_equal(positions.expand_dims(0), valid_length.expand_dims(1))  # (B, T)
    keys = F.repeat(padded * PADDING_SCORE, repeats=num_heads, axis=0).expand_dims(1)  # (B * H, 1, T)
    queries = F.zeros_like(keys).swapaxes(1, 2)  # (B * H, T, 1)
    return F.BlockGrad(F.broadcast_add(queries, keys))


class SelfAttention(MixedPrecisionBlock):
    """Multi-head self-attention with biases (Vaswani et al. 2017, section 3.2.2).

    (B, T, C) and the padding scores (B * H, T, T) -> (B, T, C), all float32. With a relative bias it takes
    the buckets of distances, (T, T), as well.
    """

    def __init__(self, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        units, self._num_heads = config.units, config.num_heads
        self._scale = (units // self._num_heads) ** -0.5
        with self.name_scope():
            self.query = Dense(units, flatten=False, in_units=units, half_output=True)
            self.key = Dense(units, flatten=False, in_units=units, half_output=True)
            self.value = Dense(units, flatten=False, in_units=units, half_output=True)
            self.output = Dense(units, flatten=False, in_units=units, half_input=True)
            self.dropout = Dropout(config.dropout)
            relative = config.position == "relative-bias"
            self.relative: Any = RelativeBias(self._num_heads) if relative else None

    def hybrid_forward(self, F: Any, x: Any, *positions: Any) -> Any:
        attend = self._attend_in_float16 if self.precision == "fp16" else self._attend
        return self.output(attend(self.ops_for(F), self.query(x), self.key(x), self.value(x), *positions))

    def attention_weights(self, x: Any, *positions: Any) -> Any:
        """Return the attention weights of each position over all positions, (B, H, T, T), for arrays."""
        weights = self._weights(mx.nd, self._scores(mx.nd, self.query(x), self.key(x)), *positions)
        return weights.reshape(shape=(-4, -1, self._num_heads, 0, 0))

    def _attend(self, F: Any, query: Any, key: Any, value: Any, *positions: Any) -> Any:
        """Compute the weighted sum of all values for each position, (B, T, C)."""
        weights = self._weights(F, self._scores(F, query, key), *positions)
        return self._join_heads(F.batch_dot(weights, self._split_heads(value)))

    def _scores(self, F: Any, query: Any, key: Any) -> Any:
        """Compute the products of queries and keys, (B * H, T, T)."""
        query, key = map(self._split_heads, (query * self._scale, key))
        return F.batch_dot(query, key, transpose_b=True)

    def _attend_in_float16(self, F: Any, query: Any, key: Any, value: Any, *positions: Any) -> Any:
        """Compute the same. These operators add up in float32; `batch_dot` of float16 adds up in float16."""
        interleaved = F.interleave(query, key, value, self._num_heads)
        weights = self._weights(F, F.attention_scores(interleaved, self._num_heads), *positions)
        return F.attention_values(interleaved, weights, self._num_heads).swapaxes(0, 1)

    def _weights(self, F: Any, scores: Any, padding: Any, *buckets: Any) -> Any:
        """Compute the attention weights from the scores, both (B * H, T, T)."""
        scores = scores + padding
        if self.relative:
            by_row = scores.reshape(shape=(-4, -1, self._num_heads, 0, 0))  # (B, H, T, T)
            biased = F.broadcast_add(by_row, self.relative(*buckets).expand_dims(0))
            scores = biased.reshape(shape=(-1, 0, 0), reverse=True)
        return self.dropout(F.softmax(scores, axis=-1))

    def _split_heads(self, x: Any) -> Any:
        """(B, T, C) -> (B * H, T, C / H)."""
        heads = x.reshape(shape=(0, 0, self._num_heads, -1)).transpose(axes=(0, 2, 1, 3))
        return heads.reshape(shape=(-1, 0, 0), reverse=True)

    def _join_heads(self, x: Any) -> Any:
        """(B * H, T, C / H) -> (B, T, C), the inverse of `_split_heads`."""
        heads = x.reshape(shape=(-4, -1, self._num_heads, 0, 0)).transpose(axes=(0, 2, 1, 3))
        return heads.reshape(shape=(0, 0, -1))
