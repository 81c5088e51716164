"""Sums gradients with MXNet's parameter servers. Starts no process."""

from __future__ import annotations

from typing import Any

from ..runtime import mx
from .communicator import DistributedCommunicator


class ParameterServerCommunicator(DistributedCommunicator):
    """Sums gradients on MXNet's parameter servers, synchronously.

    Optimizers run on the workers. So the servers never unpickle an optimizer.
    """

    def __init__(self, rank: int, count: int) -> None:
        super().__init__(rank, count)
        self.kvstore = mx.kv.create("dist_sync")
        self._known: set[int] = set()

    def init_trainer(self, trainer: Any) -> None:
        # Without this barrier a fast worker could receive gradients instead of initial weights.
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

    def _leave(self) -> None:
        # The servers exit after the last worker has freed its kvstore.
        mx.base.check_call(mx.base._LIB.MXKVStoreFree(self.kvstore.handle))
        self.kvstore.handle = mx.base.KVStoreHandle()  # prevents a second free
