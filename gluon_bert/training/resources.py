"""Estimate the resources of a run before its first step: memory, masked tokens, FLOPs.

The memory follows from the arrays that the operators keep of a forward pass. docs/memory-and-precision.md
compares it with what runs took.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Callable

from ..config import DISTANCE_BUCKETS, Config, ModelConfig
from ..errors import InputError
from ..model.task import Task
from ..system import threads

FLOAT = 4  # bytes
# MXNet, Python and the text in memory.
PROGRAM = 300e6
# Factor for fragmentation of activations: freed blocks do not fit all later requests.
FRAGMENTS = 1.1
# Factor for the overhead of MXNet's graphs, which share memory by size and distance only.
MXNET_OVERHEAD = 1.4

# Share of the memory that suggested settings may use: the estimate is not exact.
SAFE = 0.9


@dataclass(frozen=True)
class Workload:
    """A training, as far as its size depends on it.

    num_devices: of each worker. task: of the network that is fine-tuned; None in pretraining.
    """

    config: Config
    vocab_size: int
    num_devices: int = 1
    num_workers: int = 1
    task: Task | None = None

    def with_train(self, **changes: Any) -> Workload:
        """Return a workload with changed options of the training."""
        config = self.config
        return replace(self, config=Config(config.model, config.data, replace(config.train, **changes)))

    @property
    def num_parameters(self) -> int:
        """Return the number of weights of the network."""
        return parameter_count(self.config.model, self.vocab_size, self.task)


@dataclass(frozen=True)
class ResourceEstimate:
    """The estimated size of a run; memory in bytes, for all contexts together.

    parameters: number of weights. num_masked: maximum number of masked tokens per step. flops: of a pair of
    max_seq_length tokens, forward and backward, without recomputation. micro_batch_size: pairs per forward
    and backward pass. model: weights, gradients and optimizer states. activations: arrays of a micro-batch.
    checkpoint: the copy that is written during training. example: what a batch has: pairs or texts.
    """

    parameters: int
    num_masked: int
    flops: float
    micro_batch_size: int
    model: float
    activations: float
    checkpoint: float
    example: str

    @property
    def memory(self) -> float:
        """Return the expected peak memory of the process."""
        return self.model + self.activations + self.checkpoint + PROGRAM

    def outcome(self, peak: float) -> str:
        """Return a line that compares the measured peak with the estimate."""
        return f"memory taken: {_gigabytes(peak)} at the peak, {_gigabytes(self.memory)} expected"

    def format_memory(self, batch_size: int, limit: float | None) -> str:
        """Return two lines: the memory, and the size of a step."""
        of = "" if limit is None else f" of {_gigabytes(limit)}"
        return (
            f"memory expected: {_gigabytes(self.memory)}{of}: weights, gradients and optimizer "
            f"{_gigabytes(self.model)}, activations of {self._counted(self.micro_batch_size)} "
            f"{_gigabytes(self.activations)}, a checkpoint {_gigabytes(self.checkpoint)}\n"
            f"{self.format_step(batch_size)}"
        )

    def format_step(self, batch_size: int) -> str:
        """Return a line about the size of a step."""
        masked = f"{self.num_masked:,} masked tokens at most, " if self.num_masked else ""
        return (
            f"a step: {self._counted(batch_size)}, {masked}{_flops(self.flops * batch_size)} "
            f"({_flops(self.flops)} a {self.example})"
        )

    def _counted(self, count: int) -> str:
        return f"{count:,} {self.example}s" if count > 1 else f"one {self.example}"


def estimate_resources(work: Workload, compiled: bool) -> ResourceEstimate:
    """Estimate the resources of one worker. compiled: with the compiled operators instead of MXNet's."""
    config, task = work.config, work.task
    train, parameters, num_masked = config.train, work.num_parameters, max_masked(config, task)
    micro_batch_size, shard = largest_shard(work)
    floats = (
        compiled_floats(shard, train.recompute, train.micro_batch > 0, threads())
        if compiled
        else mxnet_floats(shard, train.recompute)
    )
    # The optimizers keep two numbers per weight. With several contexts the kvstore has the weights, the sum
    # of the gradients, and a copy of the gradients of all contexts but one.
    copies = 4 * work.num_devices + (work.num_devices + 1 if work.num_devices > 1 else 0)
    return ResourceEstimate(
        parameters,
        num_masked * train.batch_size,
        flops_per_pair(
            config.model,
            work.vocab_size,
            config.data.max_seq_length,
            num_masked,
            num_outputs(num_masked, compiled, task),
        ),
        micro_batch_size,
        float(FLOAT * parameters * copies),
        FRAGMENTS * FLOAT * floats * work.num_devices,
        float(FLOAT * parameters * 3),
        "text" if task and not task.pairs else "pair",
    )


