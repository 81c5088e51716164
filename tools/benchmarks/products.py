"""Measures matrix products of a training step's shapes: `benchmark.py products`."""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from typing import Callable, NamedTuple, Sequence

import numpy as np
from benchmarks.rates import machine

from gluon_bert import ops, runtime
from gluon_bert.errors import InputError
from gluon_bert.fileio import write_json
from gluon_bert.presets import preset
from gluon_bert.runtime import mx

# A measurement repeats a product until it takes about so many floating-point operations.
FLOP = 4e9
# Words of the decoder, and masked words, that are multiplied together (ops/native/masked_loss.h).
WORDS, MASKED = 2400, 288


class Shape(NamedTuple):
    """A product (rows, depth) by (depth, columns). transposed: the left matrix is stored as its transpose."""

    name: str
    rows: int
    columns: int
    depth: int
    transposed: bool = False

    @property
    def flop(self) -> float:
        """Return the floating-point operations."""
        return 2.0 * self.rows * self.columns * self.depth

    def __str__(self) -> str:
        return f"{self.name:22}{self.rows:6} x{self.depth:5} x{self.columns:5}"


def shapes(name: str, tokens: int) -> list[Shape]:
    """Return the products of a preset's layer for so many tokens, and the decoder's for 288 masked words."""
    model = preset(name).model
    c, f = model.units, model.ffn_units
    return [
        Shape("key, value", tokens, 2 * c, c),
        Shape("query, output", tokens, c, c),
        Shape("expand", tokens, f, c),
        Shape("project", tokens, c, f),
        Shape("gradient of output", c, c, tokens, True),
        Shape("gradient of expand", f, c, tokens, True),
        Shape("gradient of project", c, f, tokens, True),
        Shape("decoder", WORDS, MASKED, c),
        Shape("gradient of decoder", WORDS, c, MASKED),
    ]


# Multiplies, and returns the CPU seconds.
Work = Callable[[], float]


def timed(work: Callable[[], None]) -> Work:
    """Return the work with its CPU seconds."""

    def seconds() -> float:
        before = time.process_time()
        work()
        return time.process_time() - before

    return seconds


def compiled(shape: Shape, bf16: bool) -> Work:
    """Return the product by the compiled operators; the right matrix is packed before, as in a step."""
    repeats = repeats_of(shape)
    return lambda: ops.multiply_repeatedly(*shape[1:], bf16=bf16, repeats=repeats)


def by_numpy(shape: Shape) -> Work:
    """Return the product by NumPy, which calls OpenBLAS."""
    left, right = matrices(shape)
    out = np.empty((shape.rows, shape.columns), np.float32)

    def work() -> None:
        for _ in range(repeats_of(shape)):
            np.matmul(left, right, out=out)

    return timed(work)


def by_mxnet(shape: Shape) -> Work:
    """Return the product by MXNet's FullyConnected, which calls oneDNN, or by its dot for gradients."""
    left, right = (mx.nd.array(np.ascontiguousarray(x)) for x in matrices(shape))
    weight = right.T.copy()
    stored = left.T.copy() if shape.transposed else left

    def work() -> None:
        for _ in range(repeats_of(shape)):
            if shape.transposed:
                mx.nd.dot(stored, right, transpose_a=True)
            else:
                mx.nd.FullyConnected(left, weight, num_hidden=shape.columns, no_bias=True)
        mx.nd.waitall()

    return timed(work)


def by_torch(shape: Shape, bf16: bool) -> Work:
    """Return the product by PyTorch."""
    import torch

    torch.set_num_threads(int(runtime.versions()["threads"]))
    dtype = torch.bfloat16 if bf16 else torch.float32
    stored, right = matrices(shape)
    weight = torch.from_numpy(np.ascontiguousarray(right.T)).to(dtype)
    left = torch.from_numpy(np.ascontiguousarray(stored.T if shape.transposed else stored)).to(dtype)
    left = left.T if shape.transposed else left
    out = torch.empty(shape.rows, shape.columns, dtype=dtype)

    def work() -> None:
        with torch.inference_mode():
            for _ in range(repeats_of(shape)):
                torch.mm(left, weight.T, out=out)

    return timed(work)


def matrices(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Return random matrices of a product."""
    rng = np.random.default_rng(0)
    stored = (shape.depth, shape.rows) if shape.transposed else (shape.rows, shape.depth)
    left = rng.standard_normal(stored, dtype=np.float32)
    return left.T if shape.transposed else left, rng.standard_normal((shape.depth, shape.columns), np.float32)


def repeats_of(shape: Shape) -> int:
    """Return how often a measurement repeats a product."""
    return max(1, round(FLOP / shape.flop))


def makers() -> dict[str, Callable[[Shape], Work]]:
    """Return what makes each baseline's work, by name. bf16 and PyTorch only where they are available."""
    torch = importlib.util.find_spec("torch") is not None
    bf16 = not ops.bf16_unsupported_reason()
    found: dict[str, Callable[[Shape], Work]] = {"compiled": lambda s: compiled(s, False)}
    found.update({"OpenBLAS": by_numpy, "MXNet": by_mxnet})
    if torch:
        found["PyTorch"] = lambda s: by_torch(s, False)
    if bf16:
        found["compiled bf16"] = lambda s: compiled(s, True)
    if bf16 and torch:
        found["PyTorch bf16"] = lambda s: by_torch(s, True)
    return found


def run(arguments: argparse.Namespace) -> int:
    """Multiply with all baselines in turns."""
    if not ops.compiled([mx.cpu()]):
        raise InputError(f"products needs the compiled operators. Here the operators are {ops.describe()}.")
    summary = (
        f"{arguments.preset}, {arguments.tokens} tokens, GFLOP per CPU second, {arguments.rounds} rounds, "
        f"{runtime.versions()['threads']} threads, {machine()}"
    )
    rates = {shape: measure(shape, arguments.rounds) for shape in shapes(arguments.preset, arguments.tokens)}
    print(table(summary, rates))
    if arguments.json:
        rows = [{**shape._asdict(), "gflops": found} for shape, found in rates.items()]
        write_json(arguments.json, {"benchmark": "products", "work": summary, "rows": rows})
    return 0


def measure(shape: Shape, rounds: int) -> dict[str, list[float]]:
    """Return each baseline's GFLOP per CPU second by round. The first round warms up and is left out."""
    works = {name: make(shape) for name, make in makers().items()}
    rates: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            seconds = work()
            if number:
                rates[name].append(shape.flop * repeats_of(shape) / max(seconds, 1e-9) / 1e9)
    return rates


def table(summary: str, rates: dict[Shape, dict[str, list[float]]]) -> str:
    """Return the medians as text."""
    names: Sequence[str] = list(next(iter(rates.values())))
    lines = [summary, f"{'':41}" + "".join(f"{name:>14}" for name in names)]
    for shape, found in rates.items():
        lines.append(f"{shape!s:41}" + "".join(f"{statistics.median(own):14.1f}" for own in found.values()))
    return "\n".join(lines)
