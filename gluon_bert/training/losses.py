"""The pretraining losses of one shard. Knows nothing of contexts, steps or optimizers."""

from __future__ import annotations

from typing import Any, NamedTuple

from .. import ops
from ..runtime import mx
from .device_batch import DeviceBatch

# Predictions whose scores are computed at once: at V = 30,000 those of 256 take 31 MB, just below the size
# from which glibc returns memory to the system each time, which doubles the time of the decoder.
CHUNK = 256


class ShardLoss(NamedTuple):
    """What one shard gives, on the shard's context; losses in nats.

    `mlm` and `nsp` are sums over the shard's predictions and pairs, (1,). `total`, (1,), is the shard's
    share of the batch's loss, mean MLM plus mean NSP: the totals of all shards add up to it. `hits`, (2,),
    counts the predictions and the pairs with the highest score at the label; predictions only if asked for.
    """

    mlm: Any
    nsp: Any
    total: Any
    correct: Any


def shard_loss(net: Any, shard: DeviceBatch, count_mlm_correct: bool = False) -> ShardLoss:
    """The MLM, the NSP and the total loss of one shard.

    The shard's weights divide by the counts of the whole batch, here and nowhere else: so one context,
    two or four give the same gradient, however the rows are divided. Counting the hits among the
    predictions takes one more pass over all their scores.
    """
    encoded = net.encoder(shard.tokens, shard.token_types, shard.valid_length)
    nsp_scores = net.nsp(net.pooler(encoded))
    nsp = cross_entropy(nsp_scores, shard.next_sentence_labels)
    mlm, mlm_correct = masked_loss(net, encoded, shard, count_mlm_correct)
    nsp_correct = num_correct(nsp_scores, shard.next_sentence_labels)
    total = mlm * shard.mlm_weight + nsp * shard.nsp_weight
    return ShardLoss(mlm, nsp, total, mx.nd.concat(mlm_correct, nsp_correct, dim=0))


def masked_loss(net: Any, encoded: Any, shard: DeviceBatch, count_hits: bool) -> tuple[Any, Any]:
    """The sum of the losses of a shard's predictions, and their hits, 0 unless asked for; both (1,)."""
    if len(shard.masked_ids) and ops.use_compiled(net.mlm, encoded):
        loss, found = ops.masked_loss(
            net.config,
            net.mlm.in_order(),
            encoded,
            shard.masked_positions,
            shard.masked_ids,
            bf16=net.mlm.precision == "bf16",
        )
        return loss, found if count_hits else mx.nd.zeros_like(found)
    masked = net.mlm.transform(encoded, shard.masked_positions)
    loss = found = mx.nd.zeros((1,), ctx=masked.context)
    for start in range(0, len(shard.masked_ids), CHUNK):
        some = slice(start, start + CHUNK)
        scores, labels = net.mlm.decoder(masked[some]), shard.masked_ids[some]
        loss = loss + cross_entropy(scores, labels)
        if count_hits:
            found = found + num_correct(scores, labels)
    return loss, found


def cross_entropy(scores: Any, labels: Any) -> Any:
    """The sum over rows of -log softmax(scores)[label], in nats: (N, K), (N,) -> (1,)."""
    return -scores.log_softmax(axis=-1).pick(labels, axis=-1).sum()


def num_correct(scores: Any, labels: Any) -> Any:
    """How many rows have their highest score at the label: (N, K), (N,) -> (1,)."""
    with mx.autograd.pause():
        return (scores.argmax(axis=-1) == labels).sum()
