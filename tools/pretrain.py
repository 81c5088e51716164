"""Pretrain BERT; `python tools/pretrain.py --help` shows how."""

from __future__ import annotations

import argparse
from itertools import count
from pathlib import Path
from typing import Any

from gluon_bert import devices
from gluon_bert.cli import add_config_flags, config_from, main_with_exit_status, parser_of, run
from gluon_bert.config import RANDOM_INITS, Config
from gluon_bert.errors import InputError
from gluon_bert.presets import DEFAULT, PRESETS, preset

EXAMPLES = """\
examples:
  python tools/pretrain.py                                   two minutes on the text in this Python
  python tools/pretrain.py --preset quick --corpus my_texts/ --max-minutes 30 --eval-every 500
  python tools/pretrain.py --preset quick --corpus wikitext-2 --gpus 0,1
  python tools/pretrain.py --preset d2l                      D2L's network, data preparation and 50 steps
  python tools/pretrain.py --preset bert-base --corpus my_texts/ --gpus 0,1 --precision fp16
  python tools/pretrain.py --init runs/quick-1 --corpus my_domain/ --lr 0.0001
  python tools/pretrain.py --resume runs/quick-1
  python tools/launch.py -n 2 -- python tools/pretrain.py --output runs/two --kvstore dist_sync

Defaults are in brackets. A run's folder has config.json, the vocabulary, log.jsonl, losses.png and
checkpoints/. docs/pretraining.md describes the options.
"""
BASIC = (
    *("--preset", "--corpus", "--init", "--output", "--resume", "--gpus", "--cpus", "--precision"),
    *("--batch-size", "--micro-batch", "--num-steps", "--max-minutes", "--lr", "--eval-every"),
)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    p = parser_of(
        "pretrain",
        "[flags]",
        "Pretrain BERT (masked language model, next-sentence prediction) on one device or many.",
        EXAMPLES,
        BASIC,
    )
    p.add_argument("--preset", metavar="NAME", help=f"{', '.join(PRESETS)} ({DEFAULT})")
    p.add_argument(
        "--config", type=Path, metavar="FILE", help="use the config.json of a run instead of a preset"
    )
    p.add_argument(
        "--resume",
        metavar="RUN|auto",
        help="continue a run from its latest checkpoint. auto: continue the run in --output, or start it",
    )
    p.add_argument(
        "--output", type=Path, metavar="FOLDER", help="folder of the new run (runs/PRESET-1, -2, ...)"
    )
    where = p.add_argument_group("devices (all GPUs, or one CPU)")
    where.add_argument("--gpus", metavar="N[,N...]", help="use these GPUs, such as 0 or 0,1")
    where.add_argument(
        "--cpus", type=int, metavar="N", help="use N contexts on the CPU, each with its part of the batch"
    )
    where.add_argument(
        "--operators",
        metavar="{auto,compiled,mxnet}",
        help="operators on CPUs. compiled: for this processor, by a C++ compiler, which takes half a minute "
        "once. mxnet: MXNet's own. auto: compiled if there is a compiler (auto, or GLUON_BERT_OPERATORS)",
    )
    where.add_argument(
        "--kvstore",
        default="device",
        metavar="{device,dist_sync,horovod}",
        help="what sums the gradients. device: this process. dist_sync: MXNet's parameter servers. horovod: "
        "Horovod (an extra). The last two run under tools/launch.py and need --output (device)",
    )
    where.add_argument(
        "--step-timeout",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="end with status 1 if one step takes longer, for example because another worker died; "
        "0: never (0)",
    )
    where.add_argument(
        "--ignore-memory-estimate",
        action="store_true",
        help="train even if the estimated memory exceeds the machine's",
    )
    where.add_argument(
        "--profile",
        type=Path,
        metavar="FILE",
        help="write a trace of MXNet's operators for chrome://tracing, and print a table of them (slower)",
    )
    p.add_argument(
        "--tensorboard",
        action="store_true",
        help="write the curves as event files into the run's folder, for tensorboard --logdir; a resumed run "
        "continues them",
    )
    add_config_flags(p)
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return main_with_exit_status(parser(), argv, pretrain)


