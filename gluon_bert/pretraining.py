"""A whole pretraining run: `pretrain` and `resume`, from the configuration to the checkpoints.

Parses no flags.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Iterator, Mapping, NamedTuple, Sequence

from . import devices as device_choice
from . import ops, runtime
from .checkpoint import CONFIG, latest_valid, steps
from .config import Config, check_changes
from .data.cooccurrence import cached_word_vectors
from .data.loader import PretrainingData, load_pretraining_data
from .data.wordpiece import load_vocabulary
from .distributed.communicator import Communicator, weights_hash
from .distributed.join import (
    check_enough,
    check_sharing,
    init_distributed,
    rank_and_size,
    run_environment,
)
from .errors import InputError, Terminated
from .fileio import exclusive_lock, remove_temporary_files
from .inference.samples import MaskedSentence, best_words, format_samples, markdown_samples, masked_sentences
from .model import precision
from .model.bert import BERTModel
from .model.parameters import weights_of
from .run import Run, check_new_run, create_run, read_config, read_environment, read_untrained, write_config
from .training import checks
from .training.callbacks import Callback, TrainerLike
from .training.checkpointer import AsyncCheckpointer, ReadOnlyCheckpointer, format_checkpoint_timing
from .training.losses import objective_loss
from .training.memory_plan import MemoryPlan
from .training.plots import References
from .training.profiling import device_utilization
from .training.progress import ProgressLogger
from .training.tensorboard import TENSORBOARD, TensorBoardLogger, check_tensorboard
from .training.trainer import Trainer
from .training.watchdog import watched
from .warm_start import load_init_run, load_initial_weights

log = logging.getLogger(__name__)


class Execution(NamedTuple):
    """Where and how a run executes. Results stay the same up to rounding and the draws of dropout.

    devices: MXNet contexts; None: those of a resumed run, otherwise every GPU, otherwise one CPU. operators:
    auto, compiled or mxnet; None: from the environment or the resumed run. kvstore: device, dist_sync or
    horovod. step_timeout: seconds after which a step ends the process; 0: never. profile: a file for MXNet's
    trace. ignore_memory_estimate: train although the estimate exceeds the memory. tensorboard: write event
    files into the run's folder `tensorboard`; a resumed run that has the folder continues them.
    """

    devices: Sequence[Any] | None = None
    operators: str | None = None
    kvstore: str = "device"
    step_timeout: float = 0.0
    profile: Path | None = None
    ignore_memory_estimate: bool = False
    tensorboard: bool = False

    def check(self) -> None:
        """Raise InputError if a value cannot be used."""
        if not self.step_timeout >= 0:
            raise InputError(f"step_timeout must be at least 0, got {self.step_timeout}.")
        if self.profile and (self.profile.is_dir() or not self.profile.absolute().parent.is_dir()):
            raise InputError(f"profile must be a file that can be written, got {self.profile}.")
        if self.tensorboard:
            check_tensorboard()


def pretrain(
    config: Config,
    output: Path | str,
    devices: Sequence[Any] | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    **execution: Any,
) -> Run | None:
    """Pretrain a network as the configuration says, into a new folder, and return the run.

    The folder gets the configuration, the vocabulary, a log, a plot and checkpoints. Ctrl-C saves a
    checkpoint and raises KeyboardInterrupt; `resume` continues. execution: the fields of `Execution`.
    callbacks: called in addition to those that log and save. Return None on all workers except the first.

    >>> config = preset("quick").replace(corpus="wikitext-2", max_minutes=30)      # doctest: +SKIP
    >>> run = pretrain(config, output="runs/quick", devices=[mx.cpu(0)])
    >>> run.fill_mask("the <mask> is flying")
    """
    output, how = Path(output), Execution(devices, **execution)
    config.check()
    how.check()
    placement = _place(config, how, recorded={})
    if placement.is_root:
        check_new_run(output)
    init_run = load_init_run(config)
    data = _load_data(config, placement, how)
    with init_distributed(how.kvstore) as communicator:
        communicator.check_same_on_all(run_environment(config, data.fingerprint))
        job = _Job(config, data, _network(config, data, placement.devices, init_run), placement, how, output)
        init_step = init_run.step if init_run else None
        del init_run  # its weights would stay in memory to the end of the run
        if not placement.is_root:
            _train_worker(job, communicator, callbacks)
            return None
        create_run(
            output,
            config,
            data.vocab,
            {
                **placement.environment(),
                "text": data.fingerprint,
                "init_step": init_step,
                "reference_losses": References.of(data)._asdict(),
            },
        )
        with exclusive_lock(output, "output"), _profiled(how.profile, placement.devices):
            return _train(job, communicator, callbacks)


def resume(
    run: Run | Path | str,
    devices: Sequence[Any] | None = None,
    *,
    config: Config | None = None,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> Run | None:
    """Continue a run from its latest checkpoint, as if it had not been stopped, and return it.

    A run without a checkpoint starts at step 0. options: the fields of `Execution`, and fields of the
    configuration that a run may change, such as num_steps. config: the whole configuration instead.

    >>> run = resume("runs/quick", num_steps=20000)                                # doctest: +SKIP
    """
    folder = run_folder(run)
    how = Execution(devices, **{name: options.pop(name) for name in Execution._fields if name in options})
    how = how._replace(tensorboard=how.tensorboard or (folder / TENSORBOARD).is_dir())
    how.check()
    before, recorded = read_config(folder / CONFIG), read_environment(folder / CONFIG)
    if "finetuned" in recorded:
        raise InputError(
            f"resume must be a pretraining run, got {folder}, which was fine-tuned. Resume it with finetune."
        )
    config = (config or before).replace(**options)
    config.check()
    check_changes(before, config, str(folder))
    placement = _place(config, how, recorded)
    with exclusive_lock(folder, "resume") if placement.is_root else nullcontext():
        if placement.is_root:
            remove_temporary_files(folder)
            remove_temporary_files(folder / "checkpoints")
        snapshot = latest_valid(folder) if steps(folder) else None
        init_run = load_init_run(config) if snapshot is None else None
        data = _load_data(config, placement, how)
        _check_same_text(data, folder, recorded)
        with init_distributed(how.kvstore) as communicator:
            communicator.check_same_on_all(run_environment(config, data.fingerprint))
            net = _network(config, data, placement.devices, init_run)
            job = _Job(config, data, net, placement, how, folder, snapshot)
            if not placement.is_root:
                _train_worker(job, communicator, callbacks)
                return None
            _report_changes(recorded, placement)
            environment = {**recorded, **placement.environment()}
            if (config, environment) != (before, recorded):
                write_config(folder, config, environment)
            if snapshot is None:
                log.info("%s has no checkpoint yet: it starts at step 0", folder)
            else:
                log.info("resuming after step %d", snapshot.step)
            with _profiled(how.profile, placement.devices):
                run = _train(job, communicator, callbacks)
            if snapshot is not None and run.step == snapshot.step:
                write_config(folder, before, recorded)  # no step was made with the new options
            return run


def run_folder(run: Run | Path | str) -> Path:
    """Return the folder of a run to resume; raise InputError if it is none."""
    folder = run.folder if isinstance(run, Run) else Path(run)
    if folder is None or not (folder / CONFIG).is_file():
        problem = f"has no {CONFIG}" if folder is not None and folder.is_dir() else "does not exist"
        raise InputError(f"resume must be the folder of a run, got {folder}, which {problem}.")
    return folder


class _Placement(NamedTuple):
    """The setting of a run: this worker's rank, the number of workers, the devices, the operators."""

    rank: int
    num_workers: int
    devices: list[Any]
    operators: str

    @property
    def is_root(self) -> bool:
        return self.rank == 0

    def environment(self) -> dict[str, Any]:
        """Return the values that a run records."""
        return {
            "contexts": [str(device) for device in self.devices],
            "workers": self.num_workers,
            "operators": self.operators,
            "versions": runtime.versions(),
        }


