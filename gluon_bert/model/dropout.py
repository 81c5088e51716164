"""Dropout whose masks follow MXNet's random seed on every device. Contains no other layer."""

from __future__ import annotations

from typing import Any

from ..runtime import mx


class Dropout(mx.gluon.HybridBlock):
    """Set a share `rate` of the values to 0 while training; any shape to the same.

    MXNet's own block lets cuDNN draw the masks on GPUs. MXNet 1.9.1 seeds cuDNN only once, at random, so its
    masks do not repeat (apache/mxnet issue 15662). Here MXNet's generator draws the masks.
    """

    def __init__(self, rate: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._rate = rate

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        return F.Dropout(x, p=self._rate, cudnn_off=True) if self._rate else x
