"""Tagging: its files, metrics, training, and running text with places in characters."""

import json
import random

import encode
import finetune
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from support.finetuning import DIVISIONS, assert_matches, assert_resumes, pretrained_run

import gluon_bert as gb
from gluon_bert.data.tokenizer import Tokenizer
from gluon_bert.data.vocab import Normalization, Vocabulary
from gluon_bert.errors import InputError
from gluon_bert.finetuning.dataset import ExampleLoader, TaskFiles
from gluon_bert.finetuning.formats import task_format
from gluon_bert.finetuning.metrics import entity_metrics, plain_tag_metrics, tag_metrics_by_type
from gluon_bert.finetuning.tagging import TaggedRow, TaggingFormat, read_tagged
from gluon_bert.inference.tagging import TextToTag, entities
from gluon_bert.model.task import Task

SHARED = ROOT.parent / "shared"
TASK = Task("tagging", False, ("O", "B-place", "I-place"))
CONLL = "in\tO\nNew\tB-place\nYork\tI-place\n\nhere\tO\n"


# Files


@pytest.fixture
def written(tmp_path):
    """Writes a file and returns its path."""

    def write(name, text):
        (tmp_path / name).write_text(text, "utf-8")
        return tmp_path / name

    return write


def test_read_tagged_reads_conll_and_jsonl_alike(written):
    lines = [
        {"tokens": ["in", "New", "York"], "labels": ["O", "B-place", "I-place"]},
        {"tokens": ["here"], "labels": ["O"]},
    ]
    files = [
        written("a.conll", CONLL),
        written("b.conll", f"-DOCSTART- O\n\n{CONLL}".replace("\t", " ").replace("\n", "\r\n")),
        written("c.conll", CONLL.replace("\t", " XX ")),
        written("d.jsonl", "".join(json.dumps(line) + "\n" for line in lines)),
        written("e.jsonl", "".join(json.dumps(line) + "\n" for line in lines).replace("labels", "ner_tags")),
    ]
    for path in files:
        one, two = read_tagged(path, "train")
        assert (one.tokens, one.tags) == (("in", "New", "York"), ("O", "B-place", "I-place"))
        assert (two.tokens, two.tags) == (("here",), ("O",))


def test_read_tagged_without_tags_is_for_test_files(written):
    path = written("a.conll", "in\nYork\n")
    (row,) = read_tagged(path, "test", labels_needed=False)
    assert row.tags is None
    with pytest.raises(InputError, match="line 1: must have a tag for each token, got none"):
        read_tagged(path, "train")


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.conll", "in\tO\nYork\n", "line 2: must have 2 columns as line 1, got 1"),
        ("a.conll", "\tO\n", "line 1: must have a token first"),
        ("a.conll", "in\tNN\nNew\tB-x\n", "line 1: the tag must be O, B-TYPE or I-TYPE .*got 'NN'"),
        ("a.conll", "in\tO\nYork\tS-x\n", "line 2: the tag must be O, .*, got 'S-x'. Write 'B-x'."),
        ("a.conll", "New\tB-x\nYork\tL-x\n", "line 2: the tag must be O, .*, got 'L-x'. Write 'I-x'."),
        ("a.jsonl", '{"tokens": ["a"], "labels": [" "]}', "line 1, token 1: the tag must not be empty"),
        ("a.jsonl", r'{"tokens": ["a"], "labels": ["N\ud800"]}', "token 1: the tag holds half a surrogate"),
        (
            "a.conll",
            "in\tO\nYork\tI-place\n",
            "line 2: 'I-place' must follow 'B-place' or 'I-place', got it behind 'O'. Write 'B-place'.",
        ),
        ("a.conll", "York\tI-place\n", "line 1: 'I-place' must follow .*, got it first. Write 'B-place'."),
        ("a.conll", "A\tB-x\nB\tI-y\n", "line 2: 'I-y' must follow 'B-y' or 'I-y', got it behind 'B-x'"),
        ("a.conll", "in\tO\n\nNew\tB-x\n\nYork\tI-x\n", "line 5: 'I-x' must follow"),
        ("a.conll", "\n\n", "is empty"),
        ("a.txt", "in\tO\n", "must end in .conll, .bio, .iob2 or .jsonl"),
        ("a.jsonl", '{"tokens": ["a", "b"], "labels": ["O"]}', "line 1: .*, got 2 tokens and 1 labels"),
        ("a.jsonl", '{"tokens": ["a"], "ner_tags": [0]}', 'line 1: must be an object such as {"tokens"'),
        ("a.jsonl", '{"tokens": ["a"], "labels": ["I-x"]}', "line 1, token 1: 'I-x' must follow"),
        ("a.jsonl", '{"tokens": [], "labels": []}', "line 1: must have a token at least, got none"),
        ("a.jsonl", '{"tokens": [" "], "labels": ["O"]}', "line 1, token 1: the token must not be empty"),
        ("a.jsonl", "{", "line 1: is not JSON"),
    ],
)
def test_read_tagged_bad_file_raises(written, name, text, message):
    with pytest.raises(InputError, match=message):
        read_tagged(written(name, text), "train")


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(alphabet='in\tO B-x I-y\n"{}[]:,tokensl\u200b\u00e9', max_size=60),
    ending=st.sampled_from(["conll", "jsonl"]),
)
def test_read_tagged_of_any_text_reads_or_refuses(tmp_path_factory, text, ending):
    path = tmp_path_factory.mktemp("any") / f"a.{ending}"
    path.write_text(text, "utf-8")
    try:
        rows = read_tagged(path, "train")
    except InputError as problem:
        assert str(path) in str(problem)
        return
    assert all(len(row.tokens) == len(row.tags) == len(row.where) > 0 for row in rows)


