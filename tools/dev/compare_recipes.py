"""Trains with several recipes for the same time and compares the results."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Sequence

from gluon_bert import cli
from gluon_bert.cli import literal, main_with_exit_status, parser_of, run
from gluon_bert.config import Config, DataConfig, TrainConfig
from gluon_bert.errors import InputError
from gluon_bert.fileio import write_json
from gluon_bert.presets import preset

EXAMPLES = """\
examples:
  python tools/dev/compare_recipes.py --corpus wikitext-2 --minutes 30 --seeds 0,1,2 --recipes d2l,quick
  python tools/dev/compare_recipes.py --corpus wikitext-2 --minutes 10 --output runs/what-matters

Every recipe trains with tools/pretrain.py, one run after another, each with the whole machine. Then all runs
are evaluated on the same validation examples: sentence pairs of up to 64 tokens with 15 % of the words
masked, except <unk>.

FOLDER gets the runs, results.json and learning.png. The command prints a table. Existing runs are kept, so
a stopped comparison continues.
"""

# Sentence pairs between evaluations in a comparison of half an hour; proportional in others. This gives about
# ten points per curve.
PAIRS_BETWEEN = 50_000
# Seeds the masks and random pairs of the common examples.
EXAMPLES_SEED = 20_201


class Recipe(NamedTuple):
    """A preset with changed fields of the configuration."""

    title: str
    preset: str
    changes: Mapping[str, Any] = {}

    def config(self) -> Config:
        """Return the configuration without text, time and seed."""
        return preset(self.preset).replace(**self.changes)

    def but(self, title: str, **changes: Any) -> Recipe:
        """Return this recipe with further changes."""
        return Recipe(title, self.preset, {**self.changes, **changes})


class RunResult(NamedTuple):
    """The results of a run.

    curve: minutes of training and the MLM loss on the common examples. steps, pairs: totals of the run.
    mlm_accuracy, nsp_accuracy: final values on the common examples.
    """

    recipe: str
    seed: int
    curve: list[tuple[float, float]]
    steps: int
    pairs: int
    mlm_accuracy: float
    nsp_accuracy: float

    @property
    def loss(self) -> float:
        """Return the final MLM loss in nats."""
        return self.curve[-1][1]


QUICK = Recipe("the preset quick", "quick")
# What the preset was before: two layers, a constant share of masks, a lower learning rate, dropout.
TWO_LAYERS = {
    **{"num_layers": 2, "dropout": 0.1, "lr": 2e-3, "warmup_ratio": 0.1, "weight_decay": 0.01},
    "final_mlm_probability": 0.0,
}
# And before it had a bias for distances, word vectors from the text and Muon.
BEFORE = {
    **{**TWO_LAYERS, "dropout": 0.0},
    **{"position": "absolute", "init_embeddings": "random", "optimizer": "adamw"},
}
RECIPES = {
    "d2l": Recipe("D2L", "d2l"),
    "quick": QUICK,
    "thorough": Recipe("the preset thorough", "thorough"),
    "mask-15": QUICK.but("quick, 15 % masked", mlm_probability=0.15, final_mlm_probability=0.0),
    "mask-30": QUICK.but("quick, 30 % masked to the end", final_mlm_probability=0.0),
    "lr-half": QUICK.but("quick, learning rate 0.0015", lr=1.5e-3),
    "lr-double": QUICK.but("quick, learning rate 0.006", lr=6e-3),
    "batch-32": QUICK.but("quick, batches of 32", batch_size=32),
    "batch-128": QUICK.but("quick, batches of 128", batch_size=128),
    "before": QUICK.but("quick of before", **BEFORE),
    "two-layers": QUICK.but("quick with two layers", **TWO_LAYERS),
    "absolute": QUICK.but("quick, no bias for distances", position="absolute"),
    "no-vectors": QUICK.but("quick, random first word vectors", init_embeddings="random"),
    "adamw": QUICK.but("quick, AdamW for all weights", optimizer="adamw"),
    "dropout": QUICK.but("quick, dropout 0.1", dropout=0.1),
    "decay": QUICK.but("quick, weight decay 0.01", weight_decay=0.01),
    "pre-norm": QUICK.but("quick, LayerNorm before the sub-layers", norm="pre"),
    "bias-zeros": QUICK.but("quick, decoder biases from zero", decoder_bias="zeros"),
    "warm-up-2": QUICK.but("quick, warm-up over 2 % of the run", warmup_ratio=0.02),
    "packed": QUICK.but("quick, packed pairs of 128", pairs="packed", max_seq_length=128, batch_size=32),
    "3-layers": QUICK.but("quick, 3 layers", num_layers=3),
    "untied": QUICK.but("quick, a decoder with weights of its own", tied_decoder=False),
}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    p = parser_of(
        "dev/compare_recipes",
        "[flags]",
        "Train with several recipes for the same time and compare the results.",
        EXAMPLES,
    )
    p.add_argument(
        "--corpus", default="wikitext-2", metavar="NAME", help="as for tools/pretrain.py (wikitext-2)"
    )
    p.add_argument("--minutes", type=float, default=30.0, metavar="X", help="minutes per run (30)")
    p.add_argument(
        "--seeds", default="0", metavar="N[,N...]", help="seeds; each recipe runs once per seed (0)"
    )
    names = ", ".join(f"{name} ({recipe.title})" for name, recipe in RECIPES.items())
    p.add_argument("--recipes", metavar="NAME[,NAME...]", help=literal(f"recipes: {names} (all)"))
    p.add_argument(
        "--output",
        type=Path,
        default=Path("runs", "recipes"),
        metavar="FOLDER",
        help="a new folder, or that of a stopped comparison (runs/recipes)",
    )
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return main_with_exit_status(parser(), argv, compare_recipes)


def compare_recipes(arguments: argparse.Namespace) -> int:
    """Train, evaluate and compare."""
    recipes, seeds = check(arguments)
    runs = {(name, seed): arguments.output / f"{name}-{seed}" for seed in seeds for name in recipes}
    for (name, seed), folder in runs.items():
        train(folder, recipes[name], seed, arguments)
    data = examples(arguments.corpus)
    results = []
    for (name, seed), folder in runs.items():
        print(f"{folder}: evaluating", file=sys.stderr)
        results.append(measure(folder, name, seed, data))
    references = references_of(data)
    write_json(
        arguments.output / "results.json",
        {
            "minutes": arguments.minutes,
            "machine": machine(),
            "reference_losses": references,
            "runs": [each._asdict() for each in results],
        },
    )
    draw(arguments.output / "learning.png", results, references["validation_unigram"])
    print(table(results))
    return 0


def check(arguments: argparse.Namespace) -> tuple[dict[str, Recipe], list[int]]:
    """Return the recipes and seeds of the flags; raise one InputError for all problems."""
    problems = []
    if not 0 < arguments.minutes < 1e6:
        problems.append(f"--minutes must be above 0, got {arguments.minutes}")
    names = arguments.recipes.split(",") if arguments.recipes else list(RECIPES)
    unknown = [name for name in names if name not in RECIPES]
    if unknown:
        problems.append(f"--recipes must be some of {', '.join(RECIPES)}, got {','.join(unknown)}")
    seeds = arguments.seeds.split(",")
    if not all(seed.isdecimal() for seed in seeds):
        problems.append(f"--seeds must be numbers with commas, such as 0,1,2, got {arguments.seeds}")
    if problems:
        raise InputError("\n".join(problems))
    return {name: RECIPES[name] for name in names}, [int(seed) for seed in seeds]


# Training


def train(folder: Path, recipe: Recipe, seed: int, arguments: argparse.Namespace) -> None:
    """Train a run with this recipe unless its folder exists; raise InputError if that fails."""
    if folder.exists():
        return
    unfinished = folder.with_name(f"{folder.name}.part")
    if unfinished.exists():
        raise InputError(
            f"{unfinished} belongs to a comparison that is running or was stopped. If it was stopped, remove "
            "it."
        )
    print(f"{folder}: training for {arguments.minutes:g} minutes", file=sys.stderr)
    command = [sys.executable, str(Path(__file__).parent.parent / "pretrain.py")]
    flags = ["--corpus", arguments.corpus, "--output", str(unfinished)]
    flags += flags_of(recipe, arguments.minutes, seed)
    status = subprocess.call([*command, *flags], stdout=subprocess.DEVNULL)
    if status:
        raise InputError(f"{unfinished}: training failed with exit status {status}")
    unfinished.rename(folder)


def flags_of(recipe: Recipe, minutes: float, seed: int) -> list[str]:
    """Return the flags of tools/pretrain.py. All checkpoints are kept for the evaluation."""
    between = round(PAIRS_BETWEEN * minutes / 30 / recipe.config().train.batch_size)
    given = {"eval_every": max(1, between), "max_minutes": minutes, "seed": seed, "keep_checkpoints": 0}
    return cli.flags_of({"preset": recipe.preset, **recipe.changes, **given})


# Evaluation


def measure(folder: Path, name: str, seed: int, data: Any) -> RunResult:
    """Evaluate all checkpoints of a run on the common examples, `data`."""
    from gluon_bert.checkpoint import CONFIG, steps
    from gluon_bert.run import load_run, read_config

    if not steps(folder):
        raise InputError(f"{folder} must have at least one checkpoint. Remove it to train it again.")
    evaluated = [(step, averages_of(load_run(folder, checkpoint=step), data)) for step in steps(folder)]
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]
    minutes = {r["step"]: r["seconds"] / 60 for r in records if "seconds" in r}
    last_step, last = evaluated[-1]
    return RunResult(
        recipe=name,
        seed=seed,
        curve=[(minutes[step], averages["mlm_loss"]) for step, averages in evaluated],
        steps=last_step,
        pairs=last_step * read_config(folder / CONFIG).train.batch_size,
        mlm_accuracy=last["mlm_accuracy"],
        nsp_accuracy=last["nsp_accuracy"],
    )


def averages_of(run: Any, data: Any) -> Any:
    """Return the losses and accuracies of a network on the common examples."""
    from gluon_bert.runtime import mx
    from gluon_bert.training.trainer import Trainer

    if run.vocab.tokens != data.vocab.tokens:
        raise InputError(
            "the run's vocabulary differs from that of the common examples. Recipes must not change the text."
        )
    return Trainer(run.net, TrainConfig(), [mx.cpu()]).evaluate(data.validation.epoch(0))


def examples(corpus: str) -> Any:
    """Return the data whose validation batches evaluate all runs.

    Raise InputError without validation text.
    """
    from gluon_bert.data.loader import load_pretraining_data

    data = load_pretraining_data(DataConfig(corpus=(corpus,)), batch_size=256, seed=EXAMPLES_SEED)
    if data.validation is None:
        raise InputError(f"--corpus {corpus} has too little validation text")
    return data


def references_of(data: Any) -> dict[str, float]:
    """Return the losses of simpler models on the common examples, as in a run's config.json."""
    from gluon_bert.training.plots import References

    return References.of(data)._asdict()


