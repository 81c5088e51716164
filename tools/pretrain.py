"""Pretrains BERT: `python tools/pretrain.py --help` tells how."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Sequence

from command_line import Terminated, add_config_flags, command, config_from, parser_of

from gluon_bert import runtime
from gluon_bert.config import DRAWN, PRESETS, Config, changeable, preset, refuse_changes
from gluon_bert.errors import BadInput
from gluon_bert.files import held_alone, remove_leftovers

EXAMPLES = """\
examples:
  python tools/pretrain.py                                   the book's small BERT on the text in this Python
  python tools/pretrain.py --corpus wikitext-2 --gpus 0,1    the book's text, on two GPUs
  python tools/pretrain.py --preset bert-tiny --corpus my_texts/ --num-steps 5000 --eval-every 500
  python tools/pretrain.py --preset bert-tiny --max-minutes 30 --eval-every 100 --patience 5
  python tools/pretrain.py --init runs/d2l-1 --corpus my_domain/ --lr 0.0001 --extend-vocab 500
  python tools/pretrain.py --cpus 2 --batch-size 64 --seed 7
  python tools/launch.py -n 2 -- python tools/pretrain.py --output runs/two --kvstore dist_sync
  python tools/pretrain.py --resume runs/bert-tiny-1         go on with a run that was stopped or killed

What stands in brackets is what the presets have. A run's folder holds config.json, vocab.json, log.jsonl,
losses.png and checkpoints/.
"""


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    p = parser_of(
        "pretrain",
        "[flags]",
        "Pretrain BERT (masked language model, next-sentence prediction) on one device or many.",
        EXAMPLES,
    )
    p.add_argument("--preset", metavar="NAME", help=f"{', '.join(PRESETS)} (d2l)")
    p.add_argument("--config", type=Path, metavar="FILE", help="an earlier run's config.json, not a preset")
    p.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help="go on with the run in this folder from its latest checkpoint, as if it had not been stopped; "
        f"beside it only flags that a run may change: {', '.join(changeable())}, --gpus, --cpus, "
        "--operators, --kvstore, --step-timeout and --profile",
    )
    p.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="the run's new folder (runs/PRESET-1, or the next free number)",
    )
    where = p.add_argument_group("where it runs (every GPU that MXNet sees, else one CPU)")
    where.add_argument("--gpus", metavar="N[,N...]", help="these GPUs, such as 0 or 0,1")
    where.add_argument(
        "--cpus", type=int, metavar="N", help="N contexts on the CPU, each with its shard of the batch"
    )
    where.add_argument(
        "--operators",
        metavar="{auto,compiled,mxnet}",
        help="on CPUs: compiled for this processor, MXNet's own, or compiled where there is a C++ compiler, "
        "which takes half a minute once (auto, or what GLUON_BERT_OPERATORS says)",
    )
    where.add_argument(
        "--kvstore",
        default="device",
        metavar="{device,dist_sync}",
        help="what sums the gradients: of one process (device), or of all that tools/launch.py starts, by "
        "MXNet's parameter servers (dist_sync): they share each batch, and need an --output (device)",
    )
    where.add_argument(
        "--step-timeout",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="end with exit status 1 when a step, with its data and maybe a checkpoint, takes longer, as "
        "where another worker is gone; 0: wait for ever (0)",
    )
    p.add_argument(
        "--profile",
        type=Path,
        metavar="FILE",
        help="write what MXNet's operators did, and when, for chrome://tracing; a table of them follows the "
        "summary. The run is slower by it",
    )
    add_config_flags(p)
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return command(parser(), argv, pretrain)


def pretrain(arguments: argparse.Namespace) -> int:
    """Pretrain as the flags say."""
    if not arguments.step_timeout >= 0:
        raise BadInput(f"--step-timeout {arguments.step_timeout}: must be at least 0")
    rank = rank_of(arguments)
    if arguments.profile is None or rank:
        return begin_or_resume(arguments)
    with profiled(arguments.profile):
        return begin_or_resume(arguments)


def begin_or_resume(arguments: argparse.Namespace) -> int:
    """A new run, or one that goes on."""
    if arguments.resume is not None:
        return resume(arguments)
    config = config_from(arguments, starting_point(arguments))
    contexts = contexts_from(arguments)
    if arguments.output is None and arguments.kvstore != "device":
        raise BadInput(
            f"--kvstore {arguments.kvstore}: --output has to name the run's folder for all workers"
        )
    name = arguments.preset or ("d2l" if arguments.config is None else "repeat")
    output = _free_folder(name) if arguments.output is None else arguments.output
    return begin(config, contexts, output, arguments)


@contextmanager
def profiled(path: Path) -> Iterator[None]:
    """Let MXNet's profiler watch a block; leaves its trace in a file and prints its table."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise BadInput(f"--profile {path}: is no file that can be written")
    from gluon_bert.runtime import mx

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


