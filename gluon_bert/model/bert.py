"""BERT for pretraining: the encoder and both heads in one HybridBlock."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import ops
from ..config import ModelConfig, check_group
from ..errors import InputError
from ..runtime import mx
from .encoder import Encoder
from .heads import MaskedLanguageModelHead, NextSentenceHead, Pooler
from .precision import MixedPrecisionBlock

# Devlin et al. 2018 draw weights from N(0, 0.02); the figure is in their code, run_pretraining.py.
NORMAL_SIGMA = 0.02


class BERTBlock(mx.gluon.HybridBlock):
    """A network with an encoder; `initialize` and `hybridize` choose what BERT needs."""

    config: ModelConfig
    encoder: Encoder

    def initialize(
        self,
        init: Any = None,
        ctx: Any = None,
        verbose: bool = False,
        force_reinit: bool = False,
        seed: int | None = None,
    ) -> None:
        """Draw the initial weights, by default as the configuration says.

        seed: seeds MXNet first. The seed then decides the weights and the dropout that follows.
        """
        if seed is not None:
            mx.random.seed(seed)
        init = initial_weights(self.config) if init is None else init
        super().initialize(init, ctx=ctx, verbose=verbose, force_reinit=force_reinit)

    def hybridize(self, active: bool = True, **kwargs: Any) -> None:
        """Hybridize. The encoder meets few shapes, so it keeps its memory from step to step."""
        super().hybridize(active, **kwargs)
        self.encoder.hybridize(active, **{"static_alloc": True, **kwargs})

    def set_matmul_precision(self, precision: str) -> None:
        """Multiply matrices in this precision, as TrainConfig names it. The weights stay float32.

        A copy of the network, such as an export, computes in float32.
        """
        if precision == self.encoder.precision:
            return

        def set_precision(block: Any) -> None:
            if isinstance(block, MixedPrecisionBlock):
                block.precision = precision

        self.apply(set_precision)
        self.hybridize()


class BERTModel(BERTBlock):
    """BERT for pretraining; `net.encoder` alone encodes tokens.

    Inputs, all float32: tokens (B, T), token_types (B, T), valid_length (B,) and masked_positions (2, M), row
    numbers above columns. Outputs, float32: encoded tokens (B, T, C), scores of the masked words (M, V) and
    of the next sentence (B, 2).

    >>> net = BERTModel(vocab_size=100, config=ModelConfig())       # doctest: +SKIP
    >>> net.initialize(ctx=mx.cpu())
    >>> net.hybridize()
    >>> encoded, mlm_scores, nsp_scores = net(tokens, token_types, valid_length, masked_positions)
    """

    def __init__(self, vocab_size: int, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if mx.util.is_np_array():
            raise InputError("gluon_bert needs MXNet's classic arrays: call mxnet.npx.reset_np() first")
        check_group(config)
        self.vocab_size, self.config = vocab_size, config
        with self.name_scope():
            self.encoder = Encoder(vocab_size, config)
            self.pooler = Pooler(config)
            tied = self.encoder.embeddings.tokens if config.tied_decoder else None
            self.mlm = MaskedLanguageModelHead(vocab_size, config, embedding=tied)
            self.nsp = NextSentenceHead(config)

    def forward(self, tokens: Any, *others: Any) -> tuple[Any, Any, Any]:
        """Compute part by part if compiled operators compute the encoder, otherwise as one graph."""
        if ops.use_compiled(self, tokens):
            return self.hybrid_forward(mx.nd, tokens, *others)
        return super().forward(tokens, *others)

    def hybrid_forward(
        self, F: Any, tokens: Any, token_types: Any, valid_length: Any, masked_positions: Any
    ) -> tuple[Any, Any, Any]:
        encoded = self.encoder(tokens, token_types, valid_length)
        return encoded, self.mlm(encoded, masked_positions), self.nsp(self.pooler(encoded))

    def with_config(self, config: ModelConfig, **kwargs: Any) -> BERTModel:
        """Return a network of the same kind with another configuration, without weights."""
        return BERTModel(self.vocab_size, config, **kwargs)

    def set_unigram_bias(self, word_counts: np.ndarray) -> None:
        """Set the decoder's biases so that its first scores are the words' frequencies.

        word_counts: (V,) how often each word is masked.
        """
        self.mlm.decoder.bias.set_data(mx.nd.array(log_frequencies(word_counts)))

    def set_word_vectors(self, word_vectors: np.ndarray) -> None:
        """Replace the embeddings of words that have a vector; their standard deviation stays the same.

        word_vectors: (V, C) with standard deviation 1. A row of NaN keeps the word's present embedding.
        """
        weight = self.encoder.embeddings.tokens.weight
        values = weight.data(weight.list_ctx()[0]).asnumpy()
        known = ~np.isnan(word_vectors[:, 0])
        values[known] = word_vectors[known] * values.std()
        weight.set_data(mx.nd.array(values))


def initial_weights(config: ModelConfig) -> Any:
    """Return MXNet's initializer for a configuration: Xavier or N(0, 0.02)."""
    return mx.init.Xavier() if config.init == "xavier" else mx.init.Normal(NORMAL_SIGMA)


def log_frequencies(counts: np.ndarray) -> np.ndarray:
    """Return the log of each word's share of all words, with one added to each count (Laplace), (V,)."""
    return np.log((counts + 1) / (counts + 1).sum())
