"""What a run will take, told before its first step: memory, masked tokens, FLOPs. Computes plain numbers only.

Memory is counted from what the operators keep of a forward pass, and was compared with what runs took;
docs/scale.md tells how far off it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Callable

from ..config import DISTANCE_BUCKETS, Config, ModelConfig
from ..errors import InputError
from ..system import threads

FLOAT = 4  # bytes
# MXNet, Python and the text that is being read.
PROGRAM = 300e6
# Of what is computed: freed blocks do not fit all that is asked for next.
FRAGMENTS = 1.1
# What MXNet's graphs take beside what must be kept: it shares memory by size and by distance only.
MXNET_OVERHEAD = 1.4

# Of the memory there is, for what is proposed: the estimate is not exact.
SAFE = 0.9


@dataclass(frozen=True)
class ResourceEstimate:
    """A run in numbers; memory in bytes, of all contexts together.

    parameters: of the network. num_masked: masked tokens of a step, at most. flops: of a pair of
    max_seq_length tokens, forward
    and backward, without what is computed twice. at_once: pairs that are computed at once. model: weights,
    gradients and what the optimizer keeps. activations: what is computed of so many pairs. checkpoint: the
    copy that is written while the training goes on.
    """

    parameters: int
    num_masked: int
    flops: float
    micro_batch_size: int
    model: float
    activations: float
    checkpoint: float

    @property
    def memory(self) -> float:
        """All that the process is expected to take at its peak."""
        return self.model + self.activations + self.checkpoint + PROGRAM

    def outcome(self, peak: float) -> str:
        """A line on what the process took at its peak."""
        return f"memory taken: {_gigabytes(peak)} at the peak, {_gigabytes(self.memory)} expected"

    def in_words(self, batch_size: int, limit: float | None) -> str:
        """Two lines for a person."""
        of = "" if limit is None else f" of {_gigabytes(limit)}"
        return (
            f"memory expected: {_gigabytes(self.memory)}{of}: weights, gradients and optimizer "
            f"{_gigabytes(self.model)}, what is computed of {_pairs(self.micro_batch_size)} at once "
            f"{_gigabytes(self.activations)}, a checkpoint {_gigabytes(self.checkpoint)}\n"
            f"{self.step_in_words(batch_size)}"
        )

    def step_in_words(self, batch_size: int) -> str:
        """Describe the size of a step in one line."""
        return (
            f"a step: {_pairs(batch_size)}, {self.num_masked:,} masked tokens at most, "
            f"{_flops(self.flops * batch_size)} ({_flops(self.flops)} a pair)"
        )


def estimate_resources(
    config: Config, vocab_size: int, num_contexts: int, compiled: bool, preprocessing_workers: int = 1
) -> ResourceEstimate:
    """The plan of one of so many workers on so many contexts, by compiled operators or MXNet's own."""
    train, length = config.train, config.data.max_seq_length
    parameters = parameter_count(config.model, vocab_size)
    share = -(-train.batch_size // preprocessing_workers)
    at_once = min(train.micro_batch or share, share)
    num_masked = max_masked(config)
    rows = -(-at_once // num_contexts)
    shard = ActivationSizes(config.model, vocab_size, rows * length, length, rows * num_masked)
    adds_up = train.micro_batch > 0
    floats = (
        compiled_floats(shard, train.recompute, adds_up, threads())
        if compiled
        else mxnet_floats(shard, train.recompute, train.precision == "fp16")
    )
    # The optimizers keep two numbers a weight. Where gradients are summed over contexts, the kvstore has the
    # weights, the sum, and a copy of the gradient of every context but one.
    copies = 4 * num_contexts + (num_contexts + 1 if num_contexts > 1 else 0)
    return ResourceEstimate(
        parameters,
        num_masked * train.batch_size,
        flops_per_pair(config.model, vocab_size, length, num_masked),
        at_once,
        float(FLOAT * parameters * copies),
        FRAGMENTS * FLOAT * floats * num_contexts,
        float(FLOAT * parameters * 3),
    )


def check_memory(
    config: Config,
    vocab_size: int,
    num_contexts: int,
    compiled: bool,
    limit: float,
    preprocessing_workers: int = 1,
) -> None:
    """Raise InputError where a worker cannot fit in so many bytes, and say what would."""

    def memory(**changes: Any) -> float:
        other = Config(config.model, config.data, replace(config.train, **changes))
        return estimate_resources(other, vocab_size, num_contexts, compiled, preprocessing_workers).memory

    if memory() <= limit:
        return
    most = estimate_resources(config, vocab_size, num_contexts, compiled, preprocessing_workers)
    would_do = settings_that_fit(memory, range(num_contexts, most.micro_batch_size + 1), limit)
    train = config.train
    raise InputError(
        f"--batch-size {train.batch_size}, --max-seq-length {config.data.max_seq_length}: the run is expected to take "
        f"{_gigabytes(memory())} of memory, and there are {_gigabytes(limit)}; {would_do}"
    )


def settings_that_fit(memory: Callable[..., float], sizes: range, limit: float) -> str:
    """Say which settings fit in nine tenths of the limit.

    memory: what a run takes with changed settings. sizes: the micro-batches that are possible.
    """
    some = SAFE * limit
    alone = _largest(sizes, lambda size: memory(micro_batch=size) <= some)
    twice = _largest(sizes, lambda size: memory(micro_batch=size, recompute=True) <= some)
    ways = [f"--micro-batch {alone}"] if alone else []
    if twice > alone:
        enough = memory(recompute=True) <= some
        ways.append("--recompute yes" if enough else f"--recompute yes --micro-batch {twice}")
    if ways:
        return f"what would do: {', or '.join(ways)}"
    return "no --micro-batch would do, nor --recompute: take a smaller network or --max-seq-length"


def parameter_count(model: ModelConfig, vocab_size: int) -> int:
    """How many numbers the network learns."""
    c, f = model.units, model.ffn_units
    norm = 2 * c
    embeddings = (vocab_size + 2 + model.max_positions) * c + norm * model.embedding_norm
    relative = DISTANCE_BUCKETS * model.num_heads * (model.position == "relative-bias")
    layer = 4 * (c * c + c) + norm + (c * f + f) + (f * c + c) + norm + relative
    decoder = vocab_size + (0 if model.tied_decoder else vocab_size * c)
    heads = (c * c + c) + (c * c + c + norm + decoder) + (2 * c + 2)
    return embeddings + model.num_layers * layer + norm * (model.norm == "pre") + heads


def max_masked(config: Config) -> int:
    """The most words of a pair that are predicted."""
    data = config.data
    words = data.max_seq_length - 3  # without <cls> and two <sep>
    count = (
        round(data.mlm_probability * data.max_seq_length)
        if data.preparation == "d2l"
        else int(data.mlm_probability * words)
    )
    return min(max(1, count), words)


def flops_per_pair(model: ModelConfig, vocab_size: int, length: int, num_masked: int) -> float:
    """Multiplications and additions in matrix products for a pair, forward and twice as many backward."""
    c, f = model.units, model.ffn_units
    layer = length * (2 * (4 * c * c + 2 * c * f) + 4 * length * c)
    heads = num_masked * 2 * (c * c + c * vocab_size) + 2 * c * c
    return 3.0 * (model.num_layers * layer + heads)


@dataclass(frozen=True)
class ActivationSizes:
    """What a context computes at once: so many tokens in rows of so many, and so many masked tokens."""

    model: ModelConfig
    words: int
    tokens: int
    length: int
    num_masked: int


def compiled_floats(shard: ActivationSizes, recompute: bool, adds_up: bool, num_threads: int) -> float:
    """What the compiled operators have in memory at their peak, by the arrays of ops/native; in floats."""
    c, f, layers = shard.model.units, shard.model.ffn_units, shard.model.num_layers
    table, matrices = shard.words * c, 4 * c * c + 2 * c * f
    stream = (layers + 1 + shard.model.embedding_norm) * c * shard.tokens
    chunk = max(128, shard.length)
    scratch = (12 * c + 2 * f) * chunk + 3 * chunk * chunk
    inner = 0 if recompute else layers * (5 * c + f) * shard.tokens
    # The encoder's result, its gradients by either head and their sum; the gradient of the stream.
    passing = 5 * c * shard.tokens
    packed = matrices * (1 + recompute) + num_threads * (matrices + scratch)
    # The decoder's gradient is ready after the forward pass; a tied one and the embedding's are then summed.
    head = (
        shard.num_masked * c * (4 + num_threads)
        + table
        + 2 * table * (shard.model.tied_decoder and not adds_up)
    )
    tiles = shard.words * 240 * 144 // 128
    return float(stream + inner + passing + packed + head + tiles)


def mxnet_floats(shard: ActivationSizes, recompute: bool, half: bool = False) -> float:
    """What MXNet's own operators have in memory at their peak; in floats. half: factors are float16."""
    model, tokens = shard.model, shard.tokens
    c, f, drops, factor = model.units, model.ffn_units, model.dropout > 0, 0.5 if half else 1.0
    scores = model.num_heads * shard.length * tokens
    # The results of ReLU and of a softmax without dropout are factors, which their gradients want as float32.
    hidden = {"relu": half, "gelu": 1, "gelu_tanh": 6}[model.activation] + factor
    # Two sums, the masks of two dropouts; query, key and value transposed, what attention found, each norm.
    streams = 2 + 2 * drops + 6 * factor
    # The softmax and its mask; what that leaves.
    attention = (2 if drops else half) + factor
    layer = tokens * (c * streams + f * hidden) + scores * attention
    layers = layer + 2 * (model.num_layers + 1) * c * tokens if recompute else model.num_layers * layer
    # The logarithms of all words' probabilities, and those of a slice of 256 with their gradients.
    slices = -(-shard.num_masked // 256)
    decoder = shard.words * (shard.num_masked + 3 * min(shard.num_masked, 256))
    # The decoder's gradient by each slice; MXNet adds up more than eight in one.
    tables = min(slices + model.tied_decoder, 8) * shard.words * c
    copies = 0.5 * half * (model.num_layers * (4 * c * c + 2 * c * f) + slices * shard.words * c)
    return MXNET_OVERHEAD * (layers + 8 * c * tokens) + scores + decoder + tables + copies


def _largest(sizes: range, fits: Callable[[int], bool]) -> int:
    """The largest size that fits, 0 if none does; a smaller one fits where a larger one does."""
    low, high = 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(sizes[middle]) else (low, middle)
    return sizes[low - 1] if low else 0


def _pairs(count: int) -> str:
    return f"{count:,} pairs" if count > 1 else "one pair"


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


def _flops(count: float) -> str:
    return f"{count / 1e12:,.1f} TFLOPs" if count >= 1e12 else f"{count / 1e9:,.1f} GFLOPs"
