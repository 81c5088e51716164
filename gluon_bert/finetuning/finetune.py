"""Fine-tune a pretrained network on labelled texts, with the one training loop. Parses no flags."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any, Iterable, Mapping, Sequence

from .. import runtime
from ..checkpoint import CONFIG, latest_valid
from ..config import Config, FineTuneConfig, TrainConfig, check_group
from ..data.tokenizer import Tokenizer
from ..data.vocab import Normalization, Vocabulary
from ..errors import InputError
from ..fileio import atomic_write, exclusive_lock, json_text
from ..inference.predictor import GluonNetwork, Predictor
from ..model.classifier import BERTForTask
from ..model.parameters import put_weights, weights_of
from ..model.task import Task
from ..run import Run, check_new_run, create_run, load_run, read_config, read_environment, read_task
from ..runtime import mx
from ..training.callbacks import Callback
from ..training.checkpointer import AsyncCheckpointer
from ..training.losses import task_loss
from ..training.memory_plan import MemoryPlan
from ..training.progress import ProgressLogger
from ..training.trainer import Trainer
from . import metrics
from .dataset import ExampleLoader, Examples, TaskFiles
from .formats import task_format


def finetune(
    run: Run | Path | str,
    train: Path | str,
    validation: Path | str,
    output: Path | str,
    *,
    test: Path | str = "",
    text_columns: Sequence[str] = (),
    label: str = "",
    header: bool = True,
    quoting: str = "auto",
    task: str = "auto",
    checkpoint: str | int = "latest",
    devices: Sequence[Any] | None = None,
    callbacks: Iterable[Callback] = (),
    ignore_memory_estimate: bool = False,
    **options: Any,
) -> Run:
    """Fine-tune a run on labelled texts; return the new run with its best network.

    run: a pretrained run or its folder. train, validation, test: files, see `formats.task_format`. output:
    the new run's folder. task: a kind of task, or auto. ignore_memory_estimate: train although the estimate
    exceeds the memory. options: fields of FineTuneConfig.

    >>> tuned = finetune("runs/base", "train.tsv", "dev.tsv", "runs/sst", lr=3e-4)          # doctest: +SKIP

    Raise InputError for files, options or runs that cannot be used.
    """
    config = _config_of(options)
    output, devices = Path(output), list(devices or [mx.cpu()])
    check_new_run(output)
    files = TaskFiles(str(train), str(validation), str(test), tuple(text_columns), label, header, quoting)
    format_ = task_format(files, task)
    rows = format_.read(files)
    # On a CPU, as a GPU has no memory to spare.
    before = run if isinstance(run, Run) else load_run(Path(run), [mx.cpu()], checkpoint)
    _check_run(before, config)
    target = format_.infer_task(rows["train"])
    check_metric(config, target)
    length = config.max_seq_length or before.config.data.max_seq_length
    reader = Tokenizer(before.vocab, length, Normalization.from_config(before.config.data))
    data = {role: format_.examples(its_rows, target, reader, role) for role, its_rows in rows.items()}
    check_validation(config, target, data["validation"])
    recipe = train_config(config, len(data["train"]))
    whole = dataclasses.replace(
        before.config.replace(max_seq_length=length, dropout=config.dropout), train=recipe
    )
    plan = memory_plan(whole, before.vocab, target, data["train"], devices)
    plan.check(ignore_memory_estimate)
    with plan.explain_out_of_memory():
        net = init_from_pretrained(before.net, target, config, devices)
        trainer = task_trainer(net, config, recipe, devices, [*_callbacks(output), *callbacks])
    before = dataclasses.replace(before, net=None)  # its weights would stay in memory to the end
    about = {
        "run": "" if isinstance(run, Run) else str(run),
        "init_step": before.step,
        "files": dataclasses.asdict(files),
        "options": dataclasses.asdict(config),
    }
    environment = {"finetuned": about, "contexts": list(map(str, devices)), "versions": runtime.versions()}
    create_run(output, whole, before.vocab, environment, target)
    return _train(output, trainer, config, reader, data, plan)


def resume_finetuning(
    folder: Path | str,
    devices: Sequence[Any] | None = None,
    callbacks: Iterable[Callback] = (),
    ignore_memory_estimate: bool = False,
) -> Run:
    """Continue a fine-tuning that was stopped, from its latest checkpoint.

    Return the run as `finetune` does.
    """
    folder, devices = Path(folder), list(devices or [mx.cpu()])
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} must be the folder of a fine-tuned run: it has no {CONFIG}")
    whole, task = read_config(folder / CONFIG), read_task(folder / CONFIG)
    config, files = _recorded(folder)
    if task is None:
        raise InputError(f"{folder} must be a fine-tuned run. Resume a pretraining run with pretrain.")
    snapshot = latest_valid(folder)
    reader = load_run(folder).reader
    format_ = task_format(files, task.kind)
    rows = format_.read(files)
    data = {role: format_.examples(its_rows, task, reader, role) for role, its_rows in rows.items()}
    if train_config(config, len(data["train"])) != whole.train:
        raise InputError(f"{files.train} must have the same rows as when {folder} was started.")
    plan = memory_plan(whole, reader.vocab, task, data["train"], devices)
    plan.check(ignore_memory_estimate)
    with plan.explain_out_of_memory():
        net = _network(len(reader.vocab), whole, task, config.seed, devices)
        trainer = task_trainer(net, config, whole.train, devices, [*_callbacks(folder), *callbacks])
        trainer.restore(snapshot, folder)
    return _train(folder, trainer, config, reader, data, plan)


def _recorded(folder: Path) -> tuple[FineTuneConfig, TaskFiles]:
    """Return the options and files of a fine-tuned run; raise InputError for other runs."""
    about = read_environment(folder / CONFIG).get("finetuned")
    try:
        assert isinstance(about, dict)
        return _config_of(about["options"]), TaskFiles(**about["files"])
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
        raise InputError(f"RUN must be a pretraining run, got {before.folder}, which was fine-tuned already.")
    positions = before.config.model.max_positions
    if config.max_seq_length and not 8 <= config.max_seq_length <= positions:
        raise InputError(
            f"max_seq_length must be from 8 to the run's {positions} positions, got {config.max_seq_length}"
        )


def check_metric(config: FineTuneConfig, task: Task) -> None:
    """Raise InputError if `best_metric` is not a metric of this kind of task."""
    allowed = metrics.metrics_of(task)
    if config.best_metric not in ("auto", *allowed):
        raise InputError(
            f"best_metric must be {', '.join(allowed)} for {task.kind}, got {config.best_metric}"
        )


def check_validation(config: FineTuneConfig, task: Task, data: Examples) -> None:
    """Raise InputError if the metric that chooses the best epoch would be NaN on validation scores."""
    best = _best_metric(config, task)
    if best in ("pearson", "spearman") and data.targets is not None and len(set(data.targets)) == 1:
        raise InputError(
            f"validation: all {len(data.targets)} scores are {data.targets[0]:g}, so the {best} correlation "
            "is not a number. Give a file with several scores, or choose best_metric=mse."
        )


def _best_metric(config: FineTuneConfig, task: Task) -> str:
    return config.best_metric if config.best_metric != "auto" else metrics.metrics_of(task)[0]


def _callbacks(folder: Path) -> list[Callback]:
    return [ProgressLogger(folder), AsyncCheckpointer(folder)]


def init_from_pretrained(
    net: Any, task: Task, config: FineTuneConfig, devices: Sequence[Any], pretrained: bool = True
) -> Any:
    """Return a network for a task: a pretrained encoder, its pooler if the task needs one, and a new head.

    pretrained: False draws the encoder and the pooler as well, to measure the effect of pretraining.
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
    best = _best_metric(config, net.task)
    mode = "min" if best in metrics.SMALLER else "max"
    return Trainer(net, recipe, devices, loss=task_loss, callbacks=callbacks, monitor=best, mode=mode)