def check_memory(work: Workload, compiled: bool, limit: float) -> None:
    """Raise InputError, with settings that fit, if a worker needs more than `limit` bytes."""

    def memory(**changes: Any) -> float:
        return estimate_resources(work.with_train(**changes), compiled).memory

    if memory() <= limit:
        return
    most = estimate_resources(work, compiled).micro_batch_size
    advice = settings_that_fit(memory, range(work.num_devices, most + 1), limit)
    raise InputError(
        f"the run needs about {_gigabytes(memory())} of memory with "
        f"batch_size={work.config.train.batch_size} and max_seq_length={work.config.data.max_seq_length}, "
        f"and the machine has {_gigabytes(limit)}. {advice}"
    )


def settings_that_fit(memory: Callable[..., float], sizes: range, limit: float) -> str:
    """Return a sentence with the settings that fit in 90 % of the limit.

    memory: returns the memory of a run with changed settings. sizes: the possible micro-batches.
    """
    some = SAFE * limit
    alone = _largest(sizes, lambda size: memory(micro_batch=size) <= some)
    twice = _largest(sizes, lambda size: memory(micro_batch=size, recompute=True) <= some)
    ways = [f"micro_batch={alone}"] if alone else []
    if twice > alone:
        enough = memory(recompute=True) <= some
        ways.append("recompute=True" if enough else f"recompute=True with micro_batch={twice}")
    if ways:
        return f"Use {' or '.join(ways)}."
    return "Use a smaller network or a smaller max_seq_length. A micro-batch of one pair does not fit."


def parameter_count(model: ModelConfig, vocab_size: int, task: Task | None = None) -> int:
    """Return the number of weights of the network: for pretraining, or for a task."""
    c, f = model.units, model.ffn_units
    norm = 2 * c
    embeddings = (vocab_size + 2 + model.max_positions) * c + norm * model.embedding_norm
    relative = DISTANCE_BUCKETS * model.num_heads * (model.position == "relative-bias")
    layer = 4 * (c * c + c) + norm + (c * f + f) + (f * c + c) + norm + relative
    decoder = vocab_size + (0 if model.tied_decoder else vocab_size * c)
    pooler = c * c + c
    if task is None:
        heads = pooler + (c * c + c + norm + decoder) + (2 * c + 2)
    else:
        heads = pooler * (not task.scores_tokens) + (c + 1) * task.outputs
    return embeddings + model.num_layers * layer + norm * (model.norm == "pre") + heads


def max_masked(config: Config, task: Task | None = None) -> int:
    """Return the maximum number of masked tokens of a pair: none for a task."""
    if task is not None:
        return 0
    data = config.data
    words = data.max_seq_length - 3  # without <cls> and two <sep>
    share = max(data.mlm_probability, data.final_mlm_probability)
    count = round(share * data.max_seq_length) if data.preparation == "d2l" else int(share * words)
    return min(max(1, count), words)


def flops_per_pair(
    model: ModelConfig, vocab_size: int, length: int, num_masked: int, outputs: int | None = None
) -> float:
    """Return the FLOPs of the matrix products for a pair: forward, and twice as many backward.

    outputs: the number of vectors that the last layer computes (default: all).
    """
    c, f = model.units, model.ffn_units

    def layer(queries: int) -> int:
        of_token, of_query = 4 * c * c, 4 * c * c + 4 * c * f + 4 * length * c
        return length * of_token + queries * of_query

    layers = (model.num_layers - 1) * layer(length) + layer(length if outputs is None else outputs)
    heads = num_masked * 2 * (c * c + c * vocab_size) + 2 * c * c
    return 3.0 * (layers + heads)


def num_outputs(num_masked: int, compiled: bool, task: Task | None = None) -> int | None:
    """Return how many vectors of a pair the last layer computes in training; None: all.

    The compiled operators compute those that the heads read: of <cls> and of the masked tokens.
    """
    return None if not compiled or (task and task.scores_tokens) else num_masked + 1


