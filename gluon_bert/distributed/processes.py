"""The processes that a job needs, on which hosts, with which variables; tools/launch.py starts them."""

from __future__ import annotations

import os
import random
import socket
import sys
from collections import Counter
from typing import Mapping, NamedTuple

from ..errors import InputError
from ..system import usable_cores

LOOPBACK = "127.0.0.1"

# Where the others of a job ask for each other.
SCHEDULER, RENDEZVOUS = ENDPOINTS = ("scheduler", "rendezvous")


class Host(NamedTuple):
    """A machine: its name for ssh, None for this one, and its address for the others."""

    name: str | None
    address: str


class Job(NamedTuple):
    """What is to run, and where; by_horovod: its workers need no servers."""

    command: list[str]
    workers: int
    servers: int
    hosts: list[Host]
    port: int | None
    by_horovod: bool = False


class ProcessSpec(NamedTuple):
    """A process of a job. trains: whether it is a worker. stays: whether it has to be ended."""

    name: str
    host: Host
    command: list[str]
    environment: Mapping[str, str]
    trains: bool = False
    stays: bool = False


def process_specs(job: Job) -> list[ProcessSpec]:
    """What a job consists of, in the order in which it is started."""
    port = job.port or free_port(job.hosts[0])
    return of_horovod(job, port) if job.by_horovod else of_parameter_servers(job, port)


def of_parameter_servers(job: Job, port: int) -> list[ProcessSpec]:
    """A scheduler, servers and workers; all end by themselves."""
    common = {
        **for_all(job),
        "DMLC_NUM_WORKER": str(job.workers),
        "DMLC_NUM_SERVER": str(job.servers),
        "DMLC_PS_ROOT_URI": job.hosts[0].address,
        "DMLC_PS_ROOT_PORT": str(port),
    }
    serve = [sys.executable, "-m", "gluon_bert.distributed.server"]
    kinds = [("scheduler", 0, serve)]
    kinds += [("server", number, serve) for number in range(job.servers)]
    kinds += [("worker", number, job.command) for number in range(job.workers)]
    roles = []
    for kind, number, command in kinds:
        host = job.hosts[number % len(job.hosts)]
        own = {"DMLC_ROLE": kind, "DMLC_TASK_ID": str(number), "DMLC_NODE_HOST": host.address}
        name = SCHEDULER if kind == "scheduler" else f"{kind} {number}"
        roles.append(ProcessSpec(name, host, command, {**common, **own}, trains=kind == "worker"))
    return roles


def of_horovod(job: Job, port: int) -> list[ProcessSpec]:
    """The rendezvous of Horovod's workers, which has to be ended, and these."""
    try:
        from horovod.runner.common.util.hosts import HostInfo, get_host_assignments
        from horovod.runner.gloo_run import create_slot_env_vars
    except ImportError as error:
        raise InputError(f"--kvstore horovod: needs Horovod ({error}); docs/scale.md says how") from error
    hosts = {host.address: host for host in job.hosts}  # one may be named twice
    taken = Counter(job.hosts[number % len(job.hosts)].address for number in range(job.workers))
    slots = get_host_assignments([HostInfo(*each) for each in taken.items()], job.workers)
    first = job.hosts[0]
    common = {
        **for_all(job),
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": first.address,
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
    }
    where = ",".join(f"{address}:{count}" for address, count in taken.items())
    meet = [
        sys.executable,
        "-m",
        "gluon_bert.distributed.horovod_rendezvous",
        first.address,
        str(port),
        where,
    ]
    roles = [ProcessSpec(RENDEZVOUS, first, meet, for_all(job), stays=True)]
    for slot in slots:
        environment = {**common, **create_slot_env_vars(slot)}
        name, host = f"worker {slot.rank}", hosts[slot.hostname]
        roles.append(ProcessSpec(name, host, job.command, environment, trains=True))
    return roles


def for_all(job: Job) -> dict[str, str]:
    """The variables that all processes of a job have in common."""
    common = {"PYTHONUNBUFFERED": "1"}
    if job.hosts[0].name is None:
        # Or each worker would use all cores.
        threads = str(max(1, usable_cores() // job.workers))
        common["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", threads)
    return common


def free_port(host: Host) -> int:
    """A port that nobody has on this machine; of another machine, one that hardly anybody would have."""
    if host.name is not None:
        return random.Random().randrange(20_000, 30_000)
    with socket.socket() as probe:
        probe.bind((host.address, 0))
        return int(probe.getsockname()[1])
