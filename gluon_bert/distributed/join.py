"""Joins and leaves a job of workers and compares their options. Sums no gradients."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import Any, Iterator

from ..config import Config
from ..errors import InputError, join_words
from ..runtime import versions
from .communicator import START, Communicator, DistributedCommunicator
from .horovod import HorovodCommunicator, check_not_loopback, horovod
from .parameter_server import ParameterServerCommunicator

# Environment variables with a worker's rank and the number of workers, by kvstore.
_PLACE_VARIABLES = {
    "dist_sync": ("DMLC_TASK_ID", "DMLC_NUM_WORKER", "DMLC_ROLE"),
    "horovod": ("HOROVOD_RANK", "HOROVOD_SIZE"),
}

KVSTORES = ("device", *_PLACE_VARIABLES)

# Paths may differ between machines. Their contents, the text and the weights, are compared instead.
_MAY_DIFFER = ("corpus", "vocab_file", "init")

# Communicators of failed workers. They stay referenced here, because to free them would wait for the others.
_FAILED: list[DistributedCommunicator] = []


def failed() -> bool:
    """Return whether this process must exit at once, because a normal exit would wait for other workers."""
    return bool(_FAILED)


def rank_and_size(kvstore: str) -> tuple[int, int]:
    """Read this worker's rank and the number of workers from the environment; raise InputError if unset."""
    if kvstore == "dist_async":
        raise InputError(
            "kvstore must not be dist_async. Its workers do not wait for each other, so no two runs are "
            "equal. Its servers would run code that they receive. Use dist_sync."
        )
    if kvstore not in KVSTORES:
        raise InputError(f"kvstore must be one of {', '.join(KVSTORES)}, got {kvstore}")
    started_for = {
        "dist_sync": os.environ.get("DMLC_ROLE") == "worker",
        "horovod": "HOROVOD_RANK" in os.environ,
    }
    if kvstore == "device":
        for other in (name for name, started in started_for.items() if started):
            raise InputError(f"kvstore must be {other} in a worker of a {other} job, got device")
        return 0, 1
    names = _PLACE_VARIABLES[kvstore]
    try:
        rank, count = (int(os.environ[name]) for name in names[:2])
    except (KeyError, ValueError):
        rank, count = 0, 0
    if not started_for[kvstore] or not 0 <= rank < count:
        raise InputError(
            f"kvstore {kvstore} needs a rank below the number of workers in the environment variables "
            f"{join_words(names)}. {START}"
        )
    if kvstore == "horovod":
        horovod()
        check_not_loopback()
    return rank, count


@contextmanager
def init_distributed(kvstore: str) -> Iterator[Communicator]:
    """Join the other workers for the length of a block; leave together with them.

    If the block raises before the workers have left, `failed` returns True from then on.
    """
    rank, count = rank_and_size(kvstore)
    if kvstore == "device":
        yield Communicator()
        return
    kind = HorovodCommunicator if kvstore == "horovod" else ParameterServerCommunicator
    communicator = kind(rank, count)
    try:
        communicator.check_distinct_ranks()
        yield communicator
        if not communicator.is_shut_down:
            communicator.shutdown()
    except BaseException:
        if not communicator.is_shut_down:
            _FAILED.append(communicator)
        raise


def check_sharing(config: Config, count: int) -> None:
    """Raise InputError if this number of workers cannot share the batches or needs a common clock."""
    if count == 1:
        return
    size = config.train.batch_size
    problems = []
    if size % count:
        below, above = size // count * count, (size // count + 1) * count
        fitting = f"{below} or {above}" if below else str(above)
        problems.append(
            f"batch_size must be a multiple of the number of workers, {count}, got {size}. Use {fitting}."
        )
    if config.train.max_minutes:
        problems.append(
            f"max_minutes must be 0 with several workers, got {config.train.max_minutes:g}. They have no "
            "common clock. Use num_steps."
        )
    if problems:
        raise InputError("\n".join(problems))


def check_enough(num_pairs: int, count: int) -> None:
    """Raise InputError if there are fewer sentence pairs than workers."""
    if num_pairs < count:
        raise InputError(
            f"corpus must have at least one sentence pair per worker, got {num_pairs} for {count} workers"
        )


def run_environment(config: Config, text: str) -> dict[str, Any]:
    """Return by name what all workers must have in common: options, the hash of the text, versions."""
    installed = versions()
    shared = {f"the version of {name}": installed[name] for name in ("gluon_bert", "mxnet")}
    shared["the text of the corpus"] = text
    for group in config.to_json().values():
        shared.update({name: value for name, value in group.items() if name not in _MAY_DIFFER})
    return shared
