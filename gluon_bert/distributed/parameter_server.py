"""Sums gradients with MXNet's parameter servers. Starts no process."""

from __future__ import annotations

from typing import Any

from ..runtime import mx
from .communicator import DistributedCommunicator


class ParameterServerCommunicator(DistributedCommunicator):
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
