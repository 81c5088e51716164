"""Fine-tuning: metrics, learning, the command, and exports and predictions of its network."""

import json
import random
import re
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import encode
import export
import finetune
import numpy as np
import pretrain
import pytest
from conftest import ROOT, small_text
from support.finetuning import DIVISIONS, assert_matches, assert_resumes

from gluon_bert.config import FineTuneConfig
from gluon_bert.conversion.converter import shapes
from gluon_bert.data.tokenizer import pad
from gluon_bert.errors import InputError
from gluon_bert.export.exporter import load_exported
from gluon_bert.finetuning import metrics
from gluon_bert.finetuning.dataset import Examples
from gluon_bert.finetuning.finetune import check_validation, init_from_pretrained
from gluon_bert.finetuning.finetune import finetune as finetune_run
from gluon_bert.finetuning.sentences import examples, infer_task
from gluon_bert.finetuning.tables import TableRow, choose_columns
from gluon_bert.inference.predictor import GluonNetwork, Predictor
from gluon_bert.inference.task_inputs import Sentence
from gluon_bert.model.task import Task
from gluon_bert.run import load_run
from gluon_bert.runtime import mx
from gluon_bert.serving.request_json import answer
from gluon_bert.training.device_batch import DeviceBatch
from gluon_bert.training.losses import task_loss
from gluon_bert.training.trainer import Trainer

NOUNS = ["crane", "bird", "driver", "city", "river"]


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A pretrained run to fine-tune, which knows the words of the tables."""
    folder = tmp_path_factory.mktemp("before")
    text = small_text().replace("lifts", "rises").replace("leaves", "falls")
    (folder / "text.txt").write_text(text, "utf-8")
    flags = [
        "--preset",
        "d2l",
        "--units",
        "32",
        "--ffn-units",
        "64",
        "--max-seq-length",
        "16",
        "--batch-size",
        "32",
        "--num-steps",
        "3",
    ]
    corpus = ["--corpus", str(folder / "text.txt"), "--min-freq", "1", "--validation-fraction", "0.3"]
    assert pretrain.main([*flags, *corpus, "--output", str(folder / "run")]) == 0
    return folder / "run"


def rows(count, seed, kind):
    """Texts whose label, score or relation a small network can learn."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        noun, up = rng.choice(NOUNS), rng.random() < 0.5
        text = f"the {noun} {'rises' if up else 'falls'}"
        if kind == "classes":
            made.append({"text": text, "label": "up" if up else "down"})
        elif kind == "pairs":
            made.append({"text": text, "pair": "it rises .", "label": "same" if up else "other"})
        else:
            made.append({"text": text, "score": round((3.5 if up else -1.25) + 0.1 * NOUNS.index(noun), 2)})
    return made


def table(path, made):
    path.write_text("".join(json.dumps(row) + "\n" for row in made), "utf-8")
    return path


@pytest.fixture
def command(before, tmp_path):
    """Runs the command on tables of a kind; returns its status and the new run's folder."""

    def run(kind, *flags, name="tuned"):
        train = table(tmp_path / "train.jsonl", rows(96, 1, kind))
        dev = table(tmp_path / "dev.jsonl", rows(40, 2, kind))
        arguments = [
            str(before),
            "--train",
            str(train),
            "--validation",
            str(dev),
            "--output",
            str(tmp_path / name),
        ]
        return finetune.main([*arguments, "--lr", "0.003", "--batch-size", "16", *flags]), tmp_path / name

    return run


# The metrics


def test_metrics_of_classes_are_those_of_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics", reason="needs the extra test-others")
    rng = np.random.default_rng(0)
    for number in (2, 3, 7):
        for _ in range(20):
            labels, predicted = rng.integers(0, number, (2, 30))
            found = metrics.classification_metrics(labels, predicted, number)
            average = "binary" if number == 2 else "macro"
            assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(labels, predicted))
            assert found["f1"] == pytest.approx(sklearn.f1_score(labels, predicted, average=average))
            assert found["matthews"] == pytest.approx(sklearn.matthews_corrcoef(labels, predicted))


