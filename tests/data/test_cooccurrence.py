"""Word vectors from co-occurrences, against plain loops and NumPy's dense decomposition."""

import json

import numpy as np
import pretrain
import pytest
from scipy import sparse

from gluon_bert.config import DataConfig
from gluon_bert.data import cooccurrence
from gluon_bert.data.cooccurrence import (
    CONTEXT_POWER,
    cached_word_vectors,
    count_cooccurrences,
    positive_pmi,
    word_vectors,
)
from gluon_bert.data.document_arrays import Documents
from gluon_bert.data.prepared import prepare
from gluon_bert.data.vocab import Vocabulary
from gluon_bert.errors import InputError
from gluon_bert.run import load_run

VOCAB = Vocabulary([f"w{i}" for i in range(40)])


@pytest.fixture(scope="module")
def text():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, len(VOCAB), 2000).astype(np.uint16)  # special tokens among them
    sentences = np.append(np.arange(0, 2000, 13), 2000)
    return Documents(tokens, sentences, np.array([0, len(sentences) - 1]))


def counted_by_loop(text):
    counts = np.zeros((len(VOCAB), len(VOCAB)))
    for start, end in zip(text.sentences, text.sentences[1:]):
        for i in range(start, end):
            for j in range(start, end):
                a, b = text.tokens[i], text.tokens[j]
                if i != j and abs(i - j) <= 5 and not VOCAB.special[a] and not VOCAB.special[b]:
                    counts[a, b] += 1 / abs(i - j)
    return counts


def test_counts_equal_a_plain_loop(text):
    found = count_cooccurrences(text, VOCAB).toarray()
    np.testing.assert_allclose(found, counted_by_loop(text), rtol=1e-12)


def test_positive_pmi_equals_its_formula():
    counts = np.array([[0.0, 4.0, 1.0], [4.0, 0.0, 2.0], [1.0, 2.0, 0.5]])
    contexts = counts.sum(axis=0) ** CONTEXT_POWER
    with np.errstate(divide="ignore"):
        expected = np.log(counts / np.outer(counts.sum(axis=1), contexts) * contexts.sum())
    found = positive_pmi(sparse.csr_matrix(counts)).toarray()
    np.testing.assert_allclose(found, np.maximum(expected, 0), atol=1e-12)


def test_vectors_span_the_dense_decomposition(text):
    size = 20
    vectors = word_vectors(text, VOCAB, size)
    met = ~np.isnan(vectors[:, 0])
    left, values, _ = np.linalg.svd(positive_pmi(count_cooccurrences(text, VOCAB)).toarray())
    expected = (left[:, :size] * np.sqrt(values[:size]))[met]
    expected -= expected.mean(axis=0)
    expected /= expected.std()
    # Columns are free in their sign, and those of equal singular values in their order: compare products.
    np.testing.assert_allclose(vectors[met] @ vectors[met].T, expected @ expected.T, atol=1e-2 * size)
    assert met.tolist() == (~VOCAB.special).tolist()


def test_vectors_are_centred_scaled_and_deterministic(text):
    vectors = word_vectors(text, VOCAB, 8, seed=3)
    met = ~np.isnan(vectors[:, 0])
    np.testing.assert_allclose(vectors[met].mean(axis=0), 0, atol=1e-6)
    assert vectors[met].std() == pytest.approx(1, abs=1e-6)
    np.testing.assert_array_equal(vectors, word_vectors(text, VOCAB, 8, seed=3))


def test_vectors_with_too_few_words_are_refused(text):
    with pytest.raises(InputError, match="more words than units, got 40 words and 40 units"):
        word_vectors(text, VOCAB, 40)


def test_shards_give_the_vectors_of_one_text(text_file, tmp_path, monkeypatch):
    config = DataConfig(corpus=(str(text_file),), text_format="sentences", min_freq=1)
    whole = prepare(config, tmp_path / "whole")
    monkeypatch.setattr("gluon_bert.data.corpora.text_file.BLOCK_BYTES", 500)
    monkeypatch.setattr("gluon_bert.data.build_shards._SHARD_WORDS", 400)
    parts = prepare(config, tmp_path / "parts")
    assert len(parts.train.sizes) > 1
    first, second = (count_cooccurrences(each.train, each.vocab).toarray() for each in (whole, parts))
    np.testing.assert_allclose(first, second, rtol=1e-12)


def test_cached_vectors_are_read_and_damaged_ones_replaced(text, tmp_path, monkeypatch):
    computed = []
    original = cooccurrence.word_vectors
    monkeypatch.setattr(cooccurrence, "word_vectors", lambda *a: computed.append(1) or original(*a))
    first = cached_word_vectors(text, VOCAB, 8, 0, tmp_path)
    np.testing.assert_array_equal(first, cached_word_vectors(text, VOCAB, 8, 0, tmp_path))
    assert len(computed) == 1
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    np.testing.assert_array_equal(first, cached_word_vectors(text, VOCAB, 8, 0, tmp_path))
    assert len(computed) == 2


def test_pretrain_starts_from_the_vectors(text_file, tmp_path, capsys):
    flags = [
        "--corpus",
        str(text_file),
        "--init-embeddings",
        "cooccurrence",
        "--units",
        "8",
        "--num-heads",
        "2",
    ]
    flags += ["--ffn-units", "8", "--batch-size", "8", "--num-steps", "1", "--lr", "1e-12", "--cpus", "1"]
    flags += ["--min-freq", "1", "--text-format", "sentences", "--output", str(tmp_path / "run")]
    assert pretrain.main(flags) == 0
    run = load_run(tmp_path / "run")
    found = run.net.encoder.embeddings.tokens.weight.data().asnumpy()
    text = prepare(run.config.data)
    expected = word_vectors(text.train, text.vocab, 8, run.config.train.seed)
    met = ~np.isnan(expected[:, 0])
    np.testing.assert_allclose(found[met] / found[met].std(), expected[met], atol=1e-3)
    assert (
        json.loads((tmp_path / "run" / "config.json").read_text())["model"]["init_embeddings"]
        == "cooccurrence"
    )
