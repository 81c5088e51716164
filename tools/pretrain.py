"""Pretrains BERT: `python tools/pretrain.py --help` tells how."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Callable

from gluon_bert.cli import add_config_flags, config_from, main_with_exit_status, parser_of
from gluon_bert.config import RANDOM_INITS, Config, changeable, check_changes
from gluon_bert.errors import InputError
from gluon_bert.fileio import exclusive_lock, remove_temporary_files
from gluon_bert.presets import PRESETS, preset
from gluon_bert.pretraining import (
    RunContext,
    check_same_text,
    network,
    place,
    profiled,
    report_device_change,
    run_non_root_rank,
    text,
    train,
)

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
    return main_with_exit_status(parser(), argv, pretrain)


def pretrain(arguments: argparse.Namespace) -> int:
    """Pretrain as the flags say: a new run, or one that goes on."""
    if not arguments.step_timeout >= 0:
        raise InputError(f"--step-timeout {arguments.step_timeout}: must be at least 0")
    profile = arguments.profile
    if profile and (profile.is_dir() or not profile.absolute().parent.is_dir()):
        raise InputError(f"--profile {profile}: is no file that can be written")
    return begin(arguments) if arguments.resume is None else resume(arguments)


def init_run(arguments: argparse.Namespace) -> Config:
    """The configuration that the flags change: a preset's, or an earlier run's."""
    if arguments.config is not None and arguments.preset is not None:
        raise InputError("--config and --preset exclude each other: give one of them")
    init = getattr(arguments, "init", RANDOM_INITS[0])
    if init not in RANDOM_INITS:
        from gluon_bert.warm_start import config_from_run

        recipe = None if arguments.config is None and arguments.preset is None else recipe_of(arguments)
        return config_from_run(init, getattr(arguments, "init_checkpoint", "latest"), recipe)
    return recipe_of(arguments)


def recipe_of(arguments: argparse.Namespace) -> Config:
    """The configuration that --preset or --config names."""
    if arguments.config is None:
        return preset(arguments.preset or "d2l")
    from gluon_bert.run import read_config  # needs MXNet, which --help does not

    return read_config(arguments.config)


def new_folder(arguments: argparse.Namespace) -> Path:
    """The folder of a new run: --output, or the next free number in runs/."""
    if arguments.output is not None:
        return Path(arguments.output)
    if arguments.kvstore != "device":
        raise InputError(
            f"--kvstore {arguments.kvstore}: --output has to name the run's folder for all workers"
        )
    name = arguments.preset or ("d2l" if arguments.config is None else "repeat")
    numbered = (Path("runs", f"{name}-{number}") for number in count(1))
    return next(folder for folder in numbered if not folder.exists())


def begin(arguments: argparse.Namespace) -> int:
    """A new run, in a folder of its own."""
    from gluon_bert.distributed.join import init_distributed, run_environment
    from gluon_bert.run import check_new_run, create_run
    from gluon_bert.training.plots import References
    from gluon_bert.warm_start import load_init_run, load_initial_weights

    config = config_from(arguments, init_run(arguments))
    output = new_folder(arguments)
    here = place(arguments, config, recorded={})
    if not here.rank:
        check_new_run(output)
    start = load_init_run(config)
    data = text(config, here)
    init_step = start.step if start else None
    with init_distributed(arguments.kvstore) as workers:
        workers.check_same_on_all(run_environment(config, data.fingerprint))
        net = network(config, data, here.contexts)
        if start:
            load_initial_weights(net, data.vocab, start)
        del start  # its weights would stay in memory to the end of the run
        given = RunContext(config, data, net, here.contexts, output, workers, arguments.step_timeout)
        if here.rank:
            return run_non_root_rank(given)
        facts = {
            **here.facts(),
            "text": data.fingerprint,
            "init_step": init_step,
            "reference_losses": References.of(data)._asdict(),
        }
        create_run(output, config, data.vocab, facts)
        with exclusive_lock(output, "--output"), profiled(arguments.profile, here.contexts):
            return train(given)


def resume(arguments: argparse.Namespace) -> int:
    """Go on with a run from its latest checkpoint, as if it had not been stopped."""
    from gluon_bert.checkpoint import CONFIG, latest_valid
    from gluon_bert.distributed.join import init_distributed, run_environment
    from gluon_bert.run import read_config, read_environment, write_config

    folder = arguments.resume
    for name in ("preset", "config", "output"):
        if getattr(arguments, name) is not None:
            raise InputError(f"--{name}: has no place beside --resume, which goes on as {folder} was begun")
    if not (folder / CONFIG).is_file():
        raise InputError(
            f"--resume {folder}: is no run: it has no {CONFIG}; name a folder that pretrain wrote"
        )
    before, facts = read_config(folder / CONFIG), read_environment(folder / CONFIG)
    config = config_from(arguments, before)
    check_changes(before, config, str(folder))
    here = place(arguments, config, facts)
    with nullcontext() if here.rank else exclusive_lock(folder, "--resume"):
        if not here.rank:
            remove_temporary_files(folder)
            remove_temporary_files(folder / "checkpoints")
        snapshot = latest_valid(folder)
        data = text(config, here)
        check_same_text(config, data, folder, facts)
        with init_distributed(arguments.kvstore) as workers:
            workers.check_same_on_all(run_environment(config, data.fingerprint))
            net = network(config, data, here.contexts)
            given = RunContext(
                config, data, net, here.contexts, folder, workers, arguments.step_timeout, snapshot
            )
            if here.rank:
                return run_non_root_rank(given)
            report_device_change(facts, here)
            now = {**facts, **here.facts()}
            if (config, now) != (before, facts):
                write_config(folder, config, now)
            with profiled(arguments.profile, here.contexts):
                return train(given)


def leave(main: Callable[[list[str]], int]) -> None:
    """Run the command and leave with its exit status; at once where other workers are waited for in vain."""

    def failed() -> bool:
        workers = sys.modules.get("gluon_bert.distributed.join")
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