def test_task_format_is_chosen_by_the_file(written):
    tokens = written("a.jsonl", '{"tokens": ["a"], "labels": ["O"]}')
    for path in (written("a.conll", CONLL), tokens):
        assert isinstance(task_format(TaskFiles(str(path), ""), "auto"), TaggingFormat)
    table = written("b.jsonl", '{"text": "a", "label": "b"}')
    assert not isinstance(task_format(TaskFiles(str(table), ""), "auto"), TaggingFormat)
    with pytest.raises(InputError, match="text_columns, label, header and quoting must be omitted"):
        task_format(TaskFiles(str(tokens), "", label="x"), "auto")
    with pytest.raises(InputError, match=r"must end in .tsv, .csv, .jsonl, .conll"):
        task_format(TaskFiles("a.xml", ""), "auto")


def test_infer_task_has_both_tags_of_each_type():
    rows = [TaggedRow(("",) * 2, ("a", "b"), ("B-person", "O")), TaggedRow(("",), ("c",), ("B-art",))]
    assert TaggingFormat().infer_task(rows).labels == ("O", "B-art", "I-art", "B-person", "I-person")
    with pytest.raises(InputError, match="all tags are O"):
        TaggingFormat().infer_task([TaggedRow(("",), ("a",), ("O",))])


def test_infer_task_of_plain_tags_has_each_once(written):
    task = TaggingFormat().infer_task(read_tagged(written("a.conll", "a\tNN\nb\tVB\n\nc\tNN\n"), "train"))
    assert (task.labels, task.has_entities) == (("NN", "VB"), False)
    with pytest.raises(InputError, match="'B-x' must occur in the training file, which has the tags NN, VB"):
        TaggingFormat().examples([TaggedRow(("",), ("a",), ("B-x",))], task, tokenizer(), "--validation")


# What the network reads


def tokenizer(max_seq_length=8):
    return Tokenizer(Vocabulary(["in", "york", "new"]), max_seq_length, Normalization(lowercase=True))


def test_first_piece_carries_the_tag():
    text = TextToTag(tokenizer(), TASK, ["in", "New/York", "\u200b", "York"])
    assert text.texts[0].tokens == ["<cls>", "in", "new", "/", "york", "<unk>", "york", "<sep>"]
    (targets,) = text.targets([0, 1, 2, 0])
    assert targets.tolist() == [-1, 0, 1, -1, -1, 2, 0, -1]


def test_long_sentence_is_read_in_parts_of_whole_words():
    words = ["in", "new/york/new", "york", "a-b/c/d/e/f/g/h", "in"]
    text = TextToTag(tokenizer(), TASK, words)
    assert all(len(part) <= 8 for part in text.texts)
    targets = text.targets([0, 1, 2, 0, 1])
    assert [t for target in targets for t in target.tolist() if t >= 0] == [0, 1, 2, 0, 1]
    assert sum(map(len, text.first_pieces)) == len(words)


def test_batch_pads_tags_and_counts_them():
    rows = [TaggedRow(("",) * n, ("new",) * n, ("O",) * n) for n in (3, 1, 5)]
    data = TaggingFormat().examples(rows, TASK, tokenizer(), "train")
    (batch,) = ExampleLoader(data, 3, seed=0, max_seq_length=8)
    assert batch.targets.shape == batch.tokens.shape
    assert batch.num_labels == 9
    assert sum(batch.rows(i, i + 1).num_labels for i in range(3)) == 9
    with pytest.raises(InputError, match=r"line 1: tag 'B-x' must occur in the training file, .* place"):
        TaggingFormat().examples([TaggedRow(("line 1",), ("a",), ("B-x",))], TASK, tokenizer(), "validation")


