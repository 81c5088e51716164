"""A learned bias for the distance between two positions, added to attention scores. Holds no embeddings."""

from __future__ import annotations

from typing import Any

from ..config import DISTANCE_BUCKETS
from ..runtime import mx

# Buckets of distances as in T5 (Raffel et al. 2020, section 2.1), on either side: 0 to 7 alone, then two per
# doubling, and the last from 91 on. Distances to the left and 0 have numbers 0 to 15, those to the right 16
# to 30.
SIDE_BUCKETS = DISTANCE_BUCKETS // 2
# A bucket of its own for pairs with <cls>, whose distance means nothing (Ke et al. 2021, TUPE, section 3.2).
CLS_BUCKET = DISTANCE_BUCKETS - 1
# Adam moves a weight by at most about the learning rate per step. Scores need larger biases sooner.
# The compiled operators have the same constants (ops/native/relative_position.h).
BIAS_SCALE = 10.0


def distance_buckets(F: Any, tokens: Any) -> Any:
    """Return the bucket of each query and key, (T, T), for tokens (B, T).

    The last bucket is that of pairs with the first position, <cls>.
    """
    positions = F.contrib.arange_like(tokens, axis=1)  # (T,)
    queries, keys = positions.expand_dims(1), positions.expand_dims(0)
    to_key = F.broadcast_sub(keys, queries)  # (T, T)
    distance = F.abs(to_key)
    # 2 log2(d) + 2 is d or more up to 7, and 8, 9, 10 ... at 8, 8 sqrt(2), 16 ...; 0.001 is for rounding.
    doublings = F.floor(F.log2(F.square(F.clip(distance, 1, 1e6))) + 2.001)
    side = F.broadcast_minimum(distance, F.clip(doublings, 0, SIDE_BUCKETS - 1))
    bucket = side + (SIDE_BUCKETS - 1) * F.clip(to_key, 0, 1)
    apart_from_cls = F.clip(F.broadcast_mul(queries, keys), 0, 1)
    # broadcast_mul, since the export to int8 would round the buckets of an elementwise product.
    return F.BlockGrad(CLS_BUCKET + F.broadcast_mul(apart_from_cls, bucket - CLS_BUCKET))


class RelativeBias(mx.gluon.HybridBlock):
    """A bias for each head and bucket, all zero at first: buckets (T, T) -> (H, T, T)."""

    def __init__(self, num_heads: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._num_heads = num_heads
        with self.name_scope():
            self.bias = self.params.get("bias", shape=(DISTANCE_BUCKETS, num_heads), init="zeros")

    def hybrid_forward(self, F: Any, buckets: Any, bias: Any) -> Any:
        sizes = {"input_dim": DISTANCE_BUCKETS, "output_dim": self._num_heads}
        biases = F.Embedding(buckets, bias, **sizes)  # (T, T, H)
        return BIAS_SCALE * biases.transpose(axes=(2, 0, 1))