def starting_point(arguments: argparse.Namespace) -> Config:
    """The configuration that the flags change: a preset's, or an earlier run's."""
    if arguments.config is not None and arguments.preset is not None:
        raise BadInput("--config and --preset exclude each other: give one of them")
    init = getattr(arguments, "init", DRAWN[0])
    if init not in DRAWN:
        from gluon_bert.starting import beginning_with

        recipe = None if arguments.config is None and arguments.preset is None else recipe_of(arguments)
        return beginning_with(init, getattr(arguments, "init_checkpoint", "latest"), recipe)
    return recipe_of(arguments)


def recipe_of(arguments: argparse.Namespace) -> Config:
    """The configuration that --preset or --config names."""
    if arguments.config is None:
        return preset(arguments.preset or "d2l")
    from gluon_bert.checkpoint import read_config  # needs MXNet, which --help does not

    return read_config(arguments.config)


def contexts_from(arguments: argparse.Namespace, recorded: Sequence[str] = ()) -> list[Any]:
    """The contexts that the flags ask for; without any those of a resumed run, else what there is."""
    gpus = None if arguments.gpus is None else runtime.parse_gpus(arguments.gpus)
    if gpus is None and arguments.cpus is None and recorded:
        gpus, cpus = runtime.parse_contexts(recorded)
        return runtime.contexts(gpus, cpus)
    return runtime.contexts(gpus, arguments.cpus)


def rank_of(arguments: argparse.Namespace) -> int:
    """This process's number among the workers of a run; 0 where it trains alone."""
    if arguments.kvstore == "device" and "DMLC_ROLE" not in os.environ:
        return 0
    from gluon_bert.training.workers import place_of

    return place_of(arguments.kvstore)[0]


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


def begin(config: Config, contexts: list[Any], output: Path, arguments: argparse.Namespace) -> int:
    """A new run, in a folder of its own."""
    from gluon_bert import ops
    from gluon_bert.checkpoint import check_new, create_run
    from gluon_bert.data.loader import load_data
    from gluon_bert.starting import load_start, start_from
    from gluon_bert.training.report import References
    from gluon_bert.training.trainer import check_evaluable, check_micro_batch
    from gluon_bert.training.workers import check_enough, check_sharing, facts_of, joined, place_of

    rank, count = place_of(arguments.kvstore)
    check_sharing(config, count)
    if not rank:
        check_new(output)
    check_micro_batch(config.train, len(contexts))
    ops.choose(arguments.operators)
    refuse_too_large(config, contexts, count)
    start = load_start(config)
    data = load_data(config.data, config.train.batch_size, config.train.seed)
    refuse_too_large(config, contexts, count, len(data.vocab))
    check_evaluable(config.train, data)
    check_enough(len(data.train.pairs(0)), count)
    with joined(arguments.kvstore) as workers:
        workers.refuse_differences(facts_of(config, data.fingerprint))
        net = network(config, data, contexts)
        if start:
            start_from(net, data.vocab, start)
        given = Given(config, data, net, contexts, output, workers, arguments.step_timeout)
        if rank:
            return train_beside(given)
        facts = {
            "contexts": [str(context) for context in contexts],
            "workers": count,
            "operators": ops.in_use(contexts),
            "versions": runtime.versions(),
            "text": data.fingerprint,
            "began_with_step": start.step if start else None,
            "losses_for_comparison": References.of(data)._asdict(),
        }
        create_run(output, config, data.vocab, facts)
        with held_alone(output, "--output"):
            return train(given)


