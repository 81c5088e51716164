"""Joins and leaves a job of workers; compares what they were given. Sums no gradients."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import Any, Iterator

from ..config import Config, flag_name
from ..errors import InputError, join_words
from ..runtime import versions
from .communicator import START, Communicator, DistributedCommunicator
from .horovod import HorovodCommunicator, _check_not_loopback, horovod
from .parameter_server import ParameterServerCommunicator

# The variables that tell a worker its rank and how many there are, by what sums the gradients of several.
_PLACE = {
    "dist_sync": ("DMLC_TASK_ID", "DMLC_NUM_WORKER", "DMLC_ROLE"),
    "horovod": ("HOROVOD_RANK", "HOROVOD_SIZE"),
}


KVSTORES = ("device", *_PLACE)


# Paths, which may differ between machines: the text and the weights themselves are compared, too.
_MAY_DIFFER = ("corpus", "vocab_file", "init")


# Workers that failed. To free what they hold would be to wait for the others.
_FAILED: list[DistributedCommunicator] = []


def failed() -> bool:
    """Whether this process has to end without a goodbye, as the other workers would wait for it for ever."""
    return bool(_FAILED)


def rank_and_size(kvstore: str) -> tuple[int, int]:
    """This worker's rank, and how many there are, as the environment has it; InputError where it has not."""
    if kvstore == "dist_async":
        raise InputError(
            "--kvstore dist_async: its workers do not wait for each other, so that no run is like another "
            "and 2 workers are not like 1, and its servers would run code that they are sent; use dist_sync"
        )
    if kvstore not in KVSTORES:
        raise InputError(f"--kvstore {kvstore}: must be one of {', '.join(KVSTORES)}")
    started_for = {
        "dist_sync": os.environ.get("DMLC_ROLE") == "worker",
        "horovod": "HOROVOD_RANK" in os.environ,
    }
    if kvstore == "device":
        for other in (name for name, started in started_for.items() if started):
            raise InputError(f"--kvstore: is needed by a worker of several, as in --kvstore {other}")
        return 0, 1
    names = _PLACE[kvstore]
    try:
        rank, count = (int(os.environ[name]) for name in names[:2])
    except (KeyError, ValueError):
        rank, count = 0, 0
    if not started_for[kvstore] or not 0 <= rank < count:
        raise InputError(
            f"--kvstore {kvstore}: {join_words(names)} in the environment do not say which of how many workers "
            f"this is; {START}"
        )
    if kvstore == "horovod":
        horovod()
        _check_not_loopback()
    return rank, count


@contextmanager
def init_distributed(kvstore: str) -> Iterator[Communicator]:
    """The workers of a run, all of which have come together, and which part together.

    After an error in the block, before they have parted, `failed` tells that this process must not wait for
    anything any more.
    """
    rank, count = rank_and_size(kvstore)
    if kvstore == "device":
        yield Communicator()
        return
    kind = HorovodCommunicator if kvstore == "horovod" else ParameterServerCommunicator
    workers = kind(rank, count)
    try:
        workers.check_distinct_ranks()
        yield workers
        if not workers.has_left:
            workers.shutdown()
    except BaseException:
        if not workers.has_left:
            _FAILED.append(workers)
        raise


def check_sharing(config: Config, count: int) -> None:
    """Raise InputError where so many workers cannot share the batches, or need one clock."""
    if count == 1:
        return
    size = config.train.batch_size
    problems = []
    if size % count:
        below, above = size // count * count, (size // count + 1) * count
        fitting = f"{below} or {above}" if below else str(above)
        problems.append(f"--batch-size {size}: {count} workers share each batch evenly; {fitting} would do")
    if config.train.max_minutes:
        problems.append(
            f"--max-minutes {config.train.max_minutes:g}: workers have no common clock; --num-steps ends "
            "their run"
        )
    if problems:
        raise InputError("\n".join(problems))


def check_enough(num_pairs: int, count: int) -> None:
    """Raise InputError where there is less text than workers."""
    if num_pairs < count:
        raise InputError(f"--corpus: has {num_pairs} sentence pairs, which is less than the {count} workers")


def run_environment(config: Config, text: str) -> dict[str, Any]:
    """What all workers must have in common before they begin, by name: flags, the text's hash, versions."""
    installed = versions()
    facts = {f"the version of {name}": installed[name] for name in ("gluon_bert", "mxnet")}
    facts["the text of --corpus"] = text
    for group in config.to_json().values():
        facts.update({flag_name(name): value for name, value in group.items() if name not in _MAY_DIFFER})
    return facts
