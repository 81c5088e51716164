"""What the commands share: flags from the configuration's fields, and how errors are told. Trains nothing."""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import importlib
import io
import logging
import os
import re
import signal
import sys
import traceback
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Set, Tuple, get_type_hints

from . import devices
from .config import GROUPS, Config, flag_name
from .errors import InputError, OutOfGPUMemory, Terminated, gpu_failure, one_line
from .presets import PRESETS

TITLES = {"model": "the network", "data": "the text and its masks", "train": "training"}


def parser_of(name: str, usage: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """A parser for tools/NAME.py, without flags yet; usage: what follows the name, a line for each way."""
    ways = [f"python tools/{name}.py {way}" for way in usage.splitlines()]
    return argparse.ArgumentParser(
        prog=name.rpartition("/")[2],
        usage="\n       ".join(ways),
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def literal(text: str) -> str:
    """A flag's help that is told as it stands: argparse takes a percent sign for the start of a format."""
    return text.replace("%", "%%")


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every field of the configuration, in groups; those not given stay as the preset has them."""
    for group_name, group in GROUPS.items():
        add_field_flags(parser.add_argument_group(TITLES[group_name]), group, partial(_defaults, group_name))


def add_field_flags(parser: Any, group: Any, default: Callable[[str], str]) -> None:
    """A flag for every field of a dataclass of options; `default` tells what a field is if not given."""
    hints = get_type_hints(group)
    for field in dataclasses.fields(group):
        parser.add_argument(
            flag_name(field.name),
            help=literal(f"{field.metadata['help']} ({default(field.name)})"),
            default=argparse.SUPPRESS,
            **_parsing(hints[field.name], field.metadata["choices"]),
        )


def config_from(arguments: argparse.Namespace, preset: Config) -> Config:
    """The preset with what the command line changed, checked."""
    names = {field.name for group in GROUPS.values() for field in dataclasses.fields(group)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    config = preset.replace(**given)
    config.check()
    return config


def add_checkpoint_flag(parser: argparse.ArgumentParser) -> None:
    """The flag of a command that reads a run: which of its networks, as `load_run` takes it."""
    parser.add_argument(
        "--checkpoint",
        default="latest",
        metavar="{latest,best,STEP}",
        help="the network after the last step, the best one on validation text, by the MLM loss or what a fine-"
        "tuned run chose it by, or that after a step (latest)",
    )


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    """The flag of a command that computes on one device."""
    parser.add_argument("--gpus", metavar="N", help="compute on this GPU (on the CPU)")


def device(arguments: argparse.Namespace) -> Any:
    """The one context that `--gpus` asks for."""
    if arguments.gpus is None:
        return devices.contexts(cpus=1)[0]
    numbers = devices.parse_gpus(arguments.gpus)
    if len(numbers) > 1:
        raise InputError(f"--gpus {arguments.gpus}: this command computes on one device; name one GPU")
    return devices.contexts(numbers)[0]


def run(main: Callable[[List[str]], int]) -> None:
    """Run a command and exit with its status; at once where other workers would be waited for in vain."""
    try:
        status = main(sys.argv[1:])
    except Exception:
        if not _left_by_other_workers():
            raise
        traceback.print_exc()
        status = 1
    if _left_by_other_workers():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _left_by_other_workers() -> bool:
    join = sys.modules.get("gluon_bert.distributed.join")
    return join is not None and bool(join.failed())


# The commands of `gluon-bert`; setup.py installs tools/ as the package gluon_bert_commands.
COMMANDS = ("pretrain", "finetune", "encode", "export", "convert", "serve", "launch")


def main() -> None:
    """Run `gluon-bert COMMAND ...`, which is tools/COMMAND.py of an installed package."""
    name, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if name not in COMMANDS:
        asked_for_help = name in ("", "-h", "--help")
        print(
            f"usage: gluon-bert {{{','.join(COMMANDS)}}} ...",
            file=sys.stdout if asked_for_help else sys.stderr,
        )
        sys.exit(0 if asked_for_help else 2)
    command = importlib.import_module(f"gluon_bert_commands.{name}")
    run(lambda _: int(command.main(rest)))


def main_with_exit_status(
    parser: argparse.ArgumentParser,
    argv: List[str] | None,
    body: Callable[[argparse.Namespace], int],
    intermixed: bool = False,
) -> int:
    """The exit status of a command: that of its body, which gets the flags, or as `run_command` has it.

    intermixed: arguments may stand between the flags.
    """
    try:
        arguments = (parser.parse_intermixed_args if intermixed else parser.parse_args)(argv)
    except SystemExit as stop:  # argparse has told what is wrong
        return int(stop.code or 0)
    return run_command(lambda: body(arguments), parser.prog)


def main_with_inner_command(
    parser: argparse.ArgumentParser,
    argv: List[str] | None,
    body: Callable[[argparse.Namespace, List[str]], int],
) -> int:
    """As `command`, of a command line with another one behind --, which the body gets, too."""
    given = sys.argv[1:] if argv is None else list(argv)
    behind = given.index("--") if "--" in given else len(given)
    return main_with_exit_status(
        parser, given[:behind], lambda arguments: body(arguments, given[behind + 1 :])
    )


def run_command(body: Callable[[], int], name: str) -> int:
    """The exit status of a command: its own, 2 for bad input told in words, 130 or 143 if it was stopped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files and texts may hold what UTF-8 cannot
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr, force=True)
    try:
        with _terminated_by_exception():
            return body()
    except Terminated:
        print(f"{name}: stopped", file=sys.stderr)
        return 128 + signal.SIGTERM
    except InputError as error:
        for line in with_flags(str(error)).splitlines():
            print(f"{name}: {line}", file=sys.stderr)
        return 2
    except OutOfGPUMemory as error:
        print(f"{name}: {error}", file=sys.stderr)
        _shut_mxnet_down()
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except (OSError, MemoryError, BrokenExecutor) as error:
        return _failed(name, error)
    except Exception as error:
        # MXNet's own error, by its name: to import it here would be to import MXNet.
        if type(error).__name__ != "MXNetError":
            raise
        return _failed(name, error)


# Options that are no fields of the configuration.
_OPTIONS = (
    "step_timeout",
    "profile",
    "ignore_memory_estimate",
    "tensorboard",
    "kvstore",
    "operators",
    "resume",
    "output",
)


def with_flags(message: str) -> str:
    """Return an error of the library with flags in place of the names of options.

    A name is replaced where it has an underscore, or where it begins a line and "must" follows.

    >>> with_flags("step_timeout must be at least 0, got -1.")
    '--step-timeout must be at least 0, got -1.'
    """
    fields = [field.name for group in GROUPS.values() for field in dataclasses.fields(group)]
    for name in [*fields, *_OPTIONS]:
        place = rf"(?<![\w.-]){name}(?![\w.=])" if "_" in name else rf"^{name}(?= must )"
        message = re.sub(place, flag_name(name), message, flags=re.MULTILINE)
    return message


@contextmanager
def _terminated_by_exception() -> Iterator[None]:
    """Let SIGTERM end the block by an exception, so that what is half-written is cleaned up."""

    def handle(*_: Any) -> None:
        raise Terminated

    before = signal.getsignal(signal.SIGTERM)
    if before is not signal.SIG_DFL:  # the command has its own way
        yield
        return
    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _failed(name: str, error: BaseException) -> int:
    """Tell in a line what went wrong outside the user's input; its origin only where the log asks for it."""
    logging.debug("where it went wrong", exc_info=error)
    reason = gpu_failure(error)
    if reason:
        print(f"{name}: {_gpu_advice(reason)}", file=sys.stderr)
        _shut_mxnet_down()
        return 1
    told = one_line(error)
    if isinstance(error, OSError) and error.strerror:
        told = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if "Write incomplete" in told or "No space left" in told:
        told += (
            " (the disk is full, or a limit on the size of files is reached: make room, or write elsewhere)"
        )
    if isinstance(error, MemoryError) or "allocate" in told:
        told += " (less memory: a smaller --batch-size, --max-seq-length or network)"
    print(f"{name}: {type(error).__name__}: {told}", file=sys.stderr)
    return 1


def _gpu_advice(reason: str) -> str:
    """Return the sentences for a GPU that has failed, by CUDA's reason."""
    if reason == "out of memory":
        return (
            "the GPU is out of memory. Use a smaller --micro-batch, --recompute yes, a smaller --batch-size or "
            "--max-seq-length, or more GPUs."
        )
    return (
        f"the GPU failed: {reason}. Check it with nvidia-smi, and run the command again, with --resume if the "
        "run has a checkpoint."
    )


def _shut_mxnet_down() -> None:
    """End MXNet's work now. After a failure of CUDA it raises again, and at the exit it would print a trace."""
    notify = getattr(sys.modules.get("mxnet.base"), "_notify_shutdown", None)
    if notify is not None:
        atexit.unregister(notify)
        with suppress(Exception):
            notify()


def _defaults(group_name: str, name: str) -> str:
    """What the presets have: one value, or those of each family of presets."""
    families: Dict[str, Set[str]] = {}
    for preset_name, config in PRESETS.items():
        family = "bert-*" if preset_name.startswith("bert-") else preset_name
        families.setdefault(family, set()).add(shown(getattr(getattr(config, group_name), name)))
    who_has: Dict[str, List[str]] = {}
    for family, values in families.items():
        who_has.setdefault("by size" if len(values) > 1 else min(values), []).append(family)
    if len(who_has) == 1:
        return min(who_has)
    return ", ".join(f"{listed(who)}: {value}" for value, who in who_has.items())


def listed(names: List[str]) -> str:
    """Return names as a phrase: a, b and c."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(value) if isinstance(value, tuple) else str(value)


def _parsing(hint: Any, choices: Tuple[str, ...]) -> Dict[str, Any]:
    if hint is bool:
        return {"type": yes_or_no, "metavar": "{yes,no}"}
    if hint == Tuple[str, ...]:
        return {"nargs": "+", "action": _AsTuple, "metavar": "NAME"}
    if choices:
        return {"metavar": "{" + ",".join(choices) + "}"}
    return {"type": hint, "metavar": "X" if hint is float else "N" if hint is int else "NAME"}


def yes_or_no(text: str) -> bool:
    """The type of a flag that is answered with yes or no."""
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"{text}: must be yes or no")
    return text == "yes"


class _AsTuple(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, tuple(values))
