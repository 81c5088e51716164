"""Trains for hours and records memory, open files and throughput."""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from gluon_bert.cli import main_with_inner_command, parser_of, run
from gluon_bert.errors import InputError
from gluon_bert.fileio import atomic_write

EXAMPLES = """\
examples:
  python tools/dev/soak.py soak/ --minutes 120
  python tools/dev/soak.py soak/ --minutes 10 -- --preset bert-tiny --corpus wikitext-2 --checkpoint-every 60

Flags of tools/pretrain.py follow --. The folder gets the run, samples.csv and soak.png. The command prints
the medians of both halves of the time, without its first tenth. Linux only.
"""
EVERY = 2.0  # seconds between two samples
WARM_UP = 0.1  # share of the time in which memory may grow, until every batch shape has occurred


class Sample(NamedTuple):
    """The resources of a process at a time."""

    seconds: float
    memory: float  # resident MB
    files: int  # open files
    threads: int


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    p = parser_of(
        "dev/soak",
        "FOLDER [--minutes X] [-- FLAGS]",
        "Train for hours and check that memory, open files and throughput stay constant.",
        EXAMPLES,
    )
    p.add_argument("folder", type=Path, metavar="FOLDER", help="a new folder")
    p.add_argument("--minutes", type=float, default=120.0, metavar="X", help="minutes of training (120)")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return main_with_inner_command(parser(), argv, soak)


def soak(arguments: argparse.Namespace, flags: list[str]) -> int:
    """Train, record samples and print their medians."""
    folder, minutes = arguments.folder, arguments.minutes
    if folder.exists():
        raise InputError(f"FOLDER must be a new folder, but {folder} exists")
    if not minutes > 0:
        raise InputError(f"--minutes must be above 0, got {minutes}")
    folder.mkdir(parents=True)
    command = [sys.executable, str(Path(__file__).parent.with_name("pretrain.py"))]
    # 50 steps take about a minute on two cores.
    defaults = ["--eval-every", "50", "--checkpoint-every", "50", "--max-minutes", str(minutes)]
    process = subprocess.Popen([*command, *defaults, *flags, "--output", str(folder / "run")])
    samples = []
    try:
        began = time.monotonic()
        while process.poll() is None:
            samples += sampled(process.pid, time.monotonic() - began)
            time.sleep(EVERY)
    finally:
        process.terminate()
        status = process.wait()
    with (folder / "samples.csv").open("w", newline="") as file:
        csv.writer(file).writerows([Sample._fields, *samples])
    if status:
        return status
    windows = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text("utf-8").splitlines()]
    speeds = [(w["seconds"], w["pairs_per_second"]) for w in windows if "pairs_per_second" in w]
    draw(folder / "soak.png", samples, speeds)
    series: list[tuple[str, str, list[tuple[float, float]]]] = [
        ("memory", "MB", [(s.seconds, s.memory) for s in samples]),
        ("open files", "", [(s.seconds, s.files) for s in samples]),
        ("threads", "", [(s.seconds, s.threads) for s in samples]),
        ("throughput", "pairs/s", speeds),
    ]
    for name, unit, points in series:
        print(f"{name}: {halves(points)} {unit}".rstrip())
    return 0


def sampled(pid: int, seconds: float) -> list[Sample]:
    """Return a sample of a process, or nothing if it has ended."""
    try:
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
        )
        memory = int(status["VmRSS"].split()[0]) / 1024
        files = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
        return [Sample(seconds, memory, files, int(status["Threads"]))]
    except (OSError, KeyError):
        return []


def halves(points: list[tuple[float, float]]) -> str:
    """Return the medians of both halves of the time, without the warm-up.

    >>> halves([(0, 9.0), (1, 1.0), (4, 1.0), (6, 3.0), (10, 3.0)])
    '1.0 in the first half, 3.0 in the second'
    """
    end = points[-1][0] if points else 0.0
    middle = (1 + WARM_UP) / 2 * end
    first = [value for seconds, value in points if WARM_UP * end <= seconds < middle]
    second = [value for seconds, value in points if seconds >= middle]
    if not first or not second:
        return "too few samples"
    return f"{statistics.median(first):.1f} in the first half, {statistics.median(second):.1f} in the second"


def draw(path: Path, samples: list[Sample], speeds: list[tuple[float, float]]) -> None:
    """Draw the samples over time as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    curves: list[tuple[str, list[tuple[float, Any]]]] = [
        ("resident memory [MB]", [(s.seconds, s.memory) for s in samples]),
        ("open files", [(s.seconds, s.files) for s in samples]),
        ("sentence pairs/s", list(speeds)),
    ]
    for axes, (title, points) in zip(figure.subplots(1, 3), curves):
        axes.plot([seconds / 60 for seconds, _ in points], [value for _, value in points], lw=1)
        axes.set(title=title, xlabel="minutes", ylim=(0, None))
        axes.grid(alpha=0.3)
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=110)


if __name__ == "__main__":
    run(main)
