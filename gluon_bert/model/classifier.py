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
    """The scores of a task, of texts or of tokens: (..., C) -> (..., K).

    A regression's score is in the unit of the task's scores. Question answering has no dropout here, as in
    transformers' BertForQuestionAnswering.
    """

    def __init__(self, config: ModelConfig, task: Task, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._mean, self._scale = task.mean, task.scale
        with self.name_scope():
            self.dropout = Dropout(0.0 if task.kind == "question-answering" else config.dropout)
            self.dense = mx.gluon.nn.Dense(task.outputs, flatten=False, in_units=config.units)

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        return self.dense(self.dropout(x)) * self._scale + self._mean


class BERTForTask(BERTBlock):
    """BERT with one head, for a task (Devlin et al. 2018, section 4 and figure 4).

    Inputs, all float32: tokens (B, T), token_types (B, T) and valid_length (B,). Outputs, float32: encoded
    tokens (B, T, C) and the task's scores: (B, K), or (B, T, K) of a task that scores tokens. The latter has
    no pooler.
    """

    def __init__(self, vocab_size: int, config: ModelConfig, task: Task, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_group(config)
        self.vocab_size, self.config, self.task = vocab_size, config, task
        with self.name_scope():
            self.encoder = Encoder(vocab_size, config)
            if not task.scores_tokens:
                self.pooler = Pooler(config)
            self.head = TaskHead(config, task)

    def hybrid_forward(self, F: Any, tokens: Any, token_types: Any, valid_length: Any) -> tuple[Any, Any]:
        encoded = self.encoder(tokens, token_types, valid_length)
        return encoded, self.scores(encoded)

    def scores(self, encoded: Any) -> Any:
        """Return the task's scores of encoded tokens: (B, T, C) -> (B, K), or (B, T, K)."""
        return self.head(encoded if self.task.scores_tokens else self.pooler(encoded))

    def with_config(self, config: ModelConfig, **kwargs: Any) -> BERTForTask:
        """Return a network of the same kind with another configuration, without weights."""
        return BERTForTask(self.vocab_size, config, self.task, **kwargs)


def task_of(net: Any) -> Task | None:
    """Return what a network was fine-tuned for, None for a pretrained one."""
    return net.task if isinstance(net, BERTForTask) else None
