"""BERT for fine-tuning: the encoder, the pooler and a head for one task in one HybridBlock."""

from __future__ import annotations

from typing import Any

from ..config import ModelConfig, check_group
from ..runtime import mx
from .bert import BERTBlock
from .dropout import Dropout
from .encoder import Encoder
from .heads import Pooler
from .task import Task


class TaskHead(mx.gluon.HybridBlock):
    """The scores of a task: (B, C) -> (B, K). A regression's score is in the unit of the task's scores."""

    def __init__(self, config: ModelConfig, task: Task, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._mean, self._scale = task.mean, task.scale
        with self.name_scope():
            self.dropout = Dropout(config.dropout)
            self.dense = mx.gluon.nn.Dense(task.outputs, flatten=False, in_units=config.units)

    def hybrid_forward(self, F: Any, pooled: Any) -> Any:
        return self.dense(self.dropout(pooled)) * self._scale + self._mean


class BERTForTask(BERTBlock):
    """BERT with one head, for a task (Devlin et al. 2018, section 4 and figure 4).

    Inputs, all float32: tokens (B, T), token_types (B, T) and valid_length (B,). Outputs, float32: encoded tokens
    (B, T, C) and the task's scores (B, K).
    """

    def __init__(self, vocab_size: int, config: ModelConfig, task: Task, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_group(config)
        self.vocab_size, self.config, self.task = vocab_size, config, task
        with self.name_scope():
            self.encoder = Encoder(vocab_size, config)
            self.pooler = Pooler(config)
            self.head = TaskHead(config, task)

    def hybrid_forward(self, F: Any, tokens: Any, token_types: Any, valid_length: Any) -> tuple[Any, Any]:
        encoded = self.encoder(tokens, token_types, valid_length)
        return encoded, self.head(self.pooler(encoded))

    def with_config(self, config: ModelConfig, **kwargs: Any) -> BERTForTask:
        """Return a network of the same kind with another configuration, without weights."""
        return BERTForTask(self.vocab_size, config, self.task, **kwargs)


def task_of(net: Any) -> Task | None:
    """Return what a network was fine-tuned for, None for a pretrained one."""
    return net.task if isinstance(net, BERTForTask) else None
