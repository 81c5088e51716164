"""The training loop: step, evaluate, fit. Shows and writes nothing; a reporter is told what happens."""

from __future__ import annotations

import math
from collections import deque
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence

import numpy as np

from .. import ops
from ..checkpoint import Snapshot
from ..config import TrainConfig, check_group
from ..data.batch import Batch, micro_batches
from ..data.loader import Loader, LoaderState, PretrainingData
from ..distributed.communicator import Communicator, weights_hash
from ..errors import InputError
from ..model.parameters import named_parameters, set_weights, weights_of
from ..runtime import mx
from . import checks
from .callbacks import Reporter, Saver
from .device_batch import DeviceBatch, split_and_load
from .divergence import MAX_ROLLBACKS, MAX_SKIPPED_STEPS, NonFiniteStep, TrainingDiverged
from .loss_scale import SMALLEST, LossScale
from .losses import ShardLoss, shard_loss
from .lr_schedule import learning_rate, planned_steps
from .metrics import Meter, Metrics, MetricSums
from .optimizers import (
    clip_gradients,
    gluon_trainer,
    optimizer_arrays,
    set_optimizer_arrays,
    squared_norms,
    usable_on,
)
from .profiling import LoadBalance
from .state import StepReport, TrainState, best_of

# Steps that may be queued on the devices. Two keep them busy while the next batch is made; more would
# only take memory, and make an interrupt wait.
MAX_IN_FLIGHT = 2


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and did so where it can be gone on from."""


class Queued(NamedTuple):
    """A step that the devices may still be working on."""

    step: int
    position: LoaderState
    batch: Batch
    shards: list[DeviceBatch]
    losses: list[ShardLoss]
    squared_norms: Any
    count_mlm_correct: bool
    stops: Any  # how many workers want the run to stop
    scale: LossScale | None


class Trainer:
    """Steps down the pretraining losses, with every batch spread over the contexts.

    >>> trainer = Trainer(net, preset("d2l").train, [mx.cpu(0), mx.cpu(1)])     # doctest: +SKIP
    >>> trainer.fit(data)
    """

    def __init__(
        self, net: Any, config: TrainConfig, contexts: Sequence[Any], workers: Communicator | None = None
    ) -> None:
        check_group(config)
        checks.check_micro_batch(config, len(contexts))
        checks.check_precision(config, contexts)
        parameters = net.collect_params()
        if set(contexts) != set(net.nsp.dense.weight.list_ctx()):
            raise InputError(f"the network is on {net.nsp.dense.weight.list_ctx()}, not on {list(contexts)}")
        self.net, self.config, self.contexts = net, config, list(contexts)
        self.workers = workers or Communicator()
        self.state = TrainState()
        if config.precision == "fp16":
            self.state.scale = LossScale.first(contexts[0])
        net.set_matmul_precision(config.precision)
        # Of the steps that this trainer has made.
        self.load_balance = LoadBalance()
        # Of the whole run, which the learning rate depends on; `fit` keeps it up with the clock.
        self.planned_steps: float = config.num_steps
        # Set from a signal handler, it ends `fit` between two steps, where the weights are whole, or between
        # two batches of an evaluation. Of several workers each is told, and they stop after the same step.
        self.interrupted = False
        # Called whenever a step, or a batch of an evaluation, is done.
        self.alive: Callable[[], None] = lambda: None
        self._agreed_to_stop = False
        self._queue: deque[Queued] = deque()
        # Of each parameter's gradient in the last step, before clipping; (P,), on the first context.
        self._squared_norms: Any = None
        self._stops: Any = None
        trained = {name: p for name, p in named_parameters(net).items() if p.grad_req != "null"}
        self._trained_names = list(trained)
        by_layers = config.recompute and not ops.use_compiled(
            net.encoder, net.nsp.dense.weight.list_data()[0]
        )
        self._adds_up = config.micro_batch > 0 or by_layers
        for parameter in trained.values():
            parameter.grad_req = "add" if self._adds_up else "write"
        self._back_to, self._num_rollbacks = -1, 0
        self._optimizer = gluon_trainer(parameters, config, self.workers.kvstore)
        self.workers.begin(self._optimizer)

    def step(
        self, batch: Batch, count_mlm_correct: bool = False
    ) -> tuple[list[DeviceBatch], list[ShardLoss]]:
        """One optimizer step on one batch; returns what each context computed, of one part after another.

        It waits for nothing but that a part's memory is free before the next part, of `micro_batch` pairs.
        """
        if self._adds_up:
            self.net.collect_params().zero_grad()
        shards: list[DeviceBatch] = []
        losses: list[ShardLoss] = []
        for number, part in enumerate(self._parts(batch)):
            if number:
                self._wait_for_gradients()
            loaded = split_and_load(part, self.contexts, whole=batch)
            self.load_balance.add(loaded)
            shards += loaded
            losses += self._backward(loaded, number, count_mlm_correct)
        self._update()
        return shards, losses

    def _parts(self, batch: Batch) -> list[Batch]:
        """This worker's rows of a batch, in parts of `micro_batch` pairs."""
        return micro_batches(batch.share(self.workers.rank, self.workers.count), self.config.micro_batch)

    def _backward(self, shards: list[DeviceBatch], number: int, count_mlm_correct: bool) -> list[ShardLoss]:
        """The losses of one part of a step's batch, and its gradients, in one backward pass."""
        seed = dropout_seed(self.config.seed, self.state.step + 1, self.workers.rank, number)
        mx.random.seed(seed)
        recomputing = self.net.encoder.recomputing(seed) if self.config.recompute else nullcontext()
        with recomputing as tape, mx.autograd.record():
            losses = [shard_loss(self.net, shard, count_mlm_correct) for shard in shards]
        totals, scale = [loss.total for loss in losses], self.state.scale
        # The gradient of a total with respect to itself: so all others are of the total times the scale.
        mx.autograd.backward(totals, scale and [scale.on(total.context) for total in totals])
        if tape is not None:
            tape.backward()
        return losses

    def _wait_for_gradients(self) -> None:
        """Wait for the backward pass; its last gradients are those of the words' vectors."""
        for context in self.contexts:
            self.net.encoder.embeddings.tokens.weight.grad(context).wait_to_read()

    def _update(self) -> None:
        """Change the weights by the gradients of all contexts, of all workers."""
        step = self.state.step + 1
        self._optimizer.set_learning_rate(learning_rate(self.config, step, self.planned_steps))
        self.state.step = step
        gradients, scale = self._summed_gradients(), self.state.scale
        if scale:
            scale.unscale(gradients)
        norms = squared_norms(gradients[0])
        self._squared_norms, self._stops = self.workers.broadcast_decision(norms, self.interrupted)
        if scale or self.config.on_nonfinite == "skip":
            usable = usable_on(self._squared_norms, self.contexts)
            self._optimizer.optimizer.usable = usable
            self.state.scale = scale and scale.after(usable[self.contexts[0]])
        if self.config.clip_norm:
            clip_gradients(gradients, self.config.clip_norm)
        self._optimizer.update(1)  # the losses are divided by the global counts already

    def _summed_gradients(self) -> list[list[Any]]:
        """What `_gradients` gives, summed over all contexts of all workers."""
        self._optimizer.allreduce_grads()
        gradients = self._gradients()
        self.workers.all_reduce(gradients)
        return gradients

    def _gradients(self) -> list[list[Any]]:
        """Each context's gradients, in the order of `_trained_names`."""
        trained = [p for p in named_parameters(self.net).values() if p.grad_req != "null"]
        return [[parameter.grad(context) for parameter in trained] for context in self.contexts]

    def evaluate(self, batches: Iterable[Batch]) -> Metrics:
        """The means over all batches, with dropout off. Waits for the devices."""
        meter = Meter()
        for whole in batches:
            for part in self._parts(whole):
                shards = split_and_load(part, self.contexts, whole)
                losses = [shard_loss(self.net, shard, count_mlm_correct=True) for shard in shards]
                meter.add(shards, losses, count_mlm_correct=True)
                losses[0].total.wait_to_read()
            self.alive()
            if self.interrupted and self.workers.count == 1:
                raise Interrupted
        return self._total(meter).averages()

    def fit(
        self, data: PretrainingData, reporter: Reporter | None = None, saver: Saver | None = None
    ) -> StepReport | None:
        """Train until `num_steps`, `max_minutes` or `patience` end it; returns how the run then stands.

        After `restore` it goes on where the run stood. Evaluations need validation text, as does `patience`:
        without any it is InputError. So is, by `on_nonfinite`, a loss or a gradient that is no number any more:
        Diverged. Raises Interrupted, with everything saved, when `interrupted` is set.
        """
        config, run = self.config, self.state
        reporter, saver, progress = reporter or Reporter(), saver or Saver(), None
        checks.check_evaluable(config, data)
        run.clock.start()
        self.planned_steps = planned_steps(config, run.step, run.step, run.clock.elapsed())
        batches = data.train.iter_from(run.position)
        while not self._is_over():
            try:
                # A run that was stopped in an evaluation goes on with that.
                if not self.state.evaluating:
                    progress = self._next_step(batches, data.validation, reporter) or progress
                evaluated = self.state.evaluating
                if evaluated:
                    self._evaluate(data.validation, reporter)
                due = evaluated or _is_due(config.checkpoint_every, self.state.step)
                if due or self._must_stop() or self._is_over():
                    self.wait(reporter)
                    self._gather(reporter)
                    saver.save(self)
                self.alive()
            except TrainingDiverged as end:
                batches = data.train.iter_from(self._roll_back(end, reporter, saver))
            if self._must_stop():
                raise Interrupted
        return progress

    def _must_stop(self) -> bool:
        """Whether the run is to stop here; of several workers all answer alike."""
        return self.interrupted if self.workers.count == 1 else self._agreed_to_stop

    def has_ended(self) -> bool:
        """Whether `fit` has nothing more to do; all workers answer alike."""
        return self._must_stop() or self._is_over()

    def _is_over(self) -> bool:
        """Whether the run has made its last step and its last evaluation."""
        run = self.state
        exhausted = run.best is not None and run.best.out_of_patience(self.config.patience)
        return not run.evaluating and (run.step >= self.planned_steps or exhausted)

    def _next_step(
        self, batches: Iterator[tuple[LoaderState, Batch]], validation: Loader | None, reporter: Reporter
    ) -> StepReport | None:
        """Make the next step and tell of it; returns the progress where it is logged."""
        config, run = self.config, self.state
        position, batch = next(batches)
        step, finished = run.step + 1, run.step - len(self._queue)
        self.planned_steps = planned_steps(config, step, finished, run.clock.elapsed())
        evaluated = step >= self.planned_steps or _is_due(config.eval_every, step)
        logged = evaluated or _is_due(config.log_every, step)
        scale, results = run.scale, self.step(batch, count_mlm_correct=logged)
        self._queue.append(
            Queued(step, position, batch, *results, self._squared_norms, logged, self._stops, scale)
        )
        run.position, run.evaluating = position.next(), evaluated and validation is not None
        reporter.stepped(step)
        self._finish_steps(reporter, leave=0 if logged else MAX_IN_FLIGHT)
        if not logged:
            return None
        progress = self._progress()
        reporter.progressed(progress)
        if 0 < config.max_loss < progress.window.loss:
            self._stop(f"the loss of the last window is {progress.window.loss:.3g}, above --max-loss")
        return progress

    def _evaluate(self, validation: Loader | None, reporter: Reporter) -> None:
        """Evaluate after the last step; what is interrupted in it is still to be done."""
        assert validation is not None
        run = self.state
        with run.clock.stopped(), suppress(Interrupted):
            averages = self.evaluate(validation.epoch(0))
            if not math.isfinite(averages.loss):
                self._stop("the loss on validation text is no number any more")
            run.best, run.evaluating = best_of(run.best, run.step, averages), False
            reporter.evaluated(run.step, averages, run.best)

    def _finish_steps(self, reporter: Reporter, leave: int) -> None:
        """Wait for all steps in the queue but so many; add up what they gave, or see that it is unusable."""
        run = self.state
        while len(self._queue) > leave:
            done = self._queue.popleft()
            done.squared_norms.wait_to_read()
            self._agreed_to_stop |= bool(done.stops.asscalar())
            norms = np.sqrt(done.squared_norms.asnumpy().astype(np.float64))
            if np.isfinite(norms).all():
                run.meter.add(done.shards, done.losses, done.count_mlm_correct)
                run.skipped = 0
                continue
            # A GPU that has failed gives memory that nothing has written; this raises its error.
            mx.nd.waitall()
            scale = done.scale and float(done.scale.value.asscalar())
            if scale and scale > SMALLEST:  # else a smaller one would not help
                reporter.overflowed(done.step, scale)
                continue
            run.skipped += 1
            named = list(zip(self._trained_names, norms.tolist()))
            trouble = NonFiniteStep(
                done.step, "the gradient is no number any more", done.position, done.batch, named
            )
            reporter.on_non_finite(trouble)
            if self.config.on_nonfinite != "skip" or run.skipped >= MAX_SKIPPED_STEPS:
                raise TrainingDiverged(trouble, self.config.lr)

    def _stop(self, why: str) -> None:
        raise TrainingDiverged(NonFiniteStep(self.state.step, why), self.config.lr)

    def _roll_back(self, end: TrainingDiverged, reporter: Reporter, saver: Saver) -> LoaderState:
        """To the latest checkpoint, and on with the batches that come now; raises `end` if that is no way."""
        back = self.config.on_nonfinite == "rollback"
        snapshot = self.workers.root_first(saver.latest) if back else None
        if snapshot is None:
            raise end
        self._num_rollbacks = self._num_rollbacks + 1 if snapshot.step == self._back_to else 1
        self._back_to = snapshot.step
        if self._num_rollbacks > MAX_ROLLBACKS:
            raise end
        before = self.state
        self.restore(snapshot)
        self.state.position = before.position
        self.state.clock.catch_up(before.clock)
        reporter.on_rollback(self.state, end.trouble)
        return before.position

    def _progress(self) -> StepReport:
        """How the run stands after a step, and a new window begins. Waits for the devices."""
        mx.nd.waitall()  # so that the clock stops on finished work
        run = self.state
        window, run.meter = self._total(run.meter), Meter()
        norm = math.sqrt(self._squared_norms.asnumpy().astype(np.float64).sum())
        lr, scale = self._optimizer.learning_rate, run.scale and float(run.scale.value.asscalar())
        return run.clock.progress(run.step, self.planned_steps, window, lr, norm, scale)

    def _total(self, meter: Meter) -> MetricSums:
        """What all workers' meters have added up. Waits for them."""
        sums, counts = self.workers.total(np.array(meter.totals()))
        return MetricSums(sums, counts)

    def _gather(self, reporter: Reporter) -> None:
        """Move what all workers have added up to the first one, for its checkpoint; compare their weights."""
        if self.workers.count == 1:
            return
        totals = self._total(self.state.meter)
        self.state.meter = Meter() if self.workers.rank else Meter.of(totals, self.contexts[0])
        others = self.workers.ranks_differing_from_root(weights_hash(weights_of(self.net)))
        if others:
            reporter.on_weight_drift(self.state.step, others)

    def wait(self, reporter: Reporter | None = None) -> None:
        """Wait until the devices have done all steps."""
        self._finish_steps(reporter or Reporter(), leave=0)
        mx.nd.waitall()

    def snapshot(self) -> Snapshot:
        """All that the run goes on from, copied to the host; `restore` is the inverse. Waits."""
        self.wait()
        optimizer = optimizer_arrays(self._optimizer, named_parameters(self.net))
        return Snapshot(self.state.step, weights_of(self.net), optimizer, self.state.to_json())

    def restore(self, snapshot: Snapshot, where: Path | str = "checkpoint") -> None:
        """Go on from a snapshot, maybe of another number of contexts; InputError where it does not fit."""
        set_weights(self.net, snapshot.weights, where)
        try:
            set_optimizer_arrays(self._optimizer, named_parameters(self.net), snapshot.optimizer)
        except (KeyError, ValueError) as error:
            raise InputError(f"{where}: cannot be gone on from ({type(error).__name__}: {error})") from error
        self.state = TrainState.from_json(snapshot.state, self.contexts, str(where))
        if (self.state.scale is None) != (self.config.precision != "fp16"):
            raise InputError(f"{where}: cannot be gone on from with --precision {self.config.precision}")
        if self.workers.rank:
            self.state.meter = Meter()  # the first worker has what all had added up
        self._queue.clear()


def _is_due(every: int, step: int) -> bool:
    """Whether something is due after a step that is due after so many each; 0: never."""
    return every > 0 and step % every == 0


def dropout_seed(seed: int, step: int, rank: int = 0, part: int = 0) -> int:
    """The seed of a worker's dropout in a step, from the run's: so no step before is needed to draw it again.

    part: which one of the batch, if it is computed in parts.

    MXNet's random state can be set and not read, and a checkpoint could not keep it.
    """
    # That of rank 0 and part 0 is that of [seed, step], since NumPy fills up with zeros.
    return int(np.random.SeedSequence([seed, step, rank, part]).generate_state(1)[0]) >> 1
