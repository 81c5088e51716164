"""Splits a batch over contexts. Computes no loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Sequence

import numpy as np

from ..data.batch import Batch
from ..runtime import mx


@dataclass(frozen=True)
class DeviceBatch:
    """The rows of a batch that one context computes, as float32 NDArrays named as in Batch.

    num_pairs, num_tokens, num_masked: what the shard adds to the batch, without padding; all 0 for a
    shard that is only there because the batch has fewer rows than there are contexts.
    mlm_weight, nsp_weight: what the shard's summed losses count in the batch's mean.
    """

    tokens: Any
    token_types: Any
    valid_length: Any
    masked_positions: Any
    masked_ids: Any
    next_sentence_labels: Any
    num_pairs: int
    num_tokens: int
    num_masked: int
    mlm_weight: float
    nsp_weight: float


def split_and_load(batch: Batch, contexts: Sequence[Any], whole: Batch | None = None) -> list[DeviceBatch]:
    """A shard for every context, like `gluon.utils.split_and_load`, for any batch size.

    The rows are divided as evenly as they go. A context for which none is left gets a copy of the first
    row with weight 0: its gradient is then zero, where it would otherwise be that of the step before.

    whole: the batch of an optimizer step, if this is a part of it; the weights are then shares of its mean.
    """
    whole = batch if whole is None else whole
    bounds = np.linspace(0, len(batch), len(contexts) + 1).astype(int)
    return [_load(batch, start, stop, ctx, whole) for start, stop, ctx in zip(bounds, bounds[1:], contexts)]


def _load(batch: Batch, start: int, stop: int, ctx: Any, whole: Batch) -> DeviceBatch:
    used = stop > start
    part = batch.rows(start, stop) if used else whole.rows(0, 1)

    def load(array: np.ndarray) -> Any:
        return mx.nd.array(array, ctx=ctx, dtype=np.float32)

    return DeviceBatch(
        load(part.tokens),
        load(part.token_types),
        load(part.valid_length),
        load(part.masked_positions),
        load(part.masked_ids),
        load(part.next_sentence_labels),
        num_pairs=len(part) if used else 0,
        num_tokens=int(part.valid_length.sum()) if used else 0,
        num_masked=len(part.masked_ids) if used else 0,
        mlm_weight=1 / len(whole.masked_ids) if used else 0.0,
        nsp_weight=1 / len(whole) if used else 0.0,
    )
