"""Sentence pairs: which, how long, and what their place gives away."""

import numpy as np
import pytest

from gluon_bert.config import DataConfig, preset
from gluon_bert.data.documents import Documents, number
from gluon_bert.data.pairs import NUM_SPECIAL_IN_PAIR, Pairs, _truncated, draw_pairs

SEED = preset("d2l").data


def random_documents(num_documents=300, seed=0):
    """Documents in which every sentence has words of its own, so that a segment tells where it is from."""
    rng = np.random.default_rng(seed)
    documents = np.concatenate([[0], np.cumsum(rng.integers(1, 6, num_documents))])
    sentences = np.concatenate([[0], np.cumsum(rng.integers(1, 20, documents[-1]))])
    return Documents(np.arange(5, 5 + sentences[-1], dtype=np.int32), sentences, documents)


def sentence_of(documents, segments):
    return np.searchsorted(documents.sentences, segments[:, 0], side="right") - 1


def document_of(documents, sentences):
    return np.searchsorted(documents.documents, sentences, side="right") - 1


@pytest.mark.parametrize("config", [SEED, DataConfig()], ids=["book", "corrected"])
def test_true_pairs_are_neighbours_in_one_document(config):
    documents = random_documents()
    pairs = draw_pairs(documents, config, np.random.default_rng(0))
    true = pairs.take(pairs.is_next)
    a, b = sentence_of(documents, true.first), sentence_of(documents, true.second)
    np.testing.assert_array_equal(b, a + 1)
    np.testing.assert_array_equal(document_of(documents, a), document_of(documents, b))
    assert 0.4 < pairs.is_next.mean() < 0.6


def test_matched_negatives_are_never_next_nor_of_the_same_document_nor_first():
    documents = random_documents()
    pairs = draw_pairs(documents, DataConfig(), np.random.default_rng(0))
    false = pairs.take(~pairs.is_next)
    a, b = sentence_of(documents, false.first), sentence_of(documents, false.second)
    assert (document_of(documents, a) != document_of(documents, b)).all()
    assert not np.isin(b, documents.documents[:-1]).any()


def test_the_books_negatives_give_themselves_away_by_their_place(wikitext_prepared):
    documents = wikitext_prepared.train
    starts = documents.documents[:-1]
    share = {}
    for name, config in (("book", SEED), ("corrected", DataConfig())):
        pairs = draw_pairs(documents, config, np.random.default_rng(0))
        second = sentence_of(documents, pairs.second)
        assert not np.isin(second[pairs.is_next], starts).any()
        share[name] = np.isin(second[~pairs.is_next], starts).mean()
    assert share["book"] > 0.25
    assert share["corrected"] == 0


def test_one_document_holding_nearly_all_text_still_gets_foreign_negatives():
    sizes = np.array([2000, 2, 2])
    documents = np.concatenate([[0], np.cumsum(sizes)])
    sentences = np.arange(0, 3 * documents[-1] + 1, 3)
    text = Documents(np.arange(5, 5 + sentences[-1], dtype=np.int32), sentences, documents)
    for seed in range(5):
        pairs = draw_pairs(text, DataConfig(), np.random.default_rng(seed))
        false = pairs.take(~pairs.is_next)
        a, b = sentence_of(text, false.first), sentence_of(text, false.second)
        assert (document_of(text, a) != document_of(text, b)).all()


def test_negatives_of_a_large_document_are_not_always_the_same():
    sizes = np.array([5000] + [5] * 100)
    documents = np.concatenate([[0], np.cumsum(sizes)])
    sentences = np.arange(0, 3 * documents[-1] + 1, 3)
    text = Documents(np.arange(5, 5 + sentences[-1], dtype=np.int32), sentences, documents)
    pairs = draw_pairs(text, DataConfig(negative_rate=1.0), np.random.default_rng(0))
    of_large = pairs.take(document_of(text, sentence_of(text, pairs.first)) == 0)
    times = np.bincount(sentence_of(text, of_large.second))
    times = times[times > 0]
    assert len(times) == 400  # every follower of the others
    assert times.max() < 4 * times.mean()


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_rates_of_0_and_1_are_exact(rate):
    pairs = draw_pairs(random_documents(), DataConfig(negative_rate=rate), np.random.default_rng(0))
    assert (pairs.is_next == (rate == 0.0)).all()


def test_dropping_keeps_exactly_the_pairs_that_fit():
    documents = random_documents()
    whole = draw_pairs(documents, DataConfig(max_len=64), np.random.default_rng(0))
    short = draw_pairs(documents, DataConfig(max_len=16, long_pairs="drop"), np.random.default_rng(0))
    fitting = whole.take(whole.lengths() <= 16)
    np.testing.assert_array_equal(short.first, fitting.first)
    np.testing.assert_array_equal(short.second, fitting.second)
    assert 0 < len(short) < len(whole)


@pytest.mark.parametrize("max_len", [8, 9, 16])
def test_truncation_cuts_the_longer_segment_as_the_original_does(max_len):
    rng = np.random.default_rng(0)
    a, b = rng.integers(1, 30, (2, 500))
    zeros = np.zeros(500, dtype=int)
    pairs = Pairs(np.stack([zeros, a], 1), np.stack([zeros, b], 1), zeros == 0)
    cut = _truncated(pairs, max_len)
    for i in range(500):
        kept_a, kept_b = a[i], b[i]
        while kept_a + kept_b > max_len - NUM_SPECIAL_IN_PAIR:  # truncate_seq_pair of the original
            if kept_a > kept_b:
                kept_a -= 1
            else:
                kept_b -= 1
        assert (cut.first[i, 1], cut.second[i, 1]) == (kept_a, kept_b)


def test_a_pair_of_unknown_words_only_is_left_out_unless_they_are_predicted():
    text = [["<unk> <unk>", "<unk>"], ["a b", "<unk>", "b"], ["<unk>", "a a"]]
    documents = number([(d, False) for d in text], min_freq=1).train
    rng = np.random.default_rng(0)
    kept = draw_pairs(documents, DataConfig(negative_rate=0.0), rng)
    assert len(kept) == 3
    assert len(draw_pairs(documents, DataConfig(negative_rate=0.0, predict_unknown=True), rng)) == 4


def test_wikitext2_gives_the_books_examples(wikitext_prepared):
    pairs = draw_pairs(wikitext_prepared.train, SEED, np.random.default_rng(0))
    assert abs(len(pairs) - 43_600) < 150
    assert pairs.lengths().mean() == pytest.approx(46, abs=0.5)
    assert pairs.lengths().max() <= 64
