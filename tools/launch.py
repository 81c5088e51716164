"""Starts a command on many machines, or as many workers on one: `python tools/launch.py --help` tells how."""

from __future__ import annotations

import argparse
import os
import queue
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Iterator, NamedTuple, Sequence

from gluon_bert.cli import main_with_inner_command, parser_of, run
from gluon_bert.distributed.processes import ENDPOINTS, LOOPBACK, Host, Job, ProcessSpec, process_specs
from gluon_bert.errors import InputError

EXAMPLES = """\
examples:
  python tools/launch.py -n 2 -s 1 -- python tools/pretrain.py --output runs/two --kvstore dist_sync
  python tools/launch.py -n 8 -s 4 --hostfile hosts.txt --max-restarts 3 -- \\
      python tools/pretrain.py --preset bert-base --corpus /shared/text --output /shared/runs/base \\
      --kvstore dist_sync --step-timeout 300
  python tools/launch.py -n 2 -- python tools/pretrain.py --output runs/two --kvstore horovod

With --kvstore dist_sync it starts a scheduler, servers and workers, with --kvstore horovod workers alone.
A hostfile has a host a line, which ssh reaches without a password and where this folder and this Python are
at the same paths; workers and servers take turns on the hosts. The run's folder has to be one that all hosts,
and this machine, share. Behind # is a comment.

When a process fails, all are ended, and the job goes on from its latest checkpoint, --max-restarts times
at most. A worker that hangs is found if it has a --step-timeout. Ctrl-C and SIGTERM let all workers stop
after the same step and keep a checkpoint; once more ends all at once. The exit status is that of the process
that failed first; what cannot be used (2) is not tried again.

The servers answer whoever reaches their ports: keep them in a private network.
"""

# What of the environment goes to other hosts, beside what the roles need.
PASSED_ON = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CUDA_VISIBLE_DEVICES")
PASSED_ON_PREFIXES = ("OMP_", "MXNET_", "GLUON_BERT_", "PS_", "HOROVOD_", "NCCL_")

# Seconds: for the workers to stop when that was asked for, and for all to end when the first has.
STOP_TIMEOUT, END_TIMEOUT = 120.0, 30.0

# Flags of pretrain.py that say where and how it runs, which a run does not know by itself when it goes on.
WHERE = ("--kvstore", "--step-timeout", "--gpus", "--cpus", "--operators", "--profile")

STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


class Outcome(NamedTuple):
    """How a job ended: its exit status, and what happened, in words."""

    status: int
    why: str


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    p = parser_of(
        "launch",
        "-n WORKERS [-s SERVERS] [flags] -- COMMAND",
        "Start the workers of a job, with what they need to come together, and see to their end.",
        EXAMPLES,
    )
    p.add_argument("-n", "--workers", type=int, required=True, metavar="N", help="processes that train")
    p.add_argument(
        "-s",
        "--servers",
        type=int,
        metavar="N",
        help="processes that sum the gradients for --kvstore dist_sync (1)",
    )
    p.add_argument("--hostfile", type=Path, metavar="FILE", help="the machines (this one)")
    p.add_argument(
        "--port",
        type=int,
        metavar="N",
        help="where the scheduler, or Horovod's rendezvous, listens on the first host (a free one)",
    )
    p.add_argument(
        "--max-restarts", type=int, default=0, metavar="N", help="how often a job that failed goes on (0)"
    )
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return main_with_inner_command(parser(), argv, launch)


def launch(arguments: argparse.Namespace, command: list[str]) -> int:
    """Run the job, again and again where that is asked for."""
    job = job_of(arguments, command)
    restarts = 0
    with stop_signals() as signals:
        while True:
            outcome = run_job(job, signals)
            again = outcome.status not in (0, 2, *STOPPED) and restarts < arguments.max_restarts
            if outcome.status:
                tell(outcome.why)
            if not again:
                return outcome.status
            restarts += 1
            job = job._replace(command=to_go_on(job.command))
            tell(f"restart {restarts} of {arguments.max_restarts}: {shlex.join(job.command)}")


