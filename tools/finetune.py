"""Fine-tunes a pretrained network for a task of one's own: `python tools/finetune.py --help` tells how."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from gluon_bert.cli import (
    add_checkpoint_flag,
    add_device_flag,
    add_field_flags,
    device,
    main_with_exit_status,
    parser_of,
    run,
    shown,
    yes_or_no,
)
from gluon_bert.config import FineTuneConfig, check_group
from gluon_bert.data.vocab import Normalization
from gluon_bert.errors import InputError
from gluon_bert.fileio import atomic_write, json_text, nan_to_null
from gluon_bert.finetuning.tables import QUOTING

EXAMPLES = """\
examples:
  python tools/finetune.py runs/base --train train.tsv --dev dev.tsv
  python tools/finetune.py runs/base --train train.csv --dev dev.csv --text question answer --label right
  python tools/finetune.py runs/base --train train.jsonl --dev dev.jsonl --test test.jsonl --task regression
  python tools/finetune.py runs/small --train cola/train.tsv --dev cola/dev.tsv --header no --text 4 --label 2
  python tools/encode.py runs/base-finetuned-1 "a text to be judged" --checkpoint best
  python tools/export.py runs/base-finetuned-1 --checkpoint best --format mar

RUN is the folder of a pretraining run or of converted weights. A table is a UTF-8 file that ends in .tsv
(fields separated by tabs), .csv (as in RFC 4180; the separator may also be a semicolon) or .jsonl (an object
a line), with one row a line. Its first line names the columns. With --header no they are numbered from 1.

The new run's folder holds config.json, the vocabulary, log.jsonl (an object an epoch), checkpoints/ (the last
and the best epoch's network) and predictions.jsonl, those of the best one on the dev or the test file.
"""


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    p = parser_of(
        "finetune",
        "RUN --train FILE --dev FILE [flags]",
        "Fine-tune a pretrained network: classes or a score, of single texts or of pairs.",
        EXAMPLES,
    )
    p.add_argument("run", type=Path, metavar="RUN", help="the run whose encoder is fine-tuned")
    p.add_argument("--train", type=Path, required=True, metavar="FILE", help="labelled rows to learn from")
    p.add_argument(
        "--dev", type=Path, required=True, metavar="FILE", help="labelled rows to choose the best epoch by"
    )
    p.add_argument("--test", type=Path, metavar="FILE", help="rows to predict at the end, labelled or not")
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
        choices=("auto", "classification", "regression"),
        default="auto",
        help="auto: regression where a label is a number that is not whole (auto)",
    )
    add_checkpoint_flag(p)
    add_device_flag(p)
    default = FineTuneConfig()
    add_field_flags(p.add_argument_group("how"), FineTuneConfig, lambda name: shown(getattr(default, name)))
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return main_with_exit_status(parser(), argv, finetune)


def finetune(arguments: argparse.Namespace) -> int:
    """Fine-tune as the flags say."""
    from gluon_bert.data.tokenizer import Tokenizer
    from gluon_bert.finetuning.dataset import examples, infer_task
    from gluon_bert.finetuning.finetune import FineTuner, init_from_pretrained
    from gluon_bert.run import check_new_run, load_run

    config = config_from(arguments)
    output = arguments.output or free_folder(arguments.run)
    check_new_run(output)
    rows = read_rows(arguments)
    context = device(arguments)
    before = load_run(arguments.run, [context], arguments.checkpoint)
    check(arguments, before, config)
    task = infer_task(rows["--train"], arguments.task)
    check_metric(config, task)
    max_seq_length = config.max_seq_length or before.config.data.max_seq_length
    reader = Tokenizer(before.vocab, max_seq_length, Normalization.from_config(before.config.data))
    data = {flag: examples(its_rows, task, reader, flag) for flag, its_rows in rows.items()}
    tuner = FineTuner(init_from_pretrained(before.net, task, config, context), reader, config)
    create(output, before, arguments, tuner, len(rows["--train"]))
    print(f"{describe(task, data)}\nrun folder: {output}", file=sys.stderr)
    best = fit(output, tuner, data["--train"], data["--dev"])
    print(f"best of {config.epochs} epochs: {best.number}, {in_words(best.dev)} on the dev file")
    print(predict(output, "--test" if "--test" in data else "--dev", rows, data, reader))
    print(f"its network: {output} --checkpoint best")
    return 0


def read_rows(arguments: argparse.Namespace) -> dict[str, Any]:
    """The rows of each table, by its flag."""
    from gluon_bert.finetuning.tables import choose_columns, read_table

    header = arguments.header
    quoting = arguments.quoting
    columns = choose_columns(arguments.train, "--train", header, arguments.text, arguments.label, quoting)
    tables = {"--train": arguments.train, "--dev": arguments.dev, "--test": arguments.test}
    return {
        flag: read_table(path, flag, header, columns, labels_needed=flag != "--test", quoting=quoting)
        for flag, path in tables.items()
        if path is not None
    }


def config_from(arguments: argparse.Namespace) -> FineTuneConfig:
    """What the command line says of the fine-tuning, checked."""
    names = {field.name for field in dataclasses.fields(FineTuneConfig)}
    config = FineTuneConfig(**{name: value for name, value in vars(arguments).items() if name in names})
    problems = []
    if len(arguments.text) > 2:
        problems.append(f"--text {' '.join(arguments.text)}: must be one column, or two of pairs")
    try:
        check_group(config)
    except InputError as error:
        problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    return config


def check(arguments: argparse.Namespace, before: Any, config: FineTuneConfig) -> None:
    """Raise InputError where the run cannot be fine-tuned as the flags say."""
    if before.task:
        raise InputError(f"{arguments.run}: was fine-tuned already; name the run that it began with")
    positions = before.config.model.max_positions
    if config.max_seq_length and not 8 <= config.max_seq_length <= positions:
        raise InputError(
            f"--max-seq-length {config.max_seq_length}: must be from 8 to the run's {positions} positions"
        )


def check_metric(config: FineTuneConfig, task: Any) -> None:
    """Raise InputError where the best epoch is to be chosen by what this task does not have."""
    from gluon_bert.finetuning.metrics import METRICS_BY_TASK

    if config.best_metric not in ("auto", *METRICS_BY_TASK[task.kind]):
        raise InputError(
            f"--best-metric {config.best_metric}: of a {task.kind} it must be {', '.join(METRICS_BY_TASK[task.kind])}"
        )


def create(output: Path, before: Any, arguments: argparse.Namespace, tuner: Any, num_examples: int) -> None:
    """Make the new run's folder."""
    from gluon_bert import runtime
    from gluon_bert.finetuning.finetune import train_config
    from gluon_bert.run import create_run

    config = dataclasses.replace(
        before.config.replace(max_seq_length=tuner.reader.max_seq_length, dropout=tuner.config.dropout),
        train=train_config(tuner.config, num_examples),
    )
    given = {name: getattr(arguments, name) for name in ("run", "train", "dev", "test")}
    files = {name: None if path is None else str(path) for name, path in given.items()}
    facts = {
        "finetuned": {**files, "init_step": before.step, **dataclasses.asdict(tuner.config)},
        "versions": runtime.versions(),
    }
    create_run(output, config, before.vocab, facts, tuner.net.task)


