"""The scale of a loss whose gradient passes through float16. Multiplies no loss and takes no step."""

from __future__ import annotations

from typing import Any, Mapping, NamedTuple, Sequence

import numpy as np

from ..runtime import mx
from .metrics import float_array

# float16 has nothing below 6e-8 and nothing above 65504. A loss times 65536 has gradients that do not vanish;
# when they are too large, half of it is tried, and after 2000 good steps twice as much (Micikevicius et al.
# 2018, section 3.2, who leave the numbers open; these, and the largest, are MXNet's, contrib/amp).
FIRST = 2.0**16
LARGEST = 2.0**24
SMALLEST = 1.0
GOOD_STEPS = 2000


class LossScale(NamedTuple):
    """What the loss of a step is multiplied by, a power of two, and for how many steps that went well.

    Both are (1,) float32 on the first context, where the next ones are computed: nobody waits for them.
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

        Is_finite: (1,) 1, or NaN if the gradient of this step is not finite.
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
        """Return the inverse of `to_json`. Raise ValueError if it was not written by that."""
        value, good = float_array([content["value"], content["good"]], 2).tolist()
        if not (SMALLEST <= value <= LARGEST and good >= 0):
            raise ValueError(f"must be the state of a loss scale, got {content!r}")
        return cls(*(mx.nd.array([number], ctx=context, dtype=np.float32) for number in (value, good)))
