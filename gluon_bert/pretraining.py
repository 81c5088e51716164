"""The steps of a run: what is told of them, the signals that stop them, the watchdog. Parses no flags."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, Mapping, NamedTuple, Sequence

from . import devices, runtime
from .cli import Terminated
from .config import Config
from .errors import InputError, OutOfGPUMemory, gpu_failure


class RunContext(NamedTuple):
    """What the steps of a run are made with; `snapshot`: the checkpoint that they go on from."""

    config: Config
    data: Any
    net: Any
    contexts: list[Any]
    output: Path
    workers: Any
    step_timeout: float
    snapshot: Any = None


def train(given: RunContext) -> int:
    """The steps of a run, from the first or from a checkpoint on, and what they leave in its folder."""
    from . import ops
    from .system import machine_memory, peak_memory
    from .training.checkpointer import AsyncCheckpointer, format_checkpoint_timing
    from .training.gpu_memory import memory_of
    from .training.plots import References
    from .training.progress import ProgressLogger
    from .training.resources import estimate_resources

    config, contexts, output, snapshot = given.config.train, given.contexts, given.output, given.snapshot
    operators = f"{ops.describe(contexts)}, precision {config.precision}"
    print(f"{describe(given)}\noperators: {operators}", file=sys.stderr)
    planned = estimate_resources(
        given.config, len(given.data.vocab), len(contexts), ops.compiled(contexts), given.workers.count
    )
    on_gpus = gpu_estimate(given)
    if on_gpus is None:
        print(planned.in_words(config.batch_size, machine_memory(contexts)), file=sys.stderr)
    else:
        print(
            f"{on_gpus.in_words(sum(memory_of(contexts)))}\n{planned.step_in_words(config.batch_size)}",
            file=sys.stderr,
        )
    print(f"run folder: {output}", file=sys.stderr)
    report = ProgressLogger(output, References.of(given.data))
    checkpointer = AsyncCheckpointer(output)
    trainer = trainer_of(given, [report, checkpointer])
    if snapshot is not None:
        print(f"resuming after step {snapshot.step}", file=sys.stderr)
    try:
        with stop_between_steps(trainer):
            fit(trainer, given)
    except (KeyboardInterrupt, Terminated):
        print(
            f"stopped after step {trainer.state.step}; --resume {output} continues from its checkpoint",
            file=sys.stderr,
        )
        shut_down(trainer)
        raise
    finished_before = snapshot is not None and trainer.state.step == snapshot.step
    if finished_before:
        print(f"{output} is finished, after step {snapshot.step}: --num-steps or --max-minutes asks for more")
    print("\n".join(report.summary(contexts)))
    if len(contexts) > 1 and not finished_before:
        print(trainer.load_balance)
    if checkpointer.timing.written:
        print(format_checkpoint_timing(checkpointer.timing, trainer.state.clock.elapsed()))
    peak = peak_memory()
    if on_gpus is not None:
        print(on_gpus.outcome(memory_of(contexts)[1]), file=sys.stderr)
    elif peak is not None:
        print(planned.outcome(peak), file=sys.stderr)
    return 0


def gpu_estimate(given: RunContext) -> Any:
    """Return the estimate of each GPU's memory, or None for a run on CPUs."""
    from .training.gpu_memory import estimate_gpu_memory

    if given.contexts[0].device_type != "gpu":
        return None
    return estimate_gpu_memory(given.config, len(given.data.vocab), len(given.contexts), given.workers.count)


@contextmanager
def explain_out_of_memory(given: RunContext) -> Iterator[None]:
    """Raise OutOfGPUMemory, which says what would fit, where a GPU has too little memory."""
    try:
        yield
    except Exception as error:
        if gpu_failure(error) != "out of memory":
            raise
        from .training.gpu_memory import memory_of, what_fits

        total = sum(memory_of(given.contexts))
        fits = what_fits(given.config, len(given.data.vocab), len(given.contexts), total, given.workers.count)
        raise OutOfGPUMemory(
            f"the GPU is out of memory. Each has {total / 1e9:.1f} GB, and the run was expected to take "
            f"{gpu_estimate(given).memory / 1e9:.1f} GB; {fits}"
        ) from error


