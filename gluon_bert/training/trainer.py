"""The training loop: step, evaluate, fit. Shows and writes nothing; a reporter is told what happens."""

from __future__ import annotations

import math
from collections import deque
from typing import Any, Iterable, Sequence

from ..config import TrainConfig, check_group
from ..data.batch import Batch, Shard, split_and_load
from ..data.loader import Data
from ..errors import BadInput
from ..runtime import mx
from .loss import ShardLoss, shard_loss
from .meters import Averages, Best, Clock, Meter, Progress, best_of
from .optimizer import clip_gradients, gluon_trainer
from .schedule import learning_rate, planned_steps

# Steps that may be queued on the devices. Two keep them busy while the next batch is made; more would
# only take memory, and make an interrupt wait.
QUEUED_STEPS = 2


def check_evaluable(config: TrainConfig, data: Data) -> None:
    """Raise BadInput where the end of a run depends on evaluations and there is no text for them."""
    if config.patience and not data.held_out:
        raise BadInput(
            f"--patience {config.patience}: there is too little held-out text to evaluate on; --held-out "
            "asks for more, --patience 0 does without"
        )


class Reporter:
    """Who is told of a run's progress; this one keeps it to itself."""

    def stepped(self, step: int) -> None:
        """A step has been queued."""

    def progressed(self, progress: Progress) -> None:
        """A window of steps is done."""

    def evaluated(self, step: int, held_out: Averages, best: Best) -> None:
        """The held-out text was evaluated after this step; `best` takes it into account."""


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
        # Of the whole run, which the learning rate depends on; `fit` keeps it up with the clock.
        self.planned_steps: float = config.num_steps
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
        self._optimizer.set_learning_rate(learning_rate(self.config, self.steps_taken, self.planned_steps))
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
        """Train until `num_steps`, `max_minutes` or `patience` end it; returns how the run then stands.

        Evaluations need held-out text, and so does `patience`: without any it is BadInput. So is a loss or a
        gradient that is no number any more. Raises KeyboardInterrupt when `interrupted` is set.
        """
        config, reporter = self.config, reporter or Reporter()
        check_evaluable(config, data)
        clock, meter = Clock(), Meter()
        queue: deque[Any] = deque()
        progress = best = None
        for step, batch in enumerate(data.train.forever(), 1):
            self.planned_steps = planned_steps(config, step, step - 1 - len(queue), clock.elapsed())
            last = step >= self.planned_steps
            evaluated = last or (config.eval_every and step % config.eval_every == 0)
            logged = evaluated or step % config.log_every == 0
            shards, losses = self.step(batch, count_mlm_hits=logged)
            meter.add(shards, losses, count_mlm_hits=logged)
            queue.append(losses[0].total)
            if len(queue) > QUEUED_STEPS:
                queue.popleft().wait_to_read()
            reporter.stepped(step)
            if logged:
                progress, meter = self._progress(step, clock, meter), Meter()
                queue.clear()
                reporter.progressed(progress)
                self._stop_if_diverged(step, progress.window, progress.gradient_norm)
            if evaluated and data.held_out:
                with clock.stopped():
                    held_out = self.evaluate(data.held_out.epoch(0))
                    self._stop_if_diverged(step, held_out)
                    best = best_of(best, step, held_out)
                    reporter.evaluated(step, held_out, best)
                last = last or best.exhausts(config.patience)
            self._stop_if_interrupted()
            if last:
                break
        return progress

    def _progress(self, step: int, clock: Clock, meter: Meter) -> Progress:
        """How the run stands after a step. Waits for the devices."""
        mx.nd.waitall()  # so that the clock stops on finished work
        lr, norm = self._optimizer.learning_rate, float(self._gradient_norm.asscalar())
        return clock.progress(step, self.planned_steps, meter.totals(), lr, norm)

    def _stop_if_interrupted(self) -> None:
        if self.interrupted:
            raise KeyboardInterrupt

    def _stop_if_diverged(self, step: int, losses: Averages, gradient_norm: float = 0.0) -> None:
        for name, value in (("loss", losses.loss), ("gradient", gradient_norm)):
            if not math.isfinite(value):
                raise BadInput(
                    f"--lr {self.config.lr:g}: by step {step} the {name} is no number any more, the "
                    "training has diverged; a smaller learning rate is the usual remedy"
                )
