"""Gradient checkpointing for MXNet's own operators: keeps each layer's input, and computes the rest again.

The compiled operators have their own.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Sequence

import numpy as np

from ..runtime import mx


class Segment(NamedTuple):
    """One block of a pass with its inputs and the seed of its dropout.

    entered: the result of the previous block, which has a gradient. None for the first block.
    """

    block: Any
    entered: Any
    inputs: tuple[Any, ...]
    seed: int

    def compute(self) -> Any:
        """Compute the block's result. Every call has the same dropout."""
        inputs = self.inputs if self.entered is None else (self.entered, *self.inputs)
        mx.random.seed(self.seed, ctx=inputs[0].context)
        return self.block(*inputs)


class CheckpointedForward:
    """The passes of one recorded computation, on any contexts.

    A pass ends the recorded graph: its result is a leaf with a gradient. `backward` takes this gradient to
    the parameters. Call it after the graph's own backward. The parameters' grad_req must be "add", since the
    embedding of a tied decoder has two gradients.

    >>> passes = CheckpointedForward(seed=1)                            # doctest: +SKIP
    >>> with mx.autograd.record():
    ...     loss = head(passes.forward([(embeddings, (tokens,)), (layer, (padding,))]))
    >>> loss.backward()
    >>> passes.backward()
    """

    def __init__(self, seed: int) -> None:
        self._seeds = np.random.SeedSequence(seed)
        self._passes: list[tuple[list[Segment], Any]] = []

    def forward(self, blocks: Sequence[tuple[Any, tuple[Any, ...]]]) -> Any:
        """Call blocks in a row, each with the previous result and its own inputs; return the last result."""
        seeds = self._seeds.spawn(1)[0].generate_state(len(blocks)) >> 1
        segments: list[Segment] = []
        result: Any = None
        with mx.autograd.pause(train_mode=mx.autograd.is_training()):
            for (block, inputs), seed in zip(blocks, seeds.tolist()):
                segments.append(Segment(block, result, inputs, seed))
                result = segments[-1].compute()
        result.attach_grad()
        self._passes.append((segments, result))
        return result

    def backward(self) -> None:
        """Take the gradients of all passes to the parameters, and forget the passes.

        It waits after each layer. Otherwise MXNet's engine would compute all layers again at once and hold
        all their values in memory.
        """
        passes, self._passes = self._passes, []
        gradients = [result.grad for _, result in passes]
        while any(segments for segments, _ in passes):
            gradients = [
                _backward(segments.pop(), gradient) for (segments, _), gradient in zip(passes, gradients)
            ]
            for gradient in gradients:
                if gradient is not None:
                    gradient.wait_to_read()


def _backward(segment: Segment, gradient: Any) -> Any:
    """Return the gradient of a block's input from that of its result; add to its parameters' gradients."""
    if segment.entered is not None:
        segment.entered.attach_grad()
    with mx.autograd.record():
        result = segment.compute()
    mx.autograd.backward([result], [gradient])
    return None if segment.entered is None else segment.entered.grad
