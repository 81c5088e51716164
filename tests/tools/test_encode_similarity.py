"""encode.py --similar, --similarity, --pooling and untrained heads."""

import json

import encode
import numpy as np
import pytest
from conftest import untrained_run

from gluon_bert.data.vocab import Vocabulary
from gluon_bert.inference.predictor import Predictor
from gluon_bert.inference.similarity import nearest
from gluon_bert.model.pooling import Pooling
from gluon_bert.presets import preset
from gluon_bert.run import load_run

TEXTS = ["a crane", "he just left", "a crane is flying", "the driver came"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = preset("d2l").replace(max_seq_length=16, units=16, ffn_units=32, max_positions=32)
    return untrained_run(folder, config, Vocabulary(["a", "crane", "is", "flying", "he", "left", "came"]))


def marked(run_folder, tmp_path, **values):
    """A copy of the run whose config.json says more."""
    import shutil

    folder = tmp_path / "marked"
    shutil.copytree(run_folder, folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **values}))
    return folder


def pooled(run_folder, pooling):
    run = load_run(run_folder)
    answers = Predictor.of(run).predict([run.reader.text(text) for text in TEXTS])
    return np.stack([pooling(answer.vectors) for answer in answers])


def lines_of(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
def test_encode_pooling_gives_the_embedding(mode, run_folder, capsys):
    flags = ["--json", "--pooling", mode, "--normalize"]
    assert encode.main([str(run_folder), *TEXTS, *flags]) == 0
    found = [line["embedding"] for line in lines_of(capsys)]
    vectors = [each.vectors for each in Predictor.of(load_run(run_folder)).predict(
        [load_run(run_folder).reader.text(text) for text in TEXTS])]  # fmt: skip
    expected = np.stack([{"mean": v.mean(0), "cls": v[0], "max": v.max(0)}[mode] for v in vectors])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_encode_pooling_of_the_run_is_the_default(run_folder, tmp_path, capsys):
    own = {"mode": "max", "normalize": True, "similarity": "cosine"}
    folder = marked(run_folder, tmp_path, pooling=own)
    assert encode.main([str(folder), *TEXTS, "--json"]) == 0
    found = [line["embedding"] for line in lines_of(capsys)]
    np.testing.assert_allclose(found, pooled(run_folder, Pooling("max", True)), atol=1e-5)
    assert encode.main([str(folder), *TEXTS, "--json", "--no-normalize"]) == 0
    found = [line["embedding"] for line in lines_of(capsys)]
    np.testing.assert_allclose(found, pooled(run_folder, Pooling("max")), atol=1e-5)


def test_encode_embeddings_are_in_the_npz(run_folder, tmp_path, capsys):
    path = tmp_path / "vectors.npz"
    assert encode.main([str(run_folder), *TEXTS, "--pooling", "mean", "--output", str(path)]) == 0
    with np.load(path) as arrays:
        np.testing.assert_array_equal(arrays["embeddings"], arrays["mean"])


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_encode_similar_lists_the_nearest_texts(similarity, run_folder, tmp_path, capsys):
    own = {"mode": "mean", "normalize": False, "similarity": similarity}
    folder = marked(run_folder, tmp_path, pooling=own)
    assert encode.main([str(folder), *TEXTS, "--similar", "2", "--json"]) == 0
    vectors = pooled(run_folder, Pooling("mean")).astype(np.float64)
    if similarity == "cosine":
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = vectors @ vectors.T
    for row, line in enumerate(lines_of(capsys)):
        assert line["text"] == TEXTS[row]
        best = sorted((i for i in range(4) if i != row), key=lambda i: -expected[row, i])[:2]
        assert [each["number"] - 1 for each in line["similar"]] == best
        assert [each["text"] for each in line["similar"]] == [TEXTS[i] for i in best]
        found = [each["similarity"] for each in line["similar"]]
        np.testing.assert_allclose(found, expected[row, best], rtol=1e-4)


def test_encode_similarity_compares_the_texts_of_a_pair(run_folder, capsys):
    assert encode.main([str(run_folder), "--similarity", TEXTS[0], TEXTS[2], "--json"]) == 0
    (line,) = lines_of(capsys)
    one, _, other, _ = pooled(run_folder, Pooling("mean"))
    expected = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    assert line["similarity"] == pytest.approx(expected, abs=1e-5)
    assert encode.main([str(run_folder), "--similarity", TEXTS[0], TEXTS[0]]) == 0
    assert "1.0000" in capsys.readouterr().out


def test_nearest_in_blocks_equals_nearest_at_once(monkeypatch):
    vectors = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    whole = list(nearest(vectors, 5, Pooling()))
    monkeypatch.setattr("gluon_bert.inference.similarity._BLOCK_BYTES", 4 * 50 * 7)
    for one, other in zip(whole, nearest(vectors, 5, Pooling())):
        np.testing.assert_array_equal(one.indices, other.indices)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--similar", "0", "a"], "--similar must be at least 1, got 0"),
        (["--similarity", "a"], "text 1: must be a pair"),
        (
            ["--fill-mask", "a <mask>", "--pooling", "mean"],
            "--pooling and --normalize have an effect",
        ),
    ],
)
def test_encode_similarity_wrong_flags_are_refused(flags, message, run_folder, capsys):
    assert encode.main([str(run_folder), *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "untrained, flags, message",
    [
        (["mlm"], ["--fill-mask", "a <mask>"], "the masked-language-model head must be trained first"),
        (["nsp"], ["--next", "a", "he"], "the next-sentence head must be trained first"),
        (["pooler"], ["--next", "a", "he"], "the pooler must be trained first"),
    ],
)
def test_encode_with_an_untrained_head_is_refused(untrained, flags, message, run_folder, tmp_path, capsys):
    folder = marked(run_folder, tmp_path, untrained=untrained)
    assert encode.main([str(folder), *flags]) == 2
    assert message in capsys.readouterr().err


def test_encode_with_an_untrained_pooler_has_no_pooled(run_folder, tmp_path, capsys):
    folder = marked(run_folder, tmp_path, untrained=["pooler"])
    assert encode.main([str(folder), "a crane", "--json"]) == 0
    (line,) = lines_of(capsys)
    assert "cls" in line and "pooled" not in line


@pytest.mark.parametrize(
    "values, message",
    [
        ({"untrained": ["decoder"]}, "'untrained' must be a list of pooler, mlm, nsp"),
        ({"pooling": {"mode": "last"}}, "'pooling' must be what this gluon_bert writes"),
    ],
)
def test_run_with_unknown_marks_is_refused(values, message, run_folder, tmp_path, capsys):
    assert encode.main([str(marked(run_folder, tmp_path, **values)), "a"]) == 2
    assert message in capsys.readouterr().err
