"""Question answering: its files, windows, metrics, training, and answers as slices of the context."""

import json
import random

import encode
import finetune
import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from support.finetuning import DIVISIONS, assert_matches, assert_resumes, pretrained_run

import gluon_bert as gb
from gluon_bert.data.tokenizer import Tokenizer
from gluon_bert.data.vocab import Normalization, Vocabulary
from gluon_bert.data.wordpiece import SPECIAL_TOKENS, WordPieceVocabulary
from gluon_bert.errors import InputError
from gluon_bert.finetuning.dataset import ExampleLoader, TaskFiles
from gluon_bert.finetuning.formats import task_format
from gluon_bert.finetuning.metrics import answer_metrics
from gluon_bert.finetuning.question_answering import QuestionFormat, read_squad
from gluon_bert.inference.predictor import Prediction
from gluon_bert.inference.question_answering import MAX_ANSWER_TOKENS, Question, best_span
from gluon_bert.model.task import Task

XQUAD = ROOT.parent / "shared" / "tasks" / "xquad-en"
TASK = Task("question-answering", True)
TASK_2 = Task("question-answering", True, no_answer=True)


# Files


def squad(context, *questions):
    """A SQuAD file of one paragraph."""
    return {
        "version": "1.1",
        "data": [{"title": "t", "paragraphs": [{"context": context, "qas": questions}]}],
    }


def asked(id_, question, *answers, **more):
    return {
        "id": id_,
        "question": question,
        "answers": [{"text": text, "answer_start": start} for text, start in answers],
        **more,
    }


@pytest.fixture
def written(tmp_path):
    """Writes a file and returns its path."""

    def write(content, name="a.json"):
        (tmp_path / name).write_text(json.dumps(content), "utf-8")
        return tmp_path / name

    return write


def test_read_squad_reads_answers_and_impossible_questions(written):
    context = "A crane sees a bird."
    content = squad(
        context,
        asked("1", "Who sees?", ("crane", 2), ("A crane", 0)),
        asked("2", "Who lifts?", is_impossible=True, plausible_answers=[]),
    )
    one, two = read_squad(written(content), "train")
    assert [context[start : start + len(text)] for text, start in one.answers] == ["crane", "A crane"]
    assert (two.answers, two.is_impossible) == ((), True)
    assert QuestionFormat().infer_task([one]) == TASK
    assert QuestionFormat().infer_task([one, two]) == TASK_2


@pytest.mark.parametrize(
    "content, message",
    [
        (
            squad("A crane, a crane.", asked("7", "?a", ("crane", 3))),
            "a.json, question 7: the answer 'crane' must be at its answer_start 3; it is at 2",
        ),
        (squad("A crane.", asked("7", "?a", ("bird", 0))), "question 7: .* the context does not contain it"),
        (squad("A crane.", asked("7", "?a", ("", 0))), "question 7: an answer must not be empty"),
        (squad("A crane.", asked("7", " ", ("A", 0))), "question 7: the question must not be empty"),
        (squad(" ", asked("7", "a", ("A", 0))), r"data\[0\].paragraphs\[0\]: the context must not be empty"),
        (squad("A crane.", asked("7", "a")), "question 7: must have an answer, or is_impossible true"),
        (
            squad("A crane.", asked("7", "a", ("A", 0), is_impossible=True)),
            "question 7: must have no answers, as is_impossible is true",
        ),
        (
            squad("A crane.", asked("7", "a", ("A", 0)), asked("7", "b", ("A", 0))),
            "question 7: must have a unique id",
        ),
        (squad("A crane.", {"id": "7", "answers": []}), "question 7: must have 'question', a string"),
        (squad("A crane.", {"question": "a"}), r"qas\[0\]: must have 'id', a string, as a SQuAD file has"),
        (squad("A crane.", asked("7", "a", ("A", "0"))), "question 7: must have 'answer_start', a whole"),
        (squad("A crane."), "must have a question, got none"),
        ({"rows": []}, "a.json: must have 'data', a list"),
    ],
)
def test_read_squad_bad_file_raises(written, content, message):
    with pytest.raises(InputError, match=message):
        read_squad(written(content), "train")


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 50) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def with_changed_node(content, place, value):
    """A copy of JSON content with its node number `place` replaced, counted depth first."""
    count = iter(range(10**6))

    def changed(node):
        if next(count) == place:
            return value
        if isinstance(node, dict):
            return {name: changed(each) for name, each in node.items()}
        return [changed(each) for each in node] if isinstance(node, list) else node

    return changed(content)


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 16), value=ANY_JSON)
def test_read_squad_of_damaged_file_reads_or_refuses(tmp_path_factory, place, value):
    content = squad("A crane sees a bird.", asked("1", "Who?", ("crane", 2)))
    path = tmp_path_factory.mktemp("damaged") / "a.json"
    path.write_text(json.dumps(with_changed_node(content, place, value)))
    try:
        rows = read_squad(path, "train")
    except InputError as problem:
        assert str(path) in str(problem)
        return
    for row in rows:
        for text, start in row.answers:
            assert row.context[start : start + len(text)] == text


