"""The losses of one shard. Knows nothing of devices, steps or optimizers.

A loss function takes the network and a `DeviceBatch`. It returns its named losses and their total:

>>> def mlm_only(net, shard):                                                       # doctest: +SKIP
...     encoded = encode_for_heads(net, shard)
...     return {"mlm": masked_lm(net, encoded, shard)}
"""

from __future__ import annotations

from typing import Any, Callable, Mapping, NamedTuple

from .. import ops
from ..errors import InputError
from ..runtime import mx
from .device_batch import DeviceBatch

# Masked positions per chunk. At V = 30,000 the scores of 256 take 31 MB. From 32 MB on glibc returns memory
# to the system each time, which doubles the time of the decoder.
CHUNK = 256


class LossSum(NamedTuple):
    """A loss over the rows or the masked tokens of a shard.

    value: (1,) the sum in nats, on the shard's device. number: the number of terms. weight: 1 / the count of
    the whole batch. correct: (1,) the number of correct predictions; None if not counted.
    """

    value: Any
    number: int
    weight: float
    correct: Any = None

    @property
    def share(self) -> Any:
        """(1,) this shard's part of the mean over the whole batch."""
        return self.value * self.weight


class ShardLoss(NamedTuple):
    """The losses of a shard by name, and the total whose gradient is computed.

    The totals of all shards add up to the loss of the batch.
    """

    losses: Mapping[str, LossSum]
    total: Any

    @classmethod
    def of(cls, losses: ShardLoss | Mapping[str, LossSum]) -> ShardLoss:
        """Add the total to named losses: the sum of their shares."""
        if isinstance(losses, ShardLoss):
            return losses
        if not isinstance(losses, Mapping) or not all(isinstance(each, LossSum) for each in losses.values()):
            raise InputError(
                f"loss must return a LossSum for each name, got {_types_of(losses)}. "
                "Return {name: LossSum(sum, number, weight)}."
            )
        first, *others = (loss.share for loss in losses.values())
        return cls(dict(losses), sum(others, first))


def _types_of(losses: Any) -> str:
    if not isinstance(losses, Mapping):
        return type(losses).__name__
    return ", ".join(f"{name}: {type(value).__name__}" for name, value in losses.items())


# The type of a trainer's `loss`.
LossFunction = Callable[[Any, DeviceBatch], Any]


def pretraining_loss(net: Any, shard: DeviceBatch) -> ShardLoss:
    """Return the MLM, the NSP and the total loss of one shard (Devlin et al. 2018, section 3.1)."""
    return _masked_lm_and_pairs(net, shard, "nsp")


def mlm_only(net: Any, shard: DeviceBatch) -> ShardLoss:
    """Return the MLM loss of one shard (Liu et al. 2019, RoBERTa).

    The NSP head and the pooler stay as drawn.
    """
    encoded = encode_for_heads(net, shard)
    return ShardLoss.of({"mlm": masked_lm(net, encoded, shard)})


def mlm_and_sentence_order(net: Any, shard: DeviceBatch) -> ShardLoss:
    """Return the MLM, the sentence-order and the total loss of one shard (Lan et al. 2019, ALBERT).

    The head is that of NSP. Its labels differ: 1 for two segments in order, 0 for swapped ones.
    """
    return _masked_lm_and_pairs(net, shard, "sop")


def task_loss(net: Any, shard: DeviceBatch) -> ShardLoss:
    """Return the loss of a fine-tuned network (`BERTForTask`) on one shard, by the kind of its task."""
    read = None if net.task.scores_tokens else _cls_positions(shard)
    scores = net.scores(net.encoder(shard.tokens, shard.token_types, shard.valid_length, read))
    return ShardLoss.of({"task": _TASK_LOSSES[net.task.kind](net, scores, shard)})


def _class_loss(_: Any, scores: Any, shard: DeviceBatch) -> LossSum:
    """Return the cross-entropy of classes: scores (B, K), targets (B,)."""
    correct = num_correct(scores, shard.targets)
    return LossSum(cross_entropy(scores, shard.targets), shard.num_pairs, shard.pair_weight, correct)


def _score_loss(net: Any, scores: Any, shard: DeviceBatch) -> LossSum:
    """Return the squared error of scores (B, 1) in units of their variance; targets (B,)."""
    summed = ((scores.reshape((-1,)) - shard.targets) / net.task.scale).square().sum()
    return LossSum(summed, shard.num_pairs, shard.pair_weight)


def _tag_loss(_: Any, scores: Any, shard: DeviceBatch) -> LossSum:
    """Return the cross-entropy of tags: scores (B, T, K), targets (B, T), negative without a tag."""
    has_tag, targets = shard.targets >= 0, mx.nd.maximum(shard.targets, 0)
    losses = -scores.log_softmax(axis=-1).pick(targets, axis=-1)
    with mx.autograd.pause():
        correct = ((scores.argmax(axis=-1) == targets) * has_tag).sum()
    return LossSum((losses * has_tag).sum(), shard.num_labels, shard.label_weight, correct)


