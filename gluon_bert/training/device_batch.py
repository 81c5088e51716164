"""Splits a batch over devices. Computes no loss."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Mapping, Sequence

import numpy as np

from ..runtime import mx


@dataclass(frozen=True)
class DeviceBatch:
    """The rows of a batch that one device computes.

    Each array of the batch is an attribute of the same name, a float32 NDArray: `shard.tokens`.

    num_pairs, num_tokens, num_masked: counts of this shard, without padding. A device without rows of its own
    gets a copy of the first row; its counts are 0.
    num_labels: tokens with a label, if the batch has labels.
    pair_weight, masked_weight, label_weight: 1 / the count of the whole batch. A summed loss times its weight
    is this shard's part of the mean. All are 0 for a copied row.
    count_correct: whether the loss should count correct masked predictions, which takes one more pass.
    """

    arrays: Mapping[str, Any]
    num_pairs: int
    num_tokens: int
    num_masked: int
    pair_weight: float
    masked_weight: float
    count_correct: bool = False
    num_labels: int = 0
    label_weight: float = 0.0

    def __getattr__(self, name: str) -> Any:
        arrays = self.__dict__.get("arrays", {})
        if name not in arrays:
            raise AttributeError(f"the batch has no array {name!r}; it has {', '.join(arrays)}")
        return arrays[name]


def split_and_load(
    batch: Any, devices: Sequence[Any], whole: Any = None, count_correct: bool = False
) -> list[DeviceBatch]:
    """Return a shard for every device, like `gluon.utils.split_and_load`, for any batch size.

    The rows are divided as evenly as possible. A device without rows gets a copy of the first row with
    weight 0. Its gradient is then zero; without the copy it would keep the gradient of the step before.

    whole: the batch of the optimizer step, if `batch` is a part of it. The weights divide by its counts.
    """
    whole = batch if whole is None else whole
    bounds = np.linspace(0, len(batch), len(devices) + 1).astype(int)
    return [
        _load(batch, start, stop, device, whole, count_correct)
        for start, stop, device in zip(bounds, bounds[1:], devices)
    ]


def _load(batch: Any, start: int, stop: int, device: Any, whole: Any, count_correct: bool) -> DeviceBatch:
    used = stop > start
    part = batch.rows(start, stop) if used else whole.rows(0, 1)
    arrays = {
        field.name: mx.nd.array(getattr(part, field.name), ctx=device, dtype=np.float32)
        for field in dataclasses.fields(part)
    }
    num_masked, num_labels = _num_masked(whole), _num_labels(whole)
    return DeviceBatch(
        arrays,
        num_pairs=len(part) if used else 0,
        num_tokens=int(part.valid_length.sum()) if used else 0,
        num_masked=_num_masked(part) if used else 0,
        pair_weight=1 / len(whole) if used else 0.0,
        masked_weight=1 / num_masked if used and num_masked else 0.0,
        count_correct=count_correct,
        num_labels=_num_labels(part) if used else 0,
        label_weight=1 / num_labels if used and num_labels else 0.0,
    )


def _num_masked(batch: Any) -> int:
    """Return the number of masked tokens; 0 for a batch without masks."""
    return len(getattr(batch, "masked_ids", ()))


def _num_labels(batch: Any) -> int:
    """Return the number of tokens with a label; 0 for a batch that labels no tokens."""
    return int(getattr(batch, "num_labels", 0))
