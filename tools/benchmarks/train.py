"""The contestants of `benchmark.py train`: processes that make optimizer steps when they are asked to."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import venv
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any, Mapping, NamedTuple, Sequence

from benchmarks.common import corpus_folder, machine, rates

from gluon_bert import runtime, system
from gluon_bert.data.corpora.wikitext2 import data_folder
from gluon_bert.errors import InputError
from gluon_bert.fileio import write_json

BASELINE_SCRIPTS = Path(__file__).with_name("baselines")
# What pip installs for a contestant, in one call each.
REQUIREMENTS = {
    # What the package itself asks for is old and large, and for the most part of no use to this section.
    "seed": (
        ["mxnet==1.9.1", "numpy<1.24", "pandas", "matplotlib", "ipython", "matplotlib-inline", "requests"],
        ["--no-deps", "d2l==0.17.6"],
    ),
    # Several gigabytes with CUDA, where pip finds no wheel for CPUs.
    "pytorch": (["torch==2.13.0", "numpy"],),
}


class BaselineSpec(NamedTuple):
    """A contestant: what runs it, with what arguments, in which environment (None: this one)."""

    script: str
    arguments: tuple[str, ...] = ()
    environment: str | None = None
    variables: Mapping[str, str] = {}


# The arguments CORPUS and BATCHES stand for the corpus and for a file of ready batches.
BASELINES = {
    "compiled": BaselineSpec("gluon_bert_train.py", ("CORPUS",), None, {"GLUON_BERT_OPERATORS": "compiled"}),
    "compiled-bf16": BaselineSpec(
        "gluon_bert_train.py", ("CORPUS", "bf16"), None, {"GLUON_BERT_OPERATORS": "compiled"}
    ),
    "mxnet": BaselineSpec("gluon_bert_train.py", ("CORPUS",), None, {"GLUON_BERT_OPERATORS": "mxnet"}),
    "seed": BaselineSpec("d2l_train.py", ("CORPUS",), "seed"),
    "pytorch": BaselineSpec("pytorch_train.py", ("BATCHES", "fp32"), "pytorch"),
    "pytorch-bf16": BaselineSpec("pytorch_train.py", ("BATCHES", "bf16"), "pytorch"),
}


class Baseline:
    """A process that has its text and network ready, and makes steps when asked."""

    def __init__(self, name: str, corpus: Path, batches: Path, threads: str) -> None:
        kind = BASELINES[name]
        self.name = name
        given = {"CORPUS": str(corpus), "BATCHES": str(batches)}
        self._told = TemporaryFile()  # noqa: SIM115 - open as long as the process lives
        self._process = subprocess.Popen(
            [python_of(kind.environment), kind.script, *(given.get(each, each) for each in kind.arguments)],
            cwd=BASELINE_SCRIPTS,
            # Threads that wait must not spin, or the time at work would not be work.
            env={
                "OMP_WAIT_POLICY": "passive",
                **os.environ,
                "OMP_NUM_THREADS": threads,
                **kind.variables,
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._told,
            encoding="utf-8",
        )
        self.facts = self._answer()

    def make(self, steps: int) -> dict[str, Any]:
        """Let it make some steps; see `baselines/protocol.py` for the answer."""
        assert self._process.stdin is not None
        print(steps, file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._told.seek(0)
            last = (self._told.read().decode(errors="replace").strip() or "it says nothing").splitlines()[-1]
            raise InputError(f"{self.name} ended with status {status}: {last}")
        return json.loads(line)


def write_batches(corpus: Path, count: int, path: Path) -> None:
    """Write so many batches of the corpus for contestants that make none."""
    command = [sys.executable, "write_batches.py", str(corpus), str(count), str(path)]
    done = subprocess.run(command, cwd=BASELINE_SCRIPTS, stderr=subprocess.PIPE)
    if done.returncode:
        raise InputError(f"the batches cannot be made: {done.stderr.decode().strip().splitlines()[-1]}")


def python_of(environment: str | None) -> str:
    """The Python of a contestant's environment, which is made and filled at the first call."""
    if environment is None:
        return sys.executable
    folder = data_folder() / "gluon_bert" / "peers" / environment
    python, whole = folder / "bin" / "python", folder / "whole"
    if not whole.exists():
        print(f"installing {environment} into {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        for packages in REQUIREMENTS[environment]:
            done = subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages])
            if done.returncode:
                raise InputError(f"--against {environment}: pip cannot install {' '.join(packages)}")
        whole.touch()
    return str(python)