@dataclass(frozen=True)
class ActivationSizes:
    """The sizes of a micro-batch on one context.

    words: vocabulary size. tokens: tokens in all rows. length: tokens per row. num_masked: masked tokens.
    num_outputs: the vectors that the compiled operators compute in the last layer.
    """

    model: ModelConfig
    words: int
    tokens: int
    length: int
    num_masked: int
    num_outputs: int


def largest_shard(work: Workload) -> tuple[int, ActivationSizes]:
    """Return the pairs of a worker's micro-batch, and the sizes of the largest part on one device."""
    config = work.config
    share = -(-config.train.batch_size // work.num_workers)
    micro_batch_size = min(config.train.micro_batch or share, share)
    rows, length = -(-micro_batch_size // work.num_devices), config.data.max_seq_length
    num_masked = max_masked(config, work.task)
    outputs = num_outputs(num_masked, True, work.task) or length
    sizes = ActivationSizes(
        config.model, work.vocab_size, rows * length, length, rows * num_masked, rows * outputs
    )
    return micro_batch_size, sizes


def compiled_floats(shard: ActivationSizes, recompute: bool, accumulates: bool, num_threads: int) -> float:
    """Return the peak memory of the compiled operators in floats, from the arrays in ops/native."""
    c, f, layers = shard.model.units, shard.model.ffn_units, shard.model.num_layers
    table, matrices = shard.words * c, 4 * c * c + 2 * c * f
    stream = (layers + shard.model.embedding_norm) * c * shard.tokens + 2 * c * shard.num_outputs
    wide = c >= 256 and min(512, shard.tokens // num_threads + 1)
    chunk = max(128, shard.length, wide)
    scratch = (12 * c + 2 * f) * chunk + 3 * chunk * chunk
    of_query = 3 * c + f
    layer = (2 * c + of_query) * shard.tokens
    last = 2 * c * shard.tokens + of_query * shard.num_outputs
    inner = 0 if recompute else (layers - 1) * layer + last
    # The encoder's output, its gradients from both heads and their sum; the gradient of the stream.
    passing = 5 * c * shard.tokens
    packed = matrices * (1 + recompute) + num_threads * (matrices + scratch)
    # The decoder's gradient exists after the forward pass. A tied one is then added to the embedding's.
    head = (
        shard.num_masked * c * (4 + num_threads)
        + table
        + 2 * table * (shard.model.tied_decoder and not accumulates)
    )
    tiles = shard.words * 336
    if not shard.num_masked:
        head = tiles = 0
    return float(stream + inner + passing + packed + head + tiles)


def mxnet_floats(shard: ActivationSizes, recompute: bool) -> float:
    """Return the peak memory of MXNet's operators in floats."""
    model, tokens = shard.model, shard.tokens
    c, f, drops = model.units, model.ffn_units, model.dropout > 0
    scores = model.num_heads * shard.length * tokens
    hidden = {"relu": 1, "gelu": 2, "gelu_tanh": 7}[model.activation]
    # Two sums, the masks of two dropouts; query, key and value transposed, the attention's output, each norm.
    streams = 8 + 2 * drops
    # The softmax and its dropout mask; their product.
    attention = 1 + 2 * drops
    layer = tokens * (c * streams + f * hidden) + scores * attention
    layers = layer + 2 * (model.num_layers + 1) * c * tokens if recompute else model.num_layers * layer
    # The log-probabilities of all words, and those of a chunk of 256 with their gradients.
    slices = -(-shard.num_masked // 256)
    decoder = shard.words * (shard.num_masked + 3 * min(shard.num_masked, 256))
    # The decoder's gradient of each chunk; MXNet adds more than eight in place.
    tables = min(slices + model.tied_decoder, 8) * shard.words * c if slices else 0
    return MXNET_OVERHEAD * (layers + 8 * c * tokens) + scores + decoder + tables


def _largest(sizes: range, fits: Callable[[int], bool]) -> int:
    """Return the largest size that fits, 0 if none does. If a size fits, all smaller ones fit."""
    low, high = 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(sizes[middle]) else (low, middle)
    return sizes[low - 1] if low else 0


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


def _flops(count: float) -> str:
    unit, name = (1e12, "T") if count >= 1e12 else (1e9, "G") if count >= 1e9 else (1e6, "M")
    return f"{count / unit:,.1f} {name}FLOPs"
