"""Pseudo-log-likelihoods equal a plain loop over the reference network; minimal pairs are read and judged."""

import gzip
import json
from types import SimpleNamespace

import encode
import numpy as np
import pytest
from conftest import ROOT, untrained_run
from dev import blimp
from support import reference_bert as reference

from gluon_bert.data.vocab import Vocabulary
from gluon_bert.errors import InputError
from gluon_bert.inference import predictor as predictor_module
from gluon_bert.inference.minimal_pairs import accuracies, judge, pairs_in
from gluon_bert.inference.predictor import Predictor
from gluon_bert.inference.scoring import score
from gluon_bert.presets import preset
from gluon_bert.run import load_run
from gluon_bert.serving.request_json import answer

WORDS = ["a", "crane", "is", "are", "flying", "driver", "came", "he", "just", "left", "the", "cranes"]
TEXTS = [("a crane is flying",), ("the driver came", "he just left"), ("crane",), ("a zebra is flying",)]
BLIMP = ROOT.parent / "shared" / "tasks" / "blimp"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """An untrained run with weights that matter in the result."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = preset("d2l").replace(max_seq_length=16, units=16, ffn_units=32, max_positions=32)
    return untrained_run(folder, config, Vocabulary(WORDS))


@pytest.fixture(scope="module")
def run(run_folder):
    run = load_run(run_folder)
    reference.randomise(run.net)
    return run


@pytest.fixture(scope="module")
def predictor(run):
    return Predictor.of(run)


def plain_loop(run, text):
    """The log-probability of each token in float64, one masked copy at a time, from the reference network."""
    found = []
    for position in range(len(text)):
        if text.ids[position] in (run.vocab.cls, run.vocab.sep):
            continue
        tokens = text.ids.copy()
        tokens[position] = run.vocab.mask
        copy = SimpleNamespace(
            tokens=tokens[None],
            token_types=text.token_types[None],
            valid_length=np.array([len(text)]),
            masked_positions=np.array([[0], [position]]),
        )
        _, scores, _ = reference.forward(run.config.model, reference.values(run.net), copy)
        found.append(reference.log_softmax(scores)[0, text.ids[position]])
    return np.array(found)


def test_score_matches_plain_loop(run, predictor):
    texts = [predictor.reader.text(*text) for text in TEXTS]
    for text, scored in zip(texts, score(predictor, texts)):
        expected = plain_loop(run, text)
        np.testing.assert_allclose(scored.log_probabilities, expected, atol=1e-4)
        assert scored.text is text
        assert scored.log_likelihood == pytest.approx(expected.sum(), abs=1e-3)
        assert scored.perplexity == pytest.approx(np.exp(-expected.mean()), rel=1e-3)
        tokens = [text.tokens[position] for position in scored.positions]
        assert tokens == [token for token in text.tokens if token not in ("<cls>", "<sep>")]
        position, token, value = scored.least_likely(1)[0]
        assert value == scored.log_probabilities.min() and text.tokens[position] == token


def test_score_does_not_depend_on_batches(predictor, monkeypatch):
    texts = [predictor.reader.text(*text) for text in TEXTS * 3]
    together = [each.log_probabilities for each in score(predictor, texts)]
    monkeypatch.setattr(predictor_module, "BATCH_TOKENS", 8)
    monkeypatch.setattr(predictor_module, "CHUNK_TOKENS", 16)
    for ours, alone in zip(together, (next(score(predictor, [text])) for text in texts)):
        np.testing.assert_allclose(ours, alone.log_probabilities, atol=1e-5)


def test_score_refuses_a_text_with_a_mask(predictor):
    with pytest.raises(InputError, match="must not contain <mask>"):
        list(score(predictor, [predictor.reader.text("a <mask> is flying")]))


def test_score_refuses_an_untrained_head(run):
    untrained = Predictor(Predictor.of(run).network, run.reader, untrained=("mlm",))
    with pytest.raises(InputError):
        list(score(untrained, [run.reader.text("a crane")]))


# The command and the server


def test_encode_score_prints_json(run_folder, capsys):
    predictor = Predictor.of(load_run(run_folder))
    (expected,) = score(predictor, [predictor.reader.text("a crane is flying")])
    command = [str(run_folder), "--json", "--score", "a crane is flying", "the driver came || he left"]
    assert encode.main([*command, "--top", "2"]) == 0
    single, pair = map(json.loads, capsys.readouterr().out.splitlines())
    assert single["text"] == "a crane is flying" and pair["pair"] == "he left"
    assert single["log_likelihood"] == pytest.approx(expected.log_likelihood, abs=1e-4)
    assert single["perplexity"] == pytest.approx(expected.perplexity, rel=1e-4)
    assert single["log_probabilities"][0] is None and single["log_probabilities"][-1] is None
    np.testing.assert_allclose(single["log_probabilities"][1:-1], expected.log_probabilities, atol=1e-5)
    least = single["least_likely"]
    assert len(least) == 2 and single["tokens"][least[0]["position"]] == least[0]["token"]


def test_encode_score_reads_files_and_prints_text(run_folder, tmp_path, capsys):
    (tmp_path / "texts").write_text("a crane\nthe cranes are flying\n", "utf-8")
    assert encode.main([str(run_folder), "--score", "--input", str(tmp_path / "texts")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "a crane" and "log-likelihood, perplexity" in shown[1]
    output = tmp_path / "scores.jsonl"
    given = ["--score", "--input", str(tmp_path / "texts"), "--output", str(output)]
    assert encode.main([str(run_folder), *given]) == 0
    assert [json.loads(line)["text"] for line in output.read_text("utf-8").splitlines()] == [
        "a crane",
        "the cranes are flying",
    ]


def test_encode_score_refuses_bad_input(run_folder, tmp_path, capsys):
    assert encode.main([str(run_folder), "--score", "a <mask>"]) == 2
    assert "text 1: a text to score must not contain <mask>" in capsys.readouterr().err
    assert encode.main([str(run_folder), "--score", "a", "--output", str(tmp_path / "x.npz")]) == 2
    assert "must be a .jsonl file for results other than vectors" in capsys.readouterr().err


def test_server_answers_with_scores(predictor):
    (expected,) = score(predictor, [predictor.reader.text("a crane is flying")])
    bodies = [
        b'{"text": "a crane is flying", "ask": "score", "top": 1}',
        b'{"text": "a <mask>", "ask": "score"}',
        b'{"text": "a crane", "ask": ["vectors", "score"]}',
    ]
    (status, content), (refused, why), (both, vectors) = answer(predictor, bodies)
    assert (status, refused, both) == (200, 400, 200)
    assert content["log_likelihood"] == pytest.approx(expected.log_likelihood, abs=1e-4)
    assert len(content["least_likely"]) == 1 and "cls" not in content
    assert "must not contain <mask>" in why["error"]
    assert {"cls", "perplexity"} <= set(vectors)


# Minimal pairs

PAIRS = [
    ("agreement", "a crane is flying", "a crane are flying"),
    ("agreement", "the cranes are flying", "the cranes is flying"),
    ("agreement", "the crane is flying", "the crane are flying"),
    ("agreement", "cranes are flying", "cranes is flying"),
    ("agreement", "the driver is flying", "the driver are flying"),
    ("order", "he just left", "just he left"),
    ("order", "the driver came", "driver the came"),
    ("order", "a crane came", "crane a came"),
    ("order", "he left", "left he"),
    ("order", "the driver just left", "the just driver left"),
]


@pytest.fixture
def pairs_folder(tmp_path):
    """The ten pairs, in one file of each kind."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    rows = ["\t".join(pair) for pair in [("phenomenon", "good", "bad"), *PAIRS[:5]]]
    (folder / "agreement.tsv.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    keys = ("linguistics_term", "sentence_good", "sentence_bad")
    lines = [json.dumps(dict(zip(keys, pair))) for pair in PAIRS[5:]]
    (folder / "order.jsonl").write_text("\n".join(lines), "utf-8")
    (folder / "README.md").write_text("not read")
    return folder


def test_pairs_in_reads_all_formats(pairs_folder):
    pairs = list(pairs_in(pairs_folder))
    assert [(each.phenomenon, each.good, each.bad) for each in pairs] == PAIRS
    assert pairs[0].where == f"{pairs_folder / 'agreement.tsv.gz'}, line 2"
    assert pairs[-1].where == f"{pairs_folder / 'order.jsonl'}, line 5"
    assert [each.paradigm for each in pairs_in(pairs_folder, limit=2)] == ["agreement"] * 2 + ["order"] * 2


def test_judge_matches_plain_loop_on_ten_pairs(run, predictor, pairs_folder):
    judgements = list(judge(predictor, pairs_in(pairs_folder)))
    assert len(judgements) == 10
    right = {"agreement": 0, "order": 0}
    for each, (phenomenon, good, bad) in zip(judgements, PAIRS):
        likelihoods = [plain_loop(run, predictor.reader.text(text)).sum() for text in (good, bad)]
        np.testing.assert_allclose([each.good, each.bad], likelihoods, atol=1e-3)
        assert each.correct == (likelihoods[0] > likelihoods[1])
        right[phenomenon] += likelihoods[0] > likelihoods[1]
    found = accuracies(judgements, "phenomenon")
    assert found == {name: {"pairs": 5, "accuracy": count / 5} for name, count in right.items()}
    assert 0 < sum(right.values()) < 10


def test_blimp_prints_and_writes_accuracies(run_folder, pairs_folder, tmp_path, capsys):
    predictor = Predictor.of(load_run(run_folder))
    expected = accuracies(list(judge(predictor, pairs_in(pairs_folder))), "phenomenon")
    figures = tmp_path / "blimp.json"
    assert blimp.main([str(run_folder), str(pairs_folder), "--json", str(figures)]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["phenomenon", "pairs", "accuracy"]
    assert [row.split()[:2] for row in rows] == [["agreement", "5"], ["order", "5"], ["all", "10"]]
    content = json.loads(figures.read_text("utf-8"))
    assert content["phenomena"] == expected == content["paradigms"]
    assert content["accuracy"] == pytest.approx(np.mean([each["accuracy"] for each in expected.values()]))
    assert rows[0].split()[2] == f"{expected['agreement']['accuracy']:.1%}"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.tsv", b"good\tbad\nu\tv\n", "line 1: the columns must include phenomenon, good, bad, got"),
        ("x.tsv", b"phenomenon\tgood\tbad\na\tb\n", "line 2: must have 3 columns, got 2"),
        ("x.tsv", b"phenomenon\tgood\tbad\na\tb\t \n", "line 2: phenomenon, good, bad must be three texts"),
        ("x.tsv", b"phenomenon\tgood\tbad\n", "must contain at least one pair"),
        ("x.tsv", b"\xff\xfe", "cannot be read"),
        ("x.tsv.gz", b"no gzip", "cannot be read"),
        (
            "x.jsonl",
            b'{"sentence_good": "a", "sentence_bad": 1, "linguistics_term": "t"}',
            "line 1: phenomenon",
        ),
        ("x.jsonl", b"[1]", "line 1: must be a JSON object"),
        ("x.jsonl", b"{", "line 1: must be a JSON object"),
        ("x.csv", b"", "must end in .tsv"),
    ],
)
def test_blimp_refuses_bad_files(run_folder, tmp_path, capsys, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    assert blimp.main([str(run_folder), str(path)]) == 2
    assert message in capsys.readouterr().err


def test_blimp_refuses_bad_flags(run_folder, tmp_path, capsys):
    assert blimp.main([str(run_folder), str(tmp_path), "--limit", "0", "--json", "/no/where/x.json"]) == 2
    printed = capsys.readouterr().err
    assert "--limit must be at least 1, got 0" in printed and "the folder /no/where does not exist" in printed
    assert blimp.main([str(run_folder), str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert blimp.main([str(run_folder), str(tmp_path)]) == 2
    assert "must contain files that end in .tsv" in capsys.readouterr().err


def test_blimp_names_the_line_of_a_long_sentence(run_folder, tmp_path, capsys):
    path = tmp_path / "long.tsv"
    path.write_text(f"phenomenon\tgood\tbad\nx\ta crane\t{'a ' * 20}\n", "utf-8")
    assert blimp.main([str(run_folder), str(path)]) == 2
    assert f"{path}, line 2: 22 tokens" in capsys.readouterr().err


def test_real_blimp_files_are_read():
    if not BLIMP.is_dir():
        pytest.skip(f"BLiMP is not at {BLIMP}")
    pairs = list(pairs_in(BLIMP, limit=3))
    assert len({each.paradigm for each in pairs}) == 45 and len(pairs) == 135
    assert len({each.phenomenon for each in pairs}) > 8
