"""Compares pretrained runs, and a network without pretraining, on real tasks."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Sequence

from gluon_bert import runtime
from gluon_bert.cli import main_with_exit_status, parser_of, run
from gluon_bert.errors import InputError
from gluon_bert.fileio import atomic_write, write_json

EXAMPLES = """\
examples:
  python tools/dev/downstream.py runs/old runs/quick-1 --data tasks/
  python tools/dev/downstream.py runs/quick-1 --data tasks/ --tasks cola --seeds 1 --examples 2000 --epochs 2

The folder of the tasks has sst2, cola, stsb and subj, each with train.tsv and dev.tsv, and blimp with files
of minimal pairs. Every network is fine-tuned on the same examples in the same order. BLiMP takes no training.
"From scratch" is the network of the first RUN with random weights.

The command prints a table of the best epochs' metrics on the validation files: the mean over the seeds, with
the range. FOLDER gets downstream.json and downstream.png. A stopped comparison continues.
"""


class TaskFile(NamedTuple):
    """A task: its title, the metric that chooses the best epoch, and the columns of its texts."""

    title: str
    metric: str
    text_columns: tuple[str, ...] = ("text",)


BLIMP = "blimp"
TASKS = {
    "sst2": TaskFile("SST-2, accuracy", "accuracy"),
    "cola": TaskFile("CoLA, Matthews' correlation", "matthews"),
    "stsb": TaskFile("STS-B, Pearson's correlation", "pearson", ("sentence1", "sentence2")),
    "subj": TaskFile("SUBJ, accuracy", "accuracy"),
    BLIMP: TaskFile("BLiMP, accuracy", "accuracy"),
}
SCRATCH = "from scratch"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    p = parser_of("dev/downstream", "RUN [RUN ...] --data FOLDER [flags]", str(__doc__), EXAMPLES)
    p.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of pretrained runs")
    p.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="the folder of the tasks")
    p.add_argument("--tasks", default=",".join(TASKS), metavar="NAME[,NAME...]", help="tasks (all)")
    p.add_argument("--seeds", type=int, default=3, metavar="N", help="fine-tunings of each network (3)")
    p.add_argument(
        "--examples", type=int, default=0, metavar="N", help="first examples of train.tsv to use; 0: all (0)"
    )
    p.add_argument(
        "--pairs", type=int, default=0, metavar="N", help="first pairs of each file of BLiMP; 0: all (0)"
    )
    p.add_argument("--epochs", type=int, default=3, metavar="N", help="epochs of a fine-tuning (3)")
    p.add_argument("--lr", type=float, default=3e-4, metavar="X", help="learning rate (0.0003)")
    p.add_argument(
        "--output",
        type=Path,
        default=Path("runs", "downstream"),
        metavar="FOLDER",
        help="folder of the results (runs/downstream)",
    )
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return main_with_exit_status(parser(), argv, compare)


def compare(arguments: argparse.Namespace) -> int:
    """Evaluate every network on every task; print, draw and write the results."""
    tasks = check(arguments)
    networks = {SCRATCH: arguments.runs[0], **{str(folder): folder for folder in arguments.runs}}
    path = arguments.output / "downstream.json"
    results = earlier_results(path, recipe(arguments))
    for task in tasks:
        for seed in seeds_of(task, arguments.seeds):
            for name, folder in networks.items():
                key = key_of(task, seed, name)
                if key not in results:
                    results[key] = evaluated(folder, name == SCRATCH, task, seed, arguments)
                    arguments.output.mkdir(parents=True, exist_ok=True)
                    content = {"recipe": recipe(arguments), "results": results}
                    write_json(path, {**content, "versions": runtime.versions()})
                print(f"{key}: {results[key]:.4f}", file=sys.stderr)
    values = {
        (task, name): [results[key_of(task, seed, name)] for seed in seeds_of(task, arguments.seeds)]
        for task in tasks
        for name in networks
    }
    print("\n".join(table(values, tasks, list(networks))))
    draw(arguments.output / "downstream.png", values, tasks, list(networks))
    return 0


def seeds_of(task: str, count: int) -> range:
    """Return the seeds of a task's fine-tunings. BLiMP needs one evaluation."""
    return range(1 if task == BLIMP else count)


def key_of(task: str, seed: int, network: str) -> str:
    """Return the name of a result."""
    return f"{task} {seed} {network}"


def check(arguments: argparse.Namespace) -> list[str]:
    """Return the tasks' names; raise one InputError for all problems with the flags."""
    names = arguments.tasks.split(",")
    problems = []
    if not set(names) <= set(TASKS):
        problems.append(f"--tasks must be some of {', '.join(TASKS)}, got {arguments.tasks}")
    for name in names:
        if name == BLIMP and not (arguments.data / BLIMP).is_dir():
            problems.append(f"--data must have the folder {BLIMP}, which is not in {arguments.data}")
        for part in ("train.tsv", "dev.tsv"):
            if name in TASKS and name != BLIMP and not (arguments.data / name / part).is_file():
                problems.append(f"--data must have {name}/{part}, which is not in {arguments.data}")
    for name, least in (("seeds", 1), ("examples", 0), ("pairs", 0), ("epochs", 1)):
        value = getattr(arguments, name)
        if value < least:
            problems.append(f"--{name} must be at least {least}, got {value}")
    if not arguments.lr > 0:
        problems.append(f"--lr must be above 0, got {arguments.lr}")
    if problems:
        raise InputError("\n".join(problems))
    return names