def _span_loss(_: Any, scores: Any, shard: DeviceBatch) -> LossSum:
    """Return the mean of the start's and the end's cross-entropy: scores (B, T, 2), targets (B, 2).

    Padding is no candidate, so it changes no loss.
    """
    scores = mx.nd.SequenceMask(
        scores.transpose((1, 0, 2)), shard.valid_length, use_sequence_length=True, value=_IMPOSSIBLE
    ).transpose((1, 2, 0))
    losses = -scores.log_softmax(axis=-1).pick(shard.targets, axis=-1)
    with mx.autograd.pause():
        correct = (scores.argmax(axis=-1) == shard.targets).prod(axis=-1).sum()
    return LossSum(losses.sum() / 2, shard.num_pairs, shard.pair_weight, correct)


# The softmax of this score is 0 in float32, and it is finite in float16.
_IMPOSSIBLE = -1e4

_TASK_LOSSES = {
    "classification": _class_loss,
    "regression": _score_loss,
    "tagging": _tag_loss,
    "question-answering": _span_loss,
}


# The loss function of each objective. A new one also needs its pairs in config.NEGATIVE_PAIRS.
OBJECTIVES: dict[str, LossFunction] = {
    "mlm+nsp": pretraining_loss,
    "mlm": mlm_only,
    "mlm+sop": mlm_and_sentence_order,
}


def objective_loss(objective: str, nsp_weight: float = 1.0) -> LossFunction:
    """Return the loss function of an objective. nsp_weight: of the loss of its pairs in the total."""
    loss = OBJECTIVES[objective]
    if nsp_weight == 1:
        return loss

    def weighted(net: Any, shard: DeviceBatch) -> ShardLoss:
        losses = loss(net, shard).losses
        shares = [each.share * (1 if name == "mlm" else nsp_weight) for name, each in losses.items()]
        return ShardLoss(losses, sum(shares[1:], shares[0]))

    return weighted


def _masked_lm_and_pairs(net: Any, shard: DeviceBatch, name: str) -> ShardLoss:
    encoded = encode_for_heads(net, shard)
    scores = net.nsp(net.pooler(encoded))
    pairs = LossSum(
        cross_entropy(scores, shard.next_sentence_labels),
        shard.num_pairs,
        shard.pair_weight,
        num_correct(scores, shard.next_sentence_labels),
    )
    return ShardLoss.of({"mlm": masked_lm(net, encoded, shard), name: pairs})


def encode_for_heads(net: Any, shard: DeviceBatch) -> Any:
    """Encode a shard for the heads of pretraining, (B, T, C).

    Only the vectors of <cls> and of the masked tokens mean anything. That saves most of the last layer.
    """
    read = _cls_positions(shard)
    if len(shard.masked_ids):
        read = mx.nd.concat(read, shard.masked_positions, dim=1)
    return net.encoder(shard.tokens, shard.token_types, shard.valid_length, read)


def _cls_positions(shard: DeviceBatch) -> Any:
    """Return the first position of each row, (2, B), rows above columns."""
    rows = mx.nd.arange(len(shard.tokens), ctx=shard.tokens.context)
    return mx.nd.stack(rows, mx.nd.zeros_like(rows))


def masked_lm(net: Any, encoded: Any, shard: DeviceBatch) -> LossSum:
    """Return the MLM loss of a shard's masked tokens, with the correct ones if the shard counts them."""
    if len(shard.masked_ids) and ops.use_compiled(net.mlm, encoded):
        loss, correct = ops.masked_loss(
            net.config,
            net.mlm.in_order(),
            encoded,
            shard.masked_positions,
            shard.masked_ids,
            bf16=net.mlm.precision == "bf16",
        )
    else:
        loss, correct = _masked_lm_in_chunks(net, encoded, shard)
    counted = correct if shard.count_correct else None
    return LossSum(loss, shard.num_masked, shard.masked_weight, counted)


def _masked_lm_in_chunks(net: Any, encoded: Any, shard: DeviceBatch) -> tuple[Any, Any]:
    """Return the summed loss and the number of correct predictions, both (1,)."""
    masked = net.mlm.transform(encoded, shard.masked_positions)
    decode = net.mlm.decoder.on(masked.context)
    loss = correct = mx.nd.zeros((1,), ctx=masked.context)
    for start in range(0, len(shard.masked_ids), CHUNK):
        chunk = slice(start, start + CHUNK)
        scores, labels = decode(masked[chunk]), shard.masked_ids[chunk]
        loss = loss + cross_entropy(scores, labels)
        if shard.count_correct:
            correct = correct + num_correct(scores, labels)
    return loss, correct


def cross_entropy(scores: Any, labels: Any) -> Any:
    """Return the sum over rows of -log softmax(scores)[label], in nats: (N, K), (N,) -> (1,)."""
    return -scores.log_softmax(axis=-1).pick(labels, axis=-1).sum()


def num_correct(scores: Any, labels: Any) -> Any:
    """Return how many rows have their highest score at the label: (N, K), (N,) -> (1,)."""
    with mx.autograd.pause():
        return (scores.argmax(axis=-1) == labels).sum()
