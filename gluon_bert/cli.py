"""Flags from the fields of the configuration, error messages and exit statuses. Trains nothing."""

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
from pathlib import Path
from typing import (
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Mapping,
    NoReturn,
    Sequence,
    Set,
    Tuple,
    get_type_hints,
)

from . import devices
from .config import GROUPS, Config, FineTuneConfig, flag_name
from .errors import InputError, OutOfGPUMemory, Terminated, gpu_failure, one_line
from .presets import PRESETS

TITLES = {"model": "network", "data": "text, pairs and masks", "train": "training"}


# Messages of argparse after the name of the flag, and what replaces them.
_VALUE_MESSAGES = (
    (r"invalid int value: (['\"])(?P<value>.*)\1", "{name} must be a whole number, got {value}."),
    (r"invalid float value: (['\"])(?P<value>.*)\1", "{name} must be a number, got {value}."),
    (r"expected (at least )?one argument", "{name} must have a value, got none."),
    (r"ignored explicit argument (['\"])(?P<value>.*)\1", "{name} must have no value, got {value}."),
    (
        r"invalid choice: (['\"])(?P<value>.*)\1 \(choose from (?P<choices>.*)\)",
        "{name} must be one of {choices}, got {value}.",
    ),
    (r"not allowed with argument (?:\S+/)?(?P<value>\S+)", "{name} cannot be used with {value}."),
)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors read as those of the library."""

    # The flag that lists all flags.
    all_flags = "--help"

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: {self._reworded(message)}\n")

    def _reworded(self, message: str) -> str:
        unknown = re.fullmatch(r"unrecognized arguments: (.*)", message, re.DOTALL)
        if unknown:
            return f"flags must be those of this command, got {unknown[1]}. {self.all_flags} lists them."
        missing = re.fullmatch(r"the following arguments are required: (.*)", message)
        if missing:
            return f"{missing[1]} must be given."
        named = re.fullmatch(r"argument (\S+): (.*)", message, re.DOTALL)
        return _reworded_problem(*named.groups()) if named else f"error: {message}"


def _reworded_problem(names: str, problem: str) -> str:
    """Return a sentence about a flag. names: such as -n/--workers."""
    forms = names.split("/")
    name = next((form for form in forms if form.startswith("--")), forms[0])
    for pattern, sentence in _VALUE_MESSAGES:
        found = re.fullmatch(pattern, problem, re.DOTALL)
        if found:
            parts = found.groupdict()
            value, choices = parts.get("value") or "''", parts.get("choices", "").replace("'", "")
            return sentence.format(name=name, value=value, choices=choices)
    return f"{name}: {problem}"


def parser_of(
    name: str, usage: str, description: str, epilog: str | None = None, basic: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """Return a parser for tools/NAME.py without flags.

    usage: what follows the name, one line per form. basic: the flags that --help shows; --help-all shows all.
    Without basic flags --help shows all.
    """
    forms = [f"python tools/{name}.py {form}" for form in usage.splitlines()]
    parser = _Parser(
        prog=name.rpartition("/")[2],
        usage=as_started("\n       ".join(forms)),
        description=description,
        epilog=as_started(epilog or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=not basic,
    )
    if basic:
        shown = ("--help", "--help-all", *basic)
        parser.add_argument(
            "-h", "--help", action=_PrintHelp, const=shown, help="show the most important flags"
        )
        parser.all_flags = "--help-all"
        parser.add_argument("--help-all", action=_PrintHelp, const=(), help="show all flags")
    return parser


def as_started(text: str) -> str:
    """Replace `python tools/NAME.py` by `gluon-bert NAME` in a process that was started so."""
    if Path(sys.argv[0]).name != "gluon-bert":
        return text
    return re.sub(r"python tools/(\w+)\.py", r"gluon-bert \1", text)


class _PrintHelp(argparse.Action):
    """Print the flags in `const`, all if it is empty, and exit."""

    def __init__(self, option_strings: Sequence[str], dest: str, **given: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **given)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        for action in parser._actions if self.const else ():
            if action.option_strings and not set(action.option_strings) & set(self.const):
                action.help = argparse.SUPPRESS
        parser.print_help()
        parser.exit()


class OnOff(argparse.Action):
    """A flag with two forms: --name stores True, --no-name False.

    As argparse.BooleanOptionalAction, which Python 3.8 does not have.
    """

    def __init__(self, option_strings: Sequence[str], dest: str, **given: Any) -> None:
        negated = [f"--no-{option[2:]}" for option in option_strings]
        super().__init__([*option_strings, *negated], dest, nargs=0, **given)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, not str(option_string).startswith("--no-"))


def literal(text: str) -> str:
    """Escape percent signs in a help text, as argparse formats it."""
    return text.replace("%", "%%")


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each field of the configuration, in groups. Omitted flags set nothing."""
    for group_name, group in GROUPS.items():
        add_field_flags(parser.add_argument_group(TITLES[group_name]), group, partial(_defaults, group_name))


