"""What stands on the encoder: the pooler, the masked-language-model head, the next-sentence head."""

from __future__ import annotations

from typing import Any

from ..config import ModelConfig
from ..runtime import mx
from .encoder import activation, layer_norm


class Pooler(mx.gluon.HybridBlock):
    """The first token's vector through a dense layer with tanh: (B, T, C) -> (B, C)."""

    def __init__(self, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        with self.name_scope():
            self.dense = mx.gluon.nn.Dense(
                config.units, flatten=False, activation="tanh", in_units=config.units
            )

    def hybrid_forward(self, F: Any, encoded: Any) -> Any:
        return self.dense(F.slice_axis(encoded, axis=1, begin=0, end=1).reshape(shape=(0, -1)))


class MaskedLanguageModelHead(mx.gluon.HybridBlock):
    """Scores of every word of the vocabulary at the positions asked for.

    encoded (B, T, C), predictions (2, M) with rows above positions -> (M, V). Only the predictions that
    exist are computed. With `embedding` the decoder's weight is that embedding's.
    """

    def __init__(self, vocab_size: int, config: ModelConfig, embedding: Any | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._vocab_size = vocab_size
        with self.name_scope():
            self.transform = mx.gluon.nn.Dense(config.units, flatten=False, in_units=config.units)
            self.activation = activation(config.activation)
            self.norm = layer_norm(config)
            if embedding is None:
                self.decoder_weight = self.params.get("decoder_weight", shape=(vocab_size, config.units))
            else:
                self.decoder_weight = embedding.weight
            self.decoder_bias = self.params.get("decoder_bias", shape=(vocab_size,), init="zeros")

    def hybrid_forward(
        self, F: Any, encoded: Any, predictions: Any, decoder_weight: Any, decoder_bias: Any
    ) -> Any:
        x = F.gather_nd(encoded, predictions)  # (M, C)
        x = self.norm(self.activation(self.transform(x)))
        return F.FullyConnected(x, decoder_weight, decoder_bias, num_hidden=self._vocab_size, flatten=False)


class NextSentenceHead(mx.gluon.HybridBlock):
    """Two scores a pair, "does not follow" and "follows": (B, C) -> (B, 2)."""

    def __init__(self, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        with self.name_scope():
            self.dense = mx.gluon.nn.Dense(2, flatten=False, in_units=config.units)

    def hybrid_forward(self, F: Any, pooled: Any) -> Any:
        return self.dense(pooled)
