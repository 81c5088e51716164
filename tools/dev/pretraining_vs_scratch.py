"""Compares fine-tuning with and without pretraining, on a task made of WikiText."""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Sequence

from gluon_bert import runtime
from gluon_bert.cli import add_checkpoint_flag, add_device_flag, device, main_with_exit_status, parser_of, run
from gluon_bert.config import FineTuneConfig
from gluon_bert.errors import InputError
from gluon_bert.fileio import atomic_write, write_json

# Each network sees so many examples at least, if few ones over and over, and each of them so often at least.
EXAMPLES_SEEN, EPOCHS = 5000, 3

DESCRIPTION = """\
Fine-tune the encoder of RUN, and one of the same size with random weights, to tell from which kind of section
of an article a paragraph is (history, reception, plot and so on, by the section's heading). Both see the same
examples of WikiText's train file in the same order, and are asked about the paragraphs of its valid file,
whose articles neither has seen. Told is how many they get right, by how many examples they learnt from.
"""
NAMES = {True: "pretrained", False: "from scratch"}


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    p = parser_of("does_pretraining_help", "RUN [flags]", DESCRIPTION)
    p.add_argument("run", type=Path, metavar="RUN", help="the pretrained run")
    p.add_argument(
        "--corpus", default="wikitext-2", metavar="NAME", help="wikitext-2, or its folder (wikitext-2)"
    )
    p.add_argument(
        "--sizes", type=int, nargs="+", default=[100, 400, 1600], metavar="N", help="examples (100 400 1600)"
    )
    p.add_argument("--seeds", type=int, default=3, metavar="N", help="repetitions of each (3)")
    p.add_argument("--lr", type=float, default=5e-4, metavar="X", help="the learning rate of both (0.0005)")
    p.add_argument("--output", type=Path, metavar="FOLDER", help="where figures and plot go (RUN/study)")
    add_checkpoint_flag(p)
    add_device_flag(p)
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return main_with_exit_status(parser(), argv, study)