# Entities and metrics

TAGS = st.sampled_from(["O", "B-a", "I-a", "B-b", "I-b"])
# The expected and the predicted tags of some sentences.
BOTH_TAGS = st.lists(st.lists(st.tuples(TAGS, TAGS), min_size=1, max_size=12), min_size=1, max_size=5).map(
    lambda sentences: [[[pair[i] for pair in pairs] for pairs in sentences] for i in range(2)]
)


@settings(max_examples=200, deadline=None)
@given(both=BOTH_TAGS)
def test_entity_metrics_equal_seqeval(both):
    seqeval = pytest.importorskip("seqeval.metrics", reason="needs the extra test-others")
    expected, predicted = both
    found = entity_metrics(expected, predicted)
    named = {"f1": "f1_score", "precision": "precision_score", "recall": "recall_score"}
    for name, function in {**named, "accuracy": "accuracy_score"}.items():
        options = {} if name == "accuracy" else {"zero_division": 0}
        value = getattr(seqeval, function)(expected, predicted, **options)
        assert found[name] == pytest.approx(value), name
    report = seqeval.classification_report(expected, predicted, output_dict=True, zero_division=0)
    for type_, its in tag_metrics_by_type(expected, predicted).items():
        for ours, theirs in {"precision": "precision", "recall": "recall", "f1": "f1-score"}.items():
            assert its[ours] == pytest.approx(report[type_][theirs])
        assert its["number"] == report[type_]["support"]


@settings(max_examples=100, deadline=None)
@given(both=BOTH_TAGS)
def test_plain_tag_metrics_equal_scikit_learn(both):
    metrics = pytest.importorskip("sklearn.metrics", reason="needs the extra test-others")
    expected, predicted = both
    found = plain_tag_metrics(expected, predicted)
    flat = [[tag for tags in sentences for tag in tags] for sentences in (expected, predicted)]
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(*flat))
    assert found["f1"] == pytest.approx(metrics.f1_score(*flat, average="macro", zero_division=0))


def test_entity_metrics_by_hand():
    expected = [["B-a", "I-a", "O", "B-b"], ["O", "B-a"]]
    predicted = [["B-a", "I-a", "O", "B-a"], ["O", "O"]]
    found = entity_metrics(expected, predicted)
    assert (found["precision"], found["recall"], found["f1"]) == (1 / 2, 1 / 3, 2 / 5)
    assert found["accuracy"] == 4 / 6
    assert entity_metrics([["O"]], [["O"]]) == {"f1": 0, "precision": 0, "recall": 0, "accuracy": 1}


@given(tags=st.lists(TAGS, max_size=12))
def test_entities_cover_the_tagged_words(tags):
    found = entities(tags)
    inside = {place for _, start, end in found for place in range(start, end)}
    assert inside == {place for place, tag in enumerate(tags) if tag != "O"}
    assert all(tags[start].endswith(type_) for type_, start, _ in found)


# Training and prediction

NAMES = ["crane", "bird", "driver"]


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A pretrained run to fine-tune."""
    return pretrained_run(tmp_path_factory.mktemp("before"))


def conll(count, seed):
    """Sentences whose entities a small network can learn: a name after "the" is an animal."""
    rng = random.Random(seed)
    sentences = []
    for _ in range(count):
        lines = []
        for _ in range(rng.randint(1, 7)):
            name = rng.choice(NAMES)
            named = [("the", "B-animal"), (name, "I-animal")]
            lines += named if rng.random() < 0.5 else [("it", "O"), (rng.choice([".", "is"]), "O")]
        sentences.append("".join(f"{token}\t{tag}\n" for token, tag in lines))
    return "\n".join(sentences)


@pytest.fixture
def command(before, tmp_path):
    """Runs the command; returns its status and the new run's folder."""
    (tmp_path / "train.conll").write_text(conll(64, 1), "utf-8")
    (tmp_path / "dev.conll").write_text(conll(16, 2), "utf-8")

    def run(*flags, name="tuned"):
        files = ["--train", str(tmp_path / "train.conll"), "--validation", str(tmp_path / "dev.conll")]
        options = ["--lr", "0.003", "--batch-size", "16", "--output", str(tmp_path / name), *flags]
        return finetune.main([str(before), *files, *options]), tmp_path / name

    return run


