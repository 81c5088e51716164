"""Tagging and question answering: equal to transformers' heads, and the same bits after a round trip."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from dev import finetune_transformers
from dev.finetune_transformers import adamw, train_step
from support.conversion import VOCAB_SIZE, WORDS, assert_bits, configured, converted
from support.reference_bert import randomise

from gluon_bert.checkpoint import save_checkpoint
from gluon_bert.config import FineTuneConfig
from gluon_bert.conversion.converter import network, shapes
from gluon_bert.conversion.huggingface import bert_config, read_huggingface
from gluon_bert.conversion.weight_names import HUGGINGFACE, HUGGINGFACE_SPANS
from gluon_bert.data.wordpiece import SPECIAL_TOKENS, WordPieceVocabulary
from gluon_bert.errors import InputError
from gluon_bert.finetuning.dataset import TaskBatch
from gluon_bert.finetuning.finetune import task_trainer, train_config
from gluon_bert.finetuning.tagging import TaggingBatch
from gluon_bert.model.task import Task
from gluon_bert.presets import preset
from gluon_bert.run import create_run, load_run
from gluon_bert.runtime import mx
from gluon_bert.training.device_batch import split_and_load
from gluon_bert.training.losses import task_loss

TASKS = {
    "tagging": Task("tagging", False, ("O", "B-a", "I-a", "B-b", "I-b")),
    "question-answering": Task("question-answering", True, no_answer=True),
}
LAYOUTS = {"tagging": HUGGINGFACE, "question-answering": HUGGINGFACE_SPANS}
CLASSES = {"tagging": "BertForTokenClassification", "question-answering": "BertForQuestionAnswering"}
both_tasks = pytest.mark.parametrize("kind", TASKS)


def a_batch(kind, lengths=(12, 7, 5)):
    """Random texts with random tags, or places of answers."""
    rng = np.random.default_rng(0)
    rows, length = len(lengths), max(lengths)
    valid_length = np.array(lengths, np.int32)
    padding = np.arange(length) >= valid_length[:, None]
    tokens = np.where(padding, 1, rng.integers(1, VOCAB_SIZE, (rows, length))).astype(np.int32)
    types = np.where(padding, 0, np.arange(length) >= 3).astype(np.int32)
    if kind == "question-answering":
        return TaskBatch(tokens, types, valid_length, np.array([[1, 4], [0, 0], [2, 2]]))
    tags = np.where(padding | (rng.random((rows, length)) < 0.4), -1, rng.integers(0, 5, (rows, length)))
    return TaggingBatch(tokens, types, valid_length, tags)


def transformers_model(kind, config):
    """A fine-tuned BERT of transformers with random weights, and torch."""
    torch = pytest.importorskip("torch", reason="needs the extra test-others")
    transformers = pytest.importorskip("transformers", reason="needs the extra test-others")
    settings = bert_config(config, VOCAB_SIZE, architecture=CLASSES[kind])
    if kind == "tagging":
        settings["id2label"] = dict(enumerate(TASKS[kind].labels))
    torch.manual_seed(5)
    model = getattr(transformers, CLASSES[kind])(transformers.BertConfig(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return torch, model


def theirs(torch, model, kind, batch):
    """The scores of real tokens (N, K), the loss and its gradients."""
    is_real = torch.arange(batch.tokens.shape[1]) < torch.from_numpy(batch.valid_length)[:, None]
    targets = torch.from_numpy(batch.targets).long()
    inputs = {
        "input_ids": torch.from_numpy(batch.tokens).long(),
        "token_type_ids": torch.from_numpy(batch.token_types).long(),
        "attention_mask": is_real.long(),
    }
    if kind == "tagging":
        found = model(**inputs, labels=torch.where(targets < 0, -100, targets))
        scores, loss = found.logits, found.loss
    else:
        found = model(**inputs, start_positions=targets[:, 0], end_positions=targets[:, 1])
        scores, loss = torch.stack([found.start_logits, found.end_logits], -1), found.loss
        if not is_real.all():  # its own loss takes padding for a candidate
            possible = scores.masked_fill(~is_real[..., None], -1e4).transpose(1, 2).flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(possible, targets.flatten())
    loss.backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return scores.detach().numpy()[is_real.numpy()], loss.item(), gradients


def ours(net, batch):
    """The same of a network of this package."""
    (shard,) = split_and_load(batch, [mx.cpu()])
    scores = net(shard.tokens, shard.token_types, shard.valid_length)[1].asnumpy()
    with mx.autograd.record():
        loss = task_loss(net, shard).total
    loss.backward()
    gradients = {name: p.grad().asnumpy() for name, p in net._collect_params_with_prefix().items()}
    is_real = np.arange(scores.shape[1]) < batch.valid_length[:, None]
    return scores[is_real], loss.asscalar(), gradients


@pytest.mark.parametrize("lengths", [(12, 7, 5), (9, 9, 9)], ids=["padded", "equal"])
@both_tasks
def test_task_scores_and_gradients_equal_transformers(kind, lengths, tmp_path):
    config = configured("small")
    torch, model = transformers_model(kind, config)
    batch = a_batch(kind, lengths)
    scores, loss, gradients = theirs(torch, model, kind, batch)
    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, *WORDS]) + "\n")
    read = read_huggingface(tmp_path / "theirs", lowercase=True)
    assert (read.task.kind, read.task.labels) == (kind, TASKS[kind].labels)
    net = network(read.weights, VOCAB_SIZE, config, task=read.task)
    own_scores, own_loss, own_gradients = ours(net, batch)
    np.testing.assert_allclose(own_scores, scores, rtol=0, atol=1e-5 * np.abs(scores).max())
    assert own_loss == pytest.approx(loss, rel=1e-5)
    for name in shapes(VOCAB_SIZE, config, read.task):
        expected = gradients[LAYOUTS[kind].name(name)]
        tolerance = 1e-4 * max(np.abs(expected).max(), 1)
        np.testing.assert_allclose(own_gradients[name], expected, rtol=0, atol=tolerance, err_msg=name)


@both_tasks
def test_task_training_steps_equal_transformers(kind, tmp_path):
    """The same losses over several steps: learning rates, AdamW, weight decay and clipping are the same."""
    config = dataclasses.replace(configured("small"), dropout=0.0)
    _, model = transformers_model(kind, config)
    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, *WORDS]) + "\n")
    read = read_huggingface(tmp_path / "theirs", lowercase=True)
    net = network(read.weights, VOCAB_SIZE, config, task=read.task)
    options = FineTuneConfig(epochs=1, batch_size=3, lr=0.01, dropout=0.0, weight_decay=0.1)
    recipe = train_config(options, num_examples=18)
    trainer, optimizer = task_trainer(net, options, recipe, [mx.cpu()]), adamw(model, recipe)
    batch = a_batch(kind, (9, 9, 9))
    found, expected = [], []
    for step in range(1, recipe.num_steps + 1):
        expected.append(train_step(model, optimizer, recipe, step, batch))
        _, (losses,) = trainer.step(batch)
        found.append(losses.total.asscalar())
    assert found == pytest.approx(expected, rel=1e-3)
    assert found[-1] < 0.9 * found[0]


@pytest.fixture
def run_of(tmp_path):
    """Makes a fine-tuned run with random weights."""

    def make(kind):
        vocab = WordPieceVocabulary([*SPECIAL_TOKENS, *WORDS])
        config = preset("bert-tiny").replace(
            **vars(configured("small")), max_seq_length=13, tokenizer="wordpiece"
        )
        create_run(tmp_path / "run", config, vocab, task=TASKS[kind])
        net = network({}, VOCAB_SIZE, config.model, task=TASKS[kind])
        randomise(net, 3)
        save_checkpoint(tmp_path / "run", net, step=7)
        return load_run(tmp_path / "run")

    return make


@both_tasks
def test_task_run_survives_a_round_trip(kind, run_of, tmp_path, capsys):
    run = run_of(kind)
    converted("--from", tmp_path / "run", "--to", "huggingface", tmp_path / "theirs")
    converted("--from", "huggingface", tmp_path / "theirs", "--to", tmp_path / "back")
    back = load_run(tmp_path / "back")
    assert back.task == run.task
    assert_bits(back.net, run.net)
    settings = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert settings["architectures"] == [CLASSES[kind]]
    what = "O B-a" if kind == "tagging" else "answers"
    assert f"fine-tuned for {what}" in capsys.readouterr().out


@both_tasks
def test_task_run_is_read_by_transformers(kind, run_of, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra test-others")
    transformers = pytest.importorskip("transformers", reason="needs the extra test-others")
    run, batch = run_of(kind), a_batch(kind)
    converted("--from", tmp_path / "run", "--to", "huggingface", tmp_path / "theirs")
    model = getattr(transformers, CLASSES[kind]).from_pretrained(tmp_path / "theirs").eval()
    scores, loss, _ = theirs(torch, model, kind, batch)
    own_scores, own_loss, _ = ours(run.net, batch)
    np.testing.assert_allclose(own_scores, scores, rtol=0, atol=1e-5 * np.abs(scores).max())
    assert own_loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("labels", [["DET", "NOUN", "VERB", "O", "B-x"], None], ids=["named", "LABEL_i"])
def test_tagger_with_plain_labels_equals_transformers(labels, run_of, tmp_path, capsys):
    torch, model = transformers_model("tagging", configured("small"))
    labels = labels or [f"LABEL_{i}" for i in range(5)]
    model.config.id2label = dict(enumerate(labels))
    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, *WORDS]) + "\n")
    converted("--from", "huggingface", tmp_path / "theirs", "--to", tmp_path / "run")
    assert "the labels are not BIO tags" in capsys.readouterr().out
    run = load_run(tmp_path / "run")
    words = WORDS[:6]
    inputs = torch.tensor([run.reader.text(" ".join(words)).ids])
    scores = model(input_ids=inputs).logits[0, 1:-1].softmax(-1)
    (found,) = run.predict([" ".join(words)])
    assert found["tags"] == [labels[i] for i in scores.argmax(-1)]
    assert found["probabilities"] == pytest.approx(scores.max(-1).values.tolist(), abs=1e-5)
    converted("--from", tmp_path / "run", "--to", "huggingface", tmp_path / "back")
    settings = json.loads((tmp_path / "back" / "config.json").read_text())
    assert list(settings["id2label"].values()) == labels


def test_tagger_with_one_label_is_refused(run_of, tmp_path):
    torch, model = transformers_model("tagging", configured("small"))
    model.config.id2label = {0: "O"}
    model.classifier = torch.nn.Linear(model.config.hidden_size, 1)
    model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(InputError, match="id2label must have two labels at least, got O"):
        read_huggingface(tmp_path / "theirs", lowercase=True)


def test_transformers_is_fine_tuned_by_the_command(tmp_path, capsys):
    transformers_model("tagging", configured("small"))
    config = preset("bert-tiny").replace(
        **vars(configured("small")), max_seq_length=13, tokenizer="wordpiece"
    )
    create_run(tmp_path / "run", config, WordPieceVocabulary([*SPECIAL_TOKENS, *WORDS]))
    net = network({}, VOCAB_SIZE, config.model)
    randomise(net, 3)
    save_checkpoint(tmp_path / "run", net, step=7)
    texts = tmp_path / "tags.conll"
    texts.write_text("".join(f"{WORDS[i]} B-a\n{WORDS[i + 1]} O\n\n" for i in range(4)), "utf-8")
    flags = ["--train", str(texts), "--validation", str(texts), "--epochs", "2"]
    assert finetune_transformers.main([str(tmp_path / "run"), *flags]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in printed] == ["epoch 1", "epoch 2"]
    assert all("f1 " in line for line in printed)
