"""The machine: cores, threads, memory limits, peak memory. Knows no MXNet."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Callable, Sequence


def usable_cores() -> int:
    """Return the cores, not hyper-threads, that this process may run on."""
    try:
        threads = os.sched_getaffinity(0)
        siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
        return len({Path(siblings.format(thread)).read_text() for thread in threads})
    except (AttributeError, OSError):  # no Linux
        return os.cpu_count() or 1


Reader = Callable[[Path], str]


def threads() -> int:
    """Return the number of threads of the operators."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(asked) if asked.isdigit() and int(asked) else usable_cores()


def machine_memory(contexts: Sequence[Any], read: Reader = Path.read_text) -> float | None:
    """Return the memory for a run on CPUs in bytes, of the machine or the container; None if unknown."""
    limits = [*_physical(), *_container(read)]
    on_cpus = all(context.device_type == "cpu" for context in contexts)
    return min(limits) if limits and on_cpus else None


def peak_memory(read: Reader = Path.read_text, process: int | str = "self") -> float | None:
    """Return the peak memory of the process so far in bytes, None if the system does not report it."""
    try:
        lines = read(Path(f"/proc/{process}/status")).splitlines()
    except OSError:
        return None
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def _physical() -> list[float]:
    try:
        return [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    except (ValueError, OSError):
        return []


def _container(read: Reader) -> list[float]:
    """Return the memory limits of this process's control groups, version 1 and 2, up to the root."""
    try:
        lines = read(Path("/proc/self/cgroup")).splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup/memory" if controllers else "/sys/fs/cgroup")
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        group = Path(path.lstrip("/"))
        # In a container the path may be the host's and not exist. Then the root is the container's group.
        for folder in (group, *group.parents):
            try:
                text = read(root / folder / name).strip()
            except OSError:
                continue
            if re.fullmatch(r"\d+", text):  # or "max"
                limits.append(float(text))
    return limits