def test_squad_file_is_for_question_answering(written):
    path = written(squad("A crane."))
    assert isinstance(task_format(TaskFiles(str(path), ""), "auto"), QuestionFormat)


# What the network reads

WORDS = [f"w{i}" for i in range(200)]


def tokenizer(max_seq_length):
    return Tokenizer(Vocabulary([*WORDS, "who"]), max_seq_length, Normalization(lowercase=True))


@settings(max_examples=100, deadline=None)
@given(length=st.integers(8, 40), num_words=st.integers(1, 150), question=st.integers(1, 4), data=st.data())
def test_windows_hold_the_context_and_its_answers(length, num_words, question, data):
    context = "  ".join(WORDS[:num_words])
    asked_words = ["who"] * question
    it = Question(tokenizer(length), TASK, " ".join(asked_words), context)
    seen = set()
    for text in it.texts:
        assert len(text) <= length
        assert text.tokens[: question + 2] == ["<cls>", *asked_words, "<sep>"]
        seen.update(text.tokens[question + 2 : -1])
    assert seen == set(WORDS[:num_words])
    first = data.draw(st.integers(0, num_words - 1))
    last = data.draw(st.integers(first, min(first + 2, num_words - 1)))
    begin, end = context.index(f" {WORDS[first]}") + 1 if first else 0, 0
    end = begin + len("  ".join(WORDS[first : last + 1]))
    targets = it.targets(begin, end)
    for text, (one, other) in zip(it.texts, targets):
        held = set(WORDS[first : last + 1]) <= set(text.tokens)
        assert (one > 0) == held
        if held:
            assert text.tokens[one : other + 1] == WORDS[first : last + 1]
    overlap = min(length // 3, (length - question - 3) // 2)
    assert any(one for one, _ in targets) or last - first + 1 > overlap


def test_question_too_long_raises():
    with pytest.raises(InputError, match=r"the question must have at most 12 tokens, .* got 13"):
        Question(tokenizer(16), TASK, "who " * 13, "w1")
    assert len(Question(tokenizer(16), TASK, "who " * 12, "w1 w2").texts) == 2
    for question, context in (("", "w1"), ("who", "\u200b")):
        with pytest.raises(InputError, match="at least one word"):
            Question(tokenizer(16), TASK, question, context)


def predictions(it, scores):
    """Predictions of all windows, from the scores (T, 2) of each."""
    return [
        Prediction(text, None, None, None, None, token_scores=np.asarray(its, np.float32))
        for text, its in zip(it.texts, scores)
    ]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), length=st.integers(10, 30))
