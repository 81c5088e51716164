"""What other packages call the network's parameters and how they lay them out. Reads no files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Mapping

import numpy as np

_POSITIONS = "encoder.embeddings.positions.weight"


@dataclass(frozen=True)
class WeightNames:
    """Another package's parameters in terms of ours.

    parts: parts of our names and theirs, replaced in this order. follows_first: row 0 of their next-sentence
    head is the score for "follows", which here is row 1. kernels: an ending of the names of dense weights
    that are stored transposed. batch_of_positions: the position embeddings are (1, P, C). encoder: the prefix
    of the names of the encoder and the pooler. Other names belong to heads.
    """

    parts: Mapping[str, str]
    follows_first: bool = False
    kernels: str = ""
    batch_of_positions: bool = False
    encoder: tuple[str, ...] = ("",)

    def name(self, ours: str) -> str:
        """Return their name of a parameter.

        >>> HUGGINGFACE.name("encoder.layers.0.norm1.gamma")
        'bert.encoder.layer.0.attention.output.LayerNorm.weight'
        """
        for our_part, their_part in self.parts.items():
            ours = ours.replace(our_part, their_part)
        return ours

    def is_of_encoder(self, theirs: str) -> bool:
        """Return whether one of their names belongs to the encoder or the pooler, not to a head."""
        return theirs.startswith(self.encoder)

    def foreign_shape(self, ours: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of their array for our parameter of that name."""
        return self.to_theirs(ours, np.empty(shape, np.bool_)).shape

    def to_ours(self, ours: str, array: np.ndarray) -> np.ndarray:
        """Return their array as our parameter of that name; the inverse of `to_theirs`."""
        if self.batch_of_positions and ours == _POSITIONS:
            return array[0]
        return self._turned(ours, array)

    def to_theirs(self, ours: str, array: np.ndarray) -> np.ndarray:
        """Return our parameter of that name as their array."""
        if self.batch_of_positions and ours == _POSITIONS:
            return array[None]
        return self._turned(ours, array)

    def _turned(self, ours: str, array: np.ndarray) -> np.ndarray:
        if self.follows_first and ours.startswith("nsp."):
            return array[::-1]
        return array.T if self.kernels and self.name(ours).endswith(self.kernels) else array


# BertForPreTraining, BertForSequenceClassification and BertForTokenClassification of PyTorch transformers.
# The label 0 of the first is "follows" (modeling_bert.py).
HUGGINGFACE = WeightNames(
    {
        "encoder.embeddings.tokens": "bert.embeddings.word_embeddings",
        "encoder.embeddings.segments": "bert.embeddings.token_type_embeddings",
        "encoder.embeddings.positions": "bert.embeddings.position_embeddings",
        "encoder.embeddings.norm": "bert.embeddings.LayerNorm",
        "encoder.layers": "bert.encoder.layer",
        "attend.query": "attention.self.query",
        "attend.key": "attention.self.key",
        "attend.value": "attention.self.value",
        "attend.output": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "feed_forward.expand": "intermediate.dense",
        "feed_forward.project": "output.dense",
        "norm2": "output.LayerNorm",
        "pooler": "bert.pooler",
        "mlm.transform.norm": "cls.predictions.transform.LayerNorm",
        "mlm.transform": "cls.predictions.transform",
        "mlm.decoder.bias": "cls.predictions.bias",
        "mlm.decoder": "cls.predictions.decoder",
        "nsp.dense": "cls.seq_relationship",
        "head.dense": "classifier",
        "gamma": "weight",
        "beta": "bias",
    },
    follows_first=True,
    encoder=("bert.",),
)

# BertForQuestionAnswering has another name for its head.
HUGGINGFACE_SPANS = replace(HUGGINGFACE, parts={**HUGGINGFACE.parts, "head.dense": "qa_outputs"})

# The TensorFlow checkpoints of google-research/bert. Its label 1 is a random second segment
# (create_pretraining_data.py).
TENSORFLOW = WeightNames(
    {
        "encoder.embeddings.tokens.weight": "bert/embeddings/word_embeddings",
        "encoder.embeddings.segments.weight": "bert/embeddings/token_type_embeddings",
        "encoder.embeddings.positions.weight": "bert/embeddings/position_embeddings",
        "encoder.embeddings.norm": "bert/embeddings/LayerNorm",
        "encoder.layers.": "bert/encoder/layer_",
        "attend.query": "attention/self/query",
        "attend.key": "attention/self/key",
        "attend.value": "attention/self/value",
        "attend.output": "attention/output/dense",
        "norm1": "attention/output/LayerNorm",
        "feed_forward.expand": "intermediate/dense",
        "feed_forward.project": "output/dense",
        "norm2": "output/LayerNorm",
        "pooler": "bert/pooler",
        "mlm.transform.norm": "cls/predictions/transform/LayerNorm",
        "mlm.transform": "cls/predictions/transform",
        "mlm.decoder.bias": "cls/predictions/output_bias",
        "nsp.dense.": "cls/seq_relationship/output_",
        "output_weight": "output_weights",
        ".weight": "/kernel",
        ".": "/",
    },
    follows_first=True,
    kernels="/kernel",
    encoder=("bert/",),
)

# BERTModel of GluonNLP 0.10 with pooler, decoder and classifier. Its published weights come from
# google-research/bert, and its own scripts label a random second segment 1, too.
GLUONNLP = WeightNames(
    {
        "encoder.embeddings.tokens": "word_embed.0",
        "encoder.embeddings.segments": "token_type_embed.0",
        "encoder.embeddings.positions.weight": "encoder.position_weight",
        "encoder.embeddings.norm": "encoder.layer_norm",
        "encoder.layers": "encoder.transformer_cells",
        "attend.query": "attention_cell.proj_query",
        "attend.key": "attention_cell.proj_key",
        "attend.value": "attention_cell.proj_value",
        "attend.output": "proj",
        "norm1": "layer_norm",
        "feed_forward.expand": "ffn.ffn_1",
        "feed_forward.project": "ffn.ffn_2",
        "norm2": "ffn.layer_norm",
        "pooler.dense": "pooler",
        "mlm.transform.dense": "decoder.0",
        "mlm.transform.norm": "decoder.2",
        "mlm.decoder": "decoder.3",
        "nsp.dense": "classifier",
    },
    follows_first=True,
)

# D2L's BERTModel for MXNet (d2l 0.17). Its label 1 is "follows", as here.
D2L = WeightNames(
    {
        "encoder.embeddings.tokens": "encoder.token_embedding",
        "encoder.embeddings.segments": "encoder.segment_embedding",
        "encoder.embeddings.positions.weight": "encoder.pos_embedding",
        "encoder.layers": "encoder.blks",
        "attend.query": "attention.W_q",
        "attend.key": "attention.W_k",
        "attend.value": "attention.W_v",
        "attend.output": "attention.W_o",
        "norm1": "addnorm1.ln",
        "feed_forward.expand": "ffn.dense1",
        "feed_forward.project": "ffn.dense2",
        "norm2": "addnorm2.ln",
        "pooler.dense": "hidden",
        "mlm.transform.dense": "mlm.mlp.0",
        "mlm.transform.norm": "mlm.mlp.1",
        "mlm.decoder": "mlm.mlp.2",
        "nsp.dense": "nsp.output",
    },
    batch_of_positions=True,
)
