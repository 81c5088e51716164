"""A row of `benchmark.py scale`: steps of a network on some contexts, of one worker or of several.

Its arguments are JSON: what to measure, the benchmark's process, the file for the answer, which the first
worker writes, and --kvstore=NAME. See `scaling.py` for both.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, Iterator

import numpy as np
from gluon_bert_train import best_rate_of_products, finished_step, flop

from gluon_bert import devices
from gluon_bert.config import Config
from gluon_bert.data.batch import Batch
from gluon_bert.data.loader import load_pretraining_data
from gluon_bert.distributed.join import init_distributed
from gluon_bert.model.bert import BERTModel
from gluon_bert.runtime import mx
from gluon_bert.system import peak_memory
from gluon_bert.training.trainer import Trainer


def main(job: dict[str, Any], benchmark: int, path: Path, kvstore: str) -> None:
    """Make the steps and, as the first worker, tell of them."""
    config = Config.from_json(job["config"])
    with init_distributed(kvstore) as workers:
        contexts = devices.contexts(cpus=job["contexts"])
        data = load_pretraining_data(config.data, config.train.batch_size, config.train.seed)
        net = BERTModel(len(data.vocab), config.model)
        net.initialize(ctx=contexts, seed=config.train.seed)
        net.hybridize()
        trainer = Trainer(net, config.train, contexts, workers)
        batches = data.train.batches()
        finished_step(trainer, next(batches))  # makes what the others use
        workers.all_gather(b"+")
        products = best_rate_of_products()["flop_per_second"]
        workers.all_gather(b"+")
        before = time.perf_counter()
        made = []
        for batch in islice(batches, job["steps"]):
            finished_step(trainer, batch)
            made.append(batch)
        seconds = time.perf_counter() - before
        parts = parts_of_a_step(trainer, batches)
        products = float(workers.total(np.array(products)))
        # All workers are still there.
        answer = {
            "seconds": seconds,
            "pairs": sum(map(len, made)),
            "tokens": sum(int(batch.valid_length.sum()) for batch in made),
            "flop": sum(flop(batch, config.model, len(data.vocab)) for batch in made),
            "flop_per_second_of_products": products,
            "parts": parts,
            "even": dict(zip(("tokens", "predictions"), trainer.load_balance.shares())),
            "peak_gigabytes": sum(peak_memory(process=process) or 0.0 for process in below(benchmark)) / 1e9,
            "vocabulary": len(data.vocab),
        }
        workers.all_gather(b"+")
        if not workers.rank:
            path.write_text(json.dumps(answer), "utf-8")


def parts_of_a_step(trainer: Any, batches: Iterator[Batch]) -> dict[str, float]:
    """Seconds of the parts of one more step, each of which waits until the one before is done.

    batch: making it. computing: losses and gradients. summing: the gradients of all contexts, of all workers,
    with the wait for these. updating: norm, clipping and optimizer.
    """
    seconds: dict[str, float] = {}

    @contextmanager
    def clocked(name: str) -> Iterator[None]:
        mx.nd.waitall()
        before = time.perf_counter()
        yield
        mx.nd.waitall()
        seconds[name] = time.perf_counter() - before

    sum_up, update = trainer._summed_gradients, trainer._update

    def summing() -> Any:
        with clocked("summing"):
            return sum_up()

    def updating() -> None:
        with clocked("updating"):
            update()

    with clocked("step"):
        with clocked("batch"):
            batch = next(batches)
        trainer._summed_gradients, trainer._update = summing, updating
        finished_step(trainer, batch)
    seconds["updating"] -= seconds["summing"]
    seconds["computing"] = seconds["step"] - seconds["batch"] - seconds["summing"] - seconds["updating"]
    return seconds


def below(process: int) -> list[int]:
    """The processes that a process has started, and that those have, as far as the system tells."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [process]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found[1:]


if __name__ == "__main__":
    try:
        job, benchmark, path, kvstore = sys.argv[1:]
        main(json.loads(job), int(benchmark), Path(path), kvstore.partition("=")[2])
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # at a normal end it would wait for the other workers
