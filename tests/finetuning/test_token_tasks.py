"""Taggers and answerers after training: exported, served, and refusing other requests."""

import json
import zipfile

import encode
import export
import pytest
import requests
from conftest import skip_without
from support.reference_bert import randomise

from gluon_bert.checkpoint import save_checkpoint
from gluon_bert.conversion.converter import network
from gluon_bert.data.wordpiece import SPECIAL_TOKENS, WordPieceVocabulary
from gluon_bert.export.exporter import load_exported
from gluon_bert.inference.predictor import Predictor
from gluon_bert.model.task import Task
from gluon_bert.presets import preset
from gluon_bert.run import create_run, load_run
from gluon_bert.serving.request_json import answer
from gluon_bert.serving.server import Settings, free_ports, serving

WORDS = [f"w{i}" for i in range(90)]
TASKS = {
    "tagging": Task("tagging", False, ("O", "B-a", "I-a", "B-b", "I-b")),
    "question-answering": Task("question-answering", True, no_answer=True),
}
CONTEXT = "  ".join(f"W{i % 50}" for i in range(70)) + "."
REQUESTS = {
    "tagging": [{"text": CONTEXT}, {"text": "w1 w2"}],
    "question-answering": [
        {"question": "w3 w4?", "context": CONTEXT},
        {"question": "w1", "context": "w2 w3"},
    ],
}
# Of a score or a probability, by format.
TOLERANCES = {"mxnet": 1e-4, "onnx": 1e-4, "onnx-int8": 0.1, "int8": 0.1, "bf16": 0.02}
both_tasks = pytest.mark.parametrize("kind", TASKS)


@pytest.fixture
def folder_of(tmp_path):
    """Makes the folder of a fine-tuned run with random weights."""

    def make(kind):
        vocab = WordPieceVocabulary([*SPECIAL_TOKENS, *WORDS, ".", "?"])
        sizes = {"num_layers": 2, "units": 16, "num_heads": 2, "ffn_units": 24, "max_positions": 40}
        config = preset("bert-tiny").replace(**sizes, max_seq_length=32, tokenizer="wordpiece")
        create_run(tmp_path / "run", config, vocab, task=TASKS[kind])
        net = network({}, len(vocab), config.model, task=TASKS[kind])
        randomise(net, 3)
        save_checkpoint(tmp_path / "run", net, step=7)
        return tmp_path / "run"

    return make


def replies(predictor, requests):
    return answer(predictor, [json.dumps(request).encode() for request in requests])


