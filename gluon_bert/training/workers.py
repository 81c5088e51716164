"""Processes that train one network together: what they add up, compare and agree on. Takes no step."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import contextmanager
from typing import Any, Callable, Iterator, Mapping, TypeVar

import numpy as np

from ..config import Config, flag
from ..errors import BadInput
from ..runtime import in_words, mx, versions

Result = TypeVar("Result")

KVSTORES = ("device", "dist_sync")
START = "start the workers with tools/launch.py"

# Keys of the parameter server, where those of the gradients count up from 0. To choose a server MXNet
# multiplies a key by 9973 in 32 bits.
_AGREED, _GATHERED = 100_000, 100_001

_DIGEST = 16  # bytes of a hash that are compared

# Paths, which may differ between machines: the text and the weights themselves are compared, too.
_MAY_DIFFER = ("corpus", "vocab_file", "init")


class Workers:
    """One process, which trains alone: what each way of training together has to offer.

    rank: this worker's number, from 0; the first one writes the run's folder. count: how many there are.
    kvstore: what a Gluon Trainer sums the gradients of all contexts, of all workers, with.
    """

    rank, count = 0, 1
    kvstore: Any = "device"

    def begin(self, trainer: Any) -> None:
        """Make a Gluon Trainer's kvstore ready, before its first step."""

    def gather(self, content: bytes) -> list[bytes]:
        """Every worker's bytes, by rank, of the same length on all. Waits for all workers."""
        return [content]

    def agree(self, squared_norms: Any, stop: bool) -> tuple[Any, Any]:
        """The first worker's squared norms, (P,), and how many workers want to stop, (1,). Does not wait.

        Gradients are the same on all workers, but processors of different kinds may differ in the last digit
        of a norm: so one of them decides for all.
        """
        return squared_norms, mx.nd.array([stop], ctx=squared_norms.context)

    def leave(self) -> None:
        """Part from the other workers. Waits for them."""

    def total(self, values: np.ndarray) -> np.ndarray:
        """The sum over all workers of float64 values, added by rank. Waits for all workers."""
        values = np.ascontiguousarray(values, dtype=np.float64)
        rows = [np.frombuffer(row).reshape(values.shape) for row in self.gather(values.tobytes())]
        return np.sum(rows, axis=0)

    def first_then_others(self, action: Callable[[], Result]) -> Result:
        """What an action gives, which the others begin when the first worker has done it."""
        if self.rank:
            self.gather(b"+")
        result = action()
        if not self.rank:
            self.gather(b"+")
        return result

    def unlike_the_first(self, fact: Any) -> list[int]:
        """The ranks of the workers for which a fact is another than for the first. Waits for all workers."""
        rows = self.gather(_digest(fact))
        return [rank for rank, row in enumerate(rows) if row != rows[0]]

    def refuse_differences(self, facts: Mapping[str, Any]) -> None:
        """Raise BadInput, on every worker, where facts differ from the first worker's; names them."""
        names = sorted(facts)
        if self.unlike_the_first(names):
            raise BadInput("the workers run different versions of gluon_bert: install one on all machines")
        rows = self.gather(b"".join(_digest(facts[name]) for name in names))
        for rank, row in enumerate(rows):
            places = [slice(i * _DIGEST, (i + 1) * _DIGEST) for i in range(len(names))]
            different = [name for name, place in zip(names, places) if row[place] != rows[0][place]]
            if different:
                raise BadInput(
                    f"worker {rank} differs from worker 0 in {in_words(different)}: all workers of a run "
                    "need the same"
                )