# Pairs of a text are the same, and so is the network; what is left is initial weights, dropout, order.
LEARNT_LESS = 0.2  # nats after a few dozen steps


def train(arguments: argparse.Namespace) -> int:
    """Optimizer steps of processes in turns."""

    names = ["compiled", *(arguments.against or "mxnet").split(",")]
    unknown = [name for name in names if name not in BASELINES]
    if unknown:
        raise InputError(f"--against {unknown[0]}: must be some of {', '.join(BASELINES)}")
    corpus = corpus_folder(arguments.corpus)
    threads = os.environ.get("OMP_NUM_THREADS", str(system.usable_cores()))
    with TemporaryDirectory(prefix="gluon_bert-benchmark-") as folder, ExitStack() as stack:
        batches = Path(folder, "batches.npz")
        write_batches(corpus, (arguments.rounds + 1) * arguments.steps, batches)
        contestants = []
        for name in dict.fromkeys(names):
            print(f"getting {name} ready", file=sys.stderr)
            contestants.append(Baseline(name, corpus, batches, threads))
            stack.callback(contestants[-1].close)
        answers: dict[str, list[dict[str, Any]]] = {each.name: [] for each in contestants}
        for number in range(arguments.rounds + 1):
            for each in contestants:
                answer = each.make(arguments.steps)
                if number:  # the first one is to warm up
                    answers[each.name].append(answer)
        facts = {each.name: each.facts for each in contestants}
    told = f"{arguments.rounds} rounds of {arguments.steps} steps, {threads} threads, {machine()}"
    print(train_table(told, answers, facts))
    if arguments.json:
        content = {"what": "train", "work": told, "versions": runtime.versions()}
        write_json(arguments.json, {**content, "contestants": facts, "rounds": answers})
    check_losses(answers)
    return 0


def train_table(
    told: str, answers: Mapping[str, list[dict[str, Any]]], facts: Mapping[str, Mapping[str, Any]]
) -> str:
    """The rates of training for people, and which part of the possible the first contestant reaches."""
    clock, cores = (
        {name: rates(own, key) for name, own in answers.items()} for key in ("seconds", "cpu_seconds")
    )
    first = next(iter(answers))
    lines = [told, f"{'':14}{'pairs/s':>9}{'ratio':>7}   {'from .. to':14}{'pairs/CPU s':>11}{'ratio':>7}"]
    lines[-1] += f"{'peak GB':>9}{'ready s':>9}{'MLM loss':>10}"
    for name, own in answers.items():
        ratios = [a / b for a, b in zip(clock[name], clock[first])]
        cpu_ratios = [a / b for a, b in zip(cores[name], cores[first])]
        spread = f"{min(ratios):.2f} .. {max(ratios):.2f}"
        lines.append(
            f"{name:14}{statistics.median(clock[name]):9.1f}{statistics.median(ratios):7.2f}   {spread:14}"
            f"{statistics.median(cores[name]):11.1f}{statistics.median(cpu_ratios):7.2f}"
            f"{own[-1]['peak_gigabytes']:9.2f}{facts[name]['ready_seconds']:9.1f}{own[-1]['mlm_loss']:10.3f}"
        )
    lines += [f"{name}: {fact['with']}" for name, fact in facts.items()]
    counted = [name for name, fact in facts.items() if "flop_per_pair" in fact]
    return "\n".join([*lines, *(of_the_possible(name, cores[name], facts[name]) for name in counted)])


def of_the_possible(name: str, cpu_rates: Sequence[float], facts: Mapping[str, Any]) -> str:
    """Which part of the floor, the products of a step without padding, this package's step reaches."""
    most = facts["fastest_products"]["flop_per_cpu_second"]
    reached = facts["flop_per_pair"] * statistics.median(cpu_rates)
    return (
        f"{name}: {facts['flop_per_pair'] / 1e6:.0f} MFLOP of products a pair, {reached / 1e9:.1f} GFLOP a "
        f"CPU second, {reached / most:.0%} of the {most / 1e9:.1f} of the fastest products seen in this run"
    )


def check_losses(answers: Mapping[str, list[dict[str, Any]]]) -> None:
    """Raise InputError if the first contestant's loss is above another's: speed alone does not count."""
    first, *others = ((name, own[-1]["mlm_loss"]) for name, own in answers.items())
    for name, loss in others:
        if not first[1] <= loss + LEARNT_LESS:
            raise InputError(
                f"{first[0]} has learnt less than {name}: MLM loss {first[1]:.3f}, not {loss:.3f}"
            )