def test_metrics_of_scores_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats", reason="needs the extra test-others")
    rng = np.random.default_rng(0)
    for _ in range(20):
        expected = rng.integers(0, 6, 30).astype(float)  # with ties
        predicted = expected + rng.normal(0, 2, 30).round()
        found = metrics.regression_metrics(expected, predicted)
        assert found["pearson"] == pytest.approx(stats.pearsonr(expected, predicted)[0])
        assert found["spearman"] == pytest.approx(stats.spearmanr(expected, predicted)[0])


def test_metrics_at_their_ends():
    perfect, wrong = np.array([0, 1, 1]), np.array([1, 0, 0])
    assert metrics.classification_metrics(perfect, perfect, 2) == {"accuracy": 1, "f1": 1, "matthews": 1}
    assert metrics.classification_metrics(perfect, wrong, 2) == {"accuracy": 0, "f1": 0, "matthews": -1}
    assert metrics.classification_metrics(perfect, np.zeros(3, int), 2)["matthews"] == 0
    assert metrics.classification_metrics(np.zeros(3, int), np.zeros(3, int), 2)["f1"] == 0
    scores = metrics.regression_metrics(np.array([1.0, 2.0]), np.array([3.0, 3.0]))
    assert np.isnan(scores["pearson"])
    assert scores["mse"] == 2.5


# Tasks and examples


def some_rows(*labels, texts=("a",)):
    return [TableRow(f"t.tsv, line {i + 2}", texts, label) for i, label in enumerate(labels)]


def test_infer_task_follows_the_labels():
    assert infer_task(some_rows("no", "yes", "no")) == Task("classification", False, ("no", "yes"))
    assert infer_task(some_rows("0", "1", texts=("a", "b"))) == Task("classification", True, ("0", "1"))
    assert infer_task(some_rows("1", "2.5", "1")).kind == "regression"
    task = infer_task(some_rows("0", "4"), "regression")
    assert (task.mean, task.scale, task.outputs) == (2, 2, 1)
    assert Task.from_json(json.loads(json.dumps(task.to_json())), "here") == task


@pytest.mark.parametrize(
    "labels, kind, message",
    [
        (["yes", "yes"], "auto", "all 2 labels are 'yes'"),
        (["2.5", "2.5"], "auto", "all 2 scores are 2.5"),
        (["1.5", "x"], "regression", "t.tsv, line 3: label 'x' must be a number"),
        (["nan", "1"], "regression", "t.tsv, line 2: label 'nan' must be a number"),
        (["0.4", "3.1", "None"], "auto", "t.tsv, line 4: label 'None' must be a number\nif .* task=class"),
        (["0.4", "nan", "1", "1_0"], "regression", "line 3: label 'nan' .*\n.*line 5: label '1_0' must"),
        (
            ["0,42", "3,78", "1"],
            "auto",
            "line 2: label '0,42' may be a score with a decimal comma or a class",
        ),
        (
            [str(i) for i in range(21)],
            "auto",
            "train: 21 different whole numbers may be classes or a score",
        ),
    ],
)
def test_labels_that_make_no_task_are_refused(labels, kind, message):
    with pytest.raises(InputError, match=message):
        infer_task(some_rows(*labels), kind)


def test_validation_scores_that_are_all_alike_are_refused():
    task, texts = Task("regression", False), some_rows("2.5", "2.5")
    data = Examples(task, texts, [], np.array([2.5, 2.5], np.float32))
    with pytest.raises(InputError, match=r"validation: all 2 scores are 2\.5, .* best_metric=mse"):
        check_validation(FineTuneConfig(), task, data)
    check_validation(FineTuneConfig(best_metric="mse"), task, data)


def test_infer_task_prints_classes_with_counts(caplog):
    caplog.set_level("INFO")
    infer_task(some_rows(*["pos"] * 3, "neg", "neg", "POS", "-"))
    assert "classes: 'pos' 3, 'neg' 2, '-' 1, 'POS' 1" in caplog.text
    assert "class '-' may mean that a row has no label" in caplog.text
    assert "classes that differ in capitals only: 'POS', 'pos'" in caplog.text