def job_of(arguments: argparse.Namespace, command: list[str]) -> Job:
    """What the flags ask for; InputError says all that cannot be."""
    problems = []
    by_horovod = value_of("--kvstore", command) == "horovod"
    if by_horovod and arguments.servers is not None:
        problems.append(f"--servers {arguments.servers}: Horovod's workers do without; leave it out")
    servers = 0 if by_horovod else 1 if arguments.servers is None else arguments.servers
    for name, least in (("workers", 1), ("servers", 1), ("max_restarts", 0)):
        if getattr(arguments, name) is not None and getattr(arguments, name) < least:
            problems.append(f"--{name.replace('_', '-')} {getattr(arguments, name)}: at least {least}")
    if not command:
        problems.append("-- COMMAND: is missing, such as -- python tools/pretrain.py --kvstore dist_sync")
    folders = [value_of(flag, command) for flag in ("--resume", "--output")]
    if arguments.max_restarts > 0 and command and not any(folders):
        problems.append(
            f"--max-restarts {arguments.max_restarts}: needs --output or --resume in the command, where its "
            "checkpoints are"
        )
    if problems:
        raise InputError("\n".join(problems))
    hosts = [Host(None, LOOPBACK)] if arguments.hostfile is None else hosts_in(arguments.hostfile)
    if arguments.port is not None:
        check_port(arguments.port, hosts[0])
    return Job(command, arguments.workers, servers, hosts, arguments.port, by_horovod)


def hosts_in(path: Path) -> list[Host]:
    """The machines that a hostfile names, with their addresses; InputError names those that are not known."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--hostfile {path}: cannot be read ({error})") from error
    hosts, problems = [], []
    for number, line in enumerate(lines, 1):
        name = line.split("#")[0].strip()
        if not name:
            continue
        if len(name.split()) > 1 or name.startswith("-"):
            problems.append(f"{path}, line {number}: {name!r} is no host; one a line")
            continue
        try:
            hosts.append(Host(name, socket.gethostbyname(name.rpartition("@")[2])))
        except (OSError, UnicodeError) as error:
            problems.append(f"{path}, line {number}: the host {name} is not known ({error})")
    if not hosts and not problems:
        problems.append(f"--hostfile {path}: names no host")
    loops = [host.name for host in hosts if host.address.startswith("127.")]
    if loops and len({host.address for host in hosts}) > 1:
        problems.append(
            f"--hostfile {path}: {loops[0]} is a loopback address, which the other hosts do not reach"
        )
    if problems:
        raise InputError("\n".join(problems))
    return hosts


def check_port(port: int, host: Host) -> None:
    """Raise InputError where a port is none, or, on this machine, another process has it."""
    if not 1 <= port <= 65535:
        raise InputError(f"--port {port}: from 1 to 65535")
    if host.name is None:
        with socket.socket() as probe:
            try:
                probe.bind((host.address, port))
            except OSError as error:
                raise InputError(
                    f"--port {port}: cannot be taken ({error.strerror}); choose another, or leave it out"
                ) from error


def to_go_on(command: Sequence[str]) -> list[str]:
    """The command that goes on with a run from its latest checkpoint, or begins it where there is none."""
    folder = value_of("--output", command)
    if folder is None or not any(Path(folder, "checkpoints").glob("step-*")):
        return list(command)
    script = next((i for i, word in enumerate(command) if word.endswith(".py")), 0)
    kept = [f"{flag}={value_of(flag, command)}" for flag in WHERE if value_of(flag, command) is not None]
    return [*command[: script + 1], "--resume", folder, *kept]


def value_of(flag: str, command: Sequence[str]) -> str | None:
    """The last value of a flag in a command, None where it has none."""
    value = None
    for word, following in zip(command, [*command[1:], None]):
        if word == flag:
            value = following
        elif word.startswith(flag + "="):
            value = word[len(flag) + 1 :]
    return value


def tell(text: str) -> None:
    """A line of the launcher's own."""
    print(f"launch: {text}", file=sys.stderr, flush=True)


# The processes of a job


