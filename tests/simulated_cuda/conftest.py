"""Fixtures that run commands and code on simulated GPUs. Each run is a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from gluon_bert import runtime

from .build import build

ROOT = Path(__file__).resolve().parents[2]


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Mark every test of this folder `cuda`; skip it where the simulation cannot run."""
    reason = skip_reason()
    for item in items:
        if Path(__file__).parent in Path(str(item.fspath)).parents:
            item.add_marker(pytest.mark.cuda)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


def skip_reason() -> str:
    """Why the simulation cannot run here, or an empty string."""
    if not runtime.has_cuda_wheel():
        return f"needs {runtime.CUDA_WHEEL}"
    missing = [program for program in ("gcc", "nm") if shutil.which(program) is None]
    return f"needs {' and '.join(missing)} to build the simulated CUDA" if missing else ""


# Counts of calls in which the main thread waits for a device.
MAIN_THREAD = ("main_syncs", "main_d2h")


class Result(NamedTuple):
    """What a command on simulated GPUs left behind.

    processes: the counts of each process that used CUDA, that with the most launches first. logs: of each
    process, one line for each call.
    """

    status: int
    output: str
    processes: list[dict[str, Any]]
    logs: list[list[str]]

    @property
    def launches(self) -> int:
        """The launches on all GPUs of the process that launched the most."""
        return launches(self.processes[0])

    def assert_valid(self, num_gpus: int, num_processes: int = 1) -> None:
        """Fail unless every call was valid and simulated, and the given number of GPUs of each process
        worked.

        The main thread must not wait for a device or copy from one; MXNet's threads do that.
        """
        assert all((p["faults"], p["missing"]) == (0, 0) for p in self.processes), self.output
        working = [[d for d in p["devices"] if d["launches"]] for p in self.processes]
        assert [len(devices) for devices in working if devices] == [num_gpus] * num_processes
        waits = [device[name] for devices in working for device in devices for name in MAIN_THREAD]
        assert not any(waits), waits

    def lines(self, *events: str) -> list[str]:
        """The lines of the log for these events, each without the thread's name."""
        found = [line.split(" ", 1)[1] for log in self.logs for line in log]
        return [line for line in found if line.split(" ", 1)[0] in events]

    def by_process(self) -> list[Result]:
        """One result for each process, with its log alone."""
        return [self._replace(logs=[log]) for log in self.logs]


def launches(counts: dict[str, Any]) -> int:
    """The launches of a process on all its GPUs."""
    return sum(device["launches"] for device in counts["devices"])


class SimulatedGPUs:
    """Runs tools and code with the simulated CUDA; `folder` keeps what they write."""

    def __init__(self, libraries: Path, folder: Path) -> None:
        self.libraries, self.folder = libraries, folder
        self._number = 0

    def environment(self, **variables: str) -> dict[str, str]:
        """Environment variables for a process that is to find the simulated CUDA."""
        return {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "GLUON_BERT_OPERATORS": "mxnet",  # so that nothing is compiled
            "LD_LIBRARY_PATH": str(self.libraries),
            # Where NVIDIA's wheels are installed, too, the runtime takes the first nvidia/*/lib of sys.path.
            "PYTHONPATH": os.pathsep.join([str(self.libraries.parents[2]), str(ROOT)]),
            **variables,
        }

    def tool(
        self, name: str, *flags: str, status: int | None = 0, log: bool = False, **variables: str
    ) -> Result:
        """Run tools/NAME.py; fails the test unless it ends with this status (None: any)."""
        command = [sys.executable, f"tools/{name}.py", *map(str, flags)]
        return self._run(command, status, log, variables)

    def code(
        self, text: str, *arguments: str, status: int | None = 0, log: bool = False, **variables: str
    ) -> Result:
        """Run Python code in a fresh interpreter."""
        return self._run([sys.executable, "-c", text, *map(str, arguments)], status, log, variables)

    def _run(self, command: list[str], status: int | None, log: bool, variables: dict[str, str]) -> Result:
        self._number += 1
        reports = self.folder / f"process-{self._number}"
        reports.mkdir(parents=True)
        if log:
            variables = {**variables, "GPUSIM_LOG": str(reports / "log")}
        done = subprocess.run(
            command,
            cwd=str(ROOT),
            env=self.environment(GPUSIM_REPORT=str(reports), **variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        if status is not None:
            assert done.returncode == status, done.stdout
        counts = [json.loads(file.read_text()) for file in reports.glob("*.json")]
        # Each line begins with the time.
        logs = [
            [line.split(" ", 1)[1] for line in file.read_text().splitlines()]
            for file in reports.glob("log.*")
        ]
        return Result(done.returncode, done.stdout, sorted(counts, key=launches, reverse=True), logs)


@pytest.fixture(scope="session")
def simulated_cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the simulated libraries, built once for all tests."""
    folder = tmp_path_factory.mktemp("cuda") / "nvidia" / "simulated" / "lib"
    (wheel,) = runtime.installed_wheels()
    build(wheel.library, folder)
    return folder


@pytest.fixture
def gpus(simulated_cuda: Path, tmp_path: Path) -> SimulatedGPUs:
    """Runs on simulated GPUs."""
    return SimulatedGPUs(simulated_cuda, tmp_path)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 short texts."""
    folder = tmp_path_factory.mktemp("corpus")
    for d in range(40):
        words = [f"w{(d * 7 + i * i) % 97}" for i in range(160)]
        text = " ".join(" ".join(words[i : i + 8]).capitalize() + "." for i in range(0, 160, 8))
        (folder / f"{d}.txt").write_text(text + "\n")
    return folder


@pytest.fixture
def pretrain(gpus: SimulatedGPUs, corpus: Path, tmp_path: Path) -> Any:
    """Runs tools/pretrain.py on the small corpus, into the folder tmp_path / "run"."""

    def run(*flags: str, preset: str = "bert-tiny", name: str = "run", **options: Any) -> Result:
        given = ("--preset", preset, "--corpus", corpus, "--output", tmp_path / name, *flags)
        return gpus.tool("pretrain", *given, **options)

    return run


@pytest.fixture(scope="session")
def gpu_run(simulated_cuda: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 2 steps on two GPUs. Tests only read it."""
    folder = tmp_path_factory.mktemp("gpu_run")
    given = ("--preset", "bert-tiny", "--corpus", corpus, "--output", folder / "run")
    flags = ("--gpus", "0,1", "--batch-size", "8", "--num-steps", "2")
    SimulatedGPUs(simulated_cuda, folder).tool("pretrain", *given, *flags).assert_valid(2)
    return folder / "run"


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 24 labelled texts, which holds their words."""
    path = tmp_path_factory.mktemp("table") / "texts.tsv"
    rows = [f"w{i} w{7 * i % 97} w3\t{i % 2}\n" for i in range(24)]
    path.write_text("text\tlabel\n" + "".join(rows))
    return path
