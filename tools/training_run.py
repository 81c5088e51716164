"""The steps of a run: what is told of them, the signals that stop them, the watchdog. Parses no flags."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Sequence

from command_line import Terminated

from gluon_bert.config import Config


class Given(NamedTuple):
    """What the steps of a run are made with; `snapshot`: the checkpoint that they go on from."""

    config: Config
    data: Any
    net: Any
    contexts: list[Any]
    output: Path
    workers: Any
    step_timeout: float
    snapshot: Any = None


def train(given: Given) -> int:
    """The steps of a run, from the first or from a checkpoint on, and what they leave in its folder."""
    from gluon_bert import ops
    from gluon_bert.training.plan import machine_memory, peak_memory, plan
    from gluon_bert.training.report import Report
    from gluon_bert.training.saving import CheckpointSaver, cost_in_words

    config, contexts, output, snapshot = given.config.train, given.contexts, given.output, given.snapshot
    print(f"{describe(given)}\noperators: {ops.in_use(contexts)}", file=sys.stderr)
    planned = plan(
        given.config, len(given.data.vocab), len(contexts), ops.compiled(contexts), given.workers.count
    )
    print(planned.in_words(config.batch_size, machine_memory(contexts)), file=sys.stderr)
    print(f"run folder: {output}", file=sys.stderr)
    trainer = trainer_of(given)
    if snapshot is not None:
        print(f"going on after step {snapshot.step}", file=sys.stderr)
    run = trainer.standing
    report = Report(output, config, given.data, step=run.step, best=run.best, log_bytes=run.log_bytes)
    saver = CheckpointSaver(output, config, report)
    try:
        with signals_between_steps(trainer):
            try:
                if not given.workers.alone and snapshot is None:
                    saver.save(trainer)  # so that the job can be restarted, whenever it fails
                fit(trainer, given, report, saver)
            finally:
                saver.close()
    except (KeyboardInterrupt, Terminated):
        print(
            f"the weights after step {run.step} are kept in {output}; --resume {output} goes on from there",
            file=sys.stderr,
        )
        part(trainer)
        raise
    finally:
        report.close()
    finished_before = snapshot is not None and trainer.standing.step == snapshot.step
    if finished_before:
        print(f"{output} is finished, after step {snapshot.step}: --num-steps or --max-minutes asks for more")
    print("\n".join(report.summary(contexts)))
    if len(contexts) > 1 and not finished_before:
        print(trainer.evenness.in_words())
    if saver.cost.written:
        print(cost_in_words(saver.cost, trainer.standing.clock.elapsed()))
    peak = peak_memory()
    if peak is not None:
        print(planned.outcome(peak), file=sys.stderr)
    return 0


def train_beside(given: Given) -> int:
    """The part that a worker other than the first has in a run: it writes nothing."""
    from gluon_bert.training.saving import ReadOnlySaver
    from gluon_bert.training.trainer import Reporter

    trainer = trainer_of(given)
    try:
        with signals_between_steps(trainer):
            fit(trainer, given, Reporter(), ReadOnlySaver(given.output))
    except (KeyboardInterrupt, Terminated):
        part(trainer)
        raise
    return 0


def trainer_of(given: Given) -> Any:
    """A trainer at the beginning, or where a checkpoint stands, with the same weights on all workers."""
    from gluon_bert.checkpoint import weights_of
    from gluon_bert.training.trainer import Trainer
    from gluon_bert.training.workers import digest_of_weights

    trainer = Trainer(given.net, given.config.train, given.contexts, given.workers)
    if given.snapshot is not None:
        trainer.restore(given.snapshot, given.output)
        for arrays in (given.snapshot.weights, given.snapshot.optimizer):
            arrays.clear()  # they would stay in memory to the end of the run
    if given.workers.count > 1:
        step, weights = trainer.standing.step, digest_of_weights(weights_of(given.net))
        given.workers.refuse_differences({"the step of the checkpoint": step, "the first weights": weights})
    return trainer


def fit(trainer: Any, given: Given, report: Any, saver: Any) -> None:
    """Take the steps of a run, between two of which signals stop it, and none of which takes too long."""
    from gluon_bert.training.watchdog import watched

    def end() -> None:
        print(
            f"pretrain: --step-timeout {given.step_timeout:g}: step {trainer.standing.step} takes longer; "
            "another worker may be gone, or the time too short",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # whoever waits for another process cannot be asked to end

    with watched(given.step_timeout, end) as trainer.alive:
        trainer.fit(given.data, report, saver)


def part(trainer: Any) -> None:
    """Leave the other workers where all have come to an end, rather than this one alone."""
    if trainer.has_ended():
        trainer.workers.leave()


@contextmanager
def signals_between_steps(trainer: Any) -> Iterator[None]:
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


def describe(given: Given) -> str:
    """A line on what is about to be trained."""
    data, contexts, workers = given.data, given.contexts, given.workers.count
    parameters = sum(p.data(contexts[0]).size for p in given.net.collect_params().values())
    held_out = data.held_out.documents if data.held_out else ()
    return (
        f"{len(data.train.documents):,} documents to train on and {len(held_out):,} held out, "
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
    from gluon_bert.runtime import mx
    from gluon_bert.training.evenness import time_at_work

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
            print(time_at_work(path, contexts).in_words())
