"""The training loop: step, evaluate, fit. Shows and writes nothing; a reporter is told what happens."""

from __future__ import annotations

import math
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any, Iterable, NamedTuple, Sequence

import numpy as np

from ..checkpoint import Snapshot, named_parameters, set_weights, weights_of
from ..config import TrainConfig, check_group
from ..data.batch import Batch, Shard, split_and_load
from ..data.loader import Data, Loader, Position
from ..errors import BadInput
from ..runtime import mx
from .loss import ShardLoss, shard_loss
from .meters import Averages, Best, Meter, Progress, best_of
from .optimizer import clip_gradients, gluon_trainer, optimizer_arrays, set_optimizer_arrays
from .schedule import learning_rate, planned_steps
from .standing import Standing

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


class Saver:
    """Who keeps what a run can be gone on from; this one keeps nothing."""

    def save(self, trainer: Trainer) -> None:
        """A checkpoint is due; `trainer.snapshot()` is what it holds."""


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and did so where it can be gone on from."""


class Queued(NamedTuple):
    """A step that the devices may still be working on."""

    step: int
    position: Position
    shards: list[Shard]
    losses: list[ShardLoss]
    gradient_norm: Any
    count_mlm_hits: bool


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
        self.standing = Standing()
        # Of the whole run, which the learning rate depends on; `fit` keeps it up with the clock.
        self.planned_steps: float = config.num_steps
        # Set from a signal handler, it ends `fit` between two steps, where the weights are whole, or between
        # two batches of an evaluation.
        self.interrupted = False
        self._queue: deque[Queued] = deque()
        # Of the last step, before clipping; (1,), on the first context.
        self._gradient_norm: Any = None
        self._optimizer = gluon_trainer(parameters, config)

    def step(self, batch: Batch, count_mlm_hits: bool = False) -> tuple[list[Shard], list[ShardLoss]]:
        """One optimizer step on one batch; returns what each context computed, without waiting for it."""
        mx.random.seed(dropout_seed(self.config.seed, self.standing.step + 1))
        shards = split_and_load(batch, self.contexts)
        with mx.autograd.record():
            losses = [shard_loss(self.net, shard, count_mlm_hits) for shard in shards]
        mx.autograd.backward([loss.total for loss in losses])
        self._update()
        return shards, losses

    def _update(self) -> None:
        """Change the weights by the gradients of all contexts."""
        step = self.standing.step + 1
        self._optimizer.set_learning_rate(learning_rate(self.config, step, self.planned_steps))
        self.standing.step = step
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
            if self.interrupted:
                raise Interrupted
        return meter.totals().averages()

    def fit(
        self, data: Data, reporter: Reporter | None = None, saver: Saver | None = None
    ) -> Progress | None:
        """Train until `num_steps`, `max_minutes` or `patience` end it; returns how the run then stands.

        After `restore` it goes on where the run stood. Evaluations need held-out text, as does `patience`:
        without any it is BadInput. So is a loss or a gradient that is no number any more. Raises Interrupted,
        with everything saved, when `interrupted` is set.
        """
        config, run = self.config, self.standing
        reporter, saver = reporter or Reporter(), saver or Saver()
        check_evaluable(config, data)
        run.clock.start()
        self.planned_steps = planned_steps(config, run.step, run.step, run.clock.elapsed())
        progress = None
        batches = data.train.walk(run.position)
        while not self._is_over():
            if not run.evaluating:  # where a run was stopped in an evaluation it goes on with that
                position, batch = next(batches)
                step = run.step + 1
                self.planned_steps = planned_steps(
                    config, step, run.step - len(self._queue), run.clock.elapsed()
                )
                evaluated = step >= self.planned_steps or _is_due(config.eval_every, step)
                logged = evaluated or _is_due(config.log_every, step)
                results = self.step(batch, count_mlm_hits=logged)
                self._queue.append(Queued(step, position, *results, self._gradient_norm, logged))
                self._finish_steps(leave=0 if logged else QUEUED_STEPS)
                run.position, run.evaluating = position.next(), evaluated and data.held_out is not None
                reporter.stepped(step)
                if logged:
                    progress = self._progress()
                    reporter.progressed(progress)
            evaluated = run.evaluating
            if evaluated:
                self._evaluate(data.held_out, reporter)
            if evaluated or self.interrupted or self._is_over() or _is_due(config.checkpoint_every, run.step):
                saver.save(self)
            if self.interrupted:
                raise Interrupted
        return progress

    def _is_over(self) -> bool:
        """Whether the run has made its last step and its last evaluation."""
        run = self.standing
        exhausted = run.best is not None and run.best.exhausts(self.config.patience)
        return not run.evaluating and (run.step >= self.planned_steps or exhausted)

    def _evaluate(self, held_out: Loader | None, reporter: Reporter) -> None:
        """Evaluate after the last step; what is interrupted in it is still to be done."""
        assert held_out is not None
        run = self.standing
        with run.clock.stopped(), suppress(Interrupted):
            averages = self.evaluate(held_out.epoch(0))
            self._stop_if_diverged("the loss on held-out text", averages.loss, run.step)
            run.best, run.evaluating = best_of(run.best, run.step, averages), False
            reporter.evaluated(run.step, averages, run.best)

    def _finish_steps(self, leave: int) -> None:
        """Wait for all steps in the queue but so many, and add up what they gave."""
        while len(self._queue) > leave:
            done = self._queue.popleft()
            done.gradient_norm.wait_to_read()
            where = f"epoch {done.position.epoch}, batch {done.position.batch}"
            self._stop_if_diverged(f"the gradient of {where}", done.gradient_norm.asscalar(), done.step)
            self.standing.meter.add(done.shards, done.losses, done.count_mlm_hits)

    def _progress(self) -> Progress:
        """How the run stands after a step, and a new window begins. Waits for the devices."""
        mx.nd.waitall()  # so that the clock stops on finished work
        run = self.standing
        lr, norm = self._optimizer.learning_rate, float(self._gradient_norm.asscalar())
        window, run.meter = run.meter.totals(), Meter()
        return run.clock.progress(run.step, self.planned_steps, window, lr, norm)

    def _stop_if_diverged(self, what: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise BadInput(
                f"--lr {self.config.lr:g}: at step {step} {what} is no number any more, the training has "
                "diverged; a smaller learning rate is the usual remedy"
            )

    def wait(self) -> None:
        """Wait until the devices have done all steps."""
        self._finish_steps(leave=0)
        mx.nd.waitall()

    def snapshot(self) -> Snapshot:
        """All that the run goes on from, copied to the host; `restore` is the inverse. Waits."""
        self.wait()
        optimizer = optimizer_arrays(self._optimizer, named_parameters(self.net))
        return Snapshot(self.standing.step, weights_of(self.net), optimizer, self.standing.to_json())

    def restore(self, snapshot: Snapshot, where: Path | str = "checkpoint") -> None:
        """Go on from a snapshot, maybe of another number of contexts; BadInput where it does not fit."""
        set_weights(self.net, snapshot.weights, where)
        try:
            set_optimizer_arrays(self._optimizer, named_parameters(self.net), snapshot.optimizer)
            standing = Standing.from_json(snapshot.state, self.contexts)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise BadInput(f"{where}: cannot be gone on from ({type(error).__name__}: {error})") from error
        self.standing = standing
        self._queue.clear()


def _is_due(every: int, step: int) -> bool:
    """Whether something is due after a step that is due after so many each; 0: never."""
    return every > 0 and step % every == 0


def dropout_seed(seed: int, step: int) -> int:
    """The seed of a step's dropout, from the run's: so it can be drawn again without the steps before.

    MXNet's random state can be set and not read, and a checkpoint could not keep it.
    """
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0]) >> 1
