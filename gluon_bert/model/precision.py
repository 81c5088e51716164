"""Matrix products in float32, or with factors and results in float16. All other operations are float32.

The compiled operators (ops/) have their own products in bfloat16.
"""

from __future__ import annotations

from typing import Any

from ..runtime import mx


class Float16Matmul:
    """mx.nd or mx.sym, with matrix products whose factors and results are float16.

    Inputs, outputs and biases are float32. MXNet computes these products on GPUs only.
    """

    def __init__(self, F: Any) -> None:
        self._F = F

    def __getattr__(self, name: str) -> Any:
        return getattr(self._F, name)

    def FullyConnected(self, x: Any, weight: Any, bias: Any, no_bias: bool = False, **others: Any) -> Any:
        """Multiply x by the transposed weight and add the bias."""
        factors = self._half(x), self._half(weight)
        product = self._whole(self._F.FullyConnected(*factors, no_bias=True, **others))
        return product if no_bias else self._F.broadcast_add(product, bias)

    def batch_dot(self, left: Any, right: Any, **others: Any) -> Any:
        """Multiply each matrix with its partner."""
        return self._whole(self._F.batch_dot(self._half(left), self._half(right), **others))

    def _half(self, factor: Any) -> Any:
        return self._F.cast(factor, dtype="float16")

    def _whole(self, product: Any) -> Any:
        return self._F.cast(product, dtype="float32")


class MixedPrecisionBlock(mx.gluon.HybridBlock):
    """A block with matrix products; the network's `set_matmul_precision` sets their precision."""

    precision = "fp32"

    def ops_for(self, F: Any) -> Any:
        """Return the operators that the block computes with: F, or F with products in float16."""
        return Float16Matmul(F) if self.precision == "fp16" else F


class Dense(MixedPrecisionBlock, mx.gluon.nn.Dense):
    """MXNet's dense layer; its product may be in float16."""

    def hybrid_forward(self, F: Any, x: Any, weight: Any, bias: Any = None) -> Any:
        return super().hybrid_forward(self.ops_for(F), x, weight, bias)
