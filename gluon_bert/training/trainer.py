"""The training loop: step, evaluate, fit. Prints and writes nothing; callbacks do."""

from __future__ import annotations

import math
from collections import deque
from contextlib import ExitStack, nullcontext, suppress
from itertools import count
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence, Union

import numpy as np

from .. import ops
from ..checkpoint import Snapshot
from ..config import TrainConfig, check_group
from ..data.batch import micro_batches, worker_rows
from ..data.loader import LoaderState
from ..distributed.communicator import Communicator, weights_hash
from ..errors import InputError
from ..model import precision
from ..model.parameters import named_parameters, set_weights, weights_of
from ..runtime import mx
from . import checks
from .callbacks import Callback
from .device_batch import DeviceBatch, split_and_load
from .divergence import MAX_ROLLBACKS, MAX_SKIPPED_STEPS, NonFiniteStep, TrainingDiverged
from .loss_scale import SMALLEST, LossScale
from .losses import LossFunction, ShardLoss, pretraining_loss
from .lr_schedule import learning_rate, planned_steps
from .metrics import Meter, Metrics, MetricSums, losses_of
from .optimizers import (
    clip_factors,
    encoder_matrices,
    finite_on,
    gluon_trainer,
    optimizer_arrays,
    scale_gradients,
    set_optimizer_arrays,
    squared_norms,
)
from .profiling import LoadBalance
from .state import StepReport, TrainState, best_of

# Maximum number of queued steps. Two keep the devices busy while the next batch is made. More would only take
# memory and delay an interrupt.
MAX_IN_FLIGHT = 2

# Batches to evaluate, read again each time, or a function that returns the metrics.
Validation = Union[Iterable[Any], Callable[[], Metrics], None]


class Interrupted(KeyboardInterrupt):
    """Raised after a requested stop; the run can be resumed."""


class Queued(NamedTuple):
    """A step that the devices may still be working on."""

    step: int
    position: LoaderState
    batch: Any
    shards: list[DeviceBatch]
    losses: list[ShardLoss]
    squared_norms: Any
    stops: Any  # how many workers want the run to stop
    scale: LossScale | None


