"""Processes that train one network together: what they add up, compare and agree on. Takes no step."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import socket
from contextlib import contextmanager
from typing import Any, Callable, Iterator, Mapping, Sequence, TypeVar

import numpy as np

from ..config import Config, flag
from ..errors import BadInput, in_a_line
from ..runtime import in_words, mx, versions

Result = TypeVar("Result")

START = "start the workers with tools/launch.py"

# The variables that tell a worker its rank and how many there are, by what sums the gradients of several.
_PLACE = {
    "dist_sync": ("DMLC_TASK_ID", "DMLC_NUM_WORKER", "DMLC_ROLE"),
    "horovod": ("HOROVOD_RANK", "HOROVOD_SIZE"),
}
KVSTORES = ("device", *_PLACE)

# Keys of arrays that are summed, where those of the gradients count up from 0. To choose a server MXNet
# multiplies a key by 9973 in 32 bits.
_AGREED, _GATHERED = 100_000, 100_001

_DIGEST = 16  # bytes of a hash that are compared

# Paths, which may differ between machines: the text and the weights themselves are compared, too.
_MAY_DIFFER = ("corpus", "vocab_file", "init")


class Workers:
    """One process, which trains alone: what each way of training together has to offer.

    rank: this worker's number, from 0; the first one writes the run's folder. count: how many there are.
    alone: whether no other process takes part in the job. kvstore: what a Gluon Trainer sums gradients with:
    those of all contexts, and those of all workers unless `add_up` does that.
    """

    rank, count, alone = 0, 1, True
    kvstore: Any = "device"

    def begin(self, trainer: Any) -> None:
        """Make a Gluon Trainer's kvstore ready, before its first step."""

    def add_up(self, gradients: Sequence[Sequence[Any]]) -> None:
        """Sum each context's gradients over the workers, in place, where the kvstore has not. Does not wait.

        The kvstore has summed those of this worker's contexts.
        """

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


class SeveralWorkers(Workers):
    """Workers that have a way to sum an array of each; the rest comes from that."""

    alone = False

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count
        self.has_left = False

    def refuse_same_numbers(self) -> None:
        """Raise BadInput where two workers have the same rank."""
        # A row that two workers fill is the sum of both, 2, and another row is 0.
        if set(self.gather(b"\1")) != {b"\1"}:
            raise BadInput(f"worker {self.rank}: two of {self.count} workers have the same number; {START}")

    def gather(self, content: bytes) -> list[bytes]:
        # The sum is in float32, which is exact where all but one of the summands are 0.
        table = np.zeros((self.count, len(content)), dtype=np.float32)
        table[self.rank] = np.frombuffer(content, dtype=np.uint8)
        summed = self._sum(_GATHERED + len(content), mx.nd.array(table, dtype=np.float32))
        return [row.astype(np.uint8).tobytes() for row in summed.asnumpy()]

    def agree(self, squared_norms: Any, stop: bool) -> tuple[Any, Any]:
        told = mx.nd.zeros_like(squared_norms) if self.rank else squared_norms
        asked = mx.nd.array([stop], ctx=squared_norms.context)
        summed = self._sum(_AGREED, mx.nd.concat(told, asked, dim=0))
        return summed[:-1], summed[-1:]

    def leave(self) -> None:
        """Wait until all workers are here, and part from them."""
        self.has_left = True
        mx.nd.waitall()
        self._part()

    def _sum(self, key: int, array: Any) -> Any:
        """The sum of the workers' arrays, of one shape for each key; in place, without a wait."""
        raise NotImplementedError

    def _part(self) -> None:
        """Leave, when all others do."""
        raise NotImplementedError


class ParameterServerWorkers(SeveralWorkers):
    """Workers that add up their gradients on MXNet's parameter servers, synchronously.

    The servers only add: optimizers run on the workers, so that no server has to unpickle one.
    """

    def __init__(self, rank: int, count: int) -> None:
        super().__init__(rank, count)
        self.kvstore = mx.kv.create("dist_sync")
        self._known: set[int] = set()

    def begin(self, trainer: Any) -> None:
        # A worker that steps before the servers have all first weights takes gradients for weights.
        trainer.optimizer.rescale_grad = 1.0
        trainer._init_kvstore()
        trainer._init_params()
        mx.nd.waitall()
        self.kvstore._barrier()

    def _sum(self, key: int, array: Any) -> Any:
        if key not in self._known:
            self.kvstore.init(key, mx.nd.zeros_like(array))
            self._known.add(key)
        self.kvstore.pushpull(key, array, out=array)
        return array

    def _part(self) -> None:
        # The servers end when the last worker has let its kvstore go.
        mx.base.check_call(mx.base._LIB.MXKVStoreFree(self.kvstore.handle))
        self.kvstore.handle = mx.base.KVStoreHandle()  # or it would be freed once more


