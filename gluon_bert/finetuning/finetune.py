"""Fine-tunes a pretrained network on tables of labelled texts, with the one training loop. Parses no flags."""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, Sequence

import numpy as np

from .. import runtime
from ..checkpoint import CONFIG, latest_valid
from ..config import Config, FineTuneConfig, TrainConfig, check_group
from ..data.loader import LoaderState
from ..data.tokenizer import Tokenizer, pad
from ..data.vocab import Normalization
from ..errors import InputError
from ..fileio import atomic_write, exclusive_lock, json_text
from ..inference.predictor import GluonNetwork, Prediction, Predictor
from ..model.classifier import BERTForTask
from ..model.parameters import put_weights, weights_of
from ..model.task import Task
from ..run import Run, check_new_run, create_run, load_run, read_config, read_environment, read_task
from ..runtime import mx
from ..training.callbacks import Callback
from ..training.checkpointer import AsyncCheckpointer
from ..training.losses import task_loss
from ..training.progress import ProgressLogger
from ..training.trainer import Trainer
from . import metrics
from .dataset import Examples, examples, infer_task
from .tables import TableRow, choose_columns, read_table


@dataclass(frozen=True)
class Tables:
    """The files of a task, and how to read them: see `tables.read_table`.

    text: the columns of the texts, one or two; label: that of the labels. Empty: the usual names.
    """

    train: str
    validation: str
    test: str = ""
    text: Sequence[str] = ()
    label: str = ""
    header: bool = True
    quoting: str = "auto"

    def rows(self) -> dict[str, list[TableRow]]:
        """Return the rows of each file, by the flag of tools/finetune.py that names it."""
        columns = choose_columns(
            Path(self.train), "--train", self.header, list(self.text), self.label or None, self.quoting
        )
        paths = {"--train": self.train, "--dev": self.validation, "--test": self.test}
        return {
            flag: read_table(Path(path), flag, self.header, columns, flag != "--test", quoting=self.quoting)
            for flag, path in paths.items()
            if path
        }


@dataclass(frozen=True)
class TaskBatch:
    """Texts with their targets, padded to one length; see `data.batch.Batch`.

    tokens, token_types: (B, T) int32. valid_length: (B,) int32. targets: (B,) classes or scores.
    """

    tokens: np.ndarray
    token_types: np.ndarray
    valid_length: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)

    def rows(self, start: int, stop: int) -> TaskBatch:
        """Return the batch of the rows from `start` up to `stop`."""
        arrays = (getattr(self, field.name) for field in dataclasses.fields(self))
        return TaskBatch(*(array[start:stop] for array in arrays))


class ExampleLoader:
    """Batches of labelled examples, epoch by epoch, in an order from the seed."""

    def __init__(self, data: Examples, batch_size: int, seed: int, max_seq_length: int) -> None:
        self.data, self.batch_size, self.seed, self.max_seq_length = data, batch_size, seed, max_seq_length

    def iter_from(self, start: LoaderState) -> Iterator[tuple[LoaderState, TaskBatch]]:
        """Yield the batches from a position on, epoch after epoch, each with its own position."""
        epoch, skip = start
        while True:
            for number, rows in enumerate(self.data.batches(self.batch_size, self.seed, epoch)):
                if number >= skip:
                    yield LoaderState(epoch, number), self._batch(rows)
            epoch, skip = epoch + 1, 0

    def __iter__(self) -> Iterator[TaskBatch]:
        return map(self._batch, self.data.batches(self.batch_size, self.seed, 0))

    def _batch(self, rows: np.ndarray) -> TaskBatch:
        assert self.data.targets is not None
        padded = pad([self.data.texts[i] for i in rows], self.max_seq_length)
        return TaskBatch(padded.tokens, padded.token_types, padded.valid_length, self.data.targets[rows])


def finetune(
    run: Run | Path | str,
    train: Path | str,
    validation: Path | str,
    output: Path | str,
    *,
    test: Path | str = "",
    text: Sequence[str] = (),
    label: str = "",
    header: bool = True,
    quoting: str = "auto",
    task: str = "auto",
    checkpoint: str | int = "latest",
    devices: Sequence[Any] | None = None,
    callbacks: Iterable[Callback] = (),
    **options: Any,
) -> Run:
    """Fine-tune a run on tables of labelled texts; return the new run with its best network.

    run: a pretrained run or its folder. train, validation, test: tables, see `tables.read_table`. output: the
    new run's folder. task: classification, regression, or auto. options: fields of FineTuneConfig.

    >>> tuned = finetune("runs/base", "train.tsv", "dev.tsv", "runs/sst", lr=3e-4)          # doctest: +SKIP

    Raises InputError for tables, options or runs that cannot be used.
    """
    config = _config_of(options)
    output, devices = Path(output), list(devices or [mx.cpu()])
    check_new_run(output)
    tables = Tables(str(train), str(validation), str(test), tuple(text), label, header, quoting)
    rows = tables.rows()
    before = run if isinstance(run, Run) else load_run(Path(run), devices[:1], checkpoint)
    _check_run(before, config)
    target = infer_task(rows["--train"], task)
    check_metric(config, target)
    net = init_from_pretrained(before.net, target, config, devices)
    length = config.max_seq_length or before.config.data.max_seq_length
    reader = Tokenizer(before.vocab, length, Normalization.from_config(before.config.data))
    data = {flag: examples(its_rows, target, reader, flag) for flag, its_rows in rows.items()}
    recipe = train_config(config, len(rows["--train"]))
    trainer = task_trainer(net, config, recipe, devices, [*_callbacks(output), *callbacks])
    about = {
        "run": "" if isinstance(run, Run) else str(run),
        "init_step": before.step,
        "tables": dataclasses.asdict(tables),
        "options": dataclasses.asdict(config),
    }
    whole = dataclasses.replace(
        before.config.replace(max_seq_length=length, dropout=config.dropout), train=recipe
    )
    facts = {"finetuned": about, "contexts": list(map(str, devices)), "versions": runtime.versions()}
    create_run(output, whole, before.vocab, facts, target)
    return _train(output, trainer, config, reader, rows, data, target)


