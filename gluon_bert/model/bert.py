"""BERT as it is pretrained: the encoder with both heads, one HybridBlock."""

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


class BERTModel(mx.gluon.HybridBlock):
    """BERT for pretraining; `net.encoder` alone encodes without predictions.

    Call it with tokens (B, T), token_types (B, T), valid_length (B,) and masked_positions (2, M) - the rows of the
    masked positions above their places in the row - all float32. It returns the encoded tokens
    (B, T, C), the scores of the masked words (M, V) and of the next sentence (B, 2), float32.

    >>> net = BERTModel(vocab_size=100, config=ModelConfig())       # doctest: +SKIP
    >>> net.setup(mx.cpu())
    >>> encoded, mlm_scores, nsp_scores = net(tokens, token_types, valid_length, masked_positions)
    """

    task = None  # see BERTForTask, which has one

    def __init__(self, vocab_size: int, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if mx.util.is_np_array():
            raise InputError(
                "gluon_bert computes with MXNet's classic arrays: call mxnet.npx.reset_np() first"
            )
        check_group(config)
        self.vocab_size, self.config = vocab_size, config
        with self.name_scope():
            self.encoder = Encoder(vocab_size, config)
            self.pooler = Pooler(config)
            tied = self.encoder.embeddings.tokens if config.tied_decoder else None
            self.mlm = MaskedLanguageModelHead(vocab_size, config, embedding=tied)
            self.nsp = NextSentenceHead(config)

    def forward(self, tokens: Any, *others: Any) -> tuple[Any, Any, Any]:
        """Part by part, where compiled operators compute one, or as one graph."""
        if ops.use_compiled(self, tokens):
            return self.hybrid_forward(mx.nd, tokens, *others)
        return super().forward(tokens, *others)

    def hybrid_forward(
        self, F: Any, tokens: Any, token_types: Any, valid_length: Any, masked_positions: Any
    ) -> tuple[Any, Any, Any]:
        encoded = self.encoder(tokens, token_types, valid_length)
        return encoded, self.mlm(encoded, masked_positions), self.nsp(self.pooler(encoded))

    def with_config(self, config: ModelConfig, **kwargs: Any) -> BERTModel:
        """A network of this kind with another configuration and no weights."""
        return BERTModel(self.vocab_size, config, **kwargs)

    def setup(
        self,
        contexts: Any,
        seed: int = 0,
        word_counts: np.ndarray | None = None,
        word_vectors: np.ndarray | None = None,
    ) -> None:
        """Draw the initial weights onto these contexts and compile; seeds MXNet, so dropout as well.

        word_counts: (V,) how often each word is to be predicted, for a decoder_bias of frequencies: InputError
        without them. word_vectors: (V, C) with standard deviation 1, the first word embeddings; rows of NaN
        stay random.
        """
        mx.random.seed(seed)
        self.initialize(initial_weights(self.config), ctx=contexts, force_reinit=True)
        if self.config.decoder_bias == "unigram":
            if word_counts is None:
                raise InputError("--decoder-bias unigram: the words' counts in the text are needed")
            self.mlm.decoder.bias.set_data(mx.nd.array(log_frequencies(word_counts)))
        if word_vectors is not None:
            self._set_embeddings(word_vectors)
        self.compile()

    def _set_embeddings(self, word_vectors: np.ndarray) -> None:
        """Replace the embeddings of words that have a vector, at the scale of the random ones."""
        weight = self.encoder.embeddings.tokens.weight
        values = weight.data(weight.list_ctx()[0]).asnumpy()
        known = ~np.isnan(word_vectors[:, 0])
        values[known] = word_vectors[known] * values.std()
        weight.set_data(mx.nd.array(values))

    def set_matmul_precision(self, precision: str) -> None:
        """Multiply matrices in this precision from now on, as TrainConfig has it; the weights stay float32.

        A copy of the network, such as what is exported, computes in float32.
        """
        if precision == self.nsp.dense.precision:
            return

        def tell(block: Any) -> None:
            if isinstance(block, MixedPrecisionBlock):
                block.precision = precision

        self.apply(tell)
        self.compile()

    def compile(self) -> None:
        """Hybridize; the encoder, whose shapes are few, keeps its memory from step to step."""
        self.hybridize()
        self.encoder.hybridize(static_alloc=True)


def initial_weights(config: ModelConfig) -> Any:
    """What draws the weights: Xavier, or N(0, 0.02), also where those of an earlier run will replace them."""
    return mx.init.Xavier() if config.init == "xavier" else mx.init.Normal(NORMAL_SIGMA)


def log_frequencies(counts: np.ndarray) -> np.ndarray:
    """(V,) the logarithm of each word's share of all words, with one added to every count (Laplace)."""
    return np.log((counts + 1) / (counts + 1).sum())
