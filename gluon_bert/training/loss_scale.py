"""The scale of a loss whose gradient passes through float16. Multiplies no loss and takes no step."""

from __future__ import annotations

from typing import Any, Mapping, NamedTuple, Sequence

import numpy as np

from ..runtime import mx
from .metrics import float_array

# float16 ranges from 6e-8 to 65504. Gradients of a loss times 65536 do not vanish. An overflow halves the
# scale, and 2000 good steps double it (Micikevicius et al. 2018, section 3.2). The numbers and the largest
# scale are MXNet's (contrib/amp).
FIRST = 2.0**16
LARGEST = 2.0**24
SMALLEST = 1.0
GOOD_STEPS = 2000


class LossScale(NamedTuple):
    """The scale of a step's loss, a power of two, and the number of good steps with it.

    Both are (1,) float32 on the first context. The device computes the next ones, so the host does not wait.
    """

    value: Any
    good_steps: Any

    @classmethod
    def first(cls, context: Any) -> LossScale:
        """Return the scale of the first step."""
        return cls(mx.nd.full((1,), FIRST, ctx=context), mx.nd.zeros((1,), ctx=context))

    def on(self, context: Any) -> Any:
        """Return the value on a context, (1,)."""
        return self.value.as_in_context(context)

    def unscale(self, gradients: Sequence[Sequence[Any]]) -> None:
        """Divide each context's gradients by the value, in place, which is exact."""
        for arrays in gradients:
            inverse = 1 / self.on(arrays[0].context)
            for array in arrays:
                mx.nd.broadcast_mul(array, inverse.reshape((1,) * array.ndim), out=array)

    def after(self, is_finite: Any) -> LossScale:
        """Return the scale of the next step.

        is_finite: (1,) 1, or NaN if the gradient of this step is not finite.
        """
        made = is_finite == is_finite  # NaN is not
        good = (self.good_steps + 1) * made
        enough = good == GOOD_STEPS
        value = self.value * (made * (1 + enough) + (1 - made) * 0.5)
        return LossScale(value.clip(SMALLEST, LARGEST), good * (1 - enough))

    def to_json(self) -> dict[str, float]:
        """Return plain values. Waits for the devices."""
        return {"value": float(self.value.asscalar()), "good": float(self.good_steps.asscalar())}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], context: Any) -> LossScale:
        """Return the inverse of `to_json`. Raise ValueError for other content."""
        value, good = float_array([content["value"], content["good"]], 2).tolist()
        if not (SMALLEST <= value <= LARGEST and good >= 0):
            raise ValueError(f"must be the state of a loss scale, got {content!r}")
        return cls(*(mx.nd.array([number], ctx=context, dtype=np.float32) for number in (value, good)))
