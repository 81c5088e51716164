"""Evaluates a run on minimal pairs of sentences such as BLiMP."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Mapping

from tqdm import tqdm

from gluon_bert.cli import add_checkpoint_flag, add_device_flag, device, main_with_exit_status, parser_of, run
from gluon_bert.errors import InputError
from gluon_bert.fileio import write_json

EXAMPLES = """\
examples:
  python tools/dev/blimp.py runs/quick-1 blimp/
  python tools/dev/blimp.py runs/quick-1 blimp/ --limit 100 --json blimp.json

PAIRS is a file or a folder of files, one file per paradigm. The files are tab-separated with the columns
phenomenon, good and bad, or BLiMP's own .jsonl. Both may be gzipped.

Each sentence is scored by its pseudo-log-likelihood: each token is masked in turn. A pair is correct if the
grammatical sentence has the higher score. Chance is 50 %.
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    p = parser_of(
        "dev/blimp",
        "RUN PAIRS [flags]",
        "Print how often a run prefers the grammatical sentence of a pair, per phenomenon.",
        EXAMPLES,
    )
    p.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    p.add_argument("pairs", type=Path, metavar="PAIRS", help="a file of pairs, or a folder of such files")
    p.add_argument("--limit", type=int, metavar="N", help="use the first N pairs of each file (all)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write all accuracies to a file")
    add_checkpoint_flag(p)
    add_device_flag(p)
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return main_with_exit_status(parser(), argv, blimp)


def blimp(arguments: argparse.Namespace) -> int:
    """Judge all pairs and print the accuracies."""
    from gluon_bert.inference.minimal_pairs import accuracies, judge, pairs_in
    from gluon_bert.inference.predictor import Predictor
    from gluon_bert.run import load_run

    check(arguments)
    pairs = list(pairs_in(arguments.pairs, arguments.limit))
    predictor = Predictor.of(load_run(arguments.run, [device(arguments)], arguments.checkpoint))
    bar = tqdm(judge(predictor, pairs), total=len(pairs), unit=" pairs", disable=not sys.stderr.isatty())
    judgements = list(bar)
    phenomena = accuracies(judgements, "phenomenon")
    overall = sum(each.correct for each in judgements) / len(judgements)
    print(table(phenomena, len(pairs), overall))
    if arguments.json:
        content = {"run": str(arguments.run), "pairs": len(pairs), "accuracy": overall}
        write_json(
            arguments.json,
            {**content, "phenomena": phenomena, "paradigms": accuracies(judgements, "paradigm")},
        )
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Raise one InputError for all problems with the flags."""
    problems = []
    if not arguments.pairs.exists():
        problems.append(f"PAIRS must be a file or a folder, but {arguments.pairs} does not exist")
    if arguments.limit is not None and arguments.limit < 1:
        problems.append(f"--limit must be at least 1, got {arguments.limit}")
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        problems.append(f"--json {arguments.json}: the folder {arguments.json.parent} does not exist")
    if problems:
        raise InputError("\n".join(problems))


def table(phenomena: Mapping[str, Mapping[str, Any]], num_pairs: int, overall: float) -> str:
    """Return the accuracies as text."""
    rows = [(name, each["pairs"], each["accuracy"]) for name, each in phenomena.items()]
    width = max(len(name) for name, _, _ in [*rows, ("phenomenon", 0, 0)])
    lines = [f"{'phenomenon':{width}}  {'pairs':>6}  accuracy"]
    lines += [f"{name:{width}}  {count:6}  {share:8.1%}" for name, count, share in rows]
    return "\n".join([*lines, f"{'all':{width}}  {num_pairs:6}  {overall:8.1%}"])


if __name__ == "__main__":
    run(main)