class _Job(NamedTuple):
    """All that a run's steps need. snapshot: the checkpoint to resume."""

    config: Config
    data: PretrainingData
    net: Any
    placement: _Placement
    execution: Execution
    output: Path
    snapshot: Any = None

    @property
    def memory(self) -> MemoryPlan:
        """What the run takes of its devices."""
        return _memory_plan(self.config, self.placement, len(self.data.vocab))


def _place(config: Config, how: Execution, recorded: Mapping[str, Any]) -> _Placement:
    """Choose devices and operators. Raise InputError if they are missing or do not fit the run."""
    devices = how.devices
    if devices is None and recorded.get("contexts"):
        devices = device_choice.contexts(*device_choice.parse_contexts(recorded["contexts"]))
    devices = list(device_choice.contexts() if devices is None else devices)
    rank, num_workers = rank_and_size(how.kvstore)
    check_sharing(config, num_workers)
    checks.check_micro_batch(config.train, len(devices))
    ops.select(how.operators or _recorded_operators(recorded), devices)
    precision.check_precision(config.train.precision, devices)
    placement = _Placement(rank, num_workers, devices, ops.describe(devices))
    # The vocabulary is unknown here. The rest may be too large already.
    _memory_plan(config, placement, 1).check(how.ignore_memory_estimate)
    return placement


