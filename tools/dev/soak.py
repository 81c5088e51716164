"""Trains for hours and watches memory, open files and throughput."""

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
  python tools/dev/soak.py soak/ --minutes 120
  python tools/dev/soak.py soak/ --minutes 10 -- --preset bert-tiny --corpus wikitext-2 --checkpoint-every 60

Behind -- stand flags of tools/pretrain.py. The folder gets the run, samples.csv and soak.png. How far the
second half of the time differs from the first, without its first tenth, is printed. Linux only.
"""
EVERY = 2.0  # seconds between two samples
BEGINNING = 0.1  # share of the time in which memory may still grow: every shape of a batch is met once


class Sample(NamedTuple):
    """What a process holds at a time."""

    seconds: float
    memory: float  # MB that are resident
    files: int  # that are open
    threads: int


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    p = parser_of(
        "soak",
        "FOLDER [--minutes X] [-- FLAGS]",
        "Train for long, and see whether memory, open files and throughput stay what they are.",
        EXAMPLES,
    )
    p.add_argument("folder", type=Path, metavar="FOLDER", help="a new folder")
    p.add_argument("--minutes", type=float, default=120.0, metavar="X", help="of training (120)")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return main_with_inner_command(parser(), argv, soak)


def soak(arguments: argparse.Namespace, flags: list[str]) -> int:
    """Train, sample, tell."""
    folder, minutes = arguments.folder, arguments.minutes
    if folder.exists():
        raise InputError(f"{folder}: is there already; name a new folder")
    if not minutes > 0:
        raise InputError(f"--minutes {minutes}: must be above 0")
    folder.mkdir(parents=True)
    command = [sys.executable, str(Path(__file__).with_name("pretrain.py"))]
    # A checkpoint and an evaluation every 50 steps are about one a minute on two cores.
    ours = ["--eval-every", "50", "--checkpoint-every", "50", "--max-minutes", str(minutes)]
    process = subprocess.Popen([*command, *ours, *flags, "--output", str(folder / "run")])
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
    for name, unit, points in (
        ("memory", "MB", [(s.seconds, s.memory) for s in samples]),
        ("open files", "", [(s.seconds, s.files) for s in samples]),
        ("threads", "", [(s.seconds, s.threads) for s in samples]),
        ("throughput", "pairs/s", speeds),
    ):
        print(f"{name}: {halves(points)} {unit}".rstrip())
    return 0


def sampled(pid: int, seconds: float) -> list[Sample]:
    """A sample of a process, or none where it has just ended."""
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
    """The medians of the first and of the second half of the time, without its beginning.

    >>> halves([(0, 9.0), (1, 1.0), (4, 1.0), (6, 3.0), (10, 3.0)])
    '1.0 in the first half, 3.0 in the second'
    """
    end = points[-1][0] if points else 0.0
    middle = (1 + BEGINNING) / 2 * end
    first = [value for seconds, value in points if BEGINNING * end <= seconds < middle]
    second = [value for seconds, value in points if seconds >= middle]
    if not first or not second:
        return "too short a time to tell"
    return f"{statistics.median(first):.1f} in the first half, {statistics.median(second):.1f} in the second"


def draw(path: Path, samples: list[Sample], speeds: list[tuple[float, float]]) -> None:
    """Draw all that was sampled over the time, as a PNG."""
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
