"""Fine-tunes a run's network in transformers on the same batches, to compare with."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from gluon_bert.cli import add_checkpoint_flag, add_field_flags, main_with_exit_status, parser_of, run, shown
from gluon_bert.config import FineTuneConfig, check_group
from gluon_bert.errors import InputError

DESCRIPTION = """\
Fine-tune the BertForTokenClassification or BertForQuestionAnswering of transformers from the weights of
RUN. The batches, their order, the learning rates, AdamW, clipping, dropout and the metrics are those of
tools/finetune.py with the same flags. The head's first weights and the dropped values differ: PyTorch draws
its own. The command needs torch and transformers (extra test-others). It prints the metrics after each
epoch.
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    p = parser_of("dev/finetune_transformers", "RUN --train FILE --validation FILE [flags]", DESCRIPTION)
    p.add_argument("run", type=Path, metavar="RUN", help="the run whose encoder is fine-tuned")
    p.add_argument("--train", required=True, metavar="FILE", help="a CoNLL or SQuAD file to learn from")
    p.add_argument(
        "--validation", required=True, metavar="FILE", help="a file to evaluate on after each epoch"
    )
    add_checkpoint_flag(p)
    default = FineTuneConfig()
    add_field_flags(p.add_argument_group("how"), FineTuneConfig, lambda name: shown(getattr(default, name)))
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return main_with_exit_status(parser(), argv, compare)


def compare(arguments: argparse.Namespace) -> int:
    """Fine-tune as the flags say."""
    from gluon_bert.data.tokenizer import Tokenizer
    from gluon_bert.data.vocab import Normalization
    from gluon_bert.finetuning.dataset import TaskFiles
    from gluon_bert.finetuning.finetune import describe, format_metrics, train_config
    from gluon_bert.finetuning.formats import task_format
    from gluon_bert.inference.predictor import Predictor
    from gluon_bert.run import load_run

    names = {field.name for field in dataclasses.fields(FineTuneConfig)}
    config = FineTuneConfig(**{name: value for name, value in vars(arguments).items() if name in names})
    check_group(config)
    before = load_run(arguments.run, checkpoint=arguments.checkpoint)
    files = TaskFiles(arguments.train, arguments.validation)
    format_ = task_format(files, "auto")
    rows = format_.read(files)
    task = format_.infer_task(rows["train"])
    if not task.scores_tokens:
        raise InputError(f"--train {arguments.train}: must be a file for tagging or question answering")
    length = config.max_seq_length or before.config.data.max_seq_length
    reader = Tokenizer(before.vocab, length, Normalization.from_config(before.config.data))
    data = {name: format_.examples(its_rows, task, reader, name) for name, its_rows in rows.items()}
    print(describe(task, data), file=sys.stderr)
    recipe = train_config(config, len(data["train"]))
    steps = iter(range(1, recipe.num_steps + 1))
    model = transformers_model(before, task, config)
    optimizer = adamw(model, recipe)
    for epoch in range(config.epochs):
        started = time.perf_counter()
        losses = [
            train_step(model, optimizer, recipe, next(steps), data["train"].batch(numbers.tolist(), length))
            for numbers in data["train"].batches(config.batch_size, config.seed, epoch)
        ]
        seconds = time.perf_counter() - started
        predictor = Predictor(TransformersNetwork(model), reader, task)
        found = data["validation"].metrics(data["validation"].results(predictor))
        loss = f"loss {np.mean(losses):.4f}"
        print(f"epoch {epoch + 1}: {loss}, {format_metrics(found)}, {seconds:.1f} s of training", flush=True)
    return 0


def transformers_model(before: Any, task: Any, config: FineTuneConfig) -> Any:
    """Return the model of transformers with the weights of a run and a new head."""
    import torch
    import transformers

    from gluon_bert.conversion.huggingface import write_huggingface

    torch.manual_seed(config.seed)
    kind = "BertForTokenClassification" if task.kind == "tagging" else "BertForQuestionAnswering"
    with tempfile.TemporaryDirectory() as folder:
        write_huggingface(before, Path(folder, "bert"))
        return getattr(transformers, kind).from_pretrained(
            Path(folder, "bert"),
            num_labels=task.outputs,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
        )


def adamw(model: Any, recipe: Any) -> Any:
    """Return AdamW, without weight decay for biases and LayerNorm."""
    import torch

    def decays(name: str) -> bool:
        return not name.endswith("bias") and "LayerNorm" not in name

    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if decays(name)], "weight_decay": recipe.weight_decay},
        {"params": [p for name, p in named if not decays(name)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), eps=recipe.epsilon)


def train_step(model: Any, optimizer: Any, recipe: Any, step: int, batch: Any) -> float:
    """Make one optimizer step; return the loss."""
    import torch

    from gluon_bert.training.lr_schedule import learning_rate

    for group in optimizer.param_groups:
        group["lr"] = learning_rate(recipe, step, recipe.num_steps)
    model.train()
    targets = torch.from_numpy(np.asarray(batch.targets)).long()
    if batch.targets.shape[1] == 2 and not hasattr(batch, "num_labels"):
        labels = {"start_positions": targets[:, 0], "end_positions": targets[:, 1]}
    else:
        labels = {"labels": torch.where(targets < 0, -100, targets)}
    loss = model(**inputs_of(batch), **labels).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
    optimizer.step()
    return float(loss.item())


def inputs_of(batch: Any) -> dict[str, Any]:
    """Return the inputs of transformers' models."""
    import torch

    is_real = np.arange(batch.tokens.shape[1]) < batch.valid_length[:, None]
    arrays = {"input_ids": batch.tokens, "token_type_ids": batch.token_types, "attention_mask": is_real}
    return {name: torch.from_numpy(array).long() for name, array in arrays.items()}


class TransformersNetwork:
    """A fine-tuned model of transformers as a Backend, with dropout off."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, texts: Any) -> Any:
        """Return the last hidden states and the scores of the tokens."""
        import torch

        from gluon_bert.inference.predictor import Outputs

        self._model.eval()
        with torch.no_grad():
            found = self._model(**inputs_of(texts), output_hidden_states=True)
        encoded = found.hidden_states[-1].numpy()
        if hasattr(found, "logits"):
            return Outputs(encoded, token_scores=found.logits.numpy())
        scores = np.stack([found.start_logits.numpy(), found.end_logits.numpy()], axis=-1)
        return Outputs(encoded, token_scores=scores)


if __name__ == "__main__":
    run(main)