def test_answer_is_the_best_span_of_all_windows(seed, length):
    rng = np.random.default_rng(seed)
    context = " ".join(WORDS[:60])
    it = Question(tokenizer(length), TASK_2, "who", context)
    scores = [rng.normal(size=(len(text), 2)).astype(np.float32) for text in it.texts]
    found = it.result(predictions(it, scores))
    best = (-np.inf, "")
    for text, its in zip(it.texts, scores):
        for i in range(3, len(text) - 1):
            for j in range(i, min(i + MAX_ANSWER_TOKENS, len(text) - 1)):
                best = max(best, (float(its[i, 0]) + float(its[j, 1]), " ".join(text.tokens[i : j + 1])))
    assert found.score == best[0]
    assert context[found.start : found.end] == best[1]
    null = min(float(its[0, 0]) + float(its[0, 1]) for its in scores)
    assert found.no_answer_score == null
    assert found.text == (best[1] if best[0] >= null else "")


def test_best_span_is_short_and_forward():
    scores = np.zeros((50, 2))
    scores[10, 0], scores[5, 1], scores[45, 1] = 9, 8, 7
    assert best_span(scores)[:2] != (10, 5)
    first, last, score = best_span(scores)
    assert first <= last < first + MAX_ANSWER_TOKENS
    assert score == 9


def test_answer_is_a_slice_of_the_original_text():
    vocab = WordPieceVocabulary([*SPECIAL_TOKENS, "who", "cafe", "##s", "the", "19", "##90", "."])
    reader = Tokenizer(vocab, 16, Normalization(lowercase=True))
    context = "The  Caf\u00e9s\u00a01990."
    it = Question(reader, TASK, "who", context)
    (text,) = it.texts
    assert text.tokens[3:-1] == ["the", "cafe", "##s", "19", "##90", "."]
    scores = np.zeros((len(text), 2))
    scores[4, 0], scores[7, 1] = 5, 5
    assert it.result(predictions(it, [scores])).text == "Caf\u00e9s\u00a01990"
    assert it.targets(5, 9) == [(4, 4)]
    assert it.targets(11, 15) == [(6, 7)]


# Metrics


@pytest.mark.parametrize(
    "answers, predicted, f1, exact",
    [
        (["the Crane"], "crane!", 1, 1),
        (["a red crane", "bird"], "red bird", 2 / 3, 0),
        (["crane crane bird"], "crane", 1 / 2, 0),
        (["crane"], "", 0, 0),
        (["U.S."], "us", 1, 1),
    ],
)
def test_answer_metrics_by_hand(answers, predicted, f1, exact):
    for no_answer in (False, True):
        found = answer_metrics([answers], [predicted], no_answer)
        assert found == {"f1": pytest.approx(f1), "exact_match": exact}
    both = answer_metrics([[], [], ["a crane"]], ["", "bird", "the crane"], no_answer=True)
    assert both == {"f1": pytest.approx(2 / 3), "exact_match": pytest.approx(2 / 3)}


ANSWERS = st.text(alphabet="ab the.,AN-\u00e9\u2014", max_size=12)


@settings(max_examples=200, deadline=None)
@given(answers=st.lists(ANSWERS, min_size=1, max_size=3), predicted=ANSWERS)
def test_answer_metrics_equal_transformers(answers, predicted):
    squad_metrics = pytest.importorskip(
        "transformers.data.metrics.squad_metrics", reason="needs transformers 4, which has them"
    )
    golds = [a for a in answers if squad_metrics.normalize_answer(a)] or [""]
    found = answer_metrics([answers], [predicted], no_answer=True)
    assert found["f1"] == pytest.approx(max(squad_metrics.compute_f1(a, predicted) for a in golds))
    assert found["exact_match"] == max(squad_metrics.compute_exact(a, predicted) for a in golds)
    if golds != [""] and squad_metrics.normalize_answer(predicted):  # version 1.1 differs in these
        assert answer_metrics([golds], [predicted], no_answer=False) == found


