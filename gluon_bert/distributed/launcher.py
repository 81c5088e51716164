"""Starts, watches, stops and restarts the processes of a job, here or over ssh. Parses no flags."""

from __future__ import annotations

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
from typing import IO, Iterator, NamedTuple, Sequence, Union

from ..errors import InputError
from .processes import ENDPOINTS, Host, Job, ProcessSpec, process_specs

# Environment variables that processes on other hosts get, in addition to those of their specs.
FORWARDED = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CUDA_VISIBLE_DEVICES")
FORWARDED_PREFIXES = ("OMP_", "MXNET_", "GLUON_BERT_", "PS_", "HOROVOD_", "NCCL_")

# Seconds until the workers must have stopped after a signal, and all processes after the first has ended.
STOP_TIMEOUT, END_TIMEOUT = 120.0, 30.0

BAD_INPUT = 2
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)

# A process that has ended, or the number of a signal to this process.
Event = Union["JobProcess", int]


class Outcome(NamedTuple):
    """How a job ended: its exit status, and the reason for a status other than 0."""

    status: int
    reason: str


def run_with_restarts(job: Job, max_restarts: int) -> int:
    """Run a job; run it again after a failure. Return its last exit status.

    Bad input and stops by signals are final.
    """
    restarts = 0
    with stop_signals() as signals:
        while True:
            outcome = run_job(job, signals)
            if outcome.status:
                log(outcome.reason)
            if outcome.status in (0, BAD_INPUT, *STOPPED) or restarts == max_restarts:
                return outcome.status
            restarts += 1
            log(f"restart {restarts} of {max_restarts}: {shlex.join(job.command)}")


def run_job(job: Job, events: queue.SimpleQueue[Event]) -> Outcome:
    """Start all processes of a job and wait until it ends; leave no process behind."""
    processes = start_processes(job)
    try:
        for process in processes:
            process.watch(events)
        return wait_for_end(processes, events)
    finally:
        for process in processes:
            process.end()
        for process in processes:
            process.wait()


def start_processes(job: Job) -> list[JobProcess]:
    """Start all processes of a job, or none."""
    processes: list[JobProcess] = []
    try:
        for spec in process_specs(job):
            processes.append(JobProcess(spec))
    except OSError as error:
        for process in processes:
            process.end()
        raise InputError(f"{error.filename} cannot be started ({error.strerror})") from error
    return processes


def wait_for_end(processes: Sequence[JobProcess], events: queue.SimpleQueue[Event]) -> Outcome:
    """Wait until all processes have ended, one has failed, or a second signal has arrived."""
    running, outcome, deadline = set(processes), Outcome(0, ""), float("inf")
    while any(process.ends_itself for process in running):
        try:
            event = events.get(timeout=min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX))
        except queue.Empty:
            late = min(process.name for process in running if process.ends_itself)
            return outcome if outcome.status else Outcome(1, f"{late} has not ended, while others have")
        if isinstance(event, int):
            if outcome.status:
                return outcome
            outcome = Outcome(128 + event, "stopped")
            log("stopping after this step; a second signal ends all processes at once")
            for process in running:
                if process.is_worker:
                    process.send(signal.SIGTERM)
            deadline = time.monotonic() + STOP_TIMEOUT
        elif event in running:  # not a process of the previous attempt
            running.remove(event)
            if event.is_worker and event.status in STOPPED:
                outcome = outcome if outcome.status else Outcome(event.status, f"{event.name} was stopped")
            elif event.status:
                return Outcome(event.status, event.describe_end())
            if outcome.status and not any(process.is_worker for process in running):
                return outcome  # servers without workers would wait for ever
            # All processes end together, but their events arrive one by one.
            deadline = min(deadline, time.monotonic() + END_TIMEOUT)
    return outcome


