"""BERT as it is fine-tuned: the encoder, the pooler and a head for a task, one HybridBlock."""

from __future__ import annotations

from typing import Any

from ..config import ModelConfig, check_group
from ..runtime import mx
from .bert import initial_weights
from .dropout import Dropout
from .encoder import Encoder
from .heads import Pooler
from .task import Task


class TaskHead(mx.gluon.HybridBlock):
    """The scores of a task: (B, C) -> (B, K). Of a regression in the unit of its scores."""

    def __init__(self, config: ModelConfig, task: Task, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._mean, self._scale = task.mean, task.scale
        with self.name_scope():
            self.dropout = Dropout(config.dropout)
            self.dense = mx.gluon.nn.Dense(task.outputs, flatten=False, in_units=config.units)

    def hybrid_forward(self, F: Any, pooled: Any) -> Any:
        return self.dense(self.dropout(pooled)) * self._scale + self._mean


class BERTForTask(mx.gluon.HybridBlock):
    """BERT with one head, for a task (Devlin et al. 2018, section 4 and figure 4).

    Call it with tokens (B, T), token_types (B, T) and valid_length (B,), all float32. It returns the encoded tokens
    (B, T, C) and the task's scores (B, K), float32.
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
        """A network of this kind with another configuration and no weights."""
        return BERTForTask(self.vocab_size, config, self.task, **kwargs)

    def setup(self, contexts: Any, seed: int = 0) -> None:
        """Draw the initial weights onto these contexts and compile; seeds MXNet, so dropout as well."""
        mx.random.seed(seed)
        self.initialize(initial_weights(self.config), ctx=contexts, force_reinit=True)
        self.compile()

    def compile(self) -> None:
        """Hybridize; the encoder, whose shapes are few, keeps its memory from step to step."""
        self.hybridize()
        self.encoder.hybridize(static_alloc=True)