def test_finetuning_tags_learns_and_reports_entities(command, capsys):
    status, folder = command("--epochs", "8")
    assert status == 0
    shown = capsys.readouterr()
    assert "tags of 1 types of entities: 64 sentences in train, 16 sentences in validation" in shown.err
    assert "entity  precision  recall      f1  number\nanimal" in shown.out
    run = gb.load_run(folder, checkpoint="best")
    assert run.metrics["validation"]["f1"] > 0.9
    records = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    expected, predicted = ([each[key]["tags"] for each in records] for key in ("given", "predicted"))
    best = max(
        json.loads(line)["validation"]["f1"]
        for line in (folder / "log.jsonl").read_text().splitlines()
        if "validation" in line
    )
    assert entity_metrics(expected, predicted)["f1"] == best
    text = "It is.  The CRANE is"
    (found,) = run.predict([text])
    (entity,) = found["entities"]
    assert (entity["type"], text[entity["start"] : entity["end"]]) == ("animal", "The CRANE")
    assert entity["text"] == "The CRANE"
    assert 0.5 < entity["probability"] <= 1


def test_finetuning_plain_tags_learns_and_reports_tags(command, tmp_path, capsys):
    for name, seed in (("train", 1), ("dev", 2)):
        text = conll(64, seed).replace("B-animal", "DET").replace("I-animal", "NOUN").replace("\tO", "\tX")
        (tmp_path / f"{name}.conll").write_text(text, "utf-8")
    status, folder = command("--epochs", "8", "--train", str(tmp_path / "train.conll"))
    assert status == 0
    shown = capsys.readouterr()
    assert "3 tags: 64 sentences in train" in shown.err
    assert "tag   precision  recall      f1  number\nDET " in shown.out
    run = gb.load_run(folder, checkpoint="best")
    assert run.metrics["validation"]["accuracy"] > 0.9
    text = "the CRANE"
    (found,) = run.predict([text])
    assert found["tags"] == ["DET", "NOUN"]
    assert [text[i:j] for i, j in zip(found["starts"], found["ends"])] == ["the", "CRANE"]
    assert "entities" not in found and all(0.5 < p <= 1 for p in found["probabilities"])
    assert encode.main([str(folder), text, "--checkpoint", "best"]) == 0
    assert "NOUN  CRANE" in capsys.readouterr().out
    assert command("--best-metric", "recall", name="other")[0] == 2
    assert "must be accuracy, f1 for tagging, got recall" in capsys.readouterr().err


def test_finetuning_tags_with_unknown_tag_fails(command, tmp_path, capsys):
    (tmp_path / "test.conll").write_text("the\tB-plant\n")
    assert command("--test", str(tmp_path / "test.conll"))[0] == 2
    assert "test.conll, line 1: tag 'B-plant' must occur in the training file" in capsys.readouterr().err
    assert command("--label", "x", name="other")[0] == 2
    assert "must be omitted" in capsys.readouterr().err
    assert command("--best-metric", "pearson", name="third")[0] == 2
    assert "must be f1, precision, recall, accuracy for tagging" in capsys.readouterr().err


@pytest.mark.parametrize("flags", DIVISIONS)
def test_finetuning_tags_matches_over_devices_and_parts(command, flags):
    assert_matches(command, flags)


def test_finetuning_tags_resumes(command, monkeypatch):
    whole, parts = assert_resumes(command, monkeypatch, stop_at=6)
    assert (parts / "predictions.jsonl").read_text() == (whole / "predictions.jsonl").read_text()


def test_encode_shows_entities_with_offsets(command, capsys):
    _, folder = command("--epochs", "6")
    capsys.readouterr()
    assert encode.main([str(folder), "It is. The crane is", "--checkpoint", "best"]) == 0
    assert "animal  The crane (7 to 16)" in capsys.readouterr().out
    assert encode.main([str(folder), "It is. The crane is", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["text"] == "It is. The crane is"
    assert len(content["words"]) == len(content["tags"])
    assert encode.main([str(folder), "a || b"]) == 2
    assert "must be a single text for tagging" in capsys.readouterr().err


@pytest.mark.skipif(not (SHARED / "tasks").is_dir(), reason="needs ../shared/tasks")
def test_wnut17_is_read():
    rows = read_tagged(SHARED / "tasks" / "wnut17" / "train.conll", "train")
    assert len(rows) == 3394
    task = TaggingFormat().infer_task(rows)
    assert len(task.labels) == 13
