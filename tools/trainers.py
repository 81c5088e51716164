"""The contestants of `benchmark.py train`: processes that make optimizer steps when they are asked to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Mapping, NamedTuple

from gluon_bert.data.wikitext import data_folder
from gluon_bert.errors import BadInput

PEERS = Path(__file__).with_name("peers")
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


class Kind(NamedTuple):
    """A contestant: what runs it, with what arguments, in which environment (None: this one)."""

    script: str
    arguments: tuple[str, ...] = ()
    environment: str | None = None
    variables: Mapping[str, str] = {}


# The arguments CORPUS and BATCHES stand for the corpus and for a file of ready batches.
CONTESTANTS = {
    "compiled": Kind("ours.py", ("CORPUS",), None, {"GLUON_BERT_OPERATORS": "compiled"}),
    "mxnet": Kind("ours.py", ("CORPUS",), None, {"GLUON_BERT_OPERATORS": "mxnet"}),
    "seed": Kind("seed.py", ("CORPUS",), "seed"),
    "pytorch": Kind("pytorch.py", ("BATCHES", "fp32"), "pytorch"),
    "pytorch-bf16": Kind("pytorch.py", ("BATCHES", "bf16"), "pytorch"),
}


class Contestant:
    """A process that has its text and network ready, and makes steps when asked."""

    def __init__(self, name: str, corpus: Path, batches: Path, threads: str) -> None:
        kind = CONTESTANTS[name]
        self.name = name
        given = {"CORPUS": str(corpus), "BATCHES": str(batches)}
        self._told = TemporaryFile()  # noqa: SIM115 - open as long as the process lives
        self._process = subprocess.Popen(
            [python_of(kind.environment), kind.script, *(given.get(each, each) for each in kind.arguments)],
            cwd=PEERS,
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
        """Let it make some steps; see `peers/protocol.py` for the answer."""
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
            raise BadInput(f"{self.name} ended with status {status}: {last}")
        return json.loads(line)


def write_batches(corpus: Path, count: int, path: Path) -> None:
    """Write so many batches of the corpus for contestants that make none."""
    command = [sys.executable, "batches.py", str(corpus), str(count), str(path)]
    done = subprocess.run(command, cwd=PEERS, stderr=subprocess.PIPE)
    if done.returncode:
        raise BadInput(f"the batches cannot be made: {done.stderr.decode().strip().splitlines()[-1]}")


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
                raise BadInput(f"--against {environment}: pip cannot install {' '.join(packages)}")
        whole.touch()
    return str(python)