class JobProcess:
    """A process of the job with its minder, maybe on another host; its output is passed on with a prefix."""

    def __init__(self, role: ProcessSpec) -> None:
        self.name, self.host, self.trains, self.stays = role.name, role.host, role.trains, role.stays
        self.status: int | None = None  # when it has ended
        minded = [sys.executable, "-m", "gluon_bert.distributed.supervisor", *role.command]
        if role.host.name is None:
            argv, own = minded, {**os.environ, **role.environment}
        else:
            argv = over_ssh(role.host.name, minded, {**passed_on(), **role.environment})
            own = dict(os.environ)
        self._process = subprocess.Popen(
            argv,
            env=own,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the launcher, which tells the others
        )
        streams = ((self._process.stdout, sys.stdout), (self._process.stderr, sys.stderr))
        self._threads = [threading.Thread(target=self._pass_on, args=pair, daemon=True) for pair in streams]
        for thread in self._threads:
            thread.start()

    def watch(self, events: queue.SimpleQueue[Any]) -> None:
        """Let the member itself be put in the queue when it has ended, with its status."""

        def wait() -> None:
            status = self._process.wait()
            for thread in self._threads:
                thread.join(5)  # what it has said is told before what became of it
            self.status = status if status >= 0 else 128 - status
            events.put(self)

        threading.Thread(target=wait, daemon=True).start()

    def send(self, number: int) -> None:
        """Send the process a signal."""
        with suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.write(b"%d\n" % number)
            self._process.stdin.flush()

    def end(self) -> None:
        """End the process and all that it has started, by closing its minder's standard input."""
        with suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.close()

    def wait(self, seconds: float = 15.0) -> None:
        """Wait until it has ended; what does not is killed."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for thread in self._threads:
            thread.join(5)

    def in_words(self) -> str:
        """How it ended."""
        assert self.status is not None
        how = f"exit status {self.status}" if self.status <= 128 else f"signal {self.status - 128}"
        if self.status == 255 and self.host.name is not None:
            how = "ssh's exit status 255: the host cannot be reached, or its connection broke"
        if self.name in ENDPOINTS and self.status != 128 + signal.SIGKILL:
            how += ": if its port is in use, choose another with --port"
        return f"{self.name} ended with {how}"

    def _pass_on(self, source: IO[bytes], sink: IO[str]) -> None:
        for line in source:
            # Whoever does not listen any more does not stop the job.
            with suppress(OSError, ValueError):
                sink.write(f"[{self.name}] {line.decode('utf-8', 'replace').rstrip()}\n")
                sink.flush()


def over_ssh(host: str, command: Sequence[str], environment: dict[str, str]) -> list[str]:
    """The command that runs a command on another host, in this folder and with these variables."""
    variables = [f"{name}={value}" for name, value in sorted(environment.items())]
    there = f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(['env', *variables, *command])}"
    options = ("BatchMode=yes", "ConnectTimeout=15", "ServerAliveInterval=10", "ServerAliveCountMax=3")
    return ["ssh", *(word for option in options for word in ("-o", option)), host, there]


def passed_on() -> dict[str, str]:
    """What of this environment the processes on other hosts get."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in PASSED_ON or name.startswith(PASSED_ON_PREFIXES)
    }


def run_job(job: Job, signals: queue.SimpleQueue[Any]) -> Outcome:
    """Start all processes of a job, and wait for its end, or end it."""
    members = start(job)
    try:
        for member in members:
            member.watch(signals)
        return wait_for(members, signals)
    finally:
        for member in members:
            member.end()
        for member in members:
            member.wait()


def start(job: Job) -> list[JobProcess]:
    """All processes of a job, started."""
    members: list[JobProcess] = []
    try:
        for role in process_specs(job):
            members.append(JobProcess(role))
    except OSError as error:
        for member in members:
            member.end()
        raise InputError(f"{error.filename}: cannot be started ({error.strerror})") from error
    return members


def wait_for(members: Sequence[JobProcess], events: queue.SimpleQueue[Any]) -> Outcome:
    """Wait until all have ended, the first has failed, or a second signal has come."""
    running, outcome, deadline = set(members), Outcome(0, ""), float("inf")
    while not all(member.stays for member in running):
        try:
            event = events.get(timeout=min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX))
        except queue.Empty:
            late = min(member.name for member in running if not member.stays)
            return outcome if outcome.status else Outcome(1, f"{late} has not ended, while others have")
        if isinstance(event, int):
            if outcome.status:
                return outcome
            outcome = Outcome(128 + event, "stopped")
            tell("stopping after this step; once more ends all at once")
            for member in running:
                if member.trains:
                    member.send(signal.SIGTERM)
            deadline = time.monotonic() + STOP_TIMEOUT
        elif event in running:  # not one of the job before
            running.remove(event)
            if event.trains and event.status in STOPPED:
                outcome = outcome if outcome.status else Outcome(event.status, f"{event.name} was stopped")
            elif event.status:
                return Outcome(event.status, event.in_words())
            if outcome.status and not any(member.trains for member in running):
                return outcome  # servers that were not joined yet would wait for ever
            # All end together, in whatever order it is seen.
            deadline = min(deadline, time.monotonic() + END_TIMEOUT)
    return outcome


@contextmanager
def stop_signals() -> Iterator[queue.SimpleQueue[Any]]:
    """A queue that gets the number of each SIGINT and SIGTERM in the block."""
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda n, _: events.put(int(n))) for number in numbers}
    try:
        yield events
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    run(main)