def pretrain(arguments: argparse.Namespace) -> int:
    """Pretrain as the flags say: a new run, or one that continues."""
    auto = arguments.resume == "auto"
    if auto and arguments.output is None:
        raise InputError("--resume auto needs --output. It names the run's folder.")
    if arguments.resume is not None and not auto:
        return resume(arguments, Path(arguments.resume))
    from gluon_bert.checkpoint import CONFIG  # needs MXNet, which --help does not

    if auto and (arguments.output / CONFIG).is_file():
        return resume(arguments, arguments.output, auto=True)
    return begin(arguments, auto)


def begin(arguments: argparse.Namespace, auto: bool = False) -> int:
    """Start a new run. auto: in a folder where an earlier start may have been killed."""
    from gluon_bert.pretraining import pretrain
    from gluon_bert.run import remove_unfinished_run

    config = config_from(arguments, init_run(arguments))
    output = new_folder(arguments)
    if auto:
        remove_unfinished_run(output)
    pretrain(config, output, devices_from(arguments), **execution_from(arguments))
    return 0


def resume(arguments: argparse.Namespace, folder: Path, auto: bool = False) -> int:
    """Continue a run from its latest checkpoint. auto: with the flags of its start."""
    from gluon_bert.checkpoint import CONFIG
    from gluon_bert.pretraining import resume, run_folder
    from gluon_bert.run import read_config

    for name in () if auto else ("preset", "config", "output"):
        if getattr(arguments, name) is not None:
            raise InputError(
                f"--{name} cannot be used with --resume, which continues {folder} as it was started."
            )
    config = config_from(arguments, init_run(arguments) if auto else read_config(run_folder(folder) / CONFIG))
    resume(folder, devices_from(arguments), config=config, **execution_from(arguments))
    return 0


def devices_from(arguments: argparse.Namespace) -> list[Any] | None:
    """Return the contexts that --gpus or --cpus name, None without these flags."""
    if arguments.gpus is None and arguments.cpus is None:
        return None
    gpus = None if arguments.gpus is None else devices.parse_gpus(arguments.gpus)
    return devices.contexts(gpus, arguments.cpus)


def execution_from(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `pretrain` and `resume` that say how a run executes."""
    names = ("operators", "kvstore", "step_timeout", "profile", "ignore_memory_estimate", "tensorboard")
    return {name: getattr(arguments, name) for name in names}


def init_run(arguments: argparse.Namespace) -> Config:
    """Return the configuration that the flags change: a preset's or an earlier run's."""
    if arguments.config is not None and arguments.preset is not None:
        raise InputError("--config cannot be used with --preset. Give one of them.")
    init = getattr(arguments, "init", RANDOM_INITS[0])
    if init not in RANDOM_INITS:
        from gluon_bert.warm_start import config_from_run

        recipe = None if arguments.config is None and arguments.preset is None else recipe_of(arguments)
        return config_from_run(init, getattr(arguments, "init_checkpoint", "latest"), recipe)
    return recipe_of(arguments)


def recipe_of(arguments: argparse.Namespace) -> Config:
    """Return the configuration that --preset or --config names."""
    if arguments.config is None:
        return preset(arguments.preset or DEFAULT)
    from gluon_bert.run import read_config  # needs MXNet, which --help does not

    return read_config(arguments.config)


def new_folder(arguments: argparse.Namespace) -> Path:
    """Return the folder of a new run: --output, or the next free number in runs/."""
    if arguments.output is not None:
        return Path(arguments.output)
    if arguments.kvstore in ("dist_sync", "horovod"):
        raise InputError(f"--kvstore {arguments.kvstore} needs --output, the run's folder for all workers.")
    name = arguments.preset or (DEFAULT if arguments.config is None else "repeat")
    candidates = (Path("runs", f"{name}-{number}") for number in count(1))
    return next(folder for folder in candidates if not folder.exists())


if __name__ == "__main__":
    run(main)