def fit(output: Path, tuner: Any, train: Any, dev: Any) -> Any:
    """Train, with a line, a record and a checkpoint an epoch; returns the best one."""
    from gluon_bert.checkpoint import save_checkpoint

    with (output / "log.jsonl").open("w", encoding="utf-8") as log:

        def tell(epoch: Any) -> None:
            print(f"epoch {epoch.number}: loss {epoch.loss:.4f}, dev {in_words(epoch.dev)}", file=sys.stderr)
            json.dump(nan_to_null(epoch._asdict()), log)
            log.write("\n")
            log.flush()
            save_checkpoint(output, tuner.net, epoch.step, best=epoch.best, keep=1)

        return tuner.fit(train, dev, tell)


def predict(output: Path, flag: str, rows: Any, data: Any, reader: Any) -> str:
    """Write what the best network says of a file; returns a sentence on it."""
    from gluon_bert.finetuning.finetune import evaluated, scores_of
    from gluon_bert.inference.predictor import GluonNetwork, Predictor
    from gluon_bert.run import load_run

    net = load_run(output, checkpoint="best").net
    answers = list(Predictor(GluonNetwork(net), reader, net.task).predict(data[flag].texts))
    path = output / "predictions.jsonl"
    with atomic_write(path) as file:
        for row, answer in zip(rows[flag], answers):
            given = {"label": row.label} if row.label is not None else {}
            line = {"texts": row.texts, "given": given, "predicted": answer.task_prediction}
            file.write(json_text(line) + "\n")
    told = f"{path}: {len(answers)} predictions for {flag}"
    if flag == "--test" and data[flag].targets is not None:
        told += f", {in_words(evaluated(scores_of(answers), data[flag], net.task))}"
    return told


def in_words(found: dict[str, float]) -> str:
    """Metrics for a person."""
    return ", ".join(f"{name} {value:.4f}" for name, value in found.items())


def describe(task: Any, data: dict[str, Any]) -> str:
    """A line on what is about to be learnt."""
    what = f"{len(task.labels)} classes" if task.labels else "a score"
    texts = "pairs of texts" if task.pairs else "single texts"
    files = ", ".join(f"{len(its):,} rows in {flag}" for flag, its in data.items())
    return f"{what} of {texts}: {files}"


def free_folder(before: Path) -> Path:
    """A new folder beside the run's."""
    number = 1
    while before.with_name(f"{before.name}-finetuned-{number}").exists():
        number += 1
    return before.with_name(f"{before.name}-finetuned-{number}")


if __name__ == "__main__":
    run(main)
