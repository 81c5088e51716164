"""Fine-tune a pretrained network on a table; `python tools/finetune.py --help` shows how."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from gluon_bert import devices
from gluon_bert.cli import (
    OnOff,
    add_checkpoint_flag,
    add_field_flags,
    main_with_exit_status,
    parser_of,
    run,
    shown,
)
from gluon_bert.config import FineTuneConfig, check_group, flag_name
from gluon_bert.errors import InputError
from gluon_bert.finetuning.tables import QUOTING
from gluon_bert.model.task import KINDS

EXAMPLES = """\
examples:
  python tools/finetune.py runs/base --train train.tsv --validation dev.tsv
  python tools/finetune.py runs/base --train train.csv --validation dev.csv --text-columns question answer
  python tools/finetune.py runs/base --train train.jsonl --validation dev.jsonl --task regression
  python tools/finetune.py runs/base --train train.conll --validation dev.conll
  python tools/finetune.py runs/base --train squad/train.json --validation squad/dev.json
  python tools/finetune.py runs/base --train t.tsv --validation dev.tsv --no-header --text-columns 4 --label 2
  python tools/encode.py runs/base-finetuned-1 "a text to be judged" --checkpoint best
  python tools/export.py runs/base-finetuned-1 --checkpoint best --format mar

RUN is the folder of a pretraining run or of converted weights. The training file defines the task:

  .tsv, .csv, .jsonl    a table of texts, or of pairs, with classes or scores
  .conll, .bio, .iob2   one token per line with its tag, a blank line between sentences
  .jsonl                the same as one object per line with "tokens" and "labels"
  .json                 a SQuAD file, version 1.1 or 2.0: questions, contexts and answers

A table is a UTF-8 file with one row per line: .tsv (fields separated by tabs), .csv (RFC 4180; the separator
may be a semicolon) or .jsonl (one object per line). The first line names the columns. With --no-header the
columns have the numbers 1, 2 and so on.

The new run's folder has config.json, the vocabulary, log.jsonl, losses.png, checkpoints/ with the last and
the best epoch, and predictions.jsonl: the best network's predictions for --test, or for --validation
without --test.
"""


BASIC = (
    *(
        "--train",
        "--validation",
        "--test",
        "--output",
        "--resume",
        "--text-columns",
        "--label",
        "--task",
        "--checkpoint",
    ),
    *("--gpus", "--epochs", "--batch-size", "--lr", "--max-seq-length"),
)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    p = parser_of(
        "finetune",
        "RUN --train FILE --validation FILE [flags]\n--resume RUN",
        "Fine-tune a pretrained network: for classes or scores of texts, tags of words, or answers.",
        EXAMPLES,
        BASIC,
    )
    p.add_argument("run", type=Path, nargs="?", metavar="RUN", help="the run to fine-tune")
    p.add_argument("--resume", type=Path, metavar="RUN", help="continue a fine-tuning that was stopped")
    p.add_argument(
        "--output", type=Path, metavar="FOLDER", help="folder of the new run (RUN-finetuned-1, ...)"
    )
    rows = p.add_argument_group("tables")
    rows.add_argument("--train", type=Path, metavar="FILE", help="labelled rows to learn from")
    rows.add_argument(
        "--validation", type=Path, metavar="FILE", help="labelled rows that choose the best epoch"
    )
    rows.add_argument(
        "--test", type=Path, metavar="FILE", help="rows to predict at the end; labels are optional"
    )
    rows.add_argument(
        "--text-columns",
        nargs="+",
        metavar="COLUMN",
        default=[],
        help="the column of the texts, or the two columns of pairs (found by their names)",
    )
    rows.add_argument(
        "--label",
        metavar="COLUMN",
        help="the column of labels or scores (label, score, gold_label or is_duplicate)",
    )
    rows.add_argument("--header", action=OnOff, default=True, help="the first line names the columns (on)")
    rows.add_argument(
        "--quoting",
        choices=QUOTING,
        default="auto",
        help="quotation marks in .tsv. minimal: as pandas writes them. none: keep them (auto)",
    )
    rows.add_argument(
        "--task",
        choices=("auto", *KINDS),
        default="auto",
        help="kind of task. auto: by the training file; regression if a label has a fraction (auto)",
    )
    add_checkpoint_flag(p)
    where = p.add_argument_group("devices (one CPU)")
    where.add_argument("--gpus", metavar="N[,N...]", help="use these GPUs, such as 0 or 0,1")
    where.add_argument(
        "--cpus", type=int, metavar="N", help="use N contexts on the CPU, each with its part of a batch"
    )
    where.add_argument(
        "--ignore-memory-estimate",
        action="store_true",
        help="train even if the estimated memory exceeds the machine's",
    )
    default = FineTuneConfig()
    add_field_flags(
        p.add_argument_group("training"), FineTuneConfig, lambda name: shown(getattr(default, name))
    )
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return main_with_exit_status(parser(), argv, finetune)


def finetune(arguments: argparse.Namespace) -> int:
    """Fine-tune as the flags say."""
    from gluon_bert.finetuning import finetune as finetuning

    if arguments.resume is not None:
        check_nothing_else(arguments)
        ignore = arguments.ignore_memory_estimate
        finetuning.resume_finetuning(
            arguments.resume, devices=devices_of(arguments), ignore_memory_estimate=ignore
        )
        return 0
    if None in (arguments.run, arguments.train, arguments.validation):
        raise InputError("RUN, --train and --validation must be given, or --resume.")
    if len(arguments.text_columns) > 2:
        raise InputError(
            f"--text-columns must be one column, or two for pairs, got {len(arguments.text_columns)}."
        )
    names = {field.name for field in dataclasses.fields(FineTuneConfig)}
    options = {name: value for name, value in vars(arguments).items() if name in names}
    check_group(FineTuneConfig(**options))
    finetuning.finetune(
        arguments.run,
        arguments.train,
        arguments.validation,
        arguments.output or free_folder(arguments.run),
        test=arguments.test or "",
        text_columns=arguments.text_columns,
        label=arguments.label or "",
        header=arguments.header,
        quoting=arguments.quoting,
        task=arguments.task,
        checkpoint=arguments.checkpoint,
        devices=devices_of(arguments),
        ignore_memory_estimate=arguments.ignore_memory_estimate,
        **options,
    )
    return 0


def check_nothing_else(arguments: argparse.Namespace) -> None:
    """Raise InputError if a flag is given that has no effect with --resume."""
    if arguments.run is not None:
        raise InputError("RUN must be omitted with --resume, which names the run.")
    allowed = {"resume", "gpus", "cpus", "ignore_memory_estimate"}
    defaults = vars(parser().parse_args([]))
    given = [n for n, value in vars(arguments).items() if value != defaults.get(n) and n not in allowed]
    if given:
        flags = ", ".join(map(flag_name, given))
        raise InputError(
            f"{flags} must be omitted with --resume, which continues with the options of the start. Start a "
            "new fine-tuning to change them."
        )


def devices_of(arguments: argparse.Namespace) -> list[Any]:
    """Return the devices that the flags name: one CPU without flags."""
    gpus = None if arguments.gpus is None else devices.parse_gpus(arguments.gpus)
    cpus = 1 if gpus is None and arguments.cpus is None else arguments.cpus
    return devices.contexts(gpus, cpus)


def free_folder(before: Path) -> Path:
    """Return a new folder beside the run's."""
    number = 1
    while before.with_name(f"{before.name}-finetuned-{number}").exists():
        number += 1
    return before.with_name(f"{before.name}-finetuned-{number}")


if __name__ == "__main__":
    run(main)
