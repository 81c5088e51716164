"""Fine-tunes a pretrained network for a task of one's own: `python tools/finetune.py --help` tells how."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from gluon_bert import devices
from gluon_bert.cli import (
    add_checkpoint_flag,
    add_field_flags,
    main_with_exit_status,
    parser_of,
    run,
    shown,
    yes_or_no,
)
from gluon_bert.config import FineTuneConfig, check_group
from gluon_bert.errors import InputError
from gluon_bert.finetuning.tables import QUOTING
from gluon_bert.model.task import KINDS

EXAMPLES = """\
examples:
  python tools/finetune.py runs/base --train train.tsv --dev dev.tsv
  python tools/finetune.py runs/base --train train.csv --dev dev.csv --text question answer --label right
  python tools/finetune.py runs/base --train train.jsonl --dev dev.jsonl --test test.jsonl --task regression
  python tools/finetune.py runs/base --train train.conll --dev dev.conll
  python tools/finetune.py runs/base --train squad/train.json --dev squad/dev.json
  python tools/finetune.py runs/small --train cola/train.tsv --dev cola/dev.tsv --header no --text 4 --label 2
  python tools/encode.py runs/base-finetuned-1 "a text to be judged" --checkpoint best
  python tools/export.py runs/base-finetuned-1 --checkpoint best --format mar

RUN is the folder of a pretraining run or of converted weights. The training file says what the task is:

  .tsv, .csv, .jsonl    a table of texts, or of pairs, with classes or scores
  .conll, .bio, .iob2   a token a line with its BIO tag, a blank line between sentences
  .jsonl                the same as an object a line with "tokens" and "labels"
  .json                 a SQuAD file, version 1.1 or 2.0: questions, contexts and answers

A table is a UTF-8 file that ends in .tsv
(fields separated by tabs), .csv (as in RFC 4180; the separator may also be a semicolon) or .jsonl (an object
a line), with one row a line. Its first line names the columns. With --header no they are numbered from 1.

The new run's folder holds config.json, the vocabulary, log.jsonl, losses.png, checkpoints/ (the last and the
best epoch's network) and predictions.jsonl, those of the best one on the dev or the test file.
"""


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    p = parser_of(
        "finetune",
        "RUN --train FILE --dev FILE [flags]\n--resume RUN",
        "Fine-tune a pretrained network: for classes or a score of texts, for tags of words, or for answers.",
        EXAMPLES,
    )
    p.add_argument("run", type=Path, nargs="?", metavar="RUN", help="the run whose encoder is fine-tuned")
    p.add_argument("--resume", type=Path, metavar="RUN", help="continue a fine-tuning that was stopped")
    p.add_argument("--train", type=Path, metavar="FILE", help="labelled texts to learn from")
    p.add_argument("--dev", type=Path, metavar="FILE", help="labelled texts to choose the best epoch by")
    p.add_argument("--test", type=Path, metavar="FILE", help="texts to predict at the end, labelled or not")
    p.add_argument(
        "--output", type=Path, metavar="FOLDER", help="the new run's folder (RUN-finetuned-1, ...)"
    )
    p.add_argument(
        "--text",
        nargs="+",
        metavar="COLUMN",
        default=[],
        help="the column with the texts, or the two of pairs (by name)",
    )
    p.add_argument("--label", metavar="COLUMN", help="the column with the labels or scores (label, score)")
    p.add_argument(
        "--header",
        type=yes_or_no,
        default=True,
        metavar="{yes,no}",
        help="the first line names the columns (yes)",
    )
    p.add_argument(
        "--quoting",
        choices=QUOTING,
        default="auto",
        help="of .tsv: minimal reads fields in quotation marks as pandas writes them, none keeps the marks (auto)",
    )
    p.add_argument(
        "--task",
        choices=("auto", *KINDS),
        default="auto",
        help="auto: as the training file is, regression where a label is a number that is not whole (auto)",
    )
    add_checkpoint_flag(p)
    p.add_argument("--gpus", metavar="N[,N...]", help="compute on these GPUs, such as 0 or 0,1 (on the CPU)")
    p.add_argument(
        "--cpus", type=int, metavar="N", help="N contexts on the CPU, each with its part of a batch"
    )
    default = FineTuneConfig()
    add_field_flags(p.add_argument_group("how"), FineTuneConfig, lambda name: shown(getattr(default, name)))
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return main_with_exit_status(parser(), argv, finetune)


def finetune(arguments: argparse.Namespace) -> int:
    """Fine-tune as the flags say."""
    from gluon_bert.finetuning import finetune as finetuning

    if arguments.resume is not None:
        if arguments.run is not None:
            raise InputError("--resume names the run: RUN must be left out")
        finetuning.resume_finetuning(arguments.resume, devices=devices_of(arguments))
        return 0
    missing = [name for name in ("run", "train", "dev") if getattr(arguments, name) is None]
    if missing:
        raise InputError(f"{', '.join(missing)}: RUN, --train and --dev must be given, or --resume")
    if len(arguments.text) > 2:
        raise InputError(f"--text {' '.join(arguments.text)}: must be one column, or two of pairs")
    names = {field.name for field in dataclasses.fields(FineTuneConfig)}
    options = {name: value for name, value in vars(arguments).items() if name in names}
    check_group(FineTuneConfig(**options))
    finetuning.finetune(
        arguments.run,
        arguments.train,
        arguments.dev,
        arguments.output or free_folder(arguments.run),
        test=arguments.test or "",
        text=arguments.text,
        label=arguments.label or "",
        header=arguments.header,
        quoting=arguments.quoting,
        task=arguments.task,
        checkpoint=arguments.checkpoint,
        devices=devices_of(arguments),
        **options,
    )
    return 0


def devices_of(arguments: argparse.Namespace) -> list[Any]:
    """Return the devices that the flags name: one CPU without flags."""
    gpus = None if arguments.gpus is None else devices.parse_gpus(arguments.gpus)
    cpus = 1 if gpus is None and arguments.cpus is None else arguments.cpus
    return devices.contexts(gpus, cpus)


def free_folder(before: Path) -> Path:
    """A new folder beside the run's."""
    number = 1
    while before.with_name(f"{before.name}-finetuned-{number}").exists():
        number += 1
    return before.with_name(f"{before.name}-finetuned-{number}")


if __name__ == "__main__":
    run(main)
