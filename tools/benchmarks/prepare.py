"""Measures the way from text files to a batch: `benchmark.py prepare`."""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Mapping

from benchmarks.rates import corpus_folder, machine
from benchmarks.train import BASELINE_SCRIPTS, python_of

from gluon_bert import runtime
from gluon_bert.data.corpora.wikitext2 import FILES
from gluon_bert.errors import InputError
from gluon_bert.fileio import write_json

TRAIN, VALID = FILES
# Seeds the order of paragraphs in an enlarged text.
_SEED = 20_201


class Preparation:
    """A baseline: workers-N, cached or d2l. home: a new folder for caches."""

    def __init__(self, name: str, corpus: Path, home: Path) -> None:
        self.name = name
        self._home = home
        if name == "d2l":
            self._command = [python_of("d2l"), "d2l_prepare.py", str(corpus)]
        else:
            workers = "0" if name == "cached" else name.split("-")[1]
            self._command = [python_of(None), "gluon_bert_prepare.py", str(corpus), workers]
        if name == "cached":
            self._once(home)

    def make(self) -> dict[str, Any]:
        """Prepare the text in a new process; return its report (see `baselines/protocol.py`)."""
        if self.name == "cached":
            return self._once(self._home)
        with TemporaryDirectory(dir=self._home) as home:
            return self._once(Path(home))

    def _once(self, home: Path) -> dict[str, Any]:
        variables = {**os.environ, "MXNET_HOME": str(home)}
        done = subprocess.run(
            self._command, cwd=BASELINE_SCRIPTS, env=variables, capture_output=True, encoding="utf-8"
        )
        if done.returncode:
            last = (done.stderr.strip() or "no output").splitlines()[-1]
            raise InputError(f"{self.name} ended with status {done.returncode}: {last}")
        report: dict[str, Any] = json.loads(done.stdout)
        return report


def enlarged(corpus: Path, megabytes: int, folder: Path) -> Path:
    """Write a corpus that repeats the paragraphs of another in random orders; return its new folder.

    It has the given size or at most one paragraph more.
    """
    folder.mkdir()
    paragraphs = [line + b"\n" for line in (corpus / TRAIN).read_bytes().splitlines()]
    rng, written = random.Random(_SEED), 0
    with (folder / TRAIN).open("wb") as file:
        while written < megabytes * 1e6:
            for paragraph in rng.sample(paragraphs, len(paragraphs)):
                written += file.write(paragraph)
                if written >= megabytes * 1e6:
                    break
    (folder / VALID).write_bytes((corpus / VALID).read_bytes())
    return folder


def check_same_batches(rounds: dict[str, list[dict[str, Any]]]) -> None:
    """Raise InputError unless this package has made the same first batch every time."""
    made = {name: {each["first_batch"] for each in own} for name, own in rounds.items() if name != "d2l"}
    if len(set().union(*made.values())) > 1:
        raise InputError(f"first batches must be equal, but differ between {', '.join(made)}")


def run(arguments: argparse.Namespace) -> int:
    """Prepare a text with all baselines in turns."""
    names = [f"workers-{number}" for number in arguments.preprocessing_workers.split(",")]
    names += arguments.against.split(",") if arguments.against else []
    corpus = corpus_folder(arguments.corpus)
    with TemporaryDirectory(prefix="gluon_bert-benchmark-") as folder:
        if arguments.megabytes:
            corpus = enlarged(corpus, arguments.megabytes, Path(folder, "text"))
        megabytes = sum((corpus / name).stat().st_size for name in (TRAIN, VALID)) / 1e6
        baselines = []
        for name in dict.fromkeys(names):
            print(f"preparing {name}", file=sys.stderr)
            Path(folder, name).mkdir()
            baselines.append(Preparation(name, corpus, Path(folder, name)))
        rounds: dict[str, list[dict[str, Any]]] = {each.name: [] for each in baselines}
        for _ in range(arguments.rounds):
            for each in baselines:
                rounds[each.name].append(each.make())
    check_same_batches(rounds)
    summary = f"{megabytes:.1f} MB, {arguments.rounds} rounds, {machine()}"
    print(table(summary, megabytes, rounds))
    if arguments.json:
        content = {"benchmark": "prepare", "work": summary, "versions": runtime.versions()}
        write_json(arguments.json, {**content, "rounds": rounds})
    return 0


def table(summary: str, megabytes: float, rounds: Mapping[str, list[dict[str, Any]]]) -> str:
    """Return the times of preparation as text."""
    first = next(iter(rounds.values()))
    lines = [summary, f"{'':14}{'seconds':>9}{'MB/s':>8}{'ratio':>7}   {'from .. to':14}{'peak GB':>9}"]
    for name, own in rounds.items():
        seconds = statistics.median(each["seconds"] for each in own)
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(first, own)]
        spread = f"{min(ratios):.2f} .. {max(ratios):.2f}"
        lines.append(
            f"{name:14}{seconds:9.2f}{megabytes / seconds:8.1f}{statistics.median(ratios):7.2f}   {spread:14}"
            f"{max(each['peak_gigabytes'] for each in own):9.2f}"
        )
    return "\n".join(lines)
