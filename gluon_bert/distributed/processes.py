"""Lists the processes of a job, with their hosts, commands and environments. Starts none of them."""

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

# Names of the processes that the others of a job connect to first.
SCHEDULER, RENDEZVOUS = ENDPOINTS = ("scheduler", "rendezvous")


class Host(NamedTuple):
    """A machine. name: for ssh, None for this machine. address: how other machines reach it."""

    name: str | None
    address: str


class Job(NamedTuple):
    """A command to run in several workers. kvstore: dist_sync or horovod, which needs no servers."""

    command: list[str]
    workers: int
    servers: int
    hosts: list[Host]
    port: int | None
    kvstore: str = "dist_sync"


class ProcessSpec(NamedTuple):
    """A process to start. ends_itself: False if the launcher has to end it."""

    name: str
    host: Host
    command: list[str]
    environment: Mapping[str, str]
    is_worker: bool = False
    ends_itself: bool = True


def process_specs(job: Job) -> list[ProcessSpec]:
    """Return all processes of a job in starting order."""
    port = job.port or free_port(job.hosts[0])
    return horovod_specs(job, port) if job.kvstore == "horovod" else parameter_server_specs(job, port)


def parameter_server_specs(job: Job, port: int) -> list[ProcessSpec]:
    """Return a scheduler, the servers and the workers."""
    common = {
        **common_environment(job),
        "DMLC_NUM_WORKER": str(job.workers),
        "DMLC_NUM_SERVER": str(job.servers),
        "DMLC_PS_ROOT_URI": job.hosts[0].address,
        "DMLC_PS_ROOT_PORT": str(port),
    }
    serve = [sys.executable, "-m", "gluon_bert.distributed.server"]
    kinds = [("scheduler", 0, serve)]
    kinds += [("server", number, serve) for number in range(job.servers)]
    kinds += [("worker", number, job.command) for number in range(job.workers)]
    specs = []
    for kind, number, command in kinds:
        host = job.hosts[number % len(job.hosts)]
        own = {"DMLC_ROLE": kind, "DMLC_TASK_ID": str(number), "DMLC_NODE_HOST": host.address}
        name = SCHEDULER if kind == "scheduler" else f"{kind} {number}"
        specs.append(ProcessSpec(name, host, command, {**common, **own}, is_worker=kind == "worker"))
    return specs


def horovod_specs(job: Job, port: int) -> list[ProcessSpec]:
    """Return the rendezvous server, which never ends by itself, and the workers."""
    try:
        from horovod.runner.common.util.hosts import HostInfo, get_host_assignments
        from horovod.runner.gloo_run import create_slot_env_vars
    except ImportError as error:
        raise InputError(f"kvstore horovod needs Horovod ({error}). See docs/distributed.md.") from error
    hosts = {host.address: host for host in job.hosts}  # a hostfile may repeat a host
    taken = Counter(job.hosts[number % len(job.hosts)].address for number in range(job.workers))
    slots = get_host_assignments([HostInfo(*each) for each in taken.items()], job.workers)
    first = job.hosts[0]
    common = {
        **common_environment(job),
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": first.address,
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
    }
    workers_by_host = ",".join(f"{address}:{count}" for address, count in taken.items())
    module = "gluon_bert.distributed.horovod_rendezvous"
    rendezvous = [sys.executable, "-m", module, first.address, str(port), workers_by_host]
    specs = [ProcessSpec(RENDEZVOUS, first, rendezvous, common_environment(job), ends_itself=False)]
    for slot in slots:
        environment = {**common, **create_slot_env_vars(slot)}
        name, host = f"worker {slot.rank}", hosts[slot.hostname]
        specs.append(ProcessSpec(name, host, job.command, environment, is_worker=True))
    return specs


def common_environment(job: Job) -> dict[str, str]:
    """Return the variables of all processes of a job."""
    common = {"PYTHONUNBUFFERED": "1"}
    if job.hosts[0].name is None:
        # By default each worker would use all cores.
        threads = str(max(1, usable_cores() // job.workers))
        common["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", threads)
    return common


def free_port(host: Host) -> int:
    """Return a free port of this machine, or a random high port of another one."""
    if host.name is not None:
        return random.Random().randrange(20_000, 30_000)
    with socket.socket() as probe:
        probe.bind((host.address, 0))
        return int(probe.getsockname()[1])