class HorovodWorkers(SeveralWorkers):
    """Workers that add up their gradients among themselves, by Horovod's allreduce, which here sums."""

    def __init__(self, rank: int, count: int) -> None:
        super().__init__(rank, count)
        self._horovod, self._sums = horovod(), 0
        # To sum several arrays as one it takes those that are ready, which is not the same in each run; and
        # where an array begins decides in which order its values are added.
        os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", "0")
        # Seconds. One worker may take longer than another to read the text.
        os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", "600")
        interface = _interface_of(os.environ.get("HOROVOD_HOSTNAME", ""))
        if interface:
            os.environ.setdefault("HOROVOD_GLOO_IFACE", interface)
        self._horovod.init()

    def add_up(self, gradients: Sequence[Sequence[Any]]) -> None:
        for number, (first, *others) in enumerate(zip(*gradients)):
            self._all_reduce(first, f"gradient {number}")
            for other in others:
                first.copyto(other)

    def _sum(self, key: int, array: Any) -> Any:
        # Another name each time, as that of the step before may still be under way.
        self._sums += 1
        return self._all_reduce(array, f"sum {self._sums}")

    def _all_reduce(self, array: Any, name: str) -> Any:
        return self._horovod.allreduce_(array, op=self._horovod.Sum, name=name)

    def _part(self) -> None:
        self.gather(b"+")  # whoever leaves ends it for all
        self._horovod.shutdown()


def horovod() -> Any:
    """The module horovod.mxnet; BadInput where it is not there, or was built without MXNet."""
    try:
        return importlib.import_module("horovod.mxnet")
    except ImportError as error:
        raise BadInput(
            f"--kvstore horovod: needs Horovod, built for MXNet ({in_a_line(error)}); docs/scale.md says how"
        ) from error


def _refuse_name_of_loopback() -> None:
    """Raise BadInput where Horovod's workers on other hosts could not reach this one.

    Horovod 0.28.1 does not use the interface for its second set of connections: it looks for the host's name.
    """
    if os.environ.get("HOROVOD_CROSS_SIZE", "1") == "1":
        return
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        raise BadInput(f"--kvstore horovod: this host's name, {name}, has no address ({error})") from error
    if address.startswith("127."):
        raise BadInput(
            f"--kvstore horovod: this host's name, {name}, stands for {address}, which other hosts do not "
            "reach; /etc/hosts has to give it an address that they do"
        )


def _interface_of(address: str) -> str | None:
    """This machine's network interface with an address, None where none has it."""
    import psutil  # Horovod needs it, too

    interfaces = psutil.net_if_addrs().items()
    return next((name for name, has in interfaces if address in {each.address for each in has}), None)


# Workers that failed. To free what they hold would be to wait for the others.
_FAILED: list[SeveralWorkers] = []


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
    started_for = {
        "dist_sync": os.environ.get("DMLC_ROLE") == "worker",
        "horovod": "HOROVOD_RANK" in os.environ,
    }
    if kvstore == "device":
        for other in (name for name, started in started_for.items() if started):
            raise BadInput(f"--kvstore: is needed by a worker of several, as in --kvstore {other}")
        return 0, 1
    names = _PLACE[kvstore]
    try:
        rank, count = (int(os.environ[name]) for name in names[:2])
    except (KeyError, ValueError):
        rank, count = 0, 0
    if not started_for[kvstore] or not 0 <= rank < count:
        raise BadInput(
            f"--kvstore {kvstore}: {in_words(names)} in the environment do not say which of how many workers "
            f"this is; {START}"
        )
    if kvstore == "horovod":
        horovod()
        _refuse_name_of_loopback()
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
    kind = HorovodWorkers if kvstore == "horovod" else ParameterServerWorkers
    workers = kind(rank, count)
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
