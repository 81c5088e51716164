"""The fine-tuning loop: begin, fit, evaluate. Writes nothing; a reporter is told of each epoch."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any, Callable, Iterable, Iterator, NamedTuple

import numpy as np

from ..config import FineTuneConfig, TrainConfig
from ..data.tokenizer import Tokenizer, pad
from ..errors import InputError
from ..inference.predictor import GluonNetwork, Prediction, Predictor
from ..model.classifier import BERTForTask
from ..model.parameters import named_parameters, weights_of
from ..model.task import Task
from ..runtime import mx
from ..training.lr_schedule import learning_rate
from ..training.optimizers import clip_gradients, gluon_trainer
from . import metrics
from .dataset import Examples


class Epoch(NamedTuple):
    """How an epoch went: the mean loss of its steps, and what the metrics are on the dev examples."""

    number: int
    step: int
    loss: float
    dev: dict[str, float]
    best: bool
    seconds: float


def init_from_pretrained(
    net: Any, task: Task, config: FineTuneConfig, context: Any, pretrained: bool = True
) -> Any:
    """A network for a task with the encoder and the pooler of a pretrained one; its head is drawn.

    pretrained: False draws the encoder and the pooler anew, too, to see what pretraining is worth.
    """
    tuned = BERTForTask(net.vocab_size, dataclasses.replace(net.config, dropout=config.dropout), task)
    tuned.initialize(ctx=[context], seed=config.seed)
    tuned.hybridize()
    if pretrained:
        weights = weights_of(net)
        for name, parameter in named_parameters(tuned).items():
            if not name.startswith("head."):
                parameter.set_data(mx.nd.array(weights[name], ctx=context))
    return tuned


def train_config(config: FineTuneConfig, num_examples: int) -> TrainConfig:
    """The optimizer's configuration for so many examples: AdamW, a warm-up and a linear fall."""
    steps = config.epochs * math.ceil(num_examples / config.batch_size)
    return TrainConfig(
        batch_size=config.batch_size,
        num_steps=steps,
        lr=config.lr,
        schedule="linear",
        warmup_ratio=config.warmup_ratio,
        # With bias correction, without which short runs on little data fail by chance (Mosbach et al. 2021).
        optimizer="adamw",
        epsilon=1e-6,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        seed=config.seed,
    )


class FineTuner:
    """Steps down the loss of a task on labelled examples.

    >>> tuner = FineTuner(begin(run.net, task, config, mx.cpu()), run.reader, config)       # doctest: +SKIP
    >>> tuner.fit(train, dev, lambda epoch: print(epoch))
    """

    def __init__(self, net: Any, reader: Tokenizer, config: FineTuneConfig) -> None:
        self.net, self.reader, self.config = net, reader, config
        self._context = net.head.dense.weight.list_ctx()[0]

    def fit(self, train: Examples, dev: Examples, reporter: Callable[[Epoch], None]) -> Epoch:
        """Train for all epochs, each followed by an evaluation; returns the best one.

        The best is that with the best first metric of the task, or that of `best_metric`, the earlier of equals.
        InputError where the loss is no number any more.
        """
        best, started = None, time.perf_counter()
        for number, step, loss in self.epochs(train):
            found = self.evaluate(dev)
            better = best is None or self._value(found) > self._value(best.dev)
            epoch = Epoch(number, step, loss, found, better, time.perf_counter() - started)
            best = epoch if better else best
            reporter(epoch)
        assert best
        return best

    def epochs(self, train: Examples) -> Iterator[tuple[int, int, float]]:
        """Train epoch by epoch: its number, the steps made so far, and the mean loss of its examples.

        InputError where the loss is no number any more.
        """
        config = train_config(self.config, len(train))
        optimizer = gluon_trainer(self.net.collect_params(), config)
        step = 0
        for number in range(1, self.config.epochs + 1):
            losses = []
            for rows in train.batches(config.batch_size, config.seed, number):
                step += 1
                optimizer.set_learning_rate(learning_rate(config, step, config.num_steps))
                losses.append((len(rows), self._step(train, rows, optimizer)))
            loss = sum(n * float(each.asscalar()) for n, each in losses) / len(train)
            if not math.isfinite(loss):
                raise InputError(
                    f"--lr {config.lr:g}: in epoch {number} the loss is no number any more; a smaller "
                    "learning rate is the usual remedy"
                )
            yield number, step, loss

    def _step(self, train: Examples, rows: np.ndarray, optimizer: Any) -> Any:
        """One optimizer step; returns the mean loss of the batch, on the device."""
        assert train.targets is not None
        batch = pad([train.texts[i] for i in rows], self.reader.max_seq_length)
        arrays = (batch.tokens, batch.token_types, batch.valid_length, train.targets[rows])
        *inputs, targets = (mx.nd.array(each, ctx=self._context, dtype=np.float32) for each in arrays)
        with mx.autograd.record():
            # Part by part, each of which keeps its memory from step to step.
            scores = self.net.head(self.net.pooler(self.net.encoder(*inputs)))
            loss = task_loss(scores, targets, self.net.task)
        loss.backward()
        trained = [p for p in self.net.collect_params().values() if p.grad_req != "null"]
        clip_gradients([[p.grad(self._context) for p in trained]], self.config.clip_norm)
        optimizer.update(1)  # the loss is a mean already
        return loss

    def _value(self, found: dict[str, float]) -> float:
        """What decides which epoch is the best; more is better."""
        name = (
            self.config.best_metric
            if self.config.best_metric != "auto"
            else metrics.METRICS_BY_TASK[self.net.task.kind][0]
        )
        value = -found[name] if name in metrics.SMALLER else found[name]
        return -math.inf if math.isnan(value) else value

    def predict(self, examples: Examples) -> np.ndarray:
        """(N, K) float32 the scores of each text, dropout off."""
        predictor = Predictor(GluonNetwork(self.net), self.reader)
        return scores_of(predictor.predict(examples.texts))

    def evaluate(self, examples: Examples) -> dict[str, float]:
        """The metrics of the task on labelled examples."""
        return evaluated(self.predict(examples), examples, self.net.task)


def task_loss(scores: Any, targets: Any, task: Task) -> Any:
    """The mean loss of a batch, (1,): cross-entropy, or the squared error in units of their variance."""
    if task.kind == "classification":
        return -scores.log_softmax(axis=-1).pick(targets, axis=-1).mean()
    return ((scores.reshape((-1,)) - targets) / task.scale).square().mean()


def evaluated(scores: np.ndarray, examples: Examples, task: Task) -> dict[str, float]:
    """The metrics of scores (N, K) on labelled examples."""
    assert examples.targets is not None
    if task.kind == "classification":
        return metrics.classification_metrics(examples.targets, scores.argmax(axis=1), task.outputs)
    return metrics.regression_metrics(examples.targets, scores[:, 0].astype(np.float64))


def scores_of(answers: Iterable[Prediction]) -> np.ndarray:
    """(N, K) float32 the task's scores of answers."""
    return np.stack([answer.task_scores for answer in answers if answer.task_scores is not None])
