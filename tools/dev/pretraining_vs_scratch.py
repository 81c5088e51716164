"""Compares fine-tuning with and without pretraining, on a task made of WikiText."""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Sequence

import numpy as np

from gluon_bert import runtime
from gluon_bert.cli import add_checkpoint_flag, add_device_flag, device, main_with_exit_status, parser_of, run
from gluon_bert.config import FineTuneConfig
from gluon_bert.errors import InputError
from gluon_bert.fileio import atomic_write, write_json
from gluon_bert.finetuning.tables import TableRow

# Each network sees at least this many examples, with repetitions, and each example at least EPOCHS times.
EXAMPLES_SEEN, EPOCHS = 5000, 3

DESCRIPTION = """\
Fine-tune the encoder of RUN and one of the same size with random weights. The task is the kind of section
that a paragraph is from, such as history, reception or plot. Both networks see the same examples of
WikiText's train file in the same order. They are tested on its valid file, whose articles neither has seen.
The command reports the accuracy by the number of training examples.
"""
NAMES = {True: "pretrained", False: "from scratch"}
# Kinds of sections that are frequent in many articles, with the words of their headings.
KINDS = {
    "background": ("background",),
    "career": ("career",),
    "description": ("description", "characteristics"),
    "history": ("history",),
    "life": ("life", "biography"),
    "plot": ("plot", "synopsis"),
    "production": ("production", "development", "writing", "recording"),
    "reception": ("reception",),
}
_HEADING = re.compile(r"((?:= )+)(.*?)(?: =)+")
# Shorter paragraphs are captions or lines of lists.
_MIN_WORDS = 20


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    p = parser_of("dev/pretraining_vs_scratch", "RUN [flags]", DESCRIPTION)
    p.add_argument("run", type=Path, metavar="RUN", help="folder of the pretrained run")
    p.add_argument(
        "--corpus", default="wikitext-2", metavar="NAME", help="wikitext-2, or its folder (wikitext-2)"
    )
    p.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[100, 400, 1600],
        metavar="N",
        help="numbers of training examples (100 400 1600)",
    )
    p.add_argument("--seeds", type=int, default=3, metavar="N", help="repetitions of each size (3)")
    p.add_argument("--lr", type=float, default=5e-4, metavar="X", help="learning rate (0.0005)")
    p.add_argument("--output", type=Path, metavar="FOLDER", help="folder for figures and plot (RUN/study)")
    add_checkpoint_flag(p)
    add_device_flag(p)
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return main_with_exit_status(parser(), argv, study)


