"""The rows of `benchmark.py scale`, and an estimate on paper of what no row can measure here."""

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

from benchmarks.common import corpus_folder, machine, rates
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
    check_memory,
    flops_per_pair,
    max_masked,
    parameter_count,
)

LAUNCH = Path(__file__).with_name("launch.py")


class ScaleCase(NamedTuple):
    """What is measured at once: a preset on texts of `length` tokens, `batch_size` pairs of all workers."""

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
        """Its configuration. Pairs are packed of whole articles, at whose ends alone they are shorter."""
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
        """What new processes tell of so many steps; see `baselines/gluon_bert_scale.py` for the answer."""
        asked = {"config": self.config(corpus).to_json(), "contexts": self.contexts, "steps": steps}
        with TemporaryDirectory(prefix="gluon_bert-benchmark-") as folder:
            answer = Path(folder, "answer.json")
            given = [json.dumps(asked), str(os.getpid()), str(answer), f"--kvstore={self.kvstore}"]
            command = [python_of(None), "gluon_bert_scale.py", *given]
            if self.workers > 1:
                job = ["-n", str(self.workers), "--kvstore", self.kvstore]
                command = [python_of(None), str(LAUNCH), *job, "--", *command]
            done = subprocess.run(
                command,
                cwd=BASELINE_SCRIPTS,
                # Threads of several contexts or workers must not spin for the cores of each other.
                env={"OMP_WAIT_POLICY": "passive", **os.environ},
                capture_output=True,
                encoding="utf-8",
            )
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if not line.startswith("launch: ")]
                last = lines[-1] if lines else "it says nothing"
                raise InputError(f"{self} ended with status {done.returncode}: {last}")
            return json.loads(answer.read_text("utf-8"))


def rows_of(kvstores: Sequence[str], *values: Sequence[Any]) -> list[ScaleCase]:
    """A row of the first value of each field, then one for each other value, in the place of the first.

    Those of several workers are there for each kvstore.
    """
    first = ScaleCase(*(each[0] for each in values))
    others = [first._replace(**{name: v}) for name, each in zip(ScaleCase._fields, values) for v in each[1:]]
    rows = dict.fromkeys([first, *others])
    return [row._replace(kvstore=k) for row in rows for k in (kvstores if row.workers > 1 else ["device"])]


def check_cases(rows: Sequence[ScaleCase], corpus: Path) -> None:
    """Raise one InputError that names every row which could not train here, and why."""
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
                compiled = ops.compiled(contexts)
                check_memory(config, 1, row.contexts, compiled, limit / row.workers, row.workers)
        except InputError as error:
            problems.append(f"{row}: {error}")
    if problems:
        raise InputError("\n".join(problems))


# What an estimate assumes. Two rates of a GPU, both by published throughputs in fp16 and the FLOPs that are
# counted here: BERT-Base by GluonNLP 0.10's scripts on V100s, 132,900 tokens a second on eight, and
# BERT-Large by NVIDIA's own code on an A100, 580 pairs of 128 tokens a second.
TOKENS_AT_ONCE = 8192  # on a GPU
VOCABULARY = 30522
PCI_EXPRESS = 12e9  # bytes a second each way, of version 3 with 16 lanes
NETWORKS = (10, 25, 100)  # Gbit a second each way
GPUS, MACHINES = 8, 32


def flops_of_a_pair(name: str, length: int) -> float:
    """As a step counts them, with the original's vocabulary."""
    config = preset(name).replace(max_seq_length=length)
    return flops_per_pair(config.model, VOCABULARY, length, max_masked(config))


def gpu_rates() -> tuple[float, float]:
    """FLOPs a second that a GPU was seen to reach, by the two throughputs above."""
    gluonnlp = 132_900 / GPUS / 128 * flops_of_a_pair("bert-base", 128)
    return gluonnlp, 580 * flops_of_a_pair("bert-large", 128)


def passed_on(size: float, members: int) -> float:
    """Bytes that a member sends, and receives, to have the sum of all members' arrays of so many bytes.

    It is what a ring sends, and what a member sends that is at the same time the server of its share: but for
    its own share, its array to the servers, and its share's sum to the others.
    """
    return 2 * size * (members - 1) / members