def add_field_flags(parser: Any, group: Any, default: Callable[[str], str]) -> None:
    """Add a flag for each field of a dataclass of options. `default` gives the text of a field's default."""
    hints = get_type_hints(group)
    for field in dataclasses.fields(group):
        parser.add_argument(
            flag_name(field.name),
            help=literal(f"{field.metadata['help']} ({default(field.name)})"),
            default=argparse.SUPPRESS,
            **_parsing(hints[field.name], field.metadata["choices"]),
        )


def config_from(arguments: argparse.Namespace, preset: Config) -> Config:
    """Return the preset with the values of the command line, checked."""
    names = {field.name for group in GROUPS.values() for field in dataclasses.fields(group)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    config = preset.replace(**given)
    config.check()
    return config


def add_checkpoint_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag that chooses a checkpoint, as `load_run` takes it."""
    parser.add_argument(
        "--checkpoint",
        default="latest",
        metavar="{latest,best,STEP}",
        help="checkpoint: latest; best, by the MLM loss or a fine-tuned run's metric; or a step (latest)",
    )


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag of a command that computes on one device."""
    parser.add_argument("--gpus", metavar="N", help="compute on this GPU (the CPU)")


def device(arguments: argparse.Namespace) -> Any:
    """Return the one device that `--gpus` names."""
    if arguments.gpus is None:
        return devices.contexts(cpus=1)[0]
    numbers = devices.parse_gpus(arguments.gpus)
    if len(numbers) > 1:
        raise InputError(f"--gpus must be one GPU for this command, got {arguments.gpus}.")
    try:
        return devices.contexts(numbers)[0]
    except InputError as error:  # which may advise --cpus, and this command has none
        raise InputError(re.sub(r"(use )?cpus=1", "omit --gpus", str(error))) from error


def run(main: Callable[[List[str]], int]) -> None:
    """Run a command and exit with its status, at once if the other workers have ended."""
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
    """Run `gluon-bert COMMAND ...`, which is tools/COMMAND.py."""
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
    """Parse the flags, run the body, and return the exit status, as `run_command` does.

    intermixed: allow arguments between the flags.
    """
    try:
        arguments = (parser.parse_intermixed_args if intermixed else parser.parse_args)(argv)
    except SystemExit as stop:  # argparse has printed what is wrong
        return int(stop.code or 0)
    return run_command(lambda: body(arguments), parser.prog)


def main_with_inner_command(
    parser: argparse.ArgumentParser,
    argv: List[str] | None,
    body: Callable[[argparse.Namespace, List[str]], int],
) -> int:
    """Run a command line that has another one after --, which the body gets as its second argument."""
    given = sys.argv[1:] if argv is None else list(argv)
    behind = given.index("--") if "--" in given else len(given)
    return main_with_exit_status(
        parser, given[:behind], lambda arguments: body(arguments, given[behind + 1 :])
    )


def run_command(body: Callable[[], int], name: str) -> int:
    """Run a command; return its status, 1 for failures, 2 for bad input, 130 or 143 if it was stopped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names may not be valid UTF-8
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_FlagsFormatter())
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
        print(f"{name}: {with_flags(str(error))}", file=sys.stderr)
        _shut_mxnet_down()
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except (OSError, MemoryError, BrokenExecutor) as error:
        return _failed(name, error)
    except Exception as error:
        # MXNet's own error, by its name, because importing its class would import MXNet.
        if type(error).__name__ != "MXNetError":
            raise
        return _failed(name, error)


# Options of the library that are not fields of a configuration.
_OPTIONS = (
    *("step_timeout", "profile", "ignore_memory_estimate", "kvstore", "operators", "resume", "output"),
    *("gpus", "cpus", "preset", "checkpoint", "input", "text_columns", "text_file", "step", "gelu"),
    *("label", "header", "quoting", "task", "train", "validation", "test", "max_error", "format", "outputs"),
    *("management_port", "port", "tensorboard", "workers", "server_workers", "max_batch_delay", "threads"),
    "hostfile",
)

# Those that name a file, whose errors read `name PATH: ...`.
_FILES = ("train", "validation", "test", "hostfile")


class _FlagsFormatter(logging.Formatter):
    """Formats a message of the library with flags in place of the names of options."""

    def format(self, record: logging.LogRecord) -> str:
        return with_flags(super().format(record))


def with_flags(message: str) -> str:
    """Return an error message of the library with flags in place of the names of options.

    A name becomes a flag in `name=value`, in a list of names, if it has an underscore, and at the beginning
    of a line: before a verb, or if it names a file. Lines about a JSON file stay as they are.

    >>> with_flags('lr must be above 0, got -1. Or use recompute=True and tokenizer="wordpiece".')
    '--lr must be above 0, got -1. Or use --recompute and --tokenizer wordpiece.'
    """
    lines = message.splitlines()
    return "\n".join(line if re.match(r"\S*\.json: ", line) else _with_flags(line) for line in lines)


def _with_flags(line: str) -> str:
    fields = [f.name for group in (*GROUPS.values(), FineTuneConfig) for f in dataclasses.fields(group)]
    names = "|".join({*fields, *_OPTIONS})
    value = r"""("[^"]*"|'[^']*'|[\w+/-]+(?:\.\w+)*)"""
    line = re.sub(rf"\b({names})={value}", lambda m: _flag_with(m[1], m[2].strip("\"'")), line)
    subjects = rf"^(?:(?:{names})(?:, | and ))*(?:{names})(?= (?:must|has|have|cannot|and) )"
    line = re.sub(subjects, lambda m: re.sub(r"\b(?!and\b)\w+", lambda n: flag_name(n[0]), m[0]), line)
    line = re.sub(rf"^({'|'.join(_FILES)})(?=: | .*: )", lambda m: flag_name(m[1]), line)
    listed = rf"(?<![\w.-])(?:{names})(?:, (?:{names}))+\b"
    line = re.sub(listed, lambda m: ", ".join(map(flag_name, m[0].split(", "))), line)
    spaced = "|".join(name for name in names.split("|") if "_" in name)
    return re.sub(rf"(?<![\w./-])({spaced})(?![\w=(/-]|\.\w)", lambda m: flag_name(m[1]), line)


def _flag_with(name: str, value: str) -> str:
    return " ".join(flags_of({name: {"True": True, "False": False}.get(value, value)}))


def flags_of(options: Mapping[str, Any]) -> List[str]:
    """Return options as the flags of a command.

    >>> flags_of({"recompute": True, "lowercase": False, "lr": 0.01})
    ['--recompute', '--no-lowercase', '--lr', '0.01']
    """
    flags = []
    for name, value in options.items():
        if isinstance(value, bool):
            flags += [flag_name(name) if value else flag_name(f"no_{name}")]
        else:
            flags += [flag_name(name), str(value)]
    return flags


@contextmanager
def _terminated_by_exception() -> Iterator[None]:
    """Raise Terminated on SIGTERM, so that half-written files are removed."""

    def handle(*_: Any) -> None:
        raise Terminated

    before = signal.getsignal(signal.SIGTERM)
    if before is not signal.SIG_DFL:  # the command handles it
        yield
        return
    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _failed(name: str, error: BaseException) -> int:
    """Print a failure as one line and return status 1; the debug log has the traceback."""
    logging.debug("where it went wrong", exc_info=error)
    reason = gpu_failure(error)
    if reason:
        print(f"{name}: {_gpu_advice(reason)}", file=sys.stderr)
        _shut_mxnet_down()
        return 1
    text = one_line(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if "Write incomplete" in text or "No space left" in text:
        text += ". The disk is full, or a limit on file sizes is reached. Free some space or write elsewhere."
    if isinstance(error, MemoryError) or "allocate" in text:
        text += ". Use a smaller --batch-size, --max-seq-length or network."
    print(f"{name}: {type(error).__name__}: {text}", file=sys.stderr)
    return 1


def _gpu_advice(reason: str) -> str:
    """Return the sentences for a GPU that has failed, by CUDA's reason."""
    if reason == "out of memory":
        return (
            "the GPU is out of memory. Use --recompute, a smaller --micro-batch, --batch-size or "
            "--max-seq-length, or more GPUs."
        )
    return (
        f"the GPU failed: {reason}. Check it with nvidia-smi, and run the command again, with --resume if "
        "the run has a checkpoint."
    )


def _shut_mxnet_down() -> None:
    """End MXNet's work now: after a CUDA failure it would raise again at exit and print a trace."""
    notify = getattr(sys.modules.get("mxnet.base"), "_notify_shutdown", None)
    if notify is not None:
        atexit.unregister(notify)
        with suppress(Exception):
            notify()


def _defaults(group_name: str, name: str) -> str:
    """Return the default of a field: one value, or one for each family of presets."""
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
    """Return a default for a help text."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return (" ".join(value) if isinstance(value, tuple) else str(value)) or "none"


def _parsing(hint: Any, choices: Tuple[str, ...]) -> Dict[str, Any]:
    if hint is bool:
        return {"action": OnOff}
    if hint == Tuple[str, ...]:
        return {"nargs": "+", "action": _AsTuple, "metavar": "NAME"}
    if choices:
        return {"metavar": "{" + ",".join(choices) + "}"}
    return {"type": hint, "metavar": "X" if hint is float else "N" if hint is int else "NAME"}


class _AsTuple(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, tuple(values))