def study(arguments: argparse.Namespace) -> int:
    """Fine-tune all networks, then print, write and draw their accuracy."""
    from gluon_bert.data.corpora.corpus import WIKITEXT_TRAIN, WIKITEXT_VALID
    from gluon_bert.data.corpora.wikitext2 import wikitext2_folder
    from gluon_bert.finetuning.sentences import examples, infer_task
    from gluon_bert.run import load_run

    check(arguments)
    folder = wikitext2_folder() if arguments.corpus == "wikitext-2" else Path(arguments.corpus)
    rows, test_rows = (section_rows(folder / name) for name in (WIKITEXT_TRAIN, WIKITEXT_VALID))
    before = load_run(arguments.run, [device(arguments)], arguments.checkpoint)
    task = infer_task(rows, "classification")
    test_rows = [row for row in test_rows if row.label in task.labels]
    dev = examples(test_rows, task, before.reader, "valid file")
    results: list[dict[str, Any]] = []
    for size in arguments.sizes:
        for seed in range(arguments.seeds):
            train = examples(sample(rows, size, seed), task, before.reader, f"{size} examples")
            for pretrained in (True, False):
                result = fine_tuned(before, task, train, dev, tuning(size, seed, arguments.lr), pretrained)
                results.append({"size": size, "seed": seed, "pretrained": pretrained, **result})
                print(format_result(results[-1]), file=sys.stderr)
    most = Counter(row.label for row in test_rows).most_common(1)[0][1] / len(test_rows)
    write(arguments, results, most, len(test_rows))
    print("\n".join(table(results, most)))
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Raise one InputError for all problems with the flags."""
    problems = [f"--sizes must be at least 16, got {size}" for size in arguments.sizes if size < 16]
    if arguments.seeds < 1:
        problems.append(f"--seeds must be at least 1, got {arguments.seeds}")
    if not arguments.lr > 0:
        problems.append(f"--lr must be above 0, got {arguments.lr}")
    if problems:
        raise InputError("\n".join(problems))


def tuning(size: int, seed: int, lr: float) -> FineTuneConfig:
    """Return the options of fine-tuning on this many examples."""
    return FineTuneConfig(
        epochs=max(EPOCHS, math.ceil(EXAMPLES_SEEN / size)), batch_size=16, lr=lr, seed=seed
    )


def fine_tuned(
    before: Any, task: Any, train: Any, dev: Any, config: FineTuneConfig, pretrained: bool
) -> dict[str, Any]:
    """Fine-tune a network; return its metrics on the dev examples after the last epoch."""
    from gluon_bert.finetuning.dataset import ExampleLoader
    from gluon_bert.finetuning.finetune import (
        evaluate,
        init_from_pretrained,
        task_trainer,
        train_config,
    )

    started = time.perf_counter()
    devices = before.net.pooler.dense.weight.list_ctx()[:1]
    net = init_from_pretrained(before.net, task, config, devices, pretrained)
    trainer = task_trainer(net, config, train_config(config, len(train)), devices)
    batches = ExampleLoader(train, config.batch_size, config.seed, before.reader.max_seq_length)
    last = trainer.fit(batches)
    assert last is not None
    right = evaluate(net, before.reader, dev)
    return {
        **right,
        "train_loss": last.window["task_loss"],
        "seconds": round(time.perf_counter() - started, 1),
    }


def format_result(result: dict[str, Any]) -> str:
    """Return a line about one fine-tuned network."""
    return (
        f"{result['size']} examples, seed {result['seed']}, {NAMES[result['pretrained']]}: "
        f"accuracy {result['accuracy']:.1%}, F1 {result['f1']:.3f} ({result['seconds']} s)"
    )


def metric(results: Sequence[dict[str, Any]], name: str, size: int, pretrained: bool) -> list[float]:
    """Return a metric of all seeds for a number of training examples."""
    return [r[name] for r in results if r["size"] == size and r["pretrained"] == pretrained]


def table(results: Sequence[dict[str, Any]], most: float) -> list[str]:
    """Return the lines of a table: means over seeds, with the range of the accuracy."""
    lines = [f"{'examples':>8}  {'pretrained':>34}  {'from scratch':>34}"]
    for size in sorted({result["size"] for result in results}):
        cells = []
        for pretrained in (True, False):
            right, f1 = (metric(results, name, size, pretrained) for name in ("accuracy", "f1"))
            spread = f"{min(right):.1%} to {max(right):.1%}"
            cells.append(f"{statistics.mean(right):.1%} ({spread}), F1 {statistics.mean(f1):.3f}")
        lines.append(f"{size:>8}  {cells[0]:>34}  {cells[1]:>34}")
    return [*lines, f"most frequent class: {most:.1%}"]


def write(
    arguments: argparse.Namespace, results: Sequence[dict[str, Any]], most: float, num_test: int
) -> None:
    """Write all figures and the plot."""
    folder = arguments.output or arguments.run / "study"
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "run": str(arguments.run),
        "lr": arguments.lr,
        "test_paragraphs": num_test,
        "most_frequent_class": most,
        "versions": runtime.versions(),
        "results": list(results),
    }
    write_json(folder / "pretraining-vs-scratch.json", content)
    draw(folder / "pretraining-vs-scratch.png", results, most)


def draw(path: Path, results: Sequence[dict[str, Any]], most: float) -> None:
    """Draw the accuracy over the number of training examples as a PNG, with a mark per seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    sizes = sorted({result["size"] for result in results})
    for pretrained, color in ((True, "tab:blue"), (False, "tab:orange")):
        means = [100 * statistics.mean(metric(results, "accuracy", size, pretrained)) for size in sizes]
        axes.plot(sizes, means, "-", color=color, label=NAMES[pretrained])
        own = [r for r in results if r["pretrained"] == pretrained]
        axes.plot([r["size"] for r in own], [100 * r["accuracy"] for r in own], "o", color=color, ms=5)
    axes.axhline(100 * most, color="grey", ls="--", label="most frequent class")
    axes.set(
        xscale="log", xlabel="training examples", ylabel="accuracy on unseen articles [%]", ylim=(0, None)
    )
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_title("Kind of section of a paragraph")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=110)


# The task: the kind of section that a paragraph is from


def section_rows(path: Path) -> list[TableRow]:
    """Return the paragraphs of a WikiText file in sections of one of KINDS, labelled with the kind.

    Subsections belong to their section. Headings are left out. Raise InputError if the file cannot be read or
    has no such section.
    """
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as WikiText ({error})") from error
    rows, kind = [], None
    for number, line in enumerate(map(str.strip, lines), 1):
        heading = _HEADING.fullmatch(line)
        if heading and heading[1].count("=") <= 2:
            kind = _kind(heading[2]) if heading[1].count("=") == 2 else None
        elif kind and not heading and len(line.split()) >= _MIN_WORDS:
            rows.append(TableRow(f"{path}, line {number}", (line,), kind))
    if not rows:
        raise InputError(f"{path} must have a section whose heading names one of {', '.join(KINDS)}")
    return rows


def _kind(heading: str) -> str | None:
    """Return the kind that a heading names, or None if it names none or several.

    >>> _kind("Early life"), _kind("Life and career"), _kind("Themes")
    ('life', None, None)
    """
    words = set(heading.lower().split())
    kinds = [kind for kind, names in KINDS.items() if words & set(names)]
    return kinds[0] if len(kinds) == 1 else None


def sample(rows: list[TableRow], size: int, seed: int) -> list[TableRow]:
    """Draw rows by a seed. A smaller sample of the same seed is a part of a larger one.

    Raise InputError if there are too few rows.
    """
    if size > len(rows):
        raise InputError(
            f"--sizes must be at most {len(rows)}, the number of labelled paragraphs, got {size}"
        )
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[i] for i in order[:size]]


if __name__ == "__main__":
    run(main)
