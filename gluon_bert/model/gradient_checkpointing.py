"""Forward passes of which only what enters each layer is kept, and their backward passes, layer by layer.

It is for MXNet's own operators; the compiled ones compute a layer again by themselves.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Sequence

import numpy as np

from ..runtime import mx


class Segment(NamedTuple):
    """A block of a pass, what it was called with, and its dropout's seed.

    entered: the result of the block before, which has a gradient; None for the first block.
    """

    block: Any
    entered: Any
    inputs: tuple[Any, ...]
    seed: int

    def compute(self) -> Any:
        """What the block makes of its inputs, with the same dropout whenever it is asked."""
        inputs = self.inputs if self.entered is None else (self.entered, *self.inputs)
        mx.random.seed(self.seed, ctx=inputs[0].context)
        return self.block(*inputs)


class CheckpointedForward:
    """The passes of one recorded computation, on any contexts.

    A pass ends the recorded graph: its result is a leaf with a gradient. `backward`, called after that of the
    graph, takes the gradient on to the parameters, whose grad_req must be "add": an embedding that is the
    decoder, too, has two.

    >>> tape = Tape(seed=1)                                             # doctest: +SKIP
    >>> with mx.autograd.record():
    ...     loss = head(tape.forward([(embeddings, (tokens,)), (layer, (padding,))]))
    >>> loss.backward()
    >>> tape.backward()
    """

    def __init__(self, seed: int) -> None:
        self._seeds = np.random.SeedSequence(seed)
        self._passes: list[tuple[list[Segment], Any]] = []

    def forward(self, blocks: Sequence[tuple[Any, tuple[Any, ...]]]) -> Any:
        """The result of blocks in a row, each called with that of the one before and with its own inputs."""
        seeds = self._seeds.spawn(1)[0].generate_state(len(blocks)) >> 1
        stops: list[Segment] = []
        result: Any = None
        with mx.autograd.pause(train_mode=mx.autograd.is_training()):
            for (block, inputs), seed in zip(blocks, seeds.tolist()):
                stops.append(Segment(block, result, inputs, seed))
                result = stops[-1].compute()
        result.attach_grad()
        self._passes.append((stops, result))
        return result

    def backward(self) -> None:
        """Take the gradients of all passes on to the parameters, and forget the passes.

        It waits after each layer: the engine would compute the others again at once, for which nothing is
        missing, and have all their values in memory.
        """
        passes, self._passes = self._passes, []
        gradients = [result.grad for _, result in passes]
        while any(stops for stops, _ in passes):
            gradients = [_backward(stops.pop(), gradient) for (stops, _), gradient in zip(passes, gradients)]
            for gradient in gradients:
                if gradient is not None:
                    gradient.wait_to_read()


def _backward(stop: Segment, gradient: Any) -> Any:
    """From the gradient of a block's result to that of what entered it; adds to its parameters' own."""
    if stop.entered is not None:
        stop.entered.attach_grad()
    with mx.autograd.record():
        result = stop.compute()
    mx.autograd.backward([result], [gradient])
    return None if stop.entered is None else stop.entered.grad
