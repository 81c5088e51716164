"""A row of `benchmark.py scale`: steps of a network on some contexts, in one worker or several.

Arguments: the case as JSON, the benchmark's process id, the file for the report of rank 0, --kvstore=NAME.
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
from gluon_bert_train import finished_step, flop, peak_matmul

from gluon_bert import devices, ops
from gluon_bert.config import Config
from gluon_bert.data.batch import Batch
from gluon_bert.data.loader import load_pretraining_data
from gluon_bert.distributed.join import init_distributed
from gluon_bert.model.bert import BERTModel
from gluon_bert.runtime import mx
from gluon_bert.system import peak_memory
from gluon_bert.training.trainer import Trainer


def main(case: dict[str, Any], benchmark: int, path: Path, kvstore: str) -> None:
    """Take the steps; rank 0 writes the report."""
    config = Config.from_json(case["config"])
    with init_distributed(kvstore) as communicator:
        contexts = devices.contexts(cpus=case["contexts"])
        data = load_pretraining_data(config.data, config.train.batch_size, config.train.seed)
        net = BERTModel(len(data.vocab), config.model)
        net.initialize(ctx=contexts, seed=config.train.seed)
        net.hybridize()
        trainer = Trainer(net, config.train, contexts, communicator=communicator)
        batches = data.train.batches()
        finished_step(trainer, next(batches))  # warms up
        communicator.all_gather(b"+")
        products = peak_matmul("fp32")["flop_per_second"]
        communicator.all_gather(b"+")
        before = time.perf_counter()
        taken = []
        for batch in islice(batches, case["steps"]):
            finished_step(trainer, batch)
            taken.append(batch)
        seconds = time.perf_counter() - before
        parts = parts_of_a_step(trainer, batches)
        products = float(communicator.sum_values(np.array(products)))
        # The memory of all workers counts, so none may have left yet.
        report = {
            "seconds": seconds,
            "pairs": sum(map(len, taken)),
            "tokens": sum(int(batch.valid_length.sum()) for batch in taken),
            "flop": sum(
                flop(batch, config.model, len(data.vocab), ops.compiled(contexts)) for batch in taken
            ),
            "peak_matmul_flops": products,
            "parts": parts,
            "load_balance": dict(zip(("tokens", "predictions"), trainer.load_balance.shares())),
            "peak_gigabytes": sum(peak_memory(process=process) or 0.0 for process in descendants(benchmark))
            / 1e9,
            "vocabulary": len(data.vocab),
        }
        communicator.all_gather(b"+")
        if not communicator.rank:
            path.write_text(json.dumps(report), "utf-8")


def parts_of_a_step(trainer: Any, batches: Iterator[Batch]) -> dict[str, float]:
    """Return the seconds of the parts of one step, with a wait after each part.

    batch: make the batch. computing: losses and gradients. summing: sum the gradients over contexts and
    workers, and wait for these. updating: norm, clipping and optimizer.
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


def descendants(process: int) -> list[int]:
    """Return the descendants of a process, according to /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [process]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found[1:]


if __name__ == "__main__":
    try:
        case, benchmark, path, kvstore = sys.argv[1:]
        main(json.loads(case), int(benchmark), Path(path), kvstore.partition("=")[2])
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # a normal exit would wait for the other workers