# Reports


def table(results: Sequence[RunResult]) -> str:
    """Return a Markdown table of means over seeds, with the range of the losses."""
    lines = [
        "| recipe | runs | steps | pairs | MLM loss | MLM accuracy | NSP accuracy |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(each.recipe for each in results):
        runs = [each for each in results if each.recipe == name]
        losses = [each.loss for each in runs]
        spread = f" ({min(losses):.3f} to {max(losses):.3f})" if len(runs) > 1 else ""
        cells = [
            RECIPES[name].title,
            str(len(runs)),
            f"{statistics.mean(each.steps for each in runs):,.0f}",
            f"{statistics.mean(each.pairs for each in runs):,.0f}",
            f"{statistics.mean(losses):.3f}{spread}",
            f"{100 * statistics.mean(each.mlm_accuracy for each in runs):.1f} %",
            f"{100 * statistics.mean(each.nsp_accuracy for each in runs):.1f} %",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(path: Path, results: Sequence[RunResult], unigram: float) -> None:
    """Draw the loss over minutes as a PNG, with a curve per run and a colour per recipe."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from gluon_bert.fileio import atomic_write

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = list(dict.fromkeys(each.recipe for each in results))
    for each in results:
        first = each.seed == next(run.seed for run in results if run.recipe == each.recipe)
        label = RECIPES[each.recipe].title if first else None
        color = f"C{names.index(each.recipe) % 10}"
        axes.plot(*zip(*each.curve), "-o", ms=3, color=color, label=label)
    axes.axhline(unigram, color="grey", ls="--", label=f"unigram = {unigram:.2f}")
    axes.set(xlabel="minutes of training", ylabel="MLM loss on validation text [nats]", xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)


def machine() -> dict[str, Any]:
    """Return the number of cores and the versions of the libraries."""
    from gluon_bert.runtime import versions

    return {"cores": os.cpu_count(), **versions()}


if __name__ == "__main__":
    run(main)
