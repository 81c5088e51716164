"""Sums gradients with Horovod. Starts no process."""

from __future__ import annotations

import importlib
import os
import socket
from typing import Any, Sequence

from ..errors import InputError, one_line
from .communicator import DistributedCommunicator


class HorovodCommunicator(DistributedCommunicator):
    """Sums gradients between workers with Horovod's allreduce."""

    def __init__(self, rank: int, count: int) -> None:
        super().__init__(rank, count)
        self._horovod, self._sums = horovod(), 0
        # Fusion sums whichever arrays are ready as one. The offset of an array decides the order of
        # additions. So fusion would make runs differ in the last digits.
        os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", "0")
        # Seconds. One worker may read the text more slowly than another.
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
        # Each sum needs a new name: the previous one may still be in progress.
        self._sums += 1
        return self._all_reduce(array, f"sum {self._sums}")

    def _all_reduce(self, array: Any, name: str) -> Any:
        return self._horovod.allreduce_(array, op=self._horovod.Sum, name=name)

    def _leave(self) -> None:
        self.all_gather(b"+")  # the first worker to leave ends Horovod on all workers
        self._horovod.shutdown()


def horovod() -> Any:
    """Import horovod.mxnet. Raise InputError if it is missing or built without MXNet."""
    try:
        return importlib.import_module("horovod.mxnet")
    except ImportError as error:
        raise InputError(
            f"kvstore horovod needs Horovod built for MXNet ({one_line(error)}). See docs/distributed.md."
        ) from error


def check_not_loopback() -> None:
    """Raise InputError if workers on other hosts cannot reach this host by its name.

    Horovod 0.28.1 ignores HOROVOD_GLOO_IFACE for its second set of connections. It resolves the host name.
    """
    if os.environ.get("HOROVOD_CROSS_SIZE", "1") == "1":
        return
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        raise InputError(
            f"kvstore horovod needs a host name with an address: {name} has none ({error})"
        ) from error
    if address.startswith("127."):
        raise InputError(
            f"kvstore horovod: the host name {name} must resolve to an address that other hosts can reach, "
            f"got {address}. Correct it in /etc/hosts."
        )


def _interface_of(address: str) -> str | None:
    """Return the network interface with this address, or None."""
    import psutil  # a dependency of Horovod

    interfaces = psutil.net_if_addrs().items()
    return next((name for name, has in interfaces if address in {each.address for each in has}), None)