# Training and prediction


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A pretrained run to fine-tune."""
    return pretrained_run(tmp_path_factory.mktemp("before"))


def questions(count, seed, impossible=False):
    """Contexts longer than the network reads; the answer is the animal in them."""
    rng = random.Random(seed)
    paragraphs = []
    for number in range(count):
        words = rng.choices(["it", "the", ".", "is"], k=rng.randint(3, 20))
        qas = asked(str(number), "the crane", is_impossible=True)
        if not (impossible and number % 4 == 0):
            place = rng.randrange(len(words))
            words[place] = "Bird"
            qas = asked(str(number), "the crane", ("Bird", len(" ".join([*words[:place], ""]))))
        paragraphs.append({"context": " ".join(words), "qas": [qas]})
    return {"version": "2.0" if impossible else "1.1", "data": [{"title": "", "paragraphs": paragraphs}]}


@pytest.fixture
def command(before, written, tmp_path):
    """Runs the command; returns its status and the new run's folder."""

    def run(*flags, name="tuned", impossible=False):
        train = written(questions(96, 1, impossible), "train.json")
        files = [
            "--train",
            str(train),
            "--validation",
            str(written(questions(24, 2, impossible), "dev.json")),
        ]
        options = ["--lr", "0.003", "--batch-size", "16", "--output", str(tmp_path / name), *flags]
        return finetune.main([str(before), *files, *options]), tmp_path / name

    return run


@pytest.mark.parametrize("impossible", [False, True])
def test_finetuning_answers_learns_and_reports(command, impossible, capsys):
    status, folder = command("--epochs", "10", impossible=impossible)
    assert status == 0
    shown = capsys.readouterr()
    assert "answers in contexts: 96 questions in train, 24 questions in validation" in shown.err
    assert "windows of up to 16 tokens" in shown.err
    assert ("without answer" in shown.out) == impossible
    run = gb.load_run(folder, checkpoint="best")
    assert run.metrics["validation"]["f1"] > 0.9
    records = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    given_answers, said = ([each[key] for each in records] for key in ("given", "predicted"))
    found = answer_metrics(
        [each["answers"] for each in given_answers], [each["answer"] for each in said], impossible
    )
    best = max(
        json.loads(line)["validation"]["f1"]
        for line in (folder / "log.jsonl").read_text().splitlines()
        if "validation" in line
    )
    assert found["f1"] == best
    context = "it is . the  BIRD is it . is the it . " + "it is . " * 10
    (answer,) = run.predict([("the crane", context)])
    assert context[answer["start"] : answer["end"]] == answer["answer"] == "BIRD"


def test_finetuning_answers_bad_input_fails(command, before, written, tmp_path, capsys):
    test = written(squad("it is", asked("9", "the " * 20)), "test.json")
    assert command("--test", str(test))[0] == 2
    assert "test.json, question 9: the question must have at most 12 tokens" in capsys.readouterr().err
    impossible = str(written(questions(8, 3, impossible=True), "other.json"))
    assert command("--test", impossible, name="other")[0] == 2
    assert "must have an answer, as all questions of the training file have" in capsys.readouterr().err


@pytest.mark.parametrize("flags", DIVISIONS)
def test_finetuning_answers_matches_over_devices(command, flags):
    assert_matches(command, flags)


def test_finetuning_answers_resumes(command, monkeypatch):
    assert_resumes(command, monkeypatch, stop_at=12)


def test_encode_answers_a_question(command, capsys):
    _, folder = command("--epochs", "1")
    capsys.readouterr()
    assert encode.main([str(folder), "the crane || it is . the Bird is"]) == 0
    assert " to " in capsys.readouterr().out.splitlines()[1]
    assert encode.main([str(folder), "the crane || it is . the Bird is", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["pair"][content["start"] : content["end"]] == content["answer"]
    assert encode.main([str(folder), "the crane"]) == 2
    assert "must be a pair of a question and its context" in capsys.readouterr().err


@pytest.mark.skipif(not XQUAD.is_dir(), reason="needs ../shared/tasks")
def test_xquad_answers_are_found_again():
    rows = read_squad(XQUAD / "train.json", "train")
    vocab = Vocabulary([])
    reader = Tokenizer(vocab, 64, Normalization(lowercase=True))
    data = QuestionFormat().examples(rows, TASK, reader, "train")
    batches = list(ExampleLoader(data, 16, seed=0, max_seq_length=64))
    assert sum(map(len, batches)) == len(data.texts) > len(rows)
    assert sum((batch.targets[:, 0] > 0).sum() for batch in batches) >= len(rows)