def resume_finetuning(
    folder: Path | str, devices: Sequence[Any] | None = None, callbacks: Iterable[Callback] = ()
) -> Run:
    """Continue a fine-tuning that was stopped, from its latest checkpoint; return the run as `finetune` does."""
    folder, devices = Path(folder), list(devices or [mx.cpu()])
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} must be the folder of a fine-tuned run: it has no {CONFIG}")
    whole, task = read_config(folder / CONFIG), read_task(folder / CONFIG)
    config, tables = _recorded(folder)
    if task is None:
        raise InputError(f"{folder} must be a fine-tuned run. Resume it with pretrain --resume")
    snapshot = latest_valid(folder)
    reader = load_run(folder).reader
    rows = tables.rows()
    data = {flag: examples(its_rows, task, reader, flag) for flag, its_rows in rows.items()}
    if train_config(config, len(rows["--train"])) != whole.train:
        raise InputError(f"{tables.train} must have the rows that {folder} began with. It has others now")
    net = _network(len(reader.vocab), whole, task, config.seed, devices)
    trainer = task_trainer(net, config, whole.train, devices, [*_callbacks(folder), *callbacks])
    trainer.restore(snapshot, folder)
    return _train(folder, trainer, config, reader, rows, data, task)


def _recorded(folder: Path) -> tuple[FineTuneConfig, Tables]:
    """Return the options and tables that a fine-tuned run began with; InputError for other runs."""
    about = read_environment(folder / CONFIG).get("finetuned")
    try:
        assert isinstance(about, dict)
        return _config_of(about["options"]), Tables(**about["tables"])
    except (AssertionError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder / CONFIG} must be the record of a fine-tuning that can be resumed"
        ) from error


def _config_of(options: Mapping[str, Any]) -> FineTuneConfig:
    """Return the options as a configuration, checked."""
    known = [field.name for field in dataclasses.fields(FineTuneConfig)]
    unknown = sorted(options.keys() - set(known))
    if unknown:
        raise InputError(f"unknown option {', '.join(unknown)}; the options are {', '.join(known)}")
    config = FineTuneConfig(**options)
    check_group(config)
    return config


def _check_run(before: Run, config: FineTuneConfig) -> None:
    """Raise InputError if the run cannot be fine-tuned with these options."""
    if before.task:
        raise InputError("the run was fine-tuned already; name the run that it began with")
    positions = before.config.model.max_positions
    if config.max_seq_length and not 8 <= config.max_seq_length <= positions:
        raise InputError(
            f"max_seq_length must be from 8 to the run's {positions} positions, got {config.max_seq_length}"
        )


def check_metric(config: FineTuneConfig, task: Task) -> None:
    """Raise InputError if `best_metric` is not a metric of this kind of task."""
    allowed = metrics.METRICS_BY_TASK[task.kind]
    if config.best_metric not in ("auto", *allowed):
        raise InputError(
            f"best_metric must be {', '.join(allowed)} for {task.kind}, got {config.best_metric}"
        )


def _callbacks(folder: Path) -> list[Callback]:
    return [ProgressLogger(folder), AsyncCheckpointer(folder)]


def init_from_pretrained(
    net: Any, task: Task, config: FineTuneConfig, devices: Sequence[Any], pretrained: bool = True
) -> Any:
    """Return a network for a task: the encoder and the pooler of a pretrained one, and a new head.

    pretrained: False draws the encoder and the pooler as well, to measure what pretraining is worth.
    """
    tuned = BERTForTask(net.vocab_size, dataclasses.replace(net.config, dropout=config.dropout), task)
    tuned.initialize(ctx=list(devices), seed=config.seed)
    tuned.hybridize()
    if pretrained:
        own = weights_of(tuned)
        put_weights(tuned, {name: value for name, value in weights_of(net).items() if name in own})
    return tuned


