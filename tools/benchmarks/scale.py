"""Measures networks, lengths, contexts and workers, and estimates GPUs: `benchmark.py scale`."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Iterator, Mapping, NamedTuple, Sequence

from benchmarks.rates import corpus_folder, machine, rates
from benchmarks.train import BASELINE_SCRIPTS, python_of

from gluon_bert import devices, ops, runtime
from gluon_bert.config import Config
from gluon_bert.distributed.horovod import horovod
from gluon_bert.distributed.join import check_sharing
from gluon_bert.errors import InputError
from gluon_bert.fileio import write_json
from gluon_bert.presets import preset
from gluon_bert.system import machine_memory
from gluon_bert.training.resources import (
    FLOAT,
    Workload,
    check_memory,
    flops_per_pair,
    max_masked,
    parameter_count,
)

LAUNCH = Path(__file__).parent.with_name("launch.py")


class ScaleCase(NamedTuple):
    """A row: a preset on texts of `length` tokens. batch_size: pairs of all workers."""

    preset: str
    length: int
    batch_size: int
    contexts: int
    workers: int
    kvstore: str = "device"

    def __str__(self) -> str:
        by = f" by {self.kvstore}" if self.workers > 1 else ""
        return (
            f"{self.preset}, {self.length} tokens, {self.batch_size} pairs, {self.contexts} contexts, "
            f"{self.workers} workers{by}"
        )

    def config(self, corpus: Path) -> Config:
        """Return the configuration. Pairs are packed from articles, so only ends of articles are shorter."""
        config = preset(self.preset).replace(
            corpus=(str(corpus),),
            text_format="articles",
            max_seq_length=self.length,
            pairs="packed",
            short_seq_prob=0.0,
            num_buckets=1,
            batch_size=self.batch_size,
        )
        config.check()
        return config

    def measure(self, corpus: Path, steps: int) -> dict[str, Any]:
        """Take steps in new processes; return their report (see `baselines/gluon_bert_scale.py`)."""
        case = {"config": self.config(corpus).to_json(), "contexts": self.contexts, "steps": steps}
        with TemporaryDirectory(prefix="gluon_bert-benchmark-") as folder:
            path = Path(folder, "report.json")
            given = [json.dumps(case), str(os.getpid()), str(path), f"--kvstore={self.kvstore}"]
            command = [python_of(None), "gluon_bert_scale.py", *given]
            if self.workers > 1:
                job = ["-n", str(self.workers), "--kvstore", self.kvstore]
                command = [python_of(None), str(LAUNCH), *job, "--", *command]
            done = subprocess.run(
                command,
                cwd=BASELINE_SCRIPTS,
                # Waiting threads must not spin on the cores of other contexts or workers.
                env={"OMP_WAIT_POLICY": "passive", **os.environ},
                capture_output=True,
                encoding="utf-8",
            )
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if not line.startswith("launch: ")]
                last = lines[-1] if lines else "no output"
                raise InputError(f"{self} ended with status {done.returncode}: {last}")
            report: dict[str, Any] = json.loads(path.read_text("utf-8"))
            return report


def cases(kvstores: Sequence[str], *values: Sequence[Any]) -> list[ScaleCase]:
    """Return a row of the first values, then a row for each other value in the place of the first.

    Rows with several workers are repeated for each kvstore.
    """
    first = ScaleCase(*(each[0] for each in values))
    others = [first._replace(**{name: v}) for name, each in zip(ScaleCase._fields, values) for v in each[1:]]
    rows = dict.fromkeys([first, *others])
    return [row._replace(kvstore=k) for row in rows for k in (kvstores if row.workers > 1 else ["device"])]


def check_cases(rows: Sequence[ScaleCase], corpus: Path) -> None:
    """Raise one InputError for all rows that cannot train on this machine."""
    problems = []
    for row in rows:
        contexts = devices.contexts(cpus=row.contexts)
        limit = machine_memory(contexts)
        try:
            config = row.config(corpus)
            check_sharing(config, row.workers)
            if row.kvstore == "horovod":
                horovod()
            if limit is not None:
                work = Workload(config, 1, row.contexts, row.workers)
                check_memory(work, ops.compiled(contexts), limit / row.workers)
        except InputError as error:
            problems.append(f"{row}: {error}")
    if problems:
        raise InputError("\n".join(problems))


# Assumptions of the estimate. Two rates of a GPU follow from published throughputs in fp16 and the FLOPs
# counted here: BERT-Base by GluonNLP 0.10's scripts, 132,900 tokens/s on eight V100s; and BERT-Large by
# NVIDIA's own code, 580 pairs of 128 tokens/s on an A100.
TOKENS_PER_GPU = 8192  # in one step
VOCABULARY = 30522
PCI_EXPRESS = 12e9  # bytes/s each way, of version 3 with 16 lanes
NETWORKS = (10, 25, 100)  # Gbit/s each way
GPUS, MACHINES = 8, 32


def preset_flops(name: str, length: int) -> float:
    """Return the FLOPs of a training step per pair, with BERT's original vocabulary size."""
    config = preset(name).replace(max_seq_length=length)
    return flops_per_pair(config.model, VOCABULARY, length, max_masked(config))


def gpu_rates() -> tuple[float, float]:
    """Return the FLOP/s of a GPU in each of the two published throughputs."""
    gluonnlp = 132_900 / GPUS / 128 * preset_flops("bert-base", 128)
    return gluonnlp, 580 * preset_flops("bert-large", 128)


