"""Documents to ids, and their cache."""

import logging
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from gluon_bert.config import DataConfig
from gluon_bert.data.prepared import prepare, prepare_words
from gluon_bert.errors import InputError


def config_of(path, **changes):
    return DataConfig(corpus=(str(path),), text_format="sentences", **changes)


def test_prepared_ids_spell_the_documents():
    documents = [["a b", "b c"], ["c a a"], ["b b b", "zz"]]
    prepared = prepare_words([(d, False) for d in documents], min_freq=2)
    train, vocab = prepared.train, prepared.vocab
    spelt = [
        [
            " ".join(vocab.to_tokens(train.tokens[train.sentences[s] : train.sentences[s + 1]]))
            for s in range(train.documents[d], train.documents[d + 1])
        ]
        for d in range(len(train))
    ]
    assert spelt == [["a b", "b c"], ["c a a"], ["b b b", "<unk>"]]


def test_vocabulary_comes_from_training_text():
    prepared = prepare_words([(["a a", "a"], False), (["b b", "b a"], True)], min_freq=1)
    assert "b" not in prepared.vocab
    assert prepared.vocab.to_tokens(prepared.validation.tokens) == ["<unk>"] * 3 + ["a"]


def test_special_tokens_in_text_become_unk():
    prepared = prepare_words([(["<mask> <sep> a <unk>", "a <cls> <pad>"], False)], min_freq=1)
    spelt = " ".join(prepared.vocab.to_tokens(prepared.train.tokens))
    assert spelt == "<unk> <unk> a <unk> a <unk> <unk>"


def test_unigram_loss_counts_words_to_predict():
    prepared = prepare_words([(["a a b <unk>", "c b b <unk>"], False), (["a", "zz"], True)], min_freq=2)

    # <unk> 3 times (one of them the rare c), b 3, a 2
    def entropy(*counts):
        p = np.array(counts) / sum(counts)
        return -(p * np.log(p)).sum()

    train, validation = prepared.train, prepared.validation
    assert prepared.unigram_loss(train, predict_unknown=True) == pytest.approx(entropy(3, 3, 2))
    assert prepared.unigram_loss(train, predict_unknown=False) == pytest.approx(entropy(3, 2))
    both = -(np.log(2 / 8) + np.log(3 / 8)) / 2
    assert prepared.unigram_loss(validation, predict_unknown=True) == pytest.approx(both)
    assert prepared.unigram_loss(validation, predict_unknown=False) == pytest.approx(-np.log(2 / 5))


def test_cache_gives_the_same_without_reading(text_file, tmp_path, monkeypatch):
    first = prepare(config_of(text_file), tmp_path / "cache")
    monkeypatch.setattr("gluon_bert.data.prepared.prepare_shards", None)
    again = prepare(config_of(text_file), tmp_path / "cache")
    assert again.vocab.tokens == first.vocab.tokens
    assert again.statistics == first.statistics
    for side in ("train", "validation"):
        for name in ("tokens", "sentences", "documents"):
            ours, theirs = (getattr(getattr(p, side), name) for p in (first, again))
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("changes", [{"min_freq": 2}, {"lowercase": False}, {"validation_fraction": 0.2}])
def test_other_setting_has_other_cache(text_file, tmp_path, changes):
    prepare(config_of(text_file), tmp_path / "cache")
    prepare(config_of(text_file, **changes), tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_other_text_of_same_name_has_other_cache(text_file, tmp_path):
    before = prepare(config_of(text_file, min_freq=1), tmp_path / "cache")
    text_file.write_text(text_file.read_text() + "\nzebra one\nzebra two\n", "utf-8")
    after = prepare(config_of(text_file, min_freq=1, validation_fraction=0.0), tmp_path / "cache")
    assert "zebra" not in before.vocab
    assert "zebra" in after.vocab


def test_unwritable_cache_is_reported_and_skipped(text_file, tmp_path, caplog):
    (tmp_path / "taken").write_text("a file, no folder")
    with caplog.at_level(logging.WARNING):
        prepared = prepare(config_of(text_file), tmp_path / "taken")
    assert "not kept for next time" in caplog.text
    assert len(prepared.train.tokens)


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("one line only\n", {}, "must have at least 2 training documents of 2 sentences.*got 0"),
        (
            "one document\nof two lines\n",
            {"validation_fraction": 0.0},
            "got 1 in .*, and 0 for validation",
        ),
        (
            "a b\nc d\n\ne f\ng h\n",
            {"validation_fraction": 0.0},
            "min_freq must be smaller for .*, got 5: no word",
        ),
        ("", {}, "got 0 in "),
    ],
)
def test_corpus_without_enough_text_is_refused(tmp_path, text, changes, message):
    path = tmp_path / "t.txt"
    path.write_text(text, "utf-8")
    with pytest.raises(InputError, match=message):
        prepare(config_of(path, **changes), tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))


def test_prepare_wikitext2_takes_less_than_300_mb(wikitext):
    code = f"""if True:
        from gluon_bert.data.prepared import prepare
        from gluon_bert.config import DataConfig
        import pathlib, tempfile
        with tempfile.TemporaryDirectory() as cache:
            prepare(DataConfig(corpus=({str(wikitext)!r},)), pathlib.Path(cache))
        print(pathlib.Path("/proc/self/status").read_text())"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    # Not getrusage's ru_maxrss, which a process takes over from the one that started it.
    (peak,) = (int(line.split()[1]) for line in run.stdout.splitlines() if line.startswith("VmHWM"))
    assert 30 * 1024 < peak < 300 * 1024


def test_wikitext2_gives_d2l_counts(wikitext_prepared):
    train = wikitext_prepared.train
    assert len(train) == 15_496
    assert int(np.diff(train.documents).sum() - len(train)) == 59_135
    assert len(wikitext_prepared.vocab) == 20_256
    assert wikitext_prepared.unigram_loss(train, predict_unknown=True) == pytest.approx(6.870, abs=5e-4)
    assert " ".join(wikitext_prepared.vocab.to_tokens(range(8))) == "<unk> <pad> <mask> <cls> <sep> the , of"