def _network(vocab_size: int, config: Config, task: Task, seed: int, devices: Sequence[Any]) -> Any:
    net = BERTForTask(vocab_size, config.model, task)
    net.initialize(ctx=list(devices), seed=seed)
    net.hybridize()
    return net


def train_config(config: FineTuneConfig, num_examples: int) -> TrainConfig:
    """Return the training options: AdamW with warm-up and linear decay, an evaluation after each epoch."""
    epoch = math.ceil(num_examples / config.batch_size)
    return TrainConfig(
        batch_size=config.batch_size,
        micro_batch=config.micro_batch,
        precision=config.precision,
        recompute=config.recompute,
        num_steps=config.epochs * epoch,
        lr=config.lr,
        schedule="linear",
        warmup_ratio=config.warmup_ratio,
        # With bias correction, without which short runs on little data fail by chance (Mosbach et al. 2021).
        optimizer="adamw",
        epsilon=1e-6,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        seed=config.seed,
        log_every=epoch,
        eval_every=epoch,
        keep_checkpoints=1,
    )


def task_trainer(
    net: Any,
    config: FineTuneConfig,
    recipe: TrainConfig,
    devices: Sequence[Any],
    callbacks: Iterable[Callback] = (),
) -> Trainer:
    """Return a trainer with the loss and the best metric of the network's task."""
    best = config.best_metric if config.best_metric != "auto" else metrics.METRICS_BY_TASK[net.task.kind][0]
    mode = "min" if best in metrics.SMALLER else "max"
    return Trainer(net, recipe, devices, loss=task_loss, callbacks=callbacks, monitor=best, mode=mode)


def _train(
    output: Path,
    trainer: Trainer,
    config: FineTuneConfig,
    reader: Tokenizer,
    rows: Mapping[str, list[TableRow]],
    data: Mapping[str, Examples],
    task: Task,
) -> Run:
    """Train to the end, and write the predictions of the best network."""
    print(f"{describe(task, data)}\nrun folder: {output}", file=sys.stderr)
    batches = ExampleLoader(data["--train"], config.batch_size, config.seed, reader.max_seq_length)
    with exclusive_lock(output, "--output"):
        trainer.fit(batches, validation=lambda: evaluate(trainer.net, reader, data["--dev"]))
        tuned = load_run(output, trainer.devices[:1], "best")
        flag = "--test" if "--test" in data else "--dev"
        answers = list(Predictor.of(tuned).predict(data[flag].texts))
        _write_predictions(output / "predictions.jsonl", rows[flag], answers)
    best = trainer.state.best
    assert best is not None
    epoch = best.step * config.epochs // trainer.config.num_steps
    print(f"best of {config.epochs} epochs: {epoch}, {format_metrics(best.validation)} on the dev file")
    line = f"{output / 'predictions.jsonl'}: {len(answers)} predictions for {flag}"
    if flag == "--test" and data[flag].targets is not None:
        line += f", {format_metrics(evaluated(scores_of(answers), data[flag], task))}"
    print(f"{line}\nits network: {output} --checkpoint best")
    return tuned


def _write_predictions(path: Path, rows: Sequence[TableRow], answers: Sequence[Prediction]) -> None:
    with atomic_write(path) as file:
        for row, answer in zip(rows, answers):
            given = {"label": row.label} if row.label is not None else {}
            line = {"texts": row.texts, "given": given, "predicted": answer.task_prediction}
            file.write(json_text(line) + "\n")


def describe(task: Task, data: Mapping[str, Examples]) -> str:
    """Return a line on what will be learnt."""
    what = f"{len(task.labels)} classes" if task.labels else "a score"
    texts = "pairs of texts" if task.pairs else "single texts"
    files = ", ".join(f"{len(its):,} rows in {flag}" for flag, its in data.items())
    return f"{what} of {texts}: {files}"


def format_metrics(found: Mapping[str, float]) -> str:
    """Return metrics for a person."""
    return ", ".join(f"{name} {value:.4f}" for name, value in found.items())


def predict(net: Any, reader: Tokenizer, data: Examples) -> np.ndarray:
    """Return the scores of each text, (N, K) float32, with dropout off."""
    return scores_of(Predictor(GluonNetwork(net), reader).predict(data.texts))


def evaluate(net: Any, reader: Tokenizer, data: Examples) -> dict[str, float]:
    """Return the metrics of the network's task on labelled examples."""
    return evaluated(predict(net, reader, data), data, net.task)


def evaluated(scores: np.ndarray, data: Examples, task: Task) -> dict[str, float]:
    """Return the metrics of scores (N, K) on labelled examples."""
    assert data.targets is not None
    if task.kind == "classification":
        return metrics.classification_metrics(data.targets, scores.argmax(axis=1), task.outputs)
    return metrics.regression_metrics(data.targets, scores[:, 0].astype(np.float64))


def scores_of(answers: Iterable[Prediction]) -> np.ndarray:
    """Return the task's scores of predictions, (N, K) float32."""
    return np.stack([answer.task_scores for answer in answers if answer.task_scores is not None])