def memory_plan(
    config: Config, vocab: Vocabulary, task: Task, data: Examples, devices: Sequence[Any]
) -> MemoryPlan:
    """Return what fine-tuning takes of its devices, where all texts are as long as the longest."""
    longest = max(map(len, data.texts), default=config.data.max_seq_length)
    return MemoryPlan(config.replace(max_seq_length=longest), len(vocab), devices, task=task)


def _train(
    output: Path,
    trainer: Trainer,
    config: FineTuneConfig,
    reader: Tokenizer,
    data: Mapping[str, Examples],
    plan: MemoryPlan,
) -> Run:
    """Train to the end, and write the predictions of the best network."""
    lines = [describe(trainer.net.task, data), plan.describe(), f"run folder: {output}"]
    print("\n".join(lines), file=sys.stderr)
    batches = ExampleLoader(data["train"], config.batch_size, config.seed, reader.max_seq_length)
    role = "test" if "test" in data else "validation"
    with exclusive_lock(output, "output"), plan.explain_out_of_memory():
        trainer.fit(batches, validation=lambda: evaluate(trainer.net, reader, data["validation"]))
        tuned = load_run(output, trainer.devices[:1], "best")
        results = data[role].results(Predictor.of(tuned))
        with atomic_write(output / "predictions.jsonl") as file:
            file.writelines(json_text(record) + "\n" for record in data[role].records(results))
    print(plan.outcome(), file=sys.stderr)
    best = trainer.state.best
    assert best is not None
    epoch = best.step * config.epochs // trainer.config.num_steps
    print(
        f"best of {config.epochs} epochs: {epoch}, {format_metrics(best.validation)} on the validation file"
    )
    line = f"{output / 'predictions.jsonl'}: {len(results)} predictions for the {role} file"
    if data[role].targets is not None:
        if role == "test":
            line += f", {format_metrics(data[role].metrics(results))}"
        line = "\n".join([line, *data[role].details(results)])
    print(f"{line}\nits network: {output}, checkpoint best")
    return tuned


def describe(task: Task, data: Mapping[str, Examples]) -> str:
    """Return a line about the task and the files."""
    what = {
        "classification": f"{len(task.labels)} classes",
        "regression": "a score",
        "tagging": f"tags of {len(task.labels) // 2} types of entities"
        if task.has_entities
        else f"{len(task.labels)} tags",
        "question-answering": "answers in contexts",
    }[task.kind]
    texts = "" if task.scores_tokens else " of pairs of texts" if task.pairs else " of single texts"
    files = ", ".join(f"{its.described()} in {role}" for role, its in data.items())
    return f"{what}{texts}: {files}"


def format_metrics(found: Mapping[str, float]) -> str:
    """Return metrics for a person."""
    return ", ".join(f"{name} {value:.4f}" for name, value in found.items())


def evaluate(net: Any, reader: Tokenizer, data: Examples) -> dict[str, float]:
    """Return the metrics of the network's task on labelled examples, with dropout off."""
    return data.metrics(data.results(Predictor(GluonNetwork(net), reader, net.task)))
