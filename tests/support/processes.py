"""Finds processes, waits for them and checks that they are gone. Linux only."""

from __future__ import annotations

import os
import time
from pathlib import Path


def wait_for(condition, process=None, seconds=120.0, report=lambda: ""):
    """Wait until a condition holds; fail if that takes too long or the process ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        running = process is None or process.poll() is None
        assert running and time.monotonic() < deadline, report()
        time.sleep(0.02)


def is_alive(pid):
    """Return whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pids, seconds=30.0):
    """Wait until none of the processes is alive."""
    wait_for(lambda: not any(map(is_alive, pids)), seconds=seconds, report=lambda: f"still alive of {pids}")


def children_of(pid):
    """Return the process ids of the direct children of a process."""
    children = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        if parent == pid:
            children.append(int(path.name))
    return children


def processes_under(pid):
    """Return all descendants of a process, as psutil knows them."""
    import psutil  # comes with the extra serve

    return psutil.Process(pid).children(recursive=True)


def processes_with(variable):
    """Return {process id: (environment, command line)} of live processes with an environment variable."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = set((path / "environ").read_bytes().decode(errors="replace").split("\0"))
            command = (path / "cmdline").read_bytes().decode(errors="replace")
        except OSError:  # it has ended, or belongs to another user
            continue
        if variable in environment and int(path.name) != os.getpid() and is_alive(int(path.name)):
            found[int(path.name)] = environment, command
    return found