class JobProcess:
    """A running process of a job under its supervisor. Its output lines are prefixed with its name.

    status: its exit status once it has ended.
    """

    def __init__(self, spec: ProcessSpec) -> None:
        self.name, self.host = spec.name, spec.host
        self.is_worker, self.ends_itself = spec.is_worker, spec.ends_itself
        self.status: int | None = None
        command = [sys.executable, "-m", "gluon_bert.distributed.supervisor", *spec.command]
        environment = {**os.environ, **spec.environment}
        if spec.host.name is not None:
            command = ssh_command(spec.host.name, command, {**forwarded_environment(), **spec.environment})
            environment = dict(os.environ)
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches only the launcher, which signals the others
        )
        streams = ((self._process.stdout, sys.stdout), (self._process.stderr, sys.stderr))
        self._threads = [threading.Thread(target=self._forward, args=pair, daemon=True) for pair in streams]
        for thread in self._threads:
            thread.start()

    def watch(self, events: queue.SimpleQueue[Event]) -> None:
        """Put this process in the queue when it has ended."""

        def wait() -> None:
            status = self._process.wait()
            for thread in self._threads:
                thread.join(5)  # print its last lines before its exit status
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
        """End the process and its children by closing its supervisor's standard input."""
        with suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.close()

    def wait(self, seconds: float = 15.0) -> None:
        """Wait until the process has ended; kill it after some seconds."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for thread in self._threads:
            thread.join(5)

    def describe_end(self) -> str:
        """Return a line about how the process ended."""
        assert self.status is not None
        how = f"exit status {self.status}" if self.status <= 128 else f"signal {self.status - 128}"
        if self.status == 255 and self.host.name is not None:
            how = "ssh exit status 255: the host is unreachable, or the connection broke"
        if self.name in ENDPOINTS and self.status != 128 + signal.SIGKILL:
            how += ". If its port is in use, choose another one."
        return f"{self.name} ended with {how}"

    def _forward(self, source: IO[bytes], sink: IO[str]) -> None:
        for line in source:
            # A closed output of the launcher must not stop the job.
            with suppress(OSError, ValueError):
                sink.write(f"[{self.name}] {line.decode('utf-8', 'replace').rstrip()}\n")
                sink.flush()


def ssh_command(host: str, command: Sequence[str], environment: dict[str, str]) -> list[str]:
    """Return the command that runs a command on another host, in this folder and with these variables."""
    variables = [f"{name}={value}" for name, value in sorted(environment.items())]
    there = f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(['env', *variables, *command])}"
    options = ("BatchMode=yes", "ConnectTimeout=15", "ServerAliveInterval=10", "ServerAliveCountMax=3")
    return ["ssh", *(word for option in options for word in ("-o", option)), host, there]


def forwarded_environment() -> dict[str, str]:
    """Return the variables of this environment that processes on other hosts get."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in FORWARDED or name.startswith(FORWARDED_PREFIXES)
    }


@contextmanager
def stop_signals() -> Iterator[queue.SimpleQueue[Event]]:
    """Yield a queue that receives the number of each SIGINT and SIGTERM in the block."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda n, _: events.put(int(n))) for number in numbers}
    try:
        yield events
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def log(text: str) -> None:
    """Print a line of the launcher itself."""
    print(f"launch: {text}", file=sys.stderr, flush=True)


def read_hostfile(path: Path) -> list[Host]:
    """Return the hosts of a file with one host per line; raise InputError for unknown hosts."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"hostfile must be a file that can be read, got {path} ({error})") from error
    hosts, problems = [], []
    for number, line in enumerate(lines, 1):
        name = line.split("#")[0].strip()
        if not name:
            continue
        if len(name.split()) > 1 or name.startswith("-"):
            problems.append(f"{path}, line {number}: must be one host name, got {name!r}")
            continue
        try:
            hosts.append(Host(name, socket.gethostbyname(name.rpartition("@")[2])))
        except (OSError, UnicodeError) as error:
            problems.append(f"{path}, line {number}: host {name} is unknown ({error})")
    if not hosts and not problems:
        problems.append(f"hostfile must name at least one host, got {path}")
    loops = [host.name for host in hosts if host.address.startswith("127.")]
    if loops and len({host.address for host in hosts}) > 1:
        problems.append(f"hostfile {path}: {loops[0]} has a loopback address, which other hosts cannot reach")
    if problems:
        raise InputError("\n".join(problems))
    return hosts


def check_port(port: int, host: Host) -> None:
    """Raise InputError if a port is invalid or in use on this machine."""
    if not 1 <= port <= 65535:
        raise InputError(f"port must be between 1 and 65535, got {port}")
    if host.name is None:
        with socket.socket() as probe:
            try:
                probe.bind((host.address, port))
            except OSError as error:
                raise InputError(
                    f"port must be free, got {port} ({error.strerror}). Choose another or omit it."
                ) from error
