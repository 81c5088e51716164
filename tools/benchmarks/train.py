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
from gluon_bert.config import Config
from gluon_bert.data.corpora.wikitext2 import data_folder
from gluon_bert.errors import InputError
from gluon_bert.fileio import write_json
from gluon_bert.presets import preset

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
    "transformers": (["torch==2.13.0", "transformers==5.24.0", "numpy"],),
}


class BaselineSpec(NamedTuple):
    """How to start a baseline. environment: the name of a virtual environment, None for this one."""

    script: str
    arguments: tuple[str, ...] = ()
    environment: str | None = None
    operators: str | None = None


# CORPUS, BATCHES, FP32 and BF16 stand for the corpus, a file of prepared batches, and the configuration in a
# precision.
BASELINES = {
    "compiled": BaselineSpec("gluon_bert_train.py", ("FP32",), operators="compiled"),
    "compiled-bf16": BaselineSpec("gluon_bert_train.py", ("BF16",), operators="compiled"),
    "mxnet": BaselineSpec("gluon_bert_train.py", ("FP32",), operators="mxnet"),
    "d2l": BaselineSpec("d2l_train.py", ("CORPUS",), "d2l"),
    "pytorch": BaselineSpec("pytorch_train.py", ("BATCHES", "fp32"), "pytorch"),
    "pytorch-bf16": BaselineSpec("pytorch_train.py", ("BATCHES", "bf16"), "pytorch"),
    "pytorch-all": BaselineSpec("pytorch_train.py", ("BATCHES", "fp32", "all"), "pytorch"),
    "pytorch-all-bf16": BaselineSpec("pytorch_train.py", ("BATCHES", "bf16", "all"), "pytorch"),
    "pytorch-compile": BaselineSpec("pytorch_train.py", ("BATCHES", "fp32", "compile"), "pytorch"),
    "pytorch-compile-bf16": BaselineSpec("pytorch_train.py", ("BATCHES", "bf16", "compile"), "pytorch"),
    "transformers": BaselineSpec("transformers_train.py", ("BATCHES", "fp32"), "transformers"),
    "transformers-bf16": BaselineSpec("transformers_train.py", ("BATCHES", "bf16"), "transformers"),
}


def case_config(name: str, corpus: Path, length: int | None, pairs: int | None) -> Config:
    """Return the configuration of a preset on texts of `length` tokens and steps of so many pairs.

    d2l is D2L's. The others have AdamW, as all baselines do, and a constant learning rate. So their
    losses can be compared after a few steps.
    """
    config = preset(name).replace(corpus=(str(corpus),))
    if name != "d2l":
        config = config.replace(
            text_format="articles",
            pairs="packed",
            short_seq_prob=0.0,
            num_buckets=1,
            batch_size=BERT_PAIRS,
            optimizer="adamw",
            schedule="constant",
            warmup_ratio=0.0,
        )
    if length:
        config = config.replace(max_seq_length=length)
    config = config.replace(batch_size=pairs) if pairs else config
    config.check()
    return config


# Pairs of a step of the presets other than d2l.
BERT_PAIRS = 16