def recipe(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the results depend on, beside task, seed and network."""
    return {
        "examples": arguments.examples,
        "pairs": arguments.pairs,
        "epochs": arguments.epochs,
        "lr": arguments.lr,
        "scratch": str(arguments.runs[0]),
    }


def earlier_results(path: Path, expected: dict[str, Any]) -> dict[str, float]:
    """Return the results of a stopped comparison; raise InputError if its settings differ."""
    if not path.is_file():
        return {}
    content = json.loads(path.read_text("utf-8"))
    if content["recipe"] != expected:
        raise InputError(f"--output must be a new folder: {path} has the results of {content['recipe']}")
    return dict(content["results"])


def evaluated(folder: Path, scratch: bool, task: str, seed: int, arguments: argparse.Namespace) -> float:
    """Return a network's metric on a task."""
    from gluon_bert.run import load_run

    network = without_training(load_run(folder), seed) if scratch else load_run(folder)
    if task == BLIMP:
        return blimp_accuracy(network, arguments)
    return fine_tuned(network, task, seed, arguments)


def blimp_accuracy(network: Any, arguments: argparse.Namespace) -> float:
    """Return the share of minimal pairs whose grammatical sentence is more likely."""
    from gluon_bert.inference.minimal_pairs import judge, pairs_in
    from gluon_bert.inference.predictor import Predictor

    pairs = list(pairs_in(arguments.data / BLIMP, arguments.pairs or None))
    return statistics.mean(float(each.correct) for each in judge(Predictor.of(network), pairs))


def fine_tuned(network: Any, task: str, seed: int, arguments: argparse.Namespace) -> float:
    """Fine-tune a network; return the best epoch's metric on the validation file."""
    from gluon_bert.finetuning.finetune import finetune

    about = TASKS[task]
    with tempfile.TemporaryDirectory() as temporary:
        train = first_rows(arguments.data / task / "train.tsv", arguments.examples, Path(temporary))
        tuned = finetune(
            network,
            train,
            arguments.data / task / "dev.tsv",
            Path(temporary, "run"),
            text_columns=about.text_columns,
            quoting="none",
            epochs=arguments.epochs,
            lr=arguments.lr,
            seed=seed,
            best_metric=about.metric,
        )
        records = map(json.loads, Path(tuned.folder or "", "log.jsonl").read_text("utf-8").splitlines())
        return max(record["validation"][about.metric] for record in records if "validation" in record)


def first_rows(path: Path, count: int, folder: Path) -> Path:
    """Return a table of the first rows of another one; 0: that table itself."""
    if not count:
        return path
    lines = path.read_text("utf-8").splitlines(keepends=True)[: count + 1]
    part = folder / path.name
    part.write_text("".join(lines), "utf-8")
    return part


def without_training(before: Any, seed: int) -> Any:
    """Return a run with the network of another one and random weights."""
    from gluon_bert.model.bert import BERTModel
    from gluon_bert.runtime import mx

    net = BERTModel(len(before.vocab), before.config.model)
    net.initialize(ctx=[mx.cpu()], seed=seed)
    net.hybridize()
    return dataclasses.replace(before, net=net, step=0)


def table(
    values: Mapping[tuple[str, str], Sequence[float]], tasks: Sequence[str], networks: Sequence[str]
) -> list[str]:
    """Return the lines of a Markdown table: a row for each network, a column for each task.

    values: the results of a task and a network, one per seed.
    """
    lines = [
        f"| network | {' | '.join(TASKS[task].title for task in tasks)} |",
        f"| --- |{' --- |' * len(tasks)}",
    ]
    for name in networks:
        cells = []
        for task in tasks:
            found = values[task, name]
            spread = f" ({min(found):.3f} to {max(found):.3f})" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.3f}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def draw(
    path: Path,
    values: Mapping[tuple[str, str], Sequence[float]],
    tasks: Sequence[str],
    networks: Sequence[str],
) -> None:
    """Draw the means as bars, with a dot for each seed, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = 0.8 / len(networks)
    for i, name in enumerate(networks):
        places = [number + (i - (len(networks) - 1) / 2) * width for number in range(len(tasks))]
        means = [statistics.mean(values[task, name]) for task in tasks]
        axes.bar(places, means, width, label=name, color=f"C{i}", alpha=0.7)
        for place, task in zip(places, tasks):
            axes.plot([place] * len(values[task, name]), values[task, name], "k.", ms=4)
    axes.set_xticks(
        range(len(tasks)), [TASKS[task].title.replace(",", "").replace(" ", "\n") for task in tasks]
    )
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=110)


if __name__ == "__main__":
    run(main)
