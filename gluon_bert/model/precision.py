"""Matrix products in float32, or with factors and results in float16. All sums are float32.

The compiled operators (ops/) have their own products in bfloat16.
"""

from __future__ import annotations

from typing import Any, Callable, Sequence

from .. import ops
from ..errors import InputError
from ..runtime import mx


def check_precision(precision: str, devices: Sequence[Any]) -> None:
    """Raise InputError if these devices cannot multiply matrices in `precision`."""
    on_cpus = any(device.device_type == "cpu" for device in devices)
    if precision == "fp16" and on_cpus:
        raise InputError(
            "precision must be fp32 or bf16 on a CPU, got fp16. MXNet multiplies in float16 on GPUs only"
        )
    if precision == "bf16" and not on_cpus:
        raise InputError(
            "precision must be fp32 or fp16 on a GPU, got bf16. MXNet has no bfloat16 matmul there"
        )
    if precision == "bf16" and ops.bf16_unsupported_reason():
        raise InputError(f"precision must be fp32 here, got bf16: {ops.bf16_unsupported_reason()}")


class Float16Matmul:
    """mx.nd or mx.sym, with matrix products in float16 and sums in float32.

    Inputs and outputs of the methods are float32, unless they say otherwise. MXNet computes these products on
    GPUs only. half_input, half_output: dense layers get float16, and leave their results in float16.
    """

    def __init__(self, F: Any, half_input: bool = False, half_output: bool = False) -> None:
        self._F, self._half_input, self._half_output = F, half_input, half_output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._F, name)

    def FullyConnected(self, x: Any, weight: Any, bias: Any, **others: Any) -> Any:
        """Multiply x by the transposed weight and add the bias."""
        return self.dense(weight, bias, **others)(x)

    def dense(self, weight: Any, bias: Any, **others: Any) -> Callable[[Any], Any]:
        """Return a function of x that does so, with one float16 copy of the weight for all its calls."""
        weight, bias = self._half(weight), self._half(bias)

        def multiply(x: Any) -> Any:
            # A cast of float16 to float16 would be a second copy, kept for the backward pass.
            x = x if self._half_input else self._half(x)
            product = self._F.FullyConnected(x, weight, bias, **others)
            return product if self._half_output else self._whole(product)

        return multiply

    def interleave(self, query: Any, key: Any, value: Any, num_heads: int) -> Any:
        """Put the float16 vectors of each head side by side: three times (B, T, C) -> (T, B, 3 C)."""
        heads = [x.reshape(shape=(0, 0, num_heads, -1)) for x in (query, key, value)]
        return self._F.stack(*heads, axis=3).reshape(shape=(0, 0, -1)).swapaxes(0, 1)

    def attention_scores(self, interleaved: Any, num_heads: int) -> Any:
        """Multiply queries by keys, divided by the root of their size: (T, B, 3 C) -> (B * H, T, T)."""
        return self._whole(self._F.contrib.interleaved_matmul_selfatt_qk(interleaved, heads=num_heads))

    def softmax(self, x: Any, **others: Any) -> Any:
        """Compute in float32, and round the result to float16, as it is a factor of a product.

        With the operator's own dtype MXNet would take a slower kernel.
        """
        return self._half(self._F.softmax(x, **others))

    def attention_values(self, interleaved: Any, weights: Any, num_heads: int) -> Any:
        """Add up values by their weights, all float16: (T, B, 3 C), (B * H, T, T) -> (T, B, C)."""
        return self._F.contrib.interleaved_matmul_selfatt_valatt(interleaved, weights, heads=num_heads)

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
    """MXNet's dense layer, whose product may be in float16.

    half_input, half_output: then its input is float16 already, and its result stays float16.
    """

    def __init__(
        self, *args: Any, half_input: bool = False, half_output: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._half_input, self._half_output = half_input, half_output

    def ops_for(self, F: Any) -> Any:
        return Float16Matmul(F, self._half_input, self._half_output) if self.precision == "fp16" else F

    def hybrid_forward(self, F: Any, x: Any, weight: Any, bias: Any = None) -> Any:
        return super().hybrid_forward(self.ops_for(F), x, weight, bias)