class Baseline:
    """A running baseline that takes training steps on request. details: its first report."""

    def __init__(self, name: str, config: Config, batches: Path, threads: str) -> None:
        spec = BASELINES[name]
        self.name = name
        given = {"CORPUS": config.data.corpus[0], "BATCHES": str(batches)}
        for precision in ("fp32", "bf16"):
            given[precision.upper()] = json.dumps(config.replace(precision=precision).to_json())
        operators = {"GLUON_BERT_OPERATORS": spec.operators} if spec.operators else {}
        self._errors = TemporaryFile()  # noqa: SIM115 - open as long as the process lives
        self._process = subprocess.Popen(
            [python_of(spec.environment), spec.script, *(given.get(each, each) for each in spec.arguments)],
            cwd=BASELINE_SCRIPTS,
            # Waiting threads must not spin, or CPU time would include waiting.
            env={
                "OMP_WAIT_POLICY": "passive",
                **os.environ,
                "OMP_NUM_THREADS": threads,
                **operators,
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


def write_batches(config: Config, count: int, path: Path) -> None:
    """Write the first batches for baselines without a loader."""
    command = [sys.executable, "write_batches.py", json.dumps(config.to_json()), str(count), str(path)]
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
    """Take optimizer steps with all baselines in turns, for one length after another."""
    names = baselines_of(arguments)
    corpus = corpus_folder(arguments.corpus)
    lengths = [int(each) for each in arguments.lengths.split(",")] if arguments.lengths else [None]
    threads = os.environ.get("OMP_NUM_THREADS", str(system.usable_cores()))
    cases = []
    for length in lengths:
        config = case_config(arguments.preset, corpus, length, arguments.batch_size)
        rounds, details = measure(names, config, arguments.rounds, arguments.steps, threads)
        summary = (
            f"{arguments.preset}, {config.train.batch_size} pairs of at most "
            f"{config.data.max_seq_length} tokens, {arguments.rounds} rounds of {arguments.steps} steps, "
            f"{threads} threads, {machine()}"
        )
        print(table(summary, rounds, details), flush=True)
        cases.append({"work": summary, "baselines": details, "rounds": rounds})
        if arguments.json:
            content = {"benchmark": "train", "versions": runtime.versions(), "cases": cases}
            write_json(arguments.json, content)
        check_losses(rounds)
    return 0


def baselines_of(arguments: argparse.Namespace) -> list[str]:
    """Return the names of the baselines in the order of their turns."""
    names = arguments.against.split(",")
    unknown = [name for name in names if name not in BASELINES]
    if unknown:
        raise InputError(f"--against must be some of {', '.join(BASELINES)}, got {unknown[0]}")
    if "d2l" in names and arguments.preset != "d2l":
        raise InputError(f"--against d2l needs --preset d2l, got {arguments.preset}")
    if "transformers" in names and arguments.preset == "d2l":
        raise InputError(
            "--against transformers needs a bert preset, got d2l. Its BertModel normalizes the embeddings"
        )
    return list(dict.fromkeys(["compiled", *names]))


def measure(
    names: Sequence[str], config: Config, rounds: int, steps: int, threads: str
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[str, Any]]]:
    """Return each baseline's reports by round, and its details. The first round warms up and is left out."""
    with TemporaryDirectory(prefix="gluon_bert-benchmark-") as folder, ExitStack() as stack:
        batches = Path(folder, "batches.npz")
        write_batches(config, (rounds + 1) * steps, batches)
        baselines = []
        for name in names:
            print(f"preparing {name}", file=sys.stderr)
            baselines.append(Baseline(name, config, batches, threads))
            stack.callback(baselines[-1].close)
        reports: dict[str, list[dict[str, Any]]] = {each.name: [] for each in baselines}
        for number in range(rounds + 1):
            for each in baselines:
                report = each.take_steps(steps)
                if number:
                    reports[each.name].append(report)
        return reports, {each.name: each.details for each in baselines}


def table(
    summary: str, rounds: Mapping[str, list[dict[str, Any]]], details: Mapping[str, Mapping[str, Any]]
) -> str:
    """Return the rates of training as text, with the share of the peak matrix products."""
    clock, cores = (
        {name: rates(own, key) for name, own in rounds.items()} for key in ("seconds", "cpu_seconds")
    )
    first = next(iter(rounds))
    lines = [summary, f"{'':20}{'pairs/s':>9}{'ratio':>7}   {'from .. to':14}{'pairs/CPU s':>11}{'ratio':>7}"]
    lines[-1] += f"{'peak GB':>9}{'ready s':>9}{'MLM loss':>10}"
    for name, own in rounds.items():
        ratios = [a / b for a, b in zip(clock[name], clock[first])]
        cpu_ratios = [a / b for a, b in zip(cores[name], cores[first])]
        spread = f"{min(ratios):.2f} .. {max(ratios):.2f}"
        lines.append(
            f"{name:20}{statistics.median(clock[name]):9.1f}{statistics.median(ratios):7.2f}   {spread:14}"
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