def test_infer_task_regression_reads_decimal_comma():
    task = infer_task(some_rows("0,5", "1,5", "1"), "regression")
    assert (task.kind, task.mean) == ("regression", 1.0)


def test_examples_test_file_with_foreign_labels_has_none(before):
    reader, task = load_run(before).reader, Task("classification", False, ("no", "yes"))
    assert examples(some_rows("-1", "-1"), task, reader, "test").targets is None
    with pytest.raises(InputError, match="label '-1' does not occur"):
        examples(some_rows("-1", "-1"), task, reader, "validation")


def test_label_unseen_in_training_is_refused(before):
    reader, task = load_run(before).reader, Task("classification", False, ("no", "yes"))
    with pytest.raises(
        InputError, match=r"line 3: label 'maybe' does not occur in the training file, .* no, yes"
    ):
        examples(some_rows("no", "maybe"), task, reader, "validation")


def test_epoch_has_every_example_once_in_own_order(before):
    reader = load_run(before).reader
    texts = [reader.text("crane " * (1 + i % 9)) for i in range(103)]
    data = Examples(Task("regression", False), texts, list(map(Sentence, texts)), np.zeros(103))
    one, again, other = (list(data.batches(8, seed=3, epoch=epoch)) for epoch in (1, 1, 2))
    assert sorted(np.concatenate(one).tolist()) == list(range(103))
    np.testing.assert_array_equal(np.concatenate(one), np.concatenate(again))
    assert np.concatenate(one).tolist() != np.concatenate(other).tolist()
    used = sum(len(b) * max(len(texts[i]) for i in b) for b in one)
    assert used < 1.15 * sum(map(len, texts))


# The network


def test_finetuning_starts_from_the_encoder_with_its_loss(before):
    run = load_run(before)
    task = Task("classification", False, ("a", "b", "c"))
    net = init_from_pretrained(run.net, task, FineTuneConfig(dropout=0.0), [mx.cpu()])
    own, old = net._collect_params_with_prefix(), run.net._collect_params_with_prefix()
    kept = [
        name for name in shapes(run.net.vocab_size, run.net.config) if name.startswith(("encoder", "pooler"))
    ]
    assert set(own) == {*kept, "head.dense.weight", "head.dense.bias"}
    for name in kept:
        np.testing.assert_array_equal(own[name].data().asnumpy(), old[name].data().asnumpy())
    scratch = init_from_pretrained(run.net, task, FineTuneConfig(seed=9), [mx.cpu()], pretrained=False)
    drawn = scratch._collect_params_with_prefix()["encoder.layers.0.attend.query.weight"].data().asnumpy()
    assert np.abs(drawn - own["encoder.layers.0.attend.query.weight"].data().asnumpy()).max() > 0.01


def loss_of(task, scores, targets):
    """The task loss of a network with these scores, as the mean over the batch."""
    net = SimpleNamespace(encoder=lambda *_: None, scores=lambda _: mx.nd.array(scores), task=task)
    arrays = dict.fromkeys(("tokens", "token_types", "valid_length"), mx.nd.zeros((2, 3)))
    shard = DeviceBatch({**arrays, "targets": mx.nd.array(targets)}, 2, 0, 0, 1 / 2, 0.0)
    return task_loss(net, shard).total.asscalar()


def test_task_loss_is_the_mean_cross_entropy_or_error():
    task = Task("classification", False, ("a", "b", "c"))
    scores = np.array([[1.0, 2.0, 0.5], [0.0, 0.0, 3.0]])
    loss = loss_of(task, scores, [1, 0])
    log = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    assert loss == pytest.approx(-(log[0, 1] + log[1, 0]) / 2, rel=1e-6)
    score = Task("regression", False, mean=5.0, scale=2.0)
    assert loss_of(score, [[7.0], [5.0]], [5.0, 4.0]) == pytest.approx(0.625)


