"""The heads on the encoder: the pooler, the masked-language-model head, the next-sentence head."""

from __future__ import annotations

from typing import Any, Callable

from ..config import ModelConfig
from ..runtime import mx
from .encoder import activation, both_parameters, layer_norm
from .precision import Dense, MixedPrecisionBlock


class Pooler(mx.gluon.HybridBlock):
    """The first token's vector through a dense layer with tanh: (B, T, C) -> (B, C)."""

    def __init__(self, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        with self.name_scope():
            self.dense = Dense(config.units, flatten=False, activation="tanh", in_units=config.units)

    def hybrid_forward(self, F: Any, encoded: Any) -> Any:
        return self.dense(F.slice_axis(encoded, axis=1, begin=0, end=1).reshape(shape=(0, -1)))


class MaskedTransform(mx.gluon.HybridBlock):
    """The vectors of the masked positions, transformed for the decoder.

    encoded (B, T, C), masked_positions (2, M) with rows above positions -> (M, C). Only the predictions that
    exist are computed.
    """

    def __init__(self, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        with self.name_scope():
            self.dense = Dense(config.units, flatten=False, in_units=config.units)
            self.activation = activation(config.activation)
            self.norm = layer_norm(config)

    def hybrid_forward(self, F: Any, encoded: Any, masked_positions: Any) -> Any:
        return self.norm(self.activation(self.dense(F.gather_nd(encoded, masked_positions))))


class Decoder(MixedPrecisionBlock):
    """A score for every word of the vocabulary: (M, C) -> (M, V).

    params: an embedding's, to share its weight (tied). By default the decoder has its own weight.
    """

    def __init__(self, vocab_size: int, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._vocab_size = vocab_size
        with self.name_scope():
            self.weight = self.params.get("weight", shape=(vocab_size, config.units))
            self.bias = self.params.get("bias", shape=(vocab_size,), init="zeros")

    def hybrid_forward(self, F: Any, x: Any, weight: Any, bias: Any) -> Any:
        return self.ops_for(F).FullyConnected(x, weight, bias, num_hidden=self._vocab_size, flatten=False)

    def on(self, device: Any) -> Callable[[Any], Any]:
        """Return a function that computes the same of arrays on a device.

        In fp16 all its calls share one float16 copy of the weight.
        """
        factors = self.weight.data(device), self.bias.data(device)
        shape = {"num_hidden": self._vocab_size, "flatten": False}
        if self.precision == "fp16":
            return self.ops_for(mx.nd).dense(*factors, **shape)
        return lambda x: mx.nd.FullyConnected(x, *factors, **shape)


class MaskedLanguageModelHead(MixedPrecisionBlock):
    """Scores of every word at the masked positions: (B, T, C), (2, M) -> (M, V).

    Callers can call its two halves separately. The scores of all masked positions take more memory than
    any other array of the network.
    """

    def __init__(self, vocab_size: int, config: ModelConfig, embedding: Any | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        with self.name_scope():
            self.transform = MaskedTransform(config)
            self.decoder = Decoder(vocab_size, config, params=embedding.params if embedding else None)

    def hybrid_forward(self, F: Any, encoded: Any, masked_positions: Any) -> Any:
        return self.decoder(self.transform(encoded, masked_positions))

    def in_order(self) -> list[Any]:
        """Return the parameters in the order in which the head uses them."""
        transform, decoder = self.transform, self.decoder
        return [*both_parameters(transform.dense, transform.norm), decoder.weight, decoder.bias]


class NextSentenceHead(mx.gluon.HybridBlock):
    """Two scores per pair, "does not follow" and "follows": (B, C) -> (B, 2)."""

    def __init__(self, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        with self.name_scope():
            self.dense = Dense(2, flatten=False, in_units=config.units)

    def hybrid_forward(self, F: Any, pooled: Any) -> Any:
        return self.dense(pooled)