def _recorded_operators(recorded: Mapping[str, Any]) -> str | None:
    """Return the operators of a run that was started on CPUs; None for GPUs, which use MXNet's."""
    on_cpus = all(name.startswith("cpu") for name in recorded.get("contexts", ()))
    return ops.parse_description(recorded.get("operators", "")) if on_cpus else None


def _load_data(config: Config, placement: _Placement, how: Execution) -> PretrainingData:
    """Load the text. Raise InputError if it is too little, or its vocabulary too large for the memory."""
    data = load_pretraining_data(config.data, config.train.batch_size, config.train.seed)
    _memory_plan(config, placement, len(data.vocab)).check(how.ignore_memory_estimate)
    checks.check_evaluable(config.train, data.validation is not None)
    check_enough(len(data.train.pairs(0)), placement.num_workers)
    return data


def _network(config: Config, data: PretrainingData, devices: Sequence[Any], init_run: Run | None) -> Any:
    """Return a network with initial weights, random or from an earlier run."""
    net = BERTModel(len(data.vocab), config.model)
    net.initialize(ctx=devices, seed=config.train.seed)
    net.hybridize()
    if config.model.decoder_bias == "unigram":
        net.set_unigram_bias(data.word_counts)
    if config.model.init_embeddings == "cooccurrence":
        documents = data.train.documents
        net.set_word_vectors(
            cached_word_vectors(
                documents, data.vocab, config.model.units, config.train.seed, documents.folder
            )
        )
    if init_run is not None:
        load_initial_weights(net, data.vocab, init_run)
    return net


def _check_same_text(data: PretrainingData, folder: Path, recorded: Mapping[str, Any]) -> None:
    """Raise InputError if the text of a resumed run or its preparation has changed."""
    if data.fingerprint != recorded.get("text") or data.vocab.tokens != load_vocabulary(folder).tokens:
        raise InputError(
            f"corpus must be the text that {folder} was started with; it or its preparation has changed. "
            f"Start a new run with {folder / CONFIG}."
        )


def _report_changes(recorded: Mapping[str, Any], placement: _Placement) -> None:
    """Log all changes that make results differ from an uninterrupted run."""
    now = placement.environment()
    versions_before, versions_now = recorded.get("versions") or {}, now["versions"]
    for name in sorted(versions_before.keys() | versions_now.keys()):
        _report_change(name, versions_before.get(name), versions_now.get(name), "the last digits may differ")
    dropout = "dropout draws other numbers; without dropout the last digits may differ"
    _report_change("workers", recorded.get("workers", 1), now["workers"], dropout)
    before = recorded.get("operators", "")
    if before and ops.parse_description(before) != ops.parse_description(placement.operators):
        _report_change("operators", before, placement.operators, dropout)