class Trainer:
    """Trains a network, with every batch spread over the devices.

    >>> trainer = Trainer(net, preset("d2l").train, [mx.cpu(0), mx.cpu(1)])     # doctest: +SKIP
    >>> trainer.fit(data.train, validation=data.validation)

    loss: a function of the network and a `DeviceBatch` that returns named losses (see losses.py).
    communicator: the workers that share each batch. callbacks: handlers of the events of `fit`. monitor,
    mode: the metric that chooses the best evaluation, and min or max.

    A batch is a dataclass of NumPy arrays with `valid_length`, like `data.batch.Batch`. It needs `len(batch)`
    and `batch.rows(start, stop)`, which returns the batch of these rows.
    """

    def __init__(
        self,
        net: Any,
        config: TrainConfig,
        devices: Sequence[Any],
        loss: LossFunction = pretraining_loss,
        communicator: Communicator | None = None,
        callbacks: Iterable[Callback] = (),
        monitor: str = "mlm_loss",
        mode: str = "min",
    ) -> None:
        check_group(config)
        checks.check_micro_batch(config, len(devices))
        precision.check_precision(config.precision, devices)
        parameters = net.collect_params()
        example = net.encoder.embeddings.tokens.weight
        if set(devices) != set(example.list_ctx()):
            raise InputError(
                f"devices must be those of the network, {example.list_ctx()}, got {list(devices)}"
            )
        self.net, self.config, self.devices, self.loss = net, config, list(devices), loss
        self.communicator = communicator or Communicator()
        self.callbacks = list(callbacks)
        self.monitor, self.mode = monitor, mode
        self.state = TrainState()
        if config.precision == "fp16":
            self.state.scale = LossScale.first(devices[0])
        net.set_matmul_precision(config.precision)
        self.load_balance = LoadBalance()  # of the steps that this trainer has made
        # Steps of the whole run, which the learning rate depends on; `fit` updates it by the clock.
        self.planned_steps: float = config.num_steps
        # Set by a signal handler. `fit` then ends between two steps, when the weights are complete, or
        # between two batches of an evaluation. All workers stop after the same step.
        self.interrupted = False
        # Called after every step and every batch of an evaluation.
        self.alive: Callable[[], None] = lambda: None
        self._agreed_to_stop = False
        self._queue: deque[Queued] = deque()
        # Of each parameter's gradient in the last step, before clipping; (P,), on the first device.
        self._squared_norms: Any = None
        self._stops: Any = None
        by_layers = config.recompute and not ops.use_compiled(net.encoder, example.list_data()[0])
        self._adds_up = config.micro_batch > 0 or by_layers
        for parameter in self._trained().values():
            parameter.grad_req = "add" if self._adds_up else "write"
        self._froze_unused = False
        self._back_to, self._num_rollbacks = -1, 0
        matrices = encoder_matrices(named_parameters(net))
        self._optimizer = gluon_trainer(parameters, config, self.communicator.kvstore, matrices)
        self.communicator.init_trainer(self._optimizer)

    def _trained(self) -> dict[str, Any]:
        """Return the parameters that have a gradient, by name."""
        return {name: p for name, p in named_parameters(self.net).items() if p.grad_req != "null"}

    def step(self, batch: Any, count_correct: bool = False) -> tuple[list[DeviceBatch], list[ShardLoss]]:
        """Make one optimizer step on one batch; return the shards and losses of each device, part by part.

        It waits only until the memory of a part, of `micro_batch` rows, is free for the next part.
        """
        if self._adds_up:
            self.net.collect_params().zero_grad()
        shards: list[DeviceBatch] = []
        losses: list[ShardLoss] = []
        for number, part in enumerate(self._parts(batch)):
            if number:
                self._wait_for_gradients()
            loaded = split_and_load(part, self.devices, batch, count_correct)
            self.load_balance.add(loaded)
            shards += loaded
            losses += self._backward(loaded, number)
        if not self._froze_unused:
            self._freeze_unused()
        self._update()
        return shards, losses

    def _parts(self, batch: Any) -> list[Any]:
        """Return this worker's rows of a batch, in parts of `micro_batch` rows."""
        own = worker_rows(batch, self.communicator.rank, self.communicator.count)
        return micro_batches(own, self.config.micro_batch)

    def _backward(self, shards: list[DeviceBatch], number: int) -> list[ShardLoss]:
        """Return the losses of one part of a batch, after one backward pass from all their totals."""
        seed = dropout_seed(self.config.seed, self.state.step + 1, self.communicator.rank, number)
        mx.random.seed(seed)
        recomputing = self.net.encoder.recomputing(seed) if self.config.recompute else nullcontext()
        with recomputing as tape, mx.autograd.record():
            losses = [ShardLoss.of(self.loss(self.net, shard)) for shard in shards]
        totals, scale = [loss.total for loss in losses], self.state.scale
        # The gradient of a total by itself is the scale, so all gradients are those of the scaled total.
        mx.autograd.backward(totals, scale and [scale.on(total.context) for total in totals])
        if tape is not None:
            tape.backward()
        return losses

    def _freeze_unused(self) -> None:
        """Stop training the parameters that the loss does not use, such as the NSP head of MLM alone.

        Done once: later, a parameter without a gradient is an error, which Gluon reports.
        """
        self._froze_unused = True
        for parameter in self._trained().values():
            if not parameter.list_data()[0]._fresh_grad:
                parameter.grad_req = "null"

    def _wait_for_gradients(self) -> None:
        """Wait for the backward pass; the token embeddings get the last gradients."""
        for device in self.devices:
            self.net.encoder.embeddings.tokens.weight.grad(device).wait_to_read()

    def _update(self) -> None:
        """Change the weights by the gradients of all devices of all workers."""
        step = self.state.step + 1
        self._optimizer.set_learning_rate(learning_rate(self.config, step, self.planned_steps))
        self.state.step = step
        gradients, scale = self._summed_gradients(), self.state.scale
        if scale:
            scale.unscale(gradients)
        norms = squared_norms(gradients[0])
        self._squared_norms, self._stops = self.communicator.broadcast_decision(norms, self.interrupted)
        if scale or self.config.on_nonfinite == "skip":
            is_finite = finite_on(self._squared_norms, self.devices)
            self._optimizer.optimizer.is_finite = is_finite
            self.state.scale = scale and scale.after(is_finite[self.devices[0]])
        if self.config.clip_norm:
            factors = clip_factors(norms, self.config.clip_norm, self.devices)
            if self._optimizer.optimizer.scales(self.devices):
                self._optimizer.optimizer.factor = factors
            else:
                scale_gradients(gradients, factors)
        self._optimizer.update(1)  # the losses are divided by the global counts already

    def _summed_gradients(self) -> list[list[Any]]:
        """Return each device's gradients, summed over all devices of all workers."""
        self._optimizer.allreduce_grads()
        gradients = self._gradients()
        self.communicator.all_reduce(gradients)
        return gradients

    def _gradients(self) -> list[list[Any]]:
        """Return each device's gradients, in the order of `_trained`."""
        trained = self._trained().values()
        return [[parameter.grad(device) for parameter in trained] for device in self.devices]

    def evaluate(self, batches: Iterable[Any]) -> Metrics:
        """Return the means over all batches, with dropout off. Waits for the devices."""
        meter = Meter()
        for whole in batches:
            for part in self._parts(whole):
                shards = split_and_load(part, self.devices, whole, count_correct=True)
                losses = [ShardLoss.of(self.loss(self.net, shard)) for shard in shards]
                meter.add(shards, losses)
                losses[0].total.wait_to_read()
            self.alive()
            if self.interrupted and self.communicator.count == 1:
                raise Interrupted
        return self._total(meter).averages()

    def fit(self, data: Iterable[Any], validation: Validation = None) -> StepReport | None:
        """Train until `num_steps`, `max_minutes` or `patience` end it; return the last report.

        data: batches, such as a `PretrainingLoader` or a list. They are read again for each epoch. After
        `restore` training continues in the batch where it stopped. Data without `iter_from(LoaderState)` are
        then read from the start of the epoch, and earlier batches are skipped. If data have an attribute
        `progress`, it is set to this trainer's.
        validation: batches, read again for each evaluation, or a function that returns the metrics.

        Raise InputError if `patience` is set without validation, TrainingDiverged as `on_nonfinite` says, and
        Interrupted, after a checkpoint, when `interrupted` is set.
        """
        checks.check_evaluable(self.config, validation is not None)
        run, report = self.state, None
        with ExitStack() as ending:
            for callback in self.callbacks:
                callback.on_fit_begin(self)
                ending.callback(callback.on_fit_end, self)
            if not self.communicator.alone and not run.step:
                self._notify("on_checkpoint")  # so that the job can restart after any failure
            run.clock.start()
            self.planned_steps = planned_steps(self.config, run.step, run.step, run.clock.elapsed())
            if hasattr(data, "progress"):
                data.progress = self.progress
            batches = batches_from(data, run.position)
            while not self._is_over():
                try:
                    report = self._advance(batches, validation) or report
                except TrainingDiverged as end:
                    batches = batches_from(data, self._roll_back(end))
                if self._must_stop():
                    raise Interrupted
        return report

    def progress(self) -> float:
        """Return the share of the run's steps that are made, from 0 to 1."""
        return self.state.step / self.planned_steps

    def _notify(self, event: str, *arguments: Any) -> None:
        """Call a method of every callback."""
        for callback in self.callbacks:
            getattr(callback, event)(self, *arguments)

    def _advance(
        self, batches: Iterator[tuple[LoaderState, Any]], validation: Validation
    ) -> StepReport | None:
        """Make the next step, and the evaluation and the checkpoint that are due after it."""
        report = None
        if not self.state.evaluating:  # else the run was stopped in an evaluation, which is still due
            report = self._next_step(batches, validation is not None)
        evaluated = self.state.evaluating
        if evaluated:
            self._evaluate(validation)
        due = evaluated or _is_due(self.config.checkpoint_every, self.state.step)
        if due or self._must_stop() or self._is_over():
            self.wait()
            self._gather()
            self._notify("on_checkpoint")
        self.alive()
        return report

    def _must_stop(self) -> bool:
        """Return whether the run must stop now; the same on all workers."""
        return self.interrupted if self.communicator.count == 1 else self._agreed_to_stop

    def has_ended(self) -> bool:
        """Return whether `fit` has nothing more to do; the same on all workers."""
        return self._must_stop() or self._is_over()

    def _is_over(self) -> bool:
        """Return whether the run has made its last step and its last evaluation."""
        run = self.state
        exhausted = run.best is not None and run.best.out_of_patience(self.config.patience)
        return not run.evaluating and (run.step >= self.planned_steps or exhausted)

    def _next_step(self, batches: Iterator[tuple[LoaderState, Any]], validates: bool) -> StepReport | None:
        """Make the next step; return the report of the window if the step is logged."""
        config, run = self.config, self.state
        position, batch = next(batches)
        step, finished = run.step + 1, run.step - len(self._queue)
        self.planned_steps = planned_steps(config, step, finished, run.clock.elapsed())
        evaluated = step >= self.planned_steps or _is_due(config.eval_every, step)
        logged = evaluated or _is_due(config.log_every, step)
        scale, results = run.scale, self.step(batch, count_correct=logged)
        self._queue.append(Queued(step, position, batch, *results, self._squared_norms, self._stops, scale))
        run.position, run.evaluating = position.next(), evaluated and validates
        self._notify("on_step", step)
        self._finish_steps(leave=0 if logged else MAX_IN_FLIGHT)
        if not logged:
            return None
        report = self._report()
        self._notify("on_log", report)
        return report

    def _evaluate(self, validation: Validation) -> None:
        """Evaluate after the last step; an interrupted evaluation stays due."""
        assert validation is not None
        run = self.state
        with run.clock.stopped(), suppress(Interrupted):
            metrics = validation() if callable(validation) else self.evaluate(_read_anew(validation))
            if not metrics:
                raise InputError("validation must yield batches each time it is read, got none")
            if not all(math.isfinite(loss) for loss in losses_of(metrics)):
                self._stop("the loss on the validation text is not finite")
            run.best, run.evaluating = best_of(run.best, run.step, metrics, self.monitor, self.mode), False
            self._notify("on_evaluate", run.step, metrics, run.best)

    def _finish_steps(self, leave: int) -> None:
        """Wait for all queued steps but the last `leave`; add up their losses, or handle non-finite ones."""
        run = self.state
        while len(self._queue) > leave:
            done = self._queue.popleft()
            done.squared_norms.wait_to_read()
            self._agreed_to_stop |= bool(done.stops.asscalar())
            norms = np.sqrt(done.squared_norms.asnumpy().astype(np.float64))
            if np.isfinite(norms).all():
                run.meter.add(done.shards, done.losses)
                run.skipped = 0
                continue
            # A failed GPU returns uninitialized memory. This raises its error.
            mx.nd.waitall()
            scale = done.scale and float(done.scale.value.asscalar())
            if scale and scale > SMALLEST:  # else a smaller one would not help
                self._notify("on_overflow", done.step, scale)
                continue
            run.skipped += 1
            named = list(zip(self._trained(), norms.tolist()))
            found = NonFiniteStep(done.step, "the gradient is not finite", done.position, done.batch, named)
            self._notify("on_non_finite", found)
            if self.config.on_nonfinite != "skip" or run.skipped >= MAX_SKIPPED_STEPS:
                raise TrainingDiverged(found, self.config.lr)

    def _stop(self, why: str) -> None:
        raise TrainingDiverged(NonFiniteStep(self.state.step, why), self.config.lr)

    def _roll_back(self, end: TrainingDiverged) -> LoaderState:
        """Return to the latest checkpoint, and continue with the batches that follow now.

        Else raise `end`.
        """
        allowed = self.config.on_nonfinite == "rollback"
        snapshot = self.communicator.root_first(self._latest_checkpoint) if allowed else None
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
        self._notify("on_rollback", end.found)
        return before.position

    def _latest_checkpoint(self) -> Snapshot | None:
        found = (callback.latest_checkpoint() for callback in self.callbacks)
        return next((snapshot for snapshot in found if snapshot is not None), None)

    def _report(self) -> StepReport:
        """Return the report of a window, and begin a new window. Waits for the devices."""
        mx.nd.waitall()  # so that the clock stops on finished work
        run = self.state
        window, run.meter = self._total(run.meter), run.meter.cleared()
        norm = math.sqrt(self._squared_norms.asnumpy().astype(np.float64).sum())
        lr, scale = self._optimizer.learning_rate, run.scale and float(run.scale.value.asscalar())
        return run.clock.progress(run.step, self.planned_steps, window, lr, norm, scale)

    def _total(self, meter: Meter) -> MetricSums:
        """Return the sum of all workers' meters. Waits for them."""
        totals = meter.totals()
        return totals.with_array(self.communicator.sum_values(totals.to_array()))

    def _gather(self) -> None:
        """Move the sums of all workers to the first one, for its checkpoint; compare their weights."""
        if self.communicator.count == 1:
            return
        totals = self._total(self.state.meter)
        meter = Meter.of(totals, self.devices[0])
        self.state.meter = meter.cleared() if self.communicator.rank else meter
        others = self.communicator.ranks_differing_from_root(weights_hash(weights_of(self.net)))
        if others:
            self._notify("on_weight_drift", self.state.step, others)

    def wait(self) -> None:
        """Wait until the devices have done all steps."""
        self._finish_steps(leave=0)
        mx.nd.waitall()

    def snapshot(self) -> Snapshot:
        """Return a copy on the host of all that a resumed run needs; `restore` is the inverse. Waits."""
        self.wait()
        self._notify("on_save_checkpoint")
        optimizer = optimizer_arrays(self._optimizer, named_parameters(self.net))
        return Snapshot(self.state.step, weights_of(self.net), optimizer, self.state.to_json())

    def restore(self, snapshot: Snapshot, where: Path | str = "checkpoint") -> None:
        """Continue from a snapshot, on any number of devices; raise InputError if it does not fit."""
        set_weights(self.net, snapshot.weights, where)
        try:
            set_optimizer_arrays(self._optimizer, named_parameters(self.net), snapshot.optimizer)
        except (KeyError, ValueError) as error:
            raise InputError(f"{where}: cannot be resumed ({type(error).__name__}: {error})") from error
        self.state = TrainState.from_json(snapshot.state, self.devices, str(where))
        if (self.state.scale is None) != (self.config.precision != "fp16"):
            raise InputError(f"{where}: cannot be resumed with precision {self.config.precision}")
        if self.communicator.rank:
            self.state.meter = self.state.meter.cleared()  # the first worker has the sums of all
        self._queue.clear()


