"""The training loop: step, evaluate, fit. Shows and writes nothing; a reporter is told what happens."""

from __future__ import annotations

import math
from collections import deque
from itertools import islice
from typing import Any, Iterable, Protocol, Sequence

from ..config import TrainConfig, check_group
from ..data.batch import Batch, Shard, split_and_load
from ..data.loader import Data
from ..errors import BadInput
from ..runtime import mx
from .loss import ShardLoss, shard_loss
from .meters import Averages, Clock, Meter, Progress
from .optimizer import clip_gradients, gluon_trainer
from .schedule import learning_rate

# Steps that may be queued on the devices. Two keep them busy while the next batch is made; more would
# only take memory, and make an interrupt wait.
QUEUED_STEPS = 2


class Reporter(Protocol):
    """Who is told of a run's progress."""

    def stepped(self, step: int) -> None:
        """A step has been queued."""

    def progressed(self, progress: Progress) -> None:
        """A window of steps is done."""

    def evaluated(self, step: int, held_out: Averages) -> None:
        """The held-out text was evaluated after this step."""


class Trainer:
    """Steps down the pretraining losses, with every batch spread over the contexts.

    >>> trainer = Trainer(net, preset("d2l").train, [mx.cpu(0), mx.cpu(1)])     # doctest: +SKIP
    >>> trainer.fit(data)
    """

    def __init__(self, net: Any, config: TrainConfig, contexts: Sequence[Any]) -> None:
        check_group(config)
        parameters = net.collect_params()
        if set(contexts) != set(net.nsp.dense.weight.list_ctx()):
            raise BadInput(f"the network is on {net.nsp.dense.weight.list_ctx()}, not on {list(contexts)}")
        self.net, self.config, self.contexts = net, config, list(contexts)
        self.steps_taken = 0
        # Set from a signal handler, it ends `fit` with a KeyboardInterrupt between two steps, where the
        # weights are whole, or between two batches of an evaluation.
        self.interrupted = False
        # Of the last step, before clipping; (1,), on the first context.
        self._gradient_norm: Any = None
        self._optimizer = gluon_trainer(parameters, config)

    def step(self, batch: Batch, count_mlm_hits: bool = False) -> tuple[list[Shard], list[ShardLoss]]:
        """One optimizer step on one batch; returns what each context computed, without waiting for it."""
        shards = split_and_load(batch, self.contexts)
        with mx.autograd.record():
            losses = [shard_loss(self.net, shard, count_mlm_hits) for shard in shards]
        mx.autograd.backward([loss.total for loss in losses])
        self._update()
        return shards, losses

    def _update(self) -> None:
        """Change the weights by the gradients of all contexts."""
        self.steps_taken += 1
        rate = learning_rate(self.config, self.steps_taken, self.config.num_steps)
        self._optimizer.set_learning_rate(rate)
        self._optimizer.allreduce_grads()
        self._gradient_norm = clip_gradients(self._gradients(), self.config.clip_norm)
        self._optimizer.update(1)  # the losses are divided by the global counts already

    def _gradients(self) -> list[list[Any]]:
        """Each context's gradients."""
        trained = [p for p in self.net.collect_params().values() if p.grad_req != "null"]
        return [[parameter.grad(context) for parameter in trained] for context in self.contexts]

    def evaluate(self, batches: Iterable[Batch]) -> Averages:
        """The means over all batches, with dropout off. Waits for the devices."""
        meter = Meter()
        for batch in batches:
            shards = split_and_load(batch, self.contexts)
            losses = [shard_loss(self.net, shard, count_mlm_hits=True) for shard in shards]
            meter.add(shards, losses, count_mlm_hits=True)
            losses[0].total.wait_to_read()
            self._stop_if_interrupted()
        return meter.totals().averages()

    def fit(self, data: Data, reporter: Reporter | None = None) -> Progress | None:
        """Train for `num_steps` steps; returns how the run stands after the last one.

        Raises BadInput when the loss or the gradient is no number any more, KeyboardInterrupt when
        `interrupted` is set.
        """
        config, clock, meter = self.config, Clock(), Meter()
        queue: deque[Any] = deque()
        progress = None
        for step, batch in enumerate(islice(data.train.forever(), config.num_steps), 1):
            last = step == config.num_steps
            logged = last or step % config.log_every == 0
            evaluated = last or (config.eval_every and step % config.eval_every == 0)
            shards, losses = self.step(batch, count_mlm_hits=logged)
            meter.add(shards, losses, count_mlm_hits=logged)
            queue.append(losses[0].total)
            if len(queue) > QUEUED_STEPS:
                queue.popleft().wait_to_read()
            if reporter:
                reporter.stepped(step)
            if logged or evaluated:
                mx.nd.waitall()  # so that each clock stops on finished work
            if logged:
                lr, norm = self._optimizer.learning_rate, self._gradient_norm.asscalar()
                progress, meter = clock.progress(step, meter.totals(), lr, float(norm)), Meter()
                if reporter:
                    reporter.progressed(progress)
                self._stop_if_diverged(progress)
            if evaluated and data.held_out and reporter:
                with clock.stopped():
                    reporter.evaluated(step, self.evaluate(data.held_out.epoch(0)))
            self._stop_if_interrupted()
        return progress

    def _stop_if_interrupted(self) -> None:
        if self.interrupted:
            raise KeyboardInterrupt

    def _stop_if_diverged(self, progress: Progress) -> None:
        loss = progress.window.mlm_loss + progress.window.nsp_loss
        for name, value in (("loss", loss), ("gradient", progress.gradient_norm)):
            if not math.isfinite(value):
                raise BadInput(
                    f"--lr {self.config.lr:g}: by step {progress.step} the {name} is no number any more, the "
                    "training has diverged; a smaller learning rate is the usual remedy"
                )