def run_non_root_rank(given: RunContext) -> int:
    """The part that a worker other than the first has in a run: it writes nothing."""
    from .training.checkpointer import ReadOnlyCheckpointer

    trainer = trainer_of(given, [ReadOnlyCheckpointer(given.output)])
    try:
        with stop_between_steps(trainer):
            fit(trainer, given)
    except (KeyboardInterrupt, Terminated):
        shut_down(trainer)
        raise
    return 0


def trainer_of(given: RunContext, callbacks: Sequence[Any]) -> Any:
    """Return a trainer at the beginning or at a checkpoint, with the same weights on all workers."""
    from .distributed.communicator import weights_hash
    from .model.parameters import weights_of
    from .training.losses import OBJECTIVES
    from .training.trainer import Trainer

    with explain_out_of_memory(given):
        trainer = Trainer(
            given.net,
            given.config.train,
            given.contexts,
            loss=OBJECTIVES[given.config.data.objective],
            communicator=given.workers,
            callbacks=callbacks,
        )
        if given.snapshot is not None:
            trainer.restore(given.snapshot, given.output)
    if given.snapshot is not None:
        for arrays in (given.snapshot.weights, given.snapshot.optimizer):
            arrays.clear()  # they would stay in memory to the end of the run
    if given.workers.count > 1:
        step, weights = trainer.state.step, weights_hash(weights_of(given.net))
        given.workers.check_same_on_all({"the step of the checkpoint": step, "the first weights": weights})
    return trainer