def test_padding_and_the_batch_change_no_score(before):
    run = load_run(before)
    net = init_from_pretrained(
        run.net, Task("regression", False, mean=1.0, scale=3.0), FineTuneConfig(), [mx.cpu()]
    )
    texts = [run.reader.text(text) for text in ("the crane", "the bird rises . it falls", "city")]
    together = Predictor(GluonNetwork(net), run.reader, net.task).predict(texts)
    for text, score in zip(texts, (prediction.task_scores for prediction in together)):
        batch = pad([text], 16)
        inputs = [mx.nd.array(a) for a in (batch.tokens, batch.token_types, batch.valid_length)]
        np.testing.assert_allclose(net(*inputs)[1].asnumpy()[0], score, atol=1e-5)


# The command


def evaluations(folder):
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record for record in records if "validation" in record]


@pytest.mark.parametrize("kind", ["classes", "pairs"])
def test_classes_are_learnt_kept_and_told(command, kind, capsys):
    status, folder = command(kind, "--epochs", "6")
    assert status == 0
    shown = capsys.readouterr()
    assert "2 classes of" in shown.err
    log = evaluations(folder)
    assert [record["step"] for record in log] == [6, 12, 18, 24, 30, 36]
    assert log[-1]["validation"]["accuracy"] > 0.9
    highest = max(record["validation"]["accuracy"] for record in log)
    best = next(record for record in log if record["validation"]["accuracy"] == highest)
    run = load_run(folder, checkpoint="best")
    assert run.step == best["step"]
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    right = [each["given"]["label"] == each["predicted"]["label"] for each in predictions]
    assert np.mean(right) == best["validation"]["accuracy"]
    assert f"accuracy {np.mean(right):.4f}" in shown.out


def test_score_is_learned_in_its_own_unit(command, tmp_path, capsys):
    test = table(tmp_path / "test.jsonl", [{"text": "the crane rises"}, {"text": "the crane falls"}])
    status, folder = command("score", "--epochs", "8", "--test", str(test), "--best-metric", "mse")
    assert status == 0
    log = evaluations(folder)
    assert max(record["validation"]["pearson"] for record in log) > 0.9
    lowest = min(record["validation"]["mse"] for record in log)
    assert (
        lowest
        == next(r for r in log if r["step"] == load_run(folder, checkpoint="best").step)["validation"]["mse"]
    )
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [each["given"] for each in predictions] == [{}, {}]
    rises, falls = (each["predicted"]["score"] for each in predictions)
    assert rises > 2 > 0 > falls
    assert "2 predictions for the test file" in capsys.readouterr().out


def test_same_seed_gives_the_same_network(command):
    folders = [command("classes", "--epochs", "1", "--seed", seed, name=name)[1] for seed, name in
               (("5", "one"), ("5", "two"), ("6", "three"))]  # fmt: skip
    one, two, three = (load_run(folder).net._collect_params_with_prefix() for folder in folders)
    for name in one:
        np.testing.assert_array_equal(one[name].data().asnumpy(), two[name].data().asnumpy())
    assert any(not np.array_equal(one[n].data().asnumpy(), three[n].data().asnumpy()) for n in one)


@pytest.mark.parametrize("format", ["mxnet", "onnx"])
def test_export_of_a_tuned_run_gives_its_answers(command, format, capsys):
    _, folder = command("classes", "--epochs", "2")
    assert export.main([str(folder), "--checkpoint", "best", "--format", format]) == 0
    run, exported = load_run(folder, checkpoint="best"), load_exported(folder / "export" / format)
    texts = [run.reader.text(text) for text in ("the crane rises", "the bird falls", "city")]
    for one, other in zip(Predictor.of(run).predict(texts), exported.predictor.predict(texts)):
        assert one.task_prediction["label"] == other.task_prediction["label"]
        for label, probability in one.task_prediction["probabilities"].items():
            assert other.task_prediction["probabilities"][label] == pytest.approx(probability, abs=1e-5)
    bodies = [b'{"text": "the crane rises"}', b'{"text": "a", "ask": "masks"}', b'{"text": "a", "pair": "b"}']
    (status, good), (masks, no_head), (pair, no_pair) = answer(exported.predictor, bodies)
    assert (status, masks, pair) == (200, 400, 400)
    assert good["label"] in ("up", "down")
    assert sum(good["probabilities"].values()) == pytest.approx(1)
    assert "vectors" not in good
    assert "cls" not in good
    assert "fine-tuned" in no_pair["error"]
    assert "error" in no_head


