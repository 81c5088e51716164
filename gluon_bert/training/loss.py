"""The pretraining losses of one shard. Knows nothing of contexts, steps or optimizers."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..data.batch import Shard


class ShardLoss(NamedTuple):
    """The losses of one shard, each of shape (1,) on the shard's context, in nats.

    `mlm` and `nsp` are sums over the shard's predictions and pairs. `total` is the shard's share of the
    batch's loss, mean MLM plus mean NSP: the totals of all shards add up to it.
    """

    mlm: Any
    nsp: Any
    total: Any
    mlm_scores: Any  # (M, V)
    nsp_scores: Any  # (B, 2)


def shard_loss(net: Any, shard: Shard) -> ShardLoss:
    """The MLM, the NSP and the total loss of one shard.

    The shard's weights divide by the counts of the whole batch, here and nowhere else: so one context,
    two or four give the same gradient, however the rows are divided.
    """
    _, mlm_scores, nsp_scores = net(shard.tokens, shard.segments, shard.lengths, shard.predictions)
    mlm = cross_entropy(mlm_scores, shard.labels)
    nsp = cross_entropy(nsp_scores, shard.is_next)
    total = mlm * shard.mlm_weight + nsp * shard.nsp_weight
    return ShardLoss(mlm, nsp, total, mlm_scores, nsp_scores)


def cross_entropy(scores: Any, labels: Any) -> Any:
    """The sum over rows of -log softmax(scores)[label], in nats: (N, K), (N,) -> (1,)."""
    return -scores.log_softmax(axis=-1).pick(labels, axis=-1).sum()


def hits(scores: Any, labels: Any) -> Any:
    """How many rows have their highest score at the label: (N, K), (N,) -> (1,)."""
    return (scores.argmax(axis=-1) == labels).sum()
