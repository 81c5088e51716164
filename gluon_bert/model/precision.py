"""Products of matrices, in float32 or with factors and results in float16. All around them is float32.

Those in bfloat16 are the compiled operators' own (ops/).
"""

from __future__ import annotations

from typing import Any

from ..runtime import mx


class Float16Matmul:
    """What mx.nd or mx.sym offer, but for the products of matrices: their factors and results are float16.

    Both what they take and what they give is float32, and so are biases. MXNet multiplies so on GPUs only.
    """

    def __init__(self, F: Any) -> None:
        self._F = F

    def __getattr__(self, name: str) -> Any:
        return getattr(self._F, name)

    def FullyConnected(self, x: Any, weight: Any, bias: Any, no_bias: bool = False, **others: Any) -> Any:
        """x times the transposed weight, and the bias."""
        factors = self._half(x), self._half(weight)
        product = self._whole(self._F.FullyConnected(*factors, no_bias=True, **others))
        return product if no_bias else self._F.broadcast_add(product, bias)

    def batch_dot(self, left: Any, right: Any, **others: Any) -> Any:
        """The product of each matrix with its partner."""
        return self._whole(self._F.batch_dot(self._half(left), self._half(right), **others))

    def _half(self, factor: Any) -> Any:
        return self._F.cast(factor, dtype="float16")

    def _whole(self, product: Any) -> Any:
        return self._F.cast(product, dtype="float32")


class MixedPrecisionBlock(mx.gluon.HybridBlock):
    """A block with products of matrices, in the precision that `set_matmul_precision` of the network sets."""

    precision = "fp32"

    def products(self, F: Any) -> Any:
        """What the block is to compute with: F itself, or its products in float16."""
        return Float16Matmul(F) if self.precision == "fp16" else F


class Dense(MixedPrecisionBlock, mx.gluon.nn.Dense):
    """A dense layer like MXNet's, whose product may be in float16."""

    def hybrid_forward(self, F: Any, x: Any, weight: Any, bias: Any = None) -> Any:
        return super().hybrid_forward(self.products(F), x, weight, bias)