def resume(arguments: argparse.Namespace) -> int:
    """Go on with a run from its latest checkpoint, as if it had not been stopped."""
    from gluon_bert import ops
    from gluon_bert.checkpoint import CONFIG, latest_whole, read_config, read_facts, write_config
    from gluon_bert.data.loader import load_data
    from gluon_bert.data.wordpiece import load_vocabulary
    from gluon_bert.training.trainer import check_micro_batch
    from gluon_bert.training.workers import check_enough, check_sharing, facts_of, joined, place_of

    folder = arguments.resume
    for name in ("preset", "config", "output"):
        if getattr(arguments, name) is not None:
            raise BadInput(f"--{name}: has no place beside --resume, which goes on as {folder} was begun")
    if not (folder / CONFIG).is_file():
        raise BadInput(f"--resume {folder}: is no run: it has no {CONFIG}; name a folder that pretrain wrote")
    before, facts = read_config(folder / CONFIG), read_facts(folder / CONFIG)
    config = config_from(arguments, before)
    refuse_changes(before, config, str(folder))
    rank, count = place_of(arguments.kvstore)
    check_sharing(config, count)
    with nullcontext() if rank else held_alone(folder, "--resume"):
        if not rank:
            remove_leftovers(folder)
            remove_leftovers(folder / "checkpoints")
        contexts = contexts_from(arguments, facts.get("contexts") or ())
        recorded = facts.get("operators", "")
        ops.choose(arguments.operators or ops.choice_of(recorded))
        operators = ops.in_use(contexts)
        check_micro_batch(config.train, len(contexts))
        refuse_too_large(config, contexts, count, len(load_vocabulary(folder)))
        snapshot = latest_whole(folder)
        data = load_data(config.data, config.train.batch_size, config.train.seed)
        check_enough(len(data.train.pairs(0)), count)
        if data.fingerprint != facts.get("text") or data.vocab.tokens != load_vocabulary(folder).tokens:
            raise BadInput(
                f"--corpus {' '.join(config.data.corpus)}: the text, or what reads it, is not what {folder} "
                "was begun with, and a run that goes on with another is another; begin one with --config"
            )
        now = {
            "contexts": [str(context) for context in contexts],
            "workers": count,
            "operators": operators,
            "versions": runtime.versions(),
        }
        with joined(arguments.kvstore) as workers:
            workers.refuse_differences(facts_of(config, data.fingerprint))
            net = network(config, data, contexts)
            given = Given(config, data, net, contexts, folder, workers, arguments.step_timeout, snapshot)
            if rank:
                return train_beside(given)
            tell_differences(facts.get("versions") or {}, runtime.versions(), "the last digits may differ")
            dropout = "with dropout other numbers come, without it the last digits may differ"
            tell_differences({"workers": facts.get("workers", 1)}, {"workers": count}, dropout)
            if recorded and ops.choice_of(recorded) != ops.choice_of(operators):
                tell_differences({"operators": recorded}, {"operators": operators}, dropout)
            if (config, {**facts, **now}) != (before, facts):
                write_config(folder, config, {**facts, **now})
            return train(given)


def tell_differences(before: Mapping[str, Any], now: Mapping[str, Any], so: str) -> None:
    """A line for everything that is not what it was when a resumed run was begun, and so changes it."""
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            print(
                f"{name} is {now.get(name)} and was {before.get(name)}: {so} from those of a run that was "
                "not stopped",
                file=sys.stderr,
            )


def refuse_too_large(config: Config, contexts: list[Any], num_workers: int, vocab_size: int = 1) -> None:
    """Raise BadInput where a worker cannot fit in its machine's memory, however small the vocabulary."""
    from gluon_bert import ops
    from gluon_bert.training.plan import check_memory, machine_memory

    limit = machine_memory(contexts)
    if limit is not None:
        check_memory(config, vocab_size, len(contexts), ops.compiled(contexts), limit, num_workers)


def network(config: Config, data: Any, contexts: list[Any]) -> Any:
    """A network for the text, with its first weights."""
    from gluon_bert.model.bert import BERTModel

    net = BERTModel(len(data.vocab), config.model)
    net.setup(contexts, config.train.seed, data.word_counts)
    return net


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
                if given.workers.kvstore != "device" and snapshot is None:
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
    if snapshot is not None and trainer.standing.step == snapshot.step:
        print(f"{output} is finished, after step {snapshot.step}: --num-steps or --max-minutes asks for more")
    print("\n".join(report.summary(contexts)))
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


def _free_folder(preset_name: str) -> Path:
    number = 1
    while Path("runs", f"{preset_name}-{number}").exists():
        number += 1
    return Path("runs", f"{preset_name}-{number}")


def leave(main: Callable[[list[str]], int]) -> None:
    """Run the command and leave with its exit status; at once where other workers are waited for in vain."""

    def failed() -> bool:
        workers = sys.modules.get("gluon_bert.training.workers")
        return workers is not None and bool(workers.failed())

    try:
        status = main(sys.argv[1:])
    except Exception:
        if not failed():
            raise
        traceback.print_exc()
        status = 1
    if failed():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    leave(main)
