"""Starts a command in several worker processes, on one machine or many."""

from __future__ import annotations

import argparse
from pathlib import Path

from gluon_bert.cli import main_with_inner_command, parser_of, run
from gluon_bert.config import flag_name
from gluon_bert.distributed.launcher import check_port, read_hostfile, run_with_restarts
from gluon_bert.distributed.processes import LOOPBACK, Host, Job
from gluon_bert.errors import InputError

EXAMPLES = """\
examples:
  python tools/launch.py -n 2 -s 1 -- \\
      python tools/pretrain.py --num-steps 1000 --output runs/two --kvstore dist_sync
  python tools/launch.py -n 8 -s 4 --hostfile hosts.txt --max-restarts 3 -- \\
      python tools/pretrain.py --preset bert-base --corpus /shared/text --output /shared/runs/base \\
      --kvstore dist_sync --step-timeout 300 --resume auto
  python tools/launch.py -n 2 --kvstore horovod -- \\
      python tools/pretrain.py --num-steps 1000 --output runs/two --kvstore horovod

With dist_sync the job has a scheduler, servers and workers. With horovod it has workers only. Give the same
--kvstore to the command. The command's --output must be a folder that all hosts share.

List one host per line in the hostfile; text after # is a comment. Passwordless ssh must work. This folder and
this Python must have the same paths on all hosts. Workers and servers are distributed over the hosts in turn.

When a process fails, the launcher ends the others and runs the command again, at most --max-restarts times.
With --resume auto the run continues from its latest checkpoint. Use --step-timeout to detect a hanging
worker. Ctrl-C and SIGTERM stop all workers after the same step and save a checkpoint; a second signal ends
them at once. The exit status is that of the first process that failed. Bad input (status 2) is not retried.

The servers accept connections from anyone: run them in a private network.
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    p = parser_of(
        "launch",
        "-n WORKERS [-s SERVERS] [flags] -- COMMAND",
        "Start a command in several workers, watch them, and restart them after a failure.",
        EXAMPLES,
    )
    p.add_argument("-n", "--workers", type=int, required=True, metavar="N", help="number of workers")
    p.add_argument("-s", "--servers", type=int, metavar="N", help="number of servers for dist_sync (1)")
    p.add_argument(
        "--kvstore",
        default="dist_sync",
        choices=("dist_sync", "horovod"),
        help="what sums the gradients: MXNet's parameter servers or Horovod (dist_sync)",
    )
    p.add_argument("--hostfile", type=Path, metavar="FILE", help="the machines (this machine)")
    p.add_argument(
        "--port",
        type=int,
        metavar="N",
        help="port of the scheduler or of Horovod's rendezvous on the first host (a free port)",
    )
    p.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="maximum number of restarts after failures (0)",
    )
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return main_with_inner_command(parser(), argv, launch)


def launch(arguments: argparse.Namespace, command: list[str]) -> int:
    """Run the job that the flags describe."""
    return run_with_restarts(job_from(arguments, command), arguments.max_restarts)


def job_from(arguments: argparse.Namespace, command: list[str]) -> Job:
    """Return the job that the flags describe; raise one InputError for all problems."""
    problems = []
    by_horovod = arguments.kvstore == "horovod"
    if by_horovod and arguments.servers is not None:
        problems.append(f"--servers must be omitted with --kvstore horovod, got {arguments.servers}")
    servers = 0 if by_horovod else 1 if arguments.servers is None else arguments.servers
    for name, least in (("workers", 1), ("servers", 1), ("max_restarts", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            problems.append(f"{flag_name(name)} must be at least {least}, got {value}")
    if not command:
        problems.append("a command must follow --, such as -- python tools/pretrain.py --kvstore dist_sync")
    if arguments.max_restarts > 0 and pretrains(command) and "--resume" not in flags_in(command):
        problems.append(
            f"--max-restarts {arguments.max_restarts} needs --resume auto and --output in the command, so "
            "that a restart continues the run"
        )
    if problems:
        raise InputError("\n".join(problems))
    hosts = [Host(None, LOOPBACK)] if arguments.hostfile is None else read_hostfile(arguments.hostfile)
    if arguments.port is not None:
        check_port(arguments.port, hosts[0])
    return Job(command, arguments.workers, servers, hosts, arguments.port, arguments.kvstore)


def pretrains(command: list[str]) -> bool:
    """Return whether a command is this project's pretraining, which would refuse an existing --output."""
    return any(Path(word).name in ("pretrain", "pretrain.py") for word in command)


def flags_in(command: list[str]) -> set[str]:
    """Return the flags in a command, without their values."""
    return {word.partition("=")[0] for word in command if word.startswith("--")}


if __name__ == "__main__":
    run(main)