def _report_change(name: str, before: Any, now: Any, effect: str) -> None:
    if before != now:
        log.warning("%s is %s and was %s: %s from those of an uninterrupted run", name, now, before, effect)


def _train(job: _Job, communicator: Communicator, callbacks: Sequence[Callback]) -> Run:
    """Train and print the summary."""
    config, devices, output = job.config.train, job.placement.devices, job.output
    log.info("%s", _describe(job))
    log.info("operators: %s, precision %s", ops.describe(devices), config.precision)
    log.info("%s", job.memory.describe())
    log.info("run folder: %s", output)
    progress = ProgressLogger(output, References.of(job.data))
    checkpointer = AsyncCheckpointer(output)
    samples = MaskedSamples(job)
    watching: list[Callback] = [progress, checkpointer, samples]
    if job.execution.tensorboard:
        watching.append(TensorBoardLogger(output / TENSORBOARD, samples.markdown))
    trainer = _trainer(job, communicator, [*watching, *callbacks])
    try:
        with _stop_between_steps(trainer):
            _fit(trainer, job)
    except (KeyboardInterrupt, Terminated):
        log.info("stopped after step %d; resume=%s continues from its checkpoint", trainer.state.step, output)
        _shut_down(trainer)
        raise
    was_finished = job.snapshot is not None and trainer.state.step == job.snapshot.step
    if was_finished:
        step = job.snapshot.step
        log.info("%s is finished, after step %d. Raise num_steps or max_minutes to continue.", output, step)
    print("\n".join(progress.summary(devices)))
    if not was_finished:
        samples.show()
        if len(devices) > 1:
            print(trainer.load_balance)
    if checkpointer.timing.written:
        print(format_checkpoint_timing(checkpointer.timing, trainer.state.clock.elapsed()))
    log.info("%s", job.memory.outcome())
    untrained = read_untrained(output / CONFIG)
    return Run(job.net, job.data.vocab, job.config, trainer.state.step, untrained, folder=output)


def _train_worker(job: _Job, communicator: Communicator, callbacks: Sequence[Callback]) -> None:
    """Train on a worker other than the first. It writes nothing."""
    trainer = _trainer(job, communicator, [ReadOnlyCheckpointer(job.output), *callbacks])
    try:
        with _stop_between_steps(trainer):
            _fit(trainer, job)
    except (KeyboardInterrupt, Terminated):
        _shut_down(trainer)
        raise


def _trainer(job: _Job, communicator: Communicator, callbacks: Sequence[Callback]) -> Trainer:
    """Return a trainer at the beginning or at a checkpoint, with the same weights on all workers."""
    with job.memory.explain_out_of_memory():
        trainer = Trainer(
            job.net,
            job.config.train,
            job.placement.devices,
            loss=objective_loss(job.config.data.objective, job.config.train.nsp_weight),
            communicator=communicator,
            callbacks=callbacks,
        )
        if job.snapshot is not None:
            trainer.restore(job.snapshot, job.output)
    if job.snapshot is not None:
        for arrays in (job.snapshot.weights, job.snapshot.optimizer):
            arrays.clear()  # they would stay in memory to the end of the run
    if communicator.count > 1:
        weights = weights_hash(weights_of(job.net))
        communicator.check_same_on_all(
            {"the step of the checkpoint": trainer.state.step, "the first weights": weights}
        )
    return trainer