def fit(trainer: Any, given: RunContext) -> None:
    """Take the steps of a run, between two of which signals stop it, and none of which takes too long."""
    from .training.watchdog import watched

    def end() -> None:
        print(
            f"pretrain: --step-timeout {given.step_timeout:g}: step {trainer.state.step} takes longer; "
            "another worker may be gone, or the time too short",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # whoever waits for another process cannot be asked to end

    with explain_out_of_memory(given), watched(given.step_timeout, end) as trainer.alive:
        trainer.fit(given.data.train, validation=given.data.validation)


def shut_down(trainer: Any) -> None:
    """Leave the other workers where all have come to an end, rather than this one alone."""
    if trainer.has_ended():
        trainer.communicator.shutdown()


@contextmanager
def stop_between_steps(trainer: Any) -> Iterator[None]:
    """Let a first Ctrl-C or SIGTERM wait for the end of the step; a second one ends the process at once."""
    signals = (signal.SIGINT, signal.SIGTERM)
    came: list[int] = []

    def handle(number: int, _: Any) -> None:
        print("stopping after this step; once more stops at once", file=sys.stderr)
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


def describe(given: RunContext) -> str:
    """A line on what is about to be trained."""
    data, contexts, workers = given.data, given.contexts, given.workers.count
    parameters = sum(p.data(contexts[0]).size for p in given.net.collect_params().values())
    validation = data.validation.documents if data.validation else ()
    return (
        f"{len(data.train.documents):,} documents to train on and {len(validation):,} held out, "
        f"{len(data.train.pairs(0)):,} sentence pairs, a vocabulary of {len(data.vocab):,}, "
        f"{parameters:,} parameters, on {contexts}{f' of each of {workers} workers' if workers > 1 else ''}"
    )


@contextmanager
def profiled(path: Path | None, contexts: Sequence[Any]) -> Iterator[None]:
    """Let MXNet's profiler watch a block, if there is a file for its trace; then prints its table.

    Told is also how long each of several contexts was at work.
    """
    if path is None:
        yield
        return
    from .runtime import mx
    from .training.profiling import device_utilization

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
        if len(contexts) > 1:
            print(device_utilization(path, contexts))


class RunPlacement(NamedTuple):
    """Where a run computes: which of how many workers this is, its contexts, what computes on them."""

    rank: int
    preprocessing_workers: int
    contexts: list[Any]
    operators: str

    def facts(self) -> dict[str, Any]:
        """What a run records of it."""
        return {
            "contexts": [str(context) for context in self.contexts],
            "workers": self.preprocessing_workers,
            "operators": self.operators,
            "versions": runtime.versions(),
        }


def place(arguments: argparse.Namespace, config: Config, recorded: Mapping[str, Any]) -> RunPlacement:
    """Where the flags let a run compute, else where it is recorded to have been begun.

    InputError where that cannot be had, or cannot do what the configuration asks for.
    """
    from . import ops
    from .distributed.join import check_sharing, rank_and_size
    from .training import checks

    contexts = contexts_from(arguments, recorded.get("contexts") or ())
    rank, preprocessing_workers = rank_and_size(arguments.kvstore)
    check_sharing(config, preprocessing_workers)
    checks.check_micro_batch(config.train, len(contexts))
    ops.select(arguments.operators or ops.parse_description(recorded.get("operators", "")))
    checks.check_precision(config.train, contexts)
    here = RunPlacement(rank, preprocessing_workers, contexts, ops.describe(contexts))
    check_fits_memory(config, here)
    return here


def contexts_from(arguments: argparse.Namespace, recorded: Sequence[str] = ()) -> list[Any]:
    """The contexts that the flags ask for; without any those of a resumed run, else what there is."""
    gpus = None if arguments.gpus is None else devices.parse_gpus(arguments.gpus)
    if gpus is None and arguments.cpus is None and recorded:
        gpus, cpus = devices.parse_contexts(recorded)
        return devices.contexts(gpus, cpus)
    return devices.contexts(gpus, arguments.cpus)


def check_fits_memory(config: Config, here: RunPlacement, vocab_size: int = 1) -> None:
    """Raise InputError where a worker cannot fit in its machine's memory, however small the vocabulary."""
    from . import ops
    from .system import machine_memory
    from .training.resources import check_memory

    contexts = here.contexts
    if contexts[0].device_type == "gpu":
        from .training.gpu_memory import check_gpu_memory, memory_of

        free, _ = memory_of(contexts)
        check_gpu_memory(config, vocab_size, len(contexts), free, here.preprocessing_workers)
    limit = machine_memory(contexts)
    if limit is not None:
        check_memory(
            config, vocab_size, len(contexts), ops.compiled(contexts), limit, here.preprocessing_workers
        )


def text(config: Config, here: RunPlacement) -> Any:
    """The text of a run; InputError where it is too little, or its vocabulary too large for the memory."""
    from .data.loader import load_pretraining_data
    from .distributed.join import check_enough
    from .training.checks import check_evaluable

    data = load_pretraining_data(config.data, config.train.batch_size, config.train.seed)
    check_fits_memory(config, here, len(data.vocab))
    check_evaluable(config.train, data.validation is not None)
    check_enough(len(data.train.pairs(0)), here.preprocessing_workers)
    return data


def network(config: Config, data: Any, contexts: list[Any]) -> Any:
    """A network for the text, with its first weights."""
    from .data.cooccurrence import cached_word_vectors
    from .model.bert import BERTModel

    net = BERTModel(len(data.vocab), config.model)
    net.initialize(ctx=contexts, seed=config.train.seed)
    net.hybridize()
    if config.model.decoder_bias == "unigram":
        net.set_unigram_bias(data.word_counts)
    if config.model.init_embeddings == "cooccurrence":
        documents = data.train.documents
        vectors = cached_word_vectors(
            documents, data.vocab, config.model.units, config.train.seed, documents.folder
        )
        net.set_word_vectors(vectors)
    return net


def check_same_text(config: Config, data: Any, folder: Path, facts: Mapping[str, Any]) -> None:
    """Raise InputError where a run would go on with another text, or another way to read it."""
    from .data.wordpiece import load_vocabulary

    if data.fingerprint != facts.get("text") or data.vocab.tokens != load_vocabulary(folder).tokens:
        raise InputError(
            f"--corpus {' '.join(config.data.corpus)}: the text, or what reads it, is not what {folder} "
            "was begun with, and a run that goes on with another is another; begin one with --config"
        )


def report_device_change(facts: Mapping[str, Any], here: RunPlacement) -> None:
    """A line for everything that makes numbers differ from those of the run that was recorded."""
    from . import ops

    now = here.facts()
    report_config_changes(facts.get("versions") or {}, now["versions"], "the last digits may differ")
    dropout = "with dropout other numbers come, without it the last digits may differ"
    report_config_changes({"workers": facts.get("workers", 1)}, {"workers": now["workers"]}, dropout)
    recorded = facts.get("operators", "")
    if recorded and ops.parse_description(recorded) != ops.parse_description(here.operators):
        report_config_changes({"operators": recorded}, {"operators": here.operators}, dropout)


def report_config_changes(before: Mapping[str, Any], now: Mapping[str, Any], so: str) -> None:
    """A line for everything that is not what it was when a resumed run was begun, and so changes it."""
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            print(
                f"{name} is {now.get(name)} and was {before.get(name)}: {so} from those of a run that was "
                "not stopped",
                file=sys.stderr,
            )
