"""Sums gradients with Horovod. Starts no process."""

from __future__ import annotations

import importlib
import os
import socket
from typing import Any, Sequence

from ..errors import InputError, one_line
from .communicator import DistributedCommunicator


class HorovodCommunicator(DistributedCommunicator):
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

    def all_reduce(self, gradients: Sequence[Sequence[Any]]) -> None:
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
        self.all_gather(b"+")  # whoever leaves ends it for all
        self._horovod.shutdown()


def horovod() -> Any:
    """The module horovod.mxnet; InputError where it is not there, or was built without MXNet."""
    try:
        return importlib.import_module("horovod.mxnet")
    except ImportError as error:
        raise InputError(
            f"--kvstore horovod: needs Horovod, built for MXNet ({one_line(error)}); docs/scale.md says how"
        ) from error


def _check_not_loopback() -> None:
    """Raise InputError where Horovod's workers on other hosts could not reach this one.

    Horovod 0.28.1 does not use the interface for its second set of connections: it looks for the host's name.
    """
    if os.environ.get("HOROVOD_CROSS_SIZE", "1") == "1":
        return
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        raise InputError(f"--kvstore horovod: this host's name, {name}, has no address ({error})") from error
    if address.startswith("127."):
        raise InputError(
            f"--kvstore horovod: this host's name, {name}, stands for {address}, which other hosts do not "
            "reach; /etc/hosts has to give it an address that they do"
        )


def _interface_of(address: str) -> str | None:
    """This machine's network interface with an address, None where none has it."""
    import psutil  # Horovod needs it, too

    interfaces = psutil.net_if_addrs().items()
    return next((name for name, has in interfaces if address in {each.address for each in has}), None)
