"""The contestants of `benchmark.py prepare`: processes that make a text ready, up to a batch."""

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

from benchmarks.common import corpus_folder, machine
from benchmarks.train import BASELINE_SCRIPTS, python_of

from gluon_bert import runtime
from gluon_bert.data.corpora.wikitext2 import FILES
from gluon_bert.errors import InputError
from gluon_bert.fileio import write_json

TRAIN, VALID = FILES  # the names of its two files
# Of the order of a larger text's paragraphs.
_SEED = 20_201


class Preparation:
    """A way to make a text ready: with so many workers, from what is kept of the last time, or the seed's."""

    def __init__(self, name: str, corpus: Path, home: Path) -> None:
        """home: a new folder for what is kept."""
        self.name = name
        self._home = home
        if name == "seed":
            self._command = [python_of("seed"), "d2l_prepare.py", str(corpus)]
        else:
            workers = "0" if name == "cached" else name.split("-")[1]
            self._command = [python_of(None), "gluon_bert_prepare.py", str(corpus), workers]
        if name == "cached":
            self._once(home)

    def make(self) -> dict[str, Any]:
        """Make the text ready in a new process; see `baselines/protocol.py` for the answer."""
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
            last = (done.stderr.strip() or "it says nothing").splitlines()[-1]
            raise InputError(f"{self.name} ended with status {done.returncode}: {last}")
        return json.loads(done.stdout)


def enlarged(corpus: Path, megabytes: int, folder: Path) -> Path:
    """A corpus whose training text has the paragraphs of another's, again and again in new orders.

    It has so many MB or a paragraph more, in `folder`, which is made.
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


def check_same_batches(answers: dict[str, list[dict[str, Any]]]) -> None:
    """Raise InputError unless this package has made the same first batch each time, in all its ways."""
    made = {name: {each["made"] for each in own} for name, own in answers.items() if name != "seed"}
    if len(set().union(*made.values())) > 1:
        raise InputError(f"not the same first batch was made by {', '.join(made)}")


def prepare(arguments: argparse.Namespace) -> int:
    """A text made ready, by processes in turns."""

    names = [f"workers-{number}" for number in arguments.workers.split(",")]
    names += arguments.against.split(",") if arguments.against else []
    corpus = corpus_folder(arguments.corpus)
    with TemporaryDirectory(prefix="gluon_bert-benchmark-") as folder:
        if arguments.megabytes:
            corpus = enlarged(corpus, arguments.megabytes, Path(folder, "text"))
        megabytes = sum((corpus / name).stat().st_size for name in (TRAIN, VALID)) / 1e6
        contestants = []
        for name in dict.fromkeys(names):
            print(f"getting {name} ready", file=sys.stderr)
            Path(folder, name).mkdir()
            contestants.append(Preparation(name, corpus, Path(folder, name)))
        answers: dict[str, list[dict[str, Any]]] = {each.name: [] for each in contestants}
        for _ in range(arguments.rounds):
            for each in contestants:
                answers[each.name].append(each.make())
    check_same_batches(answers)
    told = f"{megabytes:.1f} MB, {arguments.rounds} rounds, {machine()}"
    print(prepare_table(told, megabytes, answers))
    if arguments.json:
        content = {"what": "prepare", "work": told, "versions": runtime.versions()}
        write_json(arguments.json, {**content, "rounds": answers})
    return 0


def prepare_table(told: str, megabytes: float, answers: Mapping[str, list[dict[str, Any]]]) -> str:
    """How long it took to make a text ready, for people."""
    first = next(iter(answers.values()))
    lines = [told, f"{'':14}{'seconds':>9}{'MB/s':>8}{'ratio':>7}   {'from .. to':14}{'peak GB':>9}"]
    for name, own in answers.items():
        seconds = statistics.median(each["seconds"] for each in own)
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(first, own)]
        spread = f"{min(ratios):.2f} .. {max(ratios):.2f}"
        lines.append(
            f"{name:14}{seconds:9.2f}{megabytes / seconds:8.1f}{statistics.median(ratios):7.2f}   {spread:14}"
            f"{max(each['peak_gigabytes'] for each in own):9.2f}"
        )
    return "\n".join(lines)