def _fit(trainer: Trainer, job: _Job) -> None:
    """Train, with a watchdog that ends the process when a step takes too long."""
    seconds = job.execution.step_timeout

    def end() -> None:
        log.error(
            "step %d took longer than step_timeout %g s. Another worker may be gone, or the time too short.",
            trainer.state.step,
            seconds,
        )
        os._exit(1)  # a process that waits for another one does not react to signals

    with job.memory.explain_out_of_memory(), watched(seconds, end) as trainer.alive:
        trainer.fit(job.data.train, validation=job.data.validation)


def _memory_plan(config: Config, placement: _Placement, vocab_size: int) -> MemoryPlan:
    return MemoryPlan(config, vocab_size, placement.devices, placement.num_workers)


def _shut_down(trainer: Trainer) -> None:
    """Leave the job if all workers have ended, not if only this one has."""
    if trainer.has_ended():
        trainer.communicator.shutdown()


class MaskedSamples(Callback):
    """Shows the network's guesses for masked validation sentences, before and after training."""

    def __init__(self, job: _Job) -> None:
        self._net, self._vocab, self._device = job.net, job.data.vocab, job.placement.devices[0]
        self._sentences: list[MaskedSentence] = []
        self._before: list[list[int]] = []
        if job.data.validation is not None:
            self._sentences = masked_sentences(
                job.data.validation.documents,
                self._vocab,
                seed=job.config.train.seed,
                max_seq_length=job.config.data.max_seq_length,
            )

    def on_fit_begin(self, trainer: TrainerLike) -> None:
        self._before = self._guess()

    def show(self) -> None:
        """Print the sentences, with the best words before and after."""
        if self._sentences:
            print(format_samples(self._vocab, self._sentences, self._before, self._guess()))

    def markdown(self) -> str:
        """Return the sentences with the present guesses, in Markdown; empty without validation text."""
        return markdown_samples(self._vocab, self._sentences, self._guess()) if self._sentences else ""

    def _guess(self) -> list[list[int]]:
        if not self._sentences:
            return []
        return best_words(self._net, self._vocab, self._sentences, self._device)


@contextmanager
def _stop_between_steps(trainer: Trainer) -> Iterator[None]:
    """Stop at the end of the step after a first Ctrl-C or SIGTERM, at once after a second one.

    Signals reach the main thread only. In another thread they keep their handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    came: list[int] = []

    def handle(number: int, _: Any) -> None:
        log.info("stopping after this step; press Ctrl-C again to stop at once")
        came.append(number)
        trainer.interrupted = True
        for each in signals:
            signal.signal(each, signal.SIG_DFL)

    before = {number: signal.signal(number, handle) for number in signals}
    try:
        yield
        if came:  # after the last step
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        if signal.SIGTERM in came:
            raise Terminated from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _describe(job: _Job) -> str:
    """Return a line about the text and the network."""
    data, devices, workers = job.data, job.placement.devices, job.placement.num_workers
    parameters = sum(p.data(devices[0]).size for p in job.net.collect_params().values())
    validation = data.validation.documents if data.validation else ()
    return (
        f"{len(data.train.documents):,} documents to train on and {len(validation):,} for validation, "
        f"{len(data.train.pairs(0)):,} sentence pairs, a vocabulary of {len(data.vocab):,}, "
        f"{parameters:,} parameters, on {devices}{f' of each of {workers} workers' if workers > 1 else ''}"
    )


@contextmanager
def _profiled(path: Path | None, devices: Sequence[Any]) -> Iterator[None]:
    """Profile a block with MXNet if a trace file is given; print the table and the devices' utilization."""
    if path is None:
        yield
        return
    mx = runtime.mx
    mx.profiler.set_config(
        profile_imperative=True, profile_symbolic=True, aggregate_stats=True, filename=str(path)
    )
    mx.profiler.set_state("run")
    try:
        yield
    finally:
        mx.nd.waitall()
        mx.profiler.set_state("stop")
        print(mx.profiler.dumps(sort_by="total"))
        mx.profiler.dump()
        if len(devices) > 1:
            print(device_utilization(path, devices))
