"""Measures optimizer steps of processes that take turns: `benchmark.py train`."""

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

from benchmarks.rates import corpus_folder, machine, rates

from gluon_bert import runtime, system
from gluon_bert.data.corpora.wikitext2 import data_folder
from gluon_bert.errors import InputError
from gluon_bert.fileio import write_json

BASELINE_SCRIPTS = Path(__file__).with_name("baselines")
# Arguments of the calls of pip that install a baseline.
REQUIREMENTS = {
    # The dependencies of d2l itself are old and large, and this benchmark uses few of them.
    "d2l": (
        ["mxnet==1.9.1", "numpy<1.24", "pandas", "matplotlib", "ipython", "matplotlib-inline", "requests"],
        ["--no-deps", "d2l==0.17.6"],
    ),
    # Several gigabytes with CUDA if pip finds no wheel for CPUs.
    "pytorch": (["torch==2.13.0", "numpy"],),
}


class BaselineSpec(NamedTuple):
    """How to start a baseline. environment: the name of a virtual environment, None for this one."""

    script: str
    arguments: tuple[str, ...] = ()
    environment: str | None = None
    variables: Mapping[str, str] = {}


# CORPUS and BATCHES stand for the corpus and for a file of prepared batches.
BASELINES = {
    "compiled": BaselineSpec("gluon_bert_train.py", ("CORPUS",), None, {"GLUON_BERT_OPERATORS": "compiled"}),
    "compiled-bf16": BaselineSpec(
        "gluon_bert_train.py", ("CORPUS", "bf16"), None, {"GLUON_BERT_OPERATORS": "compiled"}
    ),
    "mxnet": BaselineSpec("gluon_bert_train.py", ("CORPUS",), None, {"GLUON_BERT_OPERATORS": "mxnet"}),
    "d2l": BaselineSpec("d2l_train.py", ("CORPUS",), "d2l"),
    "pytorch": BaselineSpec("pytorch_train.py", ("BATCHES", "fp32"), "pytorch"),
    "pytorch-bf16": BaselineSpec("pytorch_train.py", ("BATCHES", "bf16"), "pytorch"),
}