def estimate() -> str:
    """A table of what is expected of GPUs and machines that nothing here has run on."""
    lines = [
        f"An estimate; nothing of it was run. A step computes {TOKENS_AT_ONCE} tokens on each GPU, then sums",
        f"the gradients over {GPUS} GPUs of a machine at {PCI_EXPRESS / 1e9:.0f} GB/s each way, then over "
        f"{MACHINES} machines, each of",
        "which is a worker and a server, at the network's full rate. Nothing overlaps. Behind the time of a",
        "step is the share of it in which the GPUs compute.",
        f"{'':11}{'':>7}{'gradients':>10}{'TFLOP/s':>9}{'computing':>11}{f'{GPUS} GPUs':>16}"
        + "".join(f"{f'{MACHINES} x {GPUS}, {rate} Gbit/s':>22}" for rate in NETWORKS),
    ]
    for name, length, rate in _cases():
        size = float(FLOAT * parameter_count(preset(name).model, VOCABULARY))
        computing = TOKENS_AT_ONCE / length * flops_of_a_pair(name, length) / rate
        machine = computing + passed_on(size, GPUS) / PCI_EXPRESS
        many = [machine + passed_on(size, MACHINES) / (network * 1e9 / 8) for network in NETWORKS]
        told = "".join(
            f"{f'{step * 1e3:.0f} ms, {computing / step:.0%}':>{width}}"
            for step, width in zip([machine, *many], (16, 22, 22, 22))
        )
        lines.append(
            f"{name:11}{length:7}{size / 1e6:7.0f} MB{rate / 1e12:9.0f}{computing * 1e3:8.0f} ms{told}"
        )
    return "\n".join(lines)


def _cases() -> Iterator[tuple[str, int, float]]:
    for name in ("bert-base", "bert-large"):
        for length in (128, 512):
            for rate in gpu_rates():
                yield name, length, rate


# Flags that take numbers with commas between them, in the order of a row of scale.
COUNTS = ("lengths", "batch_sizes", "contexts", "workers")


def scale(arguments: argparse.Namespace) -> int:
    """Steps of networks, lengths, batches, contexts and workers, each in new processes, in turns."""

    from gluon_bert import ops

    if arguments.estimate:
        print(estimate())
        return 0
    values = [[int(number) for number in getattr(arguments, name).split(",")] for name in COUNTS]
    rows = rows_of(arguments.kvstore.split(","), arguments.presets.split(","), *values)
    corpus = corpus_folder(arguments.corpus)
    check_cases(rows, corpus)
    answers: dict[ScaleCase, list[dict[str, Any]]] = {row: [] for row in rows}
    for number in range(arguments.rounds):
        for row in rows:
            answers[row].append(row.measure(corpus, arguments.steps))
            (rate,) = rates(answers[row][-1:])
            print(f"round {number + 1} of {arguments.rounds}: {row}: {rate:.1f} pairs/s", file=sys.stderr)
    threads, words = runtime.versions()["threads"], answers[rows[0]][0]["vocabulary"]
    told = (
        f"{arguments.rounds} rounds of {arguments.steps} steps, {threads} threads, {machine()}, "
        f"operators: {ops.describe()}, a vocabulary of {words:,}"
    )
    print(scale_table(told, answers))
    if arguments.json:
        content = {"what": "scale", "work": told, "versions": runtime.versions()}
        of_rows = [{**row._asdict(), "rounds": own} for row, own in answers.items()]
        write_json(arguments.json, {**content, "rows": of_rows})
    return 0


def scale_table(told: str, answers: Mapping[Any, list[dict[str, Any]]]) -> str:
    """What each row reaches, for people; of a step's parts those that are not the making of its batch."""
    fastest = max(answer["flop_per_second_of_products"] for own in answers.values() for answer in own)
    parts = ("computing", "summing", "updating")
    first = next(iter(answers.values()))
    lines = [told, f"{'':11}{'tokens':>7}{'pairs':>6}{'contexts':>9}{'workers':>8}  {'summed by':9}"]
    lines[-1] += (
        f"{'pairs/s':>9}{'tokens/s':>9}{'ratio':>7}   {'from .. to':14}{'of products':>11}{'peak GB':>9}"
    )
    lines[-1] += "".join(f"{part:>10}" for part in parts)
    for row, own in answers.items():
        ratios = [a / b for a, b in zip(rates(own, of="tokens"), rates(first, of="tokens"))]
        spread = f"{min(ratios):.2f} .. {max(ratios):.2f}"
        lines.append(
            f"{row.preset:11}{row.length:7}{row.batch_size:6}{row.contexts:9}{row.workers:8}  {row.kvstore:9}"
            f"{statistics.median(rates(own)):9.1f}{statistics.median(rates(own, of='tokens')):9.0f}"
            f"{statistics.median(ratios):7.2f}   {spread:14}"
            f"{statistics.median(rates(own, of='flop')) / fastest:>11.0%}"
            f"{max(answer['peak_gigabytes'] for answer in own):9.2f}"
        )
        for part in parts:
            shares = [answer["parts"][part] / answer["parts"]["step"] for answer in own]
            lines[-1] += f"{statistics.median(shares):>10.0%}"
    return "\n".join([*lines, f"the fastest products seen in this run: {fastest / 1e9:.1f} GFLOP a second"])