class ParameterServerWorkers(Workers):
    """Workers that add up their gradients on MXNet's parameter servers, synchronously.

    The servers only add: optimizers run on the workers, so that no server has to unpickle one.
    """

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count
        self.kvstore = mx.kv.create("dist_sync")
        self._known: set[int] = set()
        self.has_left = False

    def refuse_same_numbers(self) -> None:
        """Raise BadInput where two workers have the same rank."""
        # A row that two workers fill is the sum of both, 2, and another row is 0.
        if set(self.gather(b"\1")) != {b"\1"}:
            raise BadInput(f"DMLC_TASK_ID {self.rank}: two workers have the same number; {START}")

    def begin(self, trainer: Any) -> None:
        # A worker that steps before the servers have all first weights takes gradients for weights.
        trainer.optimizer.rescale_grad = 1.0
        trainer._init_kvstore()
        trainer._init_params()
        mx.nd.waitall()
        self.kvstore._barrier()

    def gather(self, content: bytes) -> list[bytes]:
        # The servers add up in float32, which is exact where all but one of the summands are 0.
        table = np.zeros((self.count, len(content)), dtype=np.float32)
        table[self.rank] = np.frombuffer(content, dtype=np.uint8)
        summed = self._sum(_GATHERED + len(content), mx.nd.array(table, dtype=np.float32))
        return [row.astype(np.uint8).tobytes() for row in summed.asnumpy()]

    def agree(self, squared_norms: Any, stop: bool) -> tuple[Any, Any]:
        told = mx.nd.zeros_like(squared_norms) if self.rank else squared_norms
        asked = mx.nd.array([stop], ctx=squared_norms.context)
        summed = self._sum(_AGREED, mx.nd.concat(told, asked, dim=0))
        return summed[:-1], summed[-1:]

    def _sum(self, key: int, array: Any) -> Any:
        """The sum of the workers' arrays, of one shape for each key."""
        if key not in self._known:
            self.kvstore.init(key, mx.nd.zeros_like(array))
            self._known.add(key)
        self.kvstore.pushpull(key, array, out=array)
        return array

    def leave(self) -> None:
        """Wait until all workers are here, and let the servers end."""
        self.has_left = True
        mx.nd.waitall()
        mx.base.check_call(mx.base._LIB.MXKVStoreFree(self.kvstore.handle))
        self.kvstore.handle = mx.base.KVStoreHandle()  # or it would be freed once more


# Workers that failed. To free what they hold would be to wait for the others.
_FAILED: list[ParameterServerWorkers] = []


def failed() -> bool:
    """Whether this process has to end without a goodbye, as the other workers would wait for it for ever."""
    return bool(_FAILED)


def place_of(kvstore: str) -> tuple[int, int]:
    """This worker's rank, and how many there are, as the environment has it; BadInput where it has not."""
    if kvstore == "dist_async":
        raise BadInput(
            "--kvstore dist_async: its workers do not wait for each other, so that no run is like another "
            "and 2 workers are not like 1, and its servers would run code that they are sent; use dist_sync"
        )
    if kvstore not in KVSTORES:
        raise BadInput(f"--kvstore {kvstore}: must be one of {', '.join(KVSTORES)}")
    if kvstore == "device":
        if os.environ.get("DMLC_ROLE") == "worker":
            raise BadInput("--kvstore: is needed by a worker of several, as in --kvstore dist_sync")
        return 0, 1
    try:
        rank, count = (int(os.environ[name]) for name in ("DMLC_TASK_ID", "DMLC_NUM_WORKER"))
    except (KeyError, ValueError):
        rank, count = 0, 0
    if os.environ.get("DMLC_ROLE") != "worker" or not 0 <= rank < count:
        raise BadInput(
            f"--kvstore {kvstore}: DMLC_ROLE, DMLC_TASK_ID and DMLC_NUM_WORKER in the environment do not say "
            f"which of how many workers this is; {START}"
        )
    return rank, count


@contextmanager
def joined(kvstore: str) -> Iterator[Workers]:
    """The workers of a run, all of which have come together, and which part together.

    After an error in the block, before they have parted, `failed` tells that this process must not wait for
    anything any more.
    """
    rank, count = place_of(kvstore)
    if kvstore == "device":
        yield Workers()
        return
    workers = ParameterServerWorkers(rank, count)
    try:
        workers.refuse_same_numbers()
        yield workers
        if not workers.has_left:
            workers.leave()
    except BaseException:
        if not workers.has_left:
            _FAILED.append(workers)
        raise


def check_sharing(config: Config, count: int) -> None:
    """Raise BadInput where so many workers cannot share the batches, or need one clock."""
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
        raise BadInput("\n".join(problems))


def check_enough(num_pairs: int, count: int) -> None:
    """Raise BadInput where there is less text than workers."""
    if num_pairs < count:
        raise BadInput(f"--corpus: has {num_pairs} sentence pairs, which is less than the {count} workers")


def facts_of(config: Config, text: str) -> dict[str, Any]:
    """What all workers must have in common before they begin, by name: flags, the text's hash, versions."""
    installed = versions()
    facts = {f"the version of {name}": installed[name] for name in ("gluon_bert", "mxnet")}
    facts["the text of --corpus"] = text
    for group in config.to_json().values():
        facts.update({flag(name): value for name, value in group.items() if name not in _MAY_DIFFER})
    return facts


def digest_of_weights(weights: Mapping[str, np.ndarray]) -> str:
    """A hash of all weights, bit for bit."""
    content = hashlib.blake2b()
    for name in sorted(weights):
        content.update(name.encode() + np.ascontiguousarray(weights[name]).tobytes())
    return content.hexdigest()


def _digest(fact: Any) -> bytes:
    return hashlib.sha256(json.dumps(fact, sort_keys=True, default=str).encode()).digest()[:_DIGEST]