class Baseline:
    """A running baseline that takes training steps on request. details: its first report."""

    def __init__(self, name: str, corpus: Path, batches: Path, threads: str) -> None:
        spec = BASELINES[name]
        self.name = name
        given = {"CORPUS": str(corpus), "BATCHES": str(batches)}
        self._errors = TemporaryFile()  # noqa: SIM115 - open as long as the process lives
        self._process = subprocess.Popen(
            [python_of(spec.environment), spec.script, *(given.get(each, each) for each in spec.arguments)],
            cwd=BASELINE_SCRIPTS,
            # Waiting threads must not spin, or CPU time would include waiting.
            env={
                "OMP_WAIT_POLICY": "passive",
                **os.environ,
                "OMP_NUM_THREADS": threads,
                **spec.variables,
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
        )
        self.details = self._report()

    def take_steps(self, steps: int) -> dict[str, Any]:
        """Take steps and return the report (see `baselines/protocol.py`)."""
        assert self._process.stdin is not None
        print(steps, file=self._process.stdin, flush=True)
        return self._report()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _report(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._errors.seek(0)
            last = (self._errors.read().decode(errors="replace").strip() or "no output").splitlines()[-1]
            raise InputError(f"{self.name} ended with status {status}: {last}")
        report: dict[str, Any] = json.loads(line)
        return report


def write_batches(corpus: Path, count: int, path: Path) -> None:
    """Write the first batches of the corpus for baselines without a loader."""
    command = [sys.executable, "write_batches.py", str(corpus), str(count), str(path)]
    done = subprocess.run(command, cwd=BASELINE_SCRIPTS, stderr=subprocess.PIPE)
    if done.returncode:
        raise InputError(f"the batches cannot be written: {done.stderr.decode().strip().splitlines()[-1]}")


def python_of(environment: str | None) -> str:
    """Return the Python of a baseline's environment; create and fill it at first use."""
    if environment is None:
        return sys.executable
    folder = data_folder() / "gluon_bert" / "baselines" / environment
    python, complete = folder / "bin" / "python", folder / "complete"
    if not complete.exists():
        print(f"installing {environment} into {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        for packages in REQUIREMENTS[environment]:
            done = subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages])
            if done.returncode:
                raise InputError(f"--against {environment}: pip could not install {' '.join(packages)}")
        complete.touch()
    return str(python)


# Nats after a few dozen steps. Text and network are equal; initial weights, dropout and order differ.
LOSS_TOLERANCE = 0.2


def run(arguments: argparse.Namespace) -> int:
    """Take optimizer steps with all baselines in turns."""
    names = ["compiled", *arguments.against.split(",")]
    unknown = [name for name in names if name not in BASELINES]
    if unknown:
        raise InputError(f"--against must be some of {', '.join(BASELINES)}, got {unknown[0]}")
    corpus = corpus_folder(arguments.corpus)
    threads = os.environ.get("OMP_NUM_THREADS", str(system.usable_cores()))
    with TemporaryDirectory(prefix="gluon_bert-benchmark-") as folder, ExitStack() as stack:
        batches = Path(folder, "batches.npz")
        write_batches(corpus, (arguments.rounds + 1) * arguments.steps, batches)
        baselines = []
        for name in dict.fromkeys(names):
            print(f"preparing {name}", file=sys.stderr)
            baselines.append(Baseline(name, corpus, batches, threads))
            stack.callback(baselines[-1].close)
        rounds: dict[str, list[dict[str, Any]]] = {each.name: [] for each in baselines}
        for number in range(arguments.rounds + 1):
            for each in baselines:
                report = each.take_steps(arguments.steps)
                if number:  # the first round warms up
                    rounds[each.name].append(report)
        details = {each.name: each.details for each in baselines}
    summary = f"{arguments.rounds} rounds of {arguments.steps} steps, {threads} threads, {machine()}"
    print(table(summary, rounds, details))
    if arguments.json:
        content = {"benchmark": "train", "work": summary, "versions": runtime.versions()}
        write_json(arguments.json, {**content, "baselines": details, "rounds": rounds})
    check_losses(rounds)
    return 0


def table(
    summary: str, rounds: Mapping[str, list[dict[str, Any]]], details: Mapping[str, Mapping[str, Any]]
) -> str:
    """Return the rates of training as text, with the share of the peak matrix products."""
    clock, cores = (
        {name: rates(own, key) for name, own in rounds.items()} for key in ("seconds", "cpu_seconds")
    )
    first = next(iter(rounds))
    lines = [summary, f"{'':14}{'pairs/s':>9}{'ratio':>7}   {'from .. to':14}{'pairs/CPU s':>11}{'ratio':>7}"]
    lines[-1] += f"{'peak GB':>9}{'ready s':>9}{'MLM loss':>10}"
    for name, own in rounds.items():
        ratios = [a / b for a, b in zip(clock[name], clock[first])]
        cpu_ratios = [a / b for a, b in zip(cores[name], cores[first])]
        spread = f"{min(ratios):.2f} .. {max(ratios):.2f}"
        lines.append(
            f"{name:14}{statistics.median(clock[name]):9.1f}{statistics.median(ratios):7.2f}   {spread:14}"
            f"{statistics.median(cores[name]):11.1f}{statistics.median(cpu_ratios):7.2f}"
            f"{own[-1]['peak_gigabytes']:9.2f}{details[name]['ready_seconds']:9.1f}{own[-1]['mlm_loss']:10.3f}"
        )
    lines += [f"{name}: {detail['software']}" for name, detail in details.items()]
    counted = [name for name, detail in details.items() if "flop_per_pair" in detail]
    return "\n".join([*lines, *(share_of_peak(name, cores[name], details[name]) for name in counted)])


def share_of_peak(name: str, cpu_rates: Sequence[float], details: Mapping[str, Any]) -> str:
    """Return a line on the FLOPs of a step without padding and their share of the peak."""
    most = details["peak_matmul"]["flop_per_cpu_second"]
    reached = details["flop_per_pair"] * statistics.median(cpu_rates)
    return (
        f"{name}: {details['flop_per_pair'] / 1e6:.0f} MFLOP of matrix products per pair, "
        f"{reached / 1e9:.1f} GFLOP per CPU second, {reached / most:.0%} of the peak of this run, "
        f"{most / 1e9:.1f}"
    )


def check_losses(rounds: Mapping[str, list[dict[str, Any]]]) -> None:
    """Raise InputError if the loss of the first baseline is above that of another."""
    first, *others = ((name, own[-1]["mlm_loss"]) for name, own in rounds.items())
    for name, loss in others:
        if not first[1] <= loss + LOSS_TOLERANCE:
            raise InputError(
                f"the MLM loss of {first[0]} must not exceed that of {name}, {loss:.3f}, got {first[1]:.3f}"
            )
