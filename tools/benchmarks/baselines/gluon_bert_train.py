"""The baselines compiled and mxnet of `benchmark.py train`: this package.

Argument: the configuration as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any, Iterator

import numpy as np
from protocol import Step, serve

from gluon_bert import devices, ops, runtime
from gluon_bert.config import Config, ModelConfig
from gluon_bert.data.batch import Batch
from gluon_bert.data.loader import Loader, load_pretraining_data
from gluon_bert.model.bert import BERTModel
from gluon_bert.runtime import mx
from gluon_bert.training.metrics import Meter, Metrics
from gluon_bert.training.resources import flops_per_pair, num_outputs
from gluon_bert.training.trainer import Trainer


def prepare() -> tuple[Iterator[Step], dict[str, Any]]:
    """Return the steps and details to report."""
    config = Config.from_json(json.loads(sys.argv[1]))
    precision = config.train.precision
    data = load_pretraining_data(config.data, config.train.batch_size, config.train.seed)
    contexts = devices.contexts(cpus=1)
    net = BERTModel(len(data.vocab), config.model)
    net.initialize(ctx=contexts, seed=config.train.seed)
    net.hybridize()
    trainer = Trainer(net, config.train, contexts)
    details = {
        "software": f"{runtime.versions()['mxnet']}, operators: {ops.describe(contexts)}, "
        f"precision {precision}",
        "flop_per_pair": flop(
            next(data.train.epoch(0)), config.model, len(data.vocab), ops.compiled(contexts)
        )
        / config.train.batch_size,
        "peak_matmul": peak_matmul(precision),
    }
    return steps(trainer, data.train), details


def steps(trainer: Any, batches: Loader) -> Iterator[Step]:
    """Take one step after another, each from the text to new weights and losses on the host."""
    for batch in batches.batches():
        means = finished_step(trainer, batch)
        yield len(batch), means["mlm_loss"], means["nsp_loss"]


def finished_step(trainer: Any, batch: Batch) -> Metrics:
    """Take a step; return its losses after the weights are updated."""
    shards, losses = trainer.step(batch)
    meter = Meter()
    meter.add(shards, losses)
    means = meter.totals().averages()
    mx.nd.waitall()
    return means


def flop(batch: Batch, model: ModelConfig, vocab_size: int, compiled: bool) -> float:
    """Return the FLOPs of a step on this batch, without padding. compiled: by the compiled operators."""
    predictions = np.bincount(batch.masked_positions[0], minlength=len(batch))
    of_rows = zip(batch.valid_length.tolist(), predictions.tolist())
    return sum(
        flops_per_pair(model, vocab_size, length, count, num_outputs(count, compiled))
        for length, count in of_rows
    )


def peak_matmul(precision: str) -> dict[str, float]:
    """Return the FLOP/s of the fastest matrix products in this process, by wall-clock and CPU time."""
    bf16 = precision == "bf16"
    size = 1024
    array = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    on_device = mx.nd.array(array)

    def by_numpy() -> float:
        np.matmul(array, array)
        return 2.0 * size**3

    def by_mxnet() -> float:
        mx.nd.dot(on_device, on_device).wait_to_read()
        return 2.0 * size**3

    best = {"flop_per_second": 0.0, "flop_per_cpu_second": 0.0}
    for _ in range(8):
        for product in (by_numpy, by_mxnet, lambda: ops.peak_matmul_flops(150, bf16)):
            before, used = time.perf_counter(), time.process_time()
            flop = product()
            seconds, cpu_seconds = time.perf_counter() - before, time.process_time() - used
            best["flop_per_second"] = max(best["flop_per_second"], flop / seconds)
            best["flop_per_cpu_second"] = max(best["flop_per_cpu_second"], flop / cpu_seconds)
    return best


if __name__ == "__main__":
    serve(prepare)
