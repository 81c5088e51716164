"""Pretrains BERT: `python tools/pretrain.py --help` tells how."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any, Callable, Mapping, NamedTuple, Sequence

from command_line import add_config_flags, command, config_from, parser_of
from training_run import Given, profiled, train, train_beside

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
        metavar="{device,dist_sync,horovod}",
        help="what sums the gradients: of one process (device), or of all that tools/launch.py starts, by "
        "MXNet's parameter servers (dist_sync) or among themselves (horovod, an extra): they share each "
        "batch, and need an --output (device)",
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
        "summary, and how long each of several contexts was at work. The run is slower by it",
    )
    add_config_flags(p)
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return command(parser(), argv, pretrain)


def pretrain(arguments: argparse.Namespace) -> int:
    """Pretrain as the flags say: a new run, or one that goes on."""
    if not arguments.step_timeout >= 0:
        raise BadInput(f"--step-timeout {arguments.step_timeout}: must be at least 0")
    profile = arguments.profile
    if profile and (profile.is_dir() or not profile.absolute().parent.is_dir()):
        raise BadInput(f"--profile {profile}: is no file that can be written")
    return begin(arguments) if arguments.resume is None else resume(arguments)


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


def new_folder(arguments: argparse.Namespace) -> Path:
    """The folder of a new run: --output, or the next free number in runs/."""
    if arguments.output is not None:
        return Path(arguments.output)
    if arguments.kvstore != "device":
        raise BadInput(
            f"--kvstore {arguments.kvstore}: --output has to name the run's folder for all workers"
        )
    name = arguments.preset or ("d2l" if arguments.config is None else "repeat")
    numbered = (Path("runs", f"{name}-{number}") for number in count(1))
    return next(folder for folder in numbered if not folder.exists())


class Place(NamedTuple):
    """Where a run computes: which of how many workers this is, its contexts, what computes on them."""

    rank: int
    num_workers: int
    contexts: list[Any]
    operators: str

    def facts(self) -> dict[str, Any]:
        """What a run records of it."""
        return {
            "contexts": [str(context) for context in self.contexts],
            "workers": self.num_workers,
            "operators": self.operators,
            "versions": runtime.versions(),
        }


def place(arguments: argparse.Namespace, config: Config, recorded: Mapping[str, Any]) -> Place:
    """Where the flags let a run compute, else where it is recorded to have been begun.

    BadInput where that cannot be had, or cannot do what the configuration asks for.
    """
    from gluon_bert import ops
    from gluon_bert.training.trainer import check_micro_batch, check_precision
    from gluon_bert.training.workers import check_sharing, place_of

    contexts = contexts_from(arguments, recorded.get("contexts") or ())
    rank, num_workers = place_of(arguments.kvstore)
    check_sharing(config, num_workers)
    check_micro_batch(config.train, len(contexts))
    ops.choose(arguments.operators or ops.choice_of(recorded.get("operators", "")))
    check_precision(config.train, contexts)
    here = Place(rank, num_workers, contexts, ops.in_use(contexts))
    refuse_too_large(config, here)
    return here


def contexts_from(arguments: argparse.Namespace, recorded: Sequence[str] = ()) -> list[Any]:
    """The contexts that the flags ask for; without any those of a resumed run, else what there is."""
    gpus = None if arguments.gpus is None else runtime.parse_gpus(arguments.gpus)
    if gpus is None and arguments.cpus is None and recorded:
        gpus, cpus = runtime.parse_contexts(recorded)
        return runtime.contexts(gpus, cpus)
    return runtime.contexts(gpus, arguments.cpus)


def refuse_too_large(config: Config, here: Place, vocab_size: int = 1) -> None:
    """Raise BadInput where a worker cannot fit in its machine's memory, however small the vocabulary."""
    from gluon_bert import ops
    from gluon_bert.training.plan import check_memory, machine_memory

    contexts = here.contexts
    limit = machine_memory(contexts)
    if limit is not None:
        check_memory(config, vocab_size, len(contexts), ops.compiled(contexts), limit, here.num_workers)


def text(config: Config, here: Place) -> Any:
    """The text of a run; BadInput where it is too little, or its vocabulary too large for the memory."""
    from gluon_bert.data.loader import load_data
    from gluon_bert.training.trainer import check_evaluable
    from gluon_bert.training.workers import check_enough

    data = load_data(config.data, config.train.batch_size, config.train.seed)
    refuse_too_large(config, here, len(data.vocab))
    check_evaluable(config.train, data)
    check_enough(len(data.train.pairs(0)), here.num_workers)
    return data