def all_reduce_bytes(size: float, members: int) -> float:
    """Return the bytes that each member sends to sum an array of this size over all members.

    A ring sends this much. So does a parameter server beside each worker.
    """
    return 2 * size * (members - 1) / members


def estimate() -> str:
    """Return a table of estimates for GPUs and machines. Nothing of it was measured."""
    lines = [
        f"An estimate, not a measurement. A step computes {TOKENS_PER_GPU} tokens on each GPU. It then sums "
        "the",
        f"gradients over the {GPUS} GPUs of a machine at {PCI_EXPRESS / 1e9:.0f} GB/s each way, then over "
        f"{MACHINES} machines at the full",
        "rate of the network. Each machine is a worker and a server. Nothing overlaps. The percentage is the",
        "share of a step in which the GPUs compute.",
        f"{'':11}{'':>7}{'gradients':>10}{'TFLOP/s':>9}{'computing':>11}{f'{GPUS} GPUs':>16}"
        + "".join(f"{f'{MACHINES} x {GPUS}, {rate} Gbit/s':>22}" for rate in NETWORKS),
    ]
    for name, length, rate in _estimated_cases():
        size = float(FLOAT * parameter_count(preset(name).model, VOCABULARY))
        computing = TOKENS_PER_GPU / length * preset_flops(name, length) / rate
        machine = computing + all_reduce_bytes(size, GPUS) / PCI_EXPRESS
        many = [machine + all_reduce_bytes(size, MACHINES) / (network * 1e9 / 8) for network in NETWORKS]
        times = "".join(
            f"{f'{step * 1e3:.0f} ms, {computing / step:.0%}':>{width}}"
            for step, width in zip([machine, *many], (16, 22, 22, 22))
        )
        lines.append(
            f"{name:11}{length:7}{size / 1e6:7.0f} MB{rate / 1e12:9.0f}{computing * 1e3:8.0f} ms{times}"
        )
    return "\n".join(lines)


def _estimated_cases() -> Iterator[tuple[str, int, float]]:
    for name in ("bert-base", "bert-large"):
        for length in (128, 512):
            for rate in gpu_rates():
                yield name, length, rate


def run(arguments: argparse.Namespace) -> int:
    """Measure all rows in turns, each in new processes."""
    if arguments.estimate:
        print(estimate())
        return 0
    given = (arguments.lengths, arguments.batch_sizes, arguments.contexts, arguments.workers)
    values = [[int(number) for number in numbers.split(",")] for numbers in given]
    rows = cases(arguments.kvstore.split(","), arguments.presets.split(","), *values)
    corpus = corpus_folder(arguments.corpus)
    check_cases(rows, corpus)
    rounds: dict[ScaleCase, list[dict[str, Any]]] = {row: [] for row in rows}
    for number in range(arguments.rounds):
        for row in rows:
            rounds[row].append(row.measure(corpus, arguments.steps))
            (rate,) = rates(rounds[row][-1:])
            print(f"round {number + 1} of {arguments.rounds}: {row}: {rate:.1f} pairs/s", file=sys.stderr)
    threads, words = runtime.versions()["threads"], rounds[rows[0]][0]["vocabulary"]
    summary = (
        f"{arguments.rounds} rounds of {arguments.steps} steps, {threads} threads, {machine()}, "
        f"operators: {ops.describe()}, a vocabulary of {words:,}"
    )
    print(table(summary, rounds))
    if arguments.json:
        content = {"benchmark": "scale", "work": summary, "versions": runtime.versions()}
        of_rows = [{**row._asdict(), "rounds": own} for row, own in rounds.items()]
        write_json(arguments.json, {**content, "rows": of_rows})
    return 0


def table(summary: str, rounds: Mapping[ScaleCase, list[dict[str, Any]]]) -> str:
    """Return the rows as text. The parts of a step exclude the making of its batch."""
    fastest = max(report["peak_matmul_flops"] for own in rounds.values() for report in own)
    parts = ("computing", "summing", "updating")
    first = next(iter(rounds.values()))
    lines = [summary, f"{'':11}{'tokens':>7}{'pairs':>6}{'contexts':>9}{'workers':>8}  {'summed by':9}"]
    lines[-1] += f"{'pairs/s':>9}{'tokens/s':>9}{'ratio':>7}   {'from .. to':14}{'of peak':>11}{'peak GB':>9}"
    lines[-1] += "".join(f"{part:>10}" for part in parts)
    for row, own in rounds.items():
        ratios = [a / b for a, b in zip(rates(own, of="tokens"), rates(first, of="tokens"))]
        spread = f"{min(ratios):.2f} .. {max(ratios):.2f}"
        lines.append(
            f"{row.preset:11}{row.length:7}{row.batch_size:6}{row.contexts:9}{row.workers:8}  {row.kvstore:9}"
            f"{statistics.median(rates(own)):9.1f}{statistics.median(rates(own, of='tokens')):9.0f}"
            f"{statistics.median(ratios):7.2f}   {spread:14}"
            f"{statistics.median(rates(own, of='flop')) / fastest:>11.0%}"
            f"{max(report['peak_gigabytes'] for report in own):9.2f}"
        )
        for part in parts:
            shares = [report["parts"][part] / report["parts"]["step"] for report in own]
            lines[-1] += f"{statistics.median(shares):>10.0%}"
    return "\n".join([*lines, f"peak of matrix products in this run: {fastest / 1e9:.1f} GFLOP/s"])