def test_export_of_the_encoder_has_no_labels(command, capsys):
    _, folder = command("classes", "--epochs", "1")
    assert export.main([str(folder), "--outputs", "encoder"]) == 0
    capsys.readouterr()
    assert encode.main([str(folder / "export" / "mxnet"), "the crane"]) == 2
    assert "must have outputs for its task. Export again with --outputs all" in capsys.readouterr().err


def test_encode_tells_labels_and_scores(command, tmp_path, capsys):
    _, classes = command("classes", "--epochs", "4", name="classes")
    _, score = command("score", "--epochs", "1", name="score")
    capsys.readouterr()
    assert encode.main([str(classes), "the crane rises", "--checkpoint", "best"]) == 0
    likeliest = capsys.readouterr().out.splitlines()[1].split()
    assert (likeliest[1], float(likeliest[0]) > 0.5) == ("up", True)
    assert encode.main([str(score), "the crane rises", "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out)["score"], float)
    assert encode.main([str(classes), "a", "--input", str(tmp_path / "x")]) == 2
    (tmp_path / "texts.txt").write_text("the crane\n")
    vectors = ["--input", str(tmp_path / "texts.txt"), "--output", str(tmp_path / "v.npz")]
    assert encode.main([str(classes), *vectors]) == 0
    assert np.load(tmp_path / "v.npz")["mean"].shape == (1, 32)
    assert encode.main([str(classes), "--fill-mask", "the <mask>"]) == 2
    assert "must have a head for masked words" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--lr", "0"], "--lr must be above 0, got 0.0"),
        (["--text-columns", "a", "b", "c"], "--text-columns must be one column, or two for pairs, got 3"),
        (["--text-columns", "words"], "has no column 'words'; it has the columns 'text', 'label'"),
        (["--max-seq-length", "4"], "from 8 to the run's 1000 positions, got 4"),
        (
            ["--best-metric", "pearson"],
            "must be accuracy, f1, matthews for classification, got pearson",
        ),
        (["--lr", "1e30"], "--lr must be at most 1000"),
        (["--test", "gone.tsv"], "--test gone.tsv: cannot be read"),
        (["--checkpoint", "99"], "--checkpoint must be one of latest, "),
    ],
)
def test_impossible_flags_are_refused(command, flags, message, capsys):
    status, _ = command("classes", *flags)
    assert status == 2
    assert message in capsys.readouterr().err


def test_tuned_run_is_refused_as_a_pretrained_one(command, before, tmp_path, capsys):
    _, folder = command("classes", "--epochs", "1")
    tables = ["--train", str(tmp_path / "train.jsonl"), "--validation", str(tmp_path / "dev.jsonl")]
    assert finetune.main([str(folder), *tables]) == 2
    assert f"RUN must be a pretraining run, got {folder}" in capsys.readouterr().err
    assert pretrain.main(["--resume", str(folder)]) == 2
    assert f"--resume must be a pretraining run, got {folder}" in capsys.readouterr().err
    assert pretrain.main(["--init", str(folder), "--output", str(tmp_path / "x")]) == 2
    assert "--init must be a pretraining run" in capsys.readouterr().err
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('"kind": "classification"', '"kind": "poetry"')
    )
    with pytest.raises(InputError, match="'task' must be a task that this gluon_bert wrote"):
        load_run(folder)


def test_flags_that_resume_ignores_are_refused(tmp_path, capsys):
    flags = ["--epochs", "9", "--train", "nofile", "--output", str(tmp_path / "new"), "--no-header"]
    assert finetune.main(["--resume", str(tmp_path), *flags]) == 2
    refused = "--output, --train, --header, --epochs must be omitted with --resume"
    assert refused in capsys.readouterr().err


