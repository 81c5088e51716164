"""Tokens to vectors: the embeddings and the stack of encoder layers. No heads, no losses."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import Any, Iterator

from .. import ops
from ..config import ModelConfig
from ..runtime import mx
from .attention import SelfAttention, padding_scores
from .dropout import Dropout
from .gradient_checkpointing import CheckpointedForward
from .precision import Dense, MixedPrecisionBlock
from .relative_position import distance_buckets

NUM_SEGMENTS = 2


def layer_norm(config: ModelConfig) -> Any:
    """Return a LayerNorm over C with the configuration's epsilon."""
    return mx.gluon.nn.LayerNorm(epsilon=config.norm_epsilon, in_channels=config.units)


class Embeddings(mx.gluon.HybridBlock):
    """The sum of token, segment and learned position embeddings: (B, T), (B, T) -> (B, T, C).

    The graph raises an error for more positions than `max_positions`.
    """

    def __init__(self, vocab_size: int, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._max_positions = config.max_positions
        with self.name_scope():
            self.tokens = mx.gluon.nn.Embedding(vocab_size, config.units)
            self.segments = mx.gluon.nn.Embedding(NUM_SEGMENTS, config.units)
            self.positions = mx.gluon.nn.Embedding(
                config.max_positions, config.units, weight_initializer=_position_initializer(config)
            )
            self.norm: Any = layer_norm(config) if config.embedding_norm else None
            self.dropout: Any = Dropout(config.dropout) if config.embedding_norm else None

    def hybrid_forward(self, F: Any, tokens: Any, token_types: Any) -> Any:
        # slice_like raises an error for a T above max_positions. A lookup alone would silently clip it.
        row = F.slice_like(F.arange(self._max_positions).expand_dims(0), tokens, axes=(1,))
        positions = F.broadcast_like(row, tokens)  # (B, T)
        x = self.tokens(tokens) + self.segments(token_types) + self.positions(positions)
        return self.dropout(self.norm(x)) if self.norm else x


def _position_initializer(config: ModelConfig) -> Any:
    """Return Xavier's initializer for an array (1, P, C), as D2L has it, or None for N(0, 0.02).

    For the shape (P, C) Xavier would draw values ten times as large.
    """
    if config.init != "xavier":
        return None
    return mx.init.Uniform((6 / (config.units * (config.max_positions + 1))) ** 0.5)


class FeedForward(mx.gluon.HybridBlock):
    """Two dense layers with an activation between them, for each position: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # MXNet computes GELU of float16 in float32, inside one operator. That by tanh is several operators.
        half = config.activation != "gelu_tanh"
        with self.name_scope():
            self.expand = Dense(config.ffn_units, flatten=False, in_units=config.units, half_output=half)
            self.activation = activation(config.activation)
            self.project = Dense(config.units, flatten=False, in_units=config.ffn_units, half_input=half)

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        return self.project(self.activation(self.expand(x)))


class EncoderLayer(mx.gluon.HybridBlock):
    """Self-attention and a feed-forward network, each with dropout, a residual and LayerNorm.

    LayerNorm comes after the residual (post, Devlin et al. 2018) or before the sub-layer (pre, Xiong
    et al. 2020): (B, T, C) and the further inputs of SelfAttention -> (B, T, C).
    """

    def __init__(self, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._pre = config.norm == "pre"
        with self.name_scope():
            self.attend = SelfAttention(config)
            self.norm1 = layer_norm(config)
            self.feed_forward = FeedForward(config)
            self.norm2 = layer_norm(config)
            self.dropout = Dropout(config.dropout)

    def hybrid_forward(self, F: Any, x: Any, *positions: Any) -> Any:
        if self._pre:
            x = x + self.dropout(self.attend(self.norm1(x), *positions))
            return x + self.dropout(self.feed_forward(self.norm2(x)))
        x = self.norm1(x + self.dropout(self.attend(x, *positions)))
        return self.norm2(x + self.dropout(self.feed_forward(x)))

    def attention_weights(self, x: Any, *positions: Any) -> Any:
        """Return the attention weights of this layer, (B, H, T, T), for arrays."""
        return self.attend.attention_weights(self.norm1(x) if self._pre else x, *positions)


class Encoder(MixedPrecisionBlock):
    """Padded token ids to a vector per position.

    tokens (B, T), token_types (B, T) of 0 and 1, valid_length (B,), all float32 -> (B, T, C) float32. What
    is in tokens past a row's length changes nothing before it, and the vectors there mean nothing.

    An optional fourth input is output_positions (2, N), rows above columns: the positions whose vectors
    the caller reads. The vectors elsewhere mean nothing then, and their gradients are ignored. The compiled
    operators do not compute them in the last layer.
    """

    def __init__(self, vocab_size: int, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._config = config
        self._checkpointed: CheckpointedForward | None = None
        with self.name_scope():
            self.embeddings = Embeddings(vocab_size, config)
            self.layers: Any = mx.gluon.nn.HybridSequential()
            for _ in range(config.num_layers):
                self.layers.add(EncoderLayer(config))
            # In a pre-LayerNorm network the last residual sum is not normalized.
            self.norm: Any = layer_norm(config) if config.norm == "pre" else None

    def forward(self, tokens: Any, token_types: Any, valid_length: Any, output_positions: Any = None) -> Any:
        """Compute with the compiled operators where possible, otherwise with `hybrid_forward`."""
        if ops.use_compiled(self, tokens):
            return ops.encode(
                self._config,
                self._in_order(),
                tokens,
                token_types,
                valid_length,
                output_positions,
                recompute=self._checkpointed is not None,
                bf16=self.precision == "bf16",
            )
        if mx.autograd.is_recording() and (self._checkpointed is not None or self.precision == "fp16"):
            return self._layer_by_layer(tokens, token_types, valid_length)
        return super().forward(tokens, token_types, valid_length)

    def _layer_by_layer(self, tokens: Any, token_types: Any, valid_length: Any) -> Any:
        """Compute the same with a graph for each layer, which may be computed again.

        In float16 one graph for all layers would keep the float16 gradients of all weights to its end.
        """
        positions = self._positions(mx.nd, tokens, valid_length)
        blocks: list[tuple[Any, tuple[Any, ...]]] = [(self.embeddings, (tokens, token_types))]
        blocks += [(layer, positions) for layer in self.layers]
        blocks += [(self.norm, ())] if self.norm else []
        if self._checkpointed is not None:
            return self._checkpointed.forward(blocks)
        x: tuple[Any, ...] = ()
        for block, inputs in blocks:
            x = (block(*x, *inputs),)
        return x[0]

    def hybridize(self, active: bool = True, **kwargs: Any) -> None:
        """Hybridize. Only the encoder as a whole keeps its memory, not a layer that is called alone."""
        super().hybridize(active, **kwargs)
        for block in self._children.values():
            block.hybridize(active)

    @contextmanager
    def recomputing(self, seed: int) -> Iterator[CheckpointedForward]:
        """Compute each layer again in the backward passes of graphs that are recorded in this context.

        Call the yielded object's `backward` after the graph's own. seed: decides the dropout of MXNet's
        operators.
        """
        self._checkpointed = CheckpointedForward(seed)
        try:
            yield self._checkpointed
        finally:
            self._checkpointed = None

    def hybrid_forward(self, F: Any, tokens: Any, token_types: Any, valid_length: Any) -> Any:
        positions = self._positions(F, tokens, valid_length)
        x = self.embeddings(tokens, token_types)
        for layer in self.layers:
            x = layer(x, *positions)
        return self.norm(x) if self.norm else x

    def attention_weights(self, tokens: Any, token_types: Any, valid_length: Any) -> list[Any]:
        """Return the attention weights of each layer, (B, H, T, T): the query's position, then the key's.

        The inputs are arrays as in `forward`. MXNet's operators compute them.
        """
        positions = self._positions(mx.nd, tokens, valid_length)
        x = self.embeddings(tokens, token_types)
        found = []
        for layer in self.layers:
            found.append(layer.attention_weights(x, *positions))
            x = layer(x, *positions)
        return found

    def _positions(self, F: Any, tokens: Any, valid_length: Any) -> tuple[Any, ...]:
        """Return the inputs of every layer beside the vectors."""
        padding = padding_scores(F, tokens, valid_length, self._config.num_heads)
        if self._config.position == "absolute":
            return (padding,)
        return padding, distance_buckets(F, tokens)

    def _in_order(self) -> list[Any]:
        """Return the parameters in the order in which the encoder uses them."""
        blocks = [self.embeddings.norm]
        for layer in self.layers:
            attend, feed_forward = layer.attend, layer.feed_forward
            blocks += [attend.query, attend.key, attend.value, attend.output, layer.norm1]
            blocks += [feed_forward.expand, feed_forward.project, layer.norm2, attend.relative]
        return [
            self.embeddings.tokens.weight,
            self.embeddings.segments.weight,
            self.embeddings.positions.weight,
            *both_parameters(*blocks, self.norm),
        ]

    def export(self, path: str, **kwargs: Any) -> None:
        """Export the graph of MXNet's own operators, even if the compiled ones computed so far."""
        if not self._cached_graph:
            one = mx.nd.ones((1, 1), ctx=self.embeddings.tokens.weight.list_ctx()[0])
            self._build_cache(one, one, one[0])
        super().export(path, **kwargs)


def both_parameters(*blocks: Any) -> list[Any]:
    """Return the parameters of dense blocks and LayerNorms in their order; skip None."""
    return [p for block in blocks if block for p in block.params.values()]


class TanhGELU(mx.gluon.HybridBlock):
    """GELU by its approximation with tanh (Hendrycks and Gimpel 2016, section 2): any shape to the same."""

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        return 0.5 * x * (1 + F.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def activation(name: str) -> Any:
    """Return the block of an activation. gelu is exact: x times the normal distribution function."""
    blocks = {"gelu": mx.gluon.nn.GELU, "gelu_tanh": TanhGELU}
    return blocks[name]() if name in blocks else mx.gluon.nn.Activation(name)