def assert_close(one, other, tolerance=1e-4):
    """Equal JSON, but for numbers."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert_close(value, other[name], tolerance)
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other):
            assert_close(a, b, tolerance)
    else:
        assert other == (pytest.approx(one, abs=tolerance) if isinstance(one, float) else one)


@both_tasks
def test_served_task_is_the_task_of_the_run(kind, folder_of):
    run = load_run(folder_of(kind))
    for request, (status, content) in zip(REQUESTS[kind], replies(Predictor.of(run), [*REQUESTS[kind], {}])):
        assert status == 200
        (expected,) = run.predict([tuple(request.values()) if len(request) > 1 else request["text"]])
        assert_close({**request, **expected}, content)
        text = request.get("context", request.get("text"))
        for found in content.get("entities", [content]):
            span = text[found["start"] : found["end"]] if found["start"] is not None else ""
            assert span == found.get("text" if kind == "tagging" else "answer")


@pytest.mark.parametrize("format", TOLERANCES)
@both_tasks
def test_exported_task_is_the_task_of_the_run(kind, format, folder_of, tmp_path, capsys):
    skip_without(format)
    folder = folder_of(kind)
    (tmp_path / "texts.txt").write_text("".join(f"w{i} " * (1 + i % 9) + "\n" for i in range(12)))
    texts = [] if format == "mxnet" else ["--text-file", str(tmp_path / "texts.txt")]
    assert export.main([str(folder), "--format", format, *texts]) == 0
    exported = load_exported(folder / "export" / format)
    assert exported.manifest.output_names == ("encoded", "token_scores")
    of_run = replies(Predictor.of(load_run(folder)), REQUESTS[kind])
    for one, other in zip(of_run, replies(exported.predictor, REQUESTS[kind])):
        assert_close(list(one), list(other), TOLERANCES[format])


@both_tasks
def test_archived_task_is_the_task_of_the_run(kind, folder_of, tmp_path, capsys):
    pytest.importorskip("model_archiver", reason="needs the extra serve")
    folder = folder_of(kind)
    assert export.main([str(folder), "--format", "mar"]) == 0
    with zipfile.ZipFile(folder / "export" / "mar" / "bert.mar") as file:
        file.extractall(tmp_path / "archive")
    predictor = load_exported(tmp_path / "archive").predictor
    for one, other in zip(
        replies(Predictor.of(load_run(folder)), REQUESTS[kind]), replies(predictor, REQUESTS[kind])
    ):
        assert_close(list(one), list(other))


@pytest.mark.java
@both_tasks
def test_server_of_a_task_answers_as_the_run(kind, folder_of, capsys):
    pytest.importorskip("mms", reason="needs the extra serve")
    folder = folder_of(kind)
    assert export.main([str(folder), "--format", "mar"]) == 0
    port, management_port = free_ports()
    settings = Settings(port=port, management_port=management_port)
    of_run = replies(Predictor.of(load_run(folder)), [*REQUESTS[kind], {}])
    with serving(folder / "export" / "mar" / "bert.mar", settings) as server:
        for request, (status, expected) in zip([*REQUESTS[kind], {}], of_run):
            for method in ("POST", "GET"):
                reply = requests.request(method, server.address, json=request, timeout=60)
                assert reply.status_code == status
                assert_close(expected, reply.json())


@pytest.mark.parametrize(
    "kind, request_, message",
    [
        ("tagging", {"text": " "}, "the text must have at least one word"),
        ("tagging", {"text": "w1", "pair": "w2"}, 'a request for tagging must have "text"'),
        ("tagging", {"text": "w1", "ask": ["task", "vectors"]}, '"ask" with "task" alone'),
        ("tagging", {"text": "w1", "ask": "masks"}, "must have a <mask>"),
        ("tagging", {"text": "w1", "context": "w2", "ask": "vectors"}, '"context" is for a network'),
        ("question-answering", {"text": "w1"}, 'must have "question" and "context"'),
        ("question-answering", {"question": "w1", "context": ""}, "the context must have at least one word"),
        ("question-answering", {"question": "w1 " * 40, "context": "w1"}, "must have at most 28 tokens"),
        ("question-answering", {"question": "w1", "context": 5}, '"context" must be a string'),
    ],
)
def test_served_task_bad_request_gets_status_400(kind, request_, message, folder_of):
    predictor = Predictor.of(load_run(folder_of(kind)))
    good = REQUESTS[kind][1]
    (status, content), (other, _) = replies(predictor, [request_, good])
    assert (status, other) == (400, 200)
    assert any(part in content["error"] for part in message.split("|"))


@both_tasks
def test_served_task_gives_vectors_too(kind, folder_of):
    predictor = Predictor.of(load_run(folder_of(kind)))
    ((status, content),) = replies(predictor, [{"text": "w1 w2", "ask": "vectors"}])
    assert status == 200 and len(content["mean"]) == 16 and "pooled" not in content


def test_encoder_export_of_a_tagger_has_no_tags(folder_of, capsys):
    folder = folder_of("tagging")
    assert export.main([str(folder), "--outputs", "encoder"]) == 0
    capsys.readouterr()
    assert encode.main([str(folder / "export" / "mxnet"), "w1"]) == 2
    assert "the export must have outputs for its task" in capsys.readouterr().err