@pytest.mark.parametrize(
    "columns", [("text", "text"), ("label", "label"), (("text", "text"), "label"), ("label", None)]
)
def test_columns_that_are_not_distinct_are_refused(tmp_path, columns):
    path = tmp_path / "t.tsv"
    path.write_text("text\tlabel\na\tb\n", "utf-8")
    texts, label = columns
    texts = (texts,) if isinstance(texts, str) else texts
    with pytest.raises(InputError, match=r"must be distinct columns|label must name the column"):
        choose_columns(path, "train", True, texts, label)


def test_command_runs_in_a_process(before, tmp_path):
    bad = tmp_path / "train.tsv"
    bad.write_text("text\tlabel\nthe crane\tup\nbroken\n")
    command = [sys.executable, str(ROOT / "tools" / "finetune.py"), str(before), "--train", str(bad)]
    done = subprocess.run([*command, "--validation", str(bad)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"finetune: {bad}, line 3: has 1 columns, where the header has 2\n"


def test_too_little_memory_is_refused_or_ignored(command, monkeypatch, capsys):
    monkeypatch.setattr("gluon_bert.training.memory_plan.machine_memory", lambda devices: 0.3e9)
    status, folder = command("classes", "--epochs", "1")
    err = capsys.readouterr().err
    assert status == 2 and not folder.exists()
    assert "finetune: the run needs about 0.3 GB of memory with --batch-size 16 and --max-seq-length" in err
    assert "and the machine has 0.3 GB" in err and "use --ignore-memory-estimate." in err
    status, _ = command("classes", "--epochs", "1", "--ignore-memory-estimate")
    err = capsys.readouterr().err
    assert status == 0
    assert "memory expected: 0.3 GB of 0.3 GB" in err and "activations of 16 texts" in err
    assert re.search(r"memory taken: \d\.\d GB at the peak, 0\.3 GB expected", err)


# The trainer's features


@pytest.mark.parametrize("flags", DIVISIONS)
def test_finetuning_matches_over_devices_and_micro_batches(command, flags):
    assert_matches(partial(command, "classes"), flags)


def test_finetuning_resumed_equals_one_that_was_not_stopped(command, monkeypatch):
    whole, parts = assert_resumes(partial(command, "classes"), monkeypatch, stop_at=9)
    assert [r["validation"] for r in evaluations(parts)] == [r["validation"] for r in evaluations(whole)]
    assert (parts / "predictions.jsonl").read_text() == (whole / "predictions.jsonl").read_text()


def test_resume_of_finetuning_refuses_other_runs_and_rows(command, before, tmp_path, capsys):
    assert finetune.main(["--resume", str(before)]) == 2
    assert "must be the record of a fine-tuning" in capsys.readouterr().err
    _, folder = command("classes", "--epochs", "1")
    table(tmp_path / "train.jsonl", rows(20, 1, "classes"))
    assert finetune.main(["--resume", str(folder)]) == 2
    assert "must have the same rows as when" in capsys.readouterr().err
    assert finetune.main([]) == 2
    assert "RUN, --train and --validation must be given" in capsys.readouterr().err


def test_finetune_function_returns_the_best_run(before, tmp_path):
    train = table(tmp_path / "train.jsonl", rows(96, 1, "classes"))
    dev = table(tmp_path / "dev.jsonl", rows(40, 2, "classes"))
    options = {"lr": 0.003, "batch_size": 16, "epochs": 4}
    tuned = finetune_run(load_run(before), train, dev, tmp_path / "tuned", **options)
    (said,) = Predictor.of(tuned).predict([tuned.reader.text("the crane rises")])
    assert said.task_prediction["label"] == "up"
    with pytest.raises(InputError, match="unknown option speed"):
        finetune_run(before, train, dev, tmp_path / "other", speed=9)


def test_finetuning_with_non_finite_gradient_diverges(command, monkeypatch, capsys):
    gradients = Trainer._gradients

    def broken(self):
        arrays = gradients(self)
        arrays[0][0][0, 0] = np.nan
        return arrays

    monkeypatch.setattr(Trainer, "_gradients", broken)
    assert command("classes")[0] == 2
    assert "has diverged: at step 1" in capsys.readouterr().err