def batches_from(data: Any, position: LoaderState) -> Iterator[tuple[LoaderState, Any]]:
    """Yield the batches from a position on, epoch after epoch, each with its own position.

    Raise InputError if an epoch has no batch, as the second epoch of a generator.
    """
    if hasattr(data, "iter_from"):
        yield from data.iter_from(position)
    skip = position.batch
    for epoch in count(position.epoch):
        number = -1
        for number, batch in enumerate(data):
            if number >= skip:
                yield LoaderState(epoch, number), batch
        if number < 0:
            raise InputError(
                f"data must yield batches in every epoch, got none in epoch {epoch}. Pass a list or a loader "
                "that can be read again, or fewer num_steps"
            )
        skip = 0


def _read_anew(validation: Any) -> Iterable[Any]:
    return validation.epoch(0) if hasattr(validation, "epoch") else validation


def _is_due(every: int, step: int) -> bool:
    """Return whether an event with this interval in steps is due after a step; 0: never."""
    return every > 0 and step % every == 0


def dropout_seed(seed: int, step: int, rank: int = 0, part: int = 0) -> int:
    """Return the seed of a worker's dropout in one part of a step's batch, from the run's seed.

    So a resumed run draws the same dropout without the steps before. MXNet's random state can be set but not
    read, and a checkpoint could not hold it.
    """
    # Rank 0 and part 0 give the seed of [seed, step], since NumPy appends zeros.
    return int(np.random.SeedSequence([seed, step, rank, part]).generate_state(1)[0]) >> 1