def begin(arguments: argparse.Namespace) -> int:
    """A new run, in a folder of its own."""
    from gluon_bert.checkpoint import check_new, create_run
    from gluon_bert.starting import load_start, start_from
    from gluon_bert.training.report import References
    from gluon_bert.training.workers import facts_of, joined

    config = config_from(arguments, starting_point(arguments))
    output = new_folder(arguments)
    here = place(arguments, config, recorded={})
    if not here.rank:
        check_new(output)
    start = load_start(config)
    data = text(config, here)
    began_with_step = start.step if start else None
    with joined(arguments.kvstore) as workers:
        workers.refuse_differences(facts_of(config, data.fingerprint))
        net = network(config, data, here.contexts)
        if start:
            start_from(net, data.vocab, start)
        del start  # its weights would stay in memory to the end of the run
        given = Given(config, data, net, here.contexts, output, workers, arguments.step_timeout)
        if here.rank:
            return train_beside(given)
        facts = {
            **here.facts(),
            "text": data.fingerprint,
            "began_with_step": began_with_step,
            "losses_for_comparison": References.of(data)._asdict(),
        }
        create_run(output, config, data.vocab, facts)
        with held_alone(output, "--output"), profiled(arguments.profile, here.contexts):
            return train(given)


def resume(arguments: argparse.Namespace) -> int:
    """Go on with a run from its latest checkpoint, as if it had not been stopped."""
    from gluon_bert.checkpoint import CONFIG, latest_whole, read_config, read_facts, write_config
    from gluon_bert.training.workers import facts_of, joined

    folder = arguments.resume
    for name in ("preset", "config", "output"):
        if getattr(arguments, name) is not None:
            raise BadInput(f"--{name}: has no place beside --resume, which goes on as {folder} was begun")
    if not (folder / CONFIG).is_file():
        raise BadInput(f"--resume {folder}: is no run: it has no {CONFIG}; name a folder that pretrain wrote")
    before, facts = read_config(folder / CONFIG), read_facts(folder / CONFIG)
    config = config_from(arguments, before)
    refuse_changes(before, config, str(folder))
    here = place(arguments, config, facts)
    with nullcontext() if here.rank else held_alone(folder, "--resume"):
        if not here.rank:
            remove_leftovers(folder)
            remove_leftovers(folder / "checkpoints")
        snapshot = latest_whole(folder)
        data = text(config, here)
        refuse_another_text(config, data, folder, facts)
        with joined(arguments.kvstore) as workers:
            workers.refuse_differences(facts_of(config, data.fingerprint))
            net = network(config, data, here.contexts)
            given = Given(config, data, net, here.contexts, folder, workers, arguments.step_timeout, snapshot)
            if here.rank:
                return train_beside(given)
            tell_another_place(facts, here)
            now = {**facts, **here.facts()}
            if (config, now) != (before, facts):
                write_config(folder, config, now)
            with profiled(arguments.profile, here.contexts):
                return train(given)


def network(config: Config, data: Any, contexts: list[Any]) -> Any:
    """A network for the text, with its first weights."""
    from gluon_bert.model.bert import BERTModel

    net = BERTModel(len(data.vocab), config.model)
    net.setup(contexts, config.train.seed, data.word_counts)
    return net


def refuse_another_text(config: Config, data: Any, folder: Path, facts: Mapping[str, Any]) -> None:
    """Raise BadInput where a run would go on with another text, or another way to read it."""
    from gluon_bert.data.wordpiece import load_vocabulary

    if data.fingerprint != facts.get("text") or data.vocab.tokens != load_vocabulary(folder).tokens:
        raise BadInput(
            f"--corpus {' '.join(config.data.corpus)}: the text, or what reads it, is not what {folder} "
            "was begun with, and a run that goes on with another is another; begin one with --config"
        )


def tell_another_place(facts: Mapping[str, Any], here: Place) -> None:
    """A line for everything that makes numbers differ from those of the run that was recorded."""
    from gluon_bert import ops

    now = here.facts()
    tell_differences(facts.get("versions") or {}, now["versions"], "the last digits may differ")
    dropout = "with dropout other numbers come, without it the last digits may differ"
    tell_differences({"workers": facts.get("workers", 1)}, {"workers": now["workers"]}, dropout)
    recorded = facts.get("operators", "")
    if recorded and ops.choice_of(recorded) != ops.choice_of(here.operators):
        tell_differences({"operators": recorded}, {"operators": here.operators}, dropout)


def tell_differences(before: Mapping[str, Any], now: Mapping[str, Any], so: str) -> None:
    """A line for everything that is not what it was when a resumed run was begun, and so changes it."""
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            print(
                f"{name} is {now.get(name)} and was {before.get(name)}: {so} from those of a run that was "
                "not stopped",
                file=sys.stderr,
            )


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