def study(arguments: argparse.Namespace) -> int:
    """Fine-tune as the flags say, tell and draw what came of it."""
    from dev.wikitext_sections import sample, section_rows

    from gluon_bert.data.corpora.corpus import WIKITEXT_TRAIN, WIKITEXT_VALID
    from gluon_bert.data.corpora.wikitext2 import wikitext2_folder
    from gluon_bert.finetuning.dataset import examples, infer_task
    from gluon_bert.run import load_run

    check(arguments)
    folder = wikitext2_folder() if arguments.corpus == "wikitext-2" else Path(arguments.corpus)
    rows, asked = (section_rows(folder / name) for name in (WIKITEXT_TRAIN, WIKITEXT_VALID))
    before = load_run(arguments.run, [device(arguments)], arguments.checkpoint)
    task = infer_task(rows, "classification")
    asked = [row for row in asked if row.label in task.labels]
    dev = examples(asked, task, before.reader, "valid file")
    results: list[dict[str, Any]] = []
    for size in arguments.sizes:
        for seed in range(arguments.seeds):
            train = examples(sample(rows, size, seed), task, before.reader, f"{size} examples")
            for pretrained in (True, False):
                result = fine_tuned(before, task, train, dev, tuning(size, seed, arguments.lr), pretrained)
                results.append({"size": size, "seed": seed, "pretrained": pretrained, **result})
                print(in_words(results[-1]), file=sys.stderr)
    most = Counter(row.label for row in asked).most_common(1)[0][1] / len(asked)
    write(arguments, results, most, len(asked))
    print("\n".join(table(results, most)))
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Raise one InputError that tells everything that is wrong with the flags."""
    problems = [f"--sizes {size}: must be at least 16" for size in arguments.sizes if size < 16]
    if arguments.seeds < 1:
        problems.append(f"--seeds {arguments.seeds}: must be at least 1")
    if not arguments.lr > 0:
        problems.append(f"--lr {arguments.lr}: must be above 0")
    if problems:
        raise InputError("\n".join(problems))


def tuning(size: int, seed: int, lr: float) -> FineTuneConfig:
    """How a network learns from so many examples."""
    return FineTuneConfig(
        epochs=max(EPOCHS, math.ceil(EXAMPLES_SEEN / size)), batch_size=16, lr=lr, seed=seed
    )


def fine_tuned(
    before: Any, task: Any, train: Any, dev: Any, config: FineTuneConfig, pretrained: bool
) -> dict[str, Any]:
    """What a network gets right on the dev examples after its last epoch."""
    from gluon_bert.finetuning.finetune import FineTuner, init_from_pretrained

    started = time.perf_counter()
    context = before.net.pooler.dense.weight.list_ctx()[0]
    tuner = FineTuner(
        init_from_pretrained(before.net, task, config, context, pretrained), before.reader, config
    )
    losses = [loss for _, _, loss in tuner.epochs(train)]
    right = tuner.evaluate(dev)
    return {**right, "train_loss": losses[-1], "seconds": round(time.perf_counter() - started, 1)}


def in_words(result: dict[str, Any]) -> str:
    """One fine-tuned network for a person."""
    return (
        f"{result['size']} examples, seed {result['seed']}, {NAMES[result['pretrained']]}: "
        f"{result['accuracy']:.1%} right, F1 {result['f1']:.3f} ({result['seconds']} s)"
    )


def found(results: Sequence[dict[str, Any]], name: str, size: int, pretrained: bool) -> list[float]:
    """A metric of the networks that learnt from so many examples, one a seed."""
    return [r[name] for r in results if r["size"] == size and r["pretrained"] == pretrained]


def table(results: Sequence[dict[str, Any]], most: float) -> list[str]:
    """The results for people: means over the seeds, of the accuracy also the smallest and the largest."""
    lines = [f"{'examples':>8}  {'pretrained':>34}  {'from scratch':>34}"]
    for size in sorted({result["size"] for result in results}):
        cells = []
        for pretrained in (True, False):
            right, f1 = (found(results, name, size, pretrained) for name in ("accuracy", "f1"))
            spread = f"{min(right):.1%} to {max(right):.1%}"
            cells.append(f"{statistics.mean(right):.1%} ({spread}), F1 {statistics.mean(f1):.3f}")
        lines.append(f"{size:>8}  {cells[0]:>34}  {cells[1]:>34}")
    return [*lines, f"the most frequent kind alone: {most:.1%} right"]


def write(arguments: argparse.Namespace, results: Sequence[dict[str, Any]], most: float, asked: int) -> None:
    """Write every figure, and the plot."""
    folder = arguments.output or arguments.run / "study"
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "run": str(arguments.run),
        "lr": arguments.lr,
        "paragraphs_asked": asked,
        "most_frequent_kind": most,
        "versions": runtime.versions(),
        "results": list(results),
    }
    write_json(folder / "does-pretraining-help.json", content)
    draw(folder / "does-pretraining-help.png", results, most)


def draw(path: Path, results: Sequence[dict[str, Any]], most: float) -> None:
    """Draw the accuracy over the number of examples, a mark for each seed, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    sizes = sorted({result["size"] for result in results})
    for pretrained, color in ((True, "tab:blue"), (False, "tab:orange")):
        means = [100 * statistics.mean(found(results, "accuracy", size, pretrained)) for size in sizes]
        axes.plot(sizes, means, "-", color=color, label=NAMES[pretrained])
        own = [r for r in results if r["pretrained"] == pretrained]
        axes.plot([r["size"] for r in own], [100 * r["accuracy"] for r in own], "o", color=color, ms=5)
    axes.axhline(100 * most, color="grey", ls="--", label="the most frequent kind alone")
    axes.set(
        xscale="log", xlabel="training examples", ylabel="right on articles not seen [%]", ylim=(0, None)
    )
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_title("Which kind of section is a paragraph from?")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=110)


if __name__ == "__main__":
    run(main)
