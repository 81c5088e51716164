"""Pairs of segments: their choice, their lengths, and whether place and length reveal labels."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gluon_bert.config import DataConfig
from gluon_bert.data.prepared import Documents, prepare_words
from gluon_bert.data.sentence_pairs import (
    NUM_SPECIAL_IN_PAIR,
    Pairs,
    _packed,
    _truncated,
    _truncated_at_random_ends,
    draw_pairs,
)
from gluon_bert.data.vocab import Vocabulary
from gluon_bert.presets import preset

SEED = preset("d2l").data
PACKED = DataConfig(pairs="packed")
UNK = Vocabulary.unk


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
def test_true_pairs_are_neighbours(config):
    documents = random_documents()
    pairs = draw_pairs(documents, config, np.random.default_rng(0), UNK)
    true = pairs.take(pairs.is_next)
    a, b = sentence_of(documents, true.first), sentence_of(documents, true.second)
    np.testing.assert_array_equal(b, a + 1)
    np.testing.assert_array_equal(document_of(documents, a), document_of(documents, b))
    assert 0.4 < pairs.is_next.mean() < 0.6


def test_matched_negatives_are_of_other_documents():
    documents = random_documents()
    pairs = draw_pairs(documents, DataConfig(), np.random.default_rng(0), UNK)
    false = pairs.take(~pairs.is_next)
    a, b = sentence_of(documents, false.first), sentence_of(documents, false.second)
    assert (document_of(documents, a) != document_of(documents, b)).all()
    assert not np.isin(b, documents.documents[:-1]).any()


def test_d2l_negatives_are_visible_by_position(wikitext_prepared):
    documents = wikitext_prepared.train
    starts = documents.documents[:-1]
    share = {}
    for name, config in (("book", SEED), ("corrected", DataConfig())):
        pairs = draw_pairs(documents, config, np.random.default_rng(0), UNK)
        second = sentence_of(documents, pairs.second)
        assert not np.isin(second[pairs.is_next], starts).any()
        share[name] = np.isin(second[~pairs.is_next], starts).mean()
    assert share["book"] > 0.25
    assert share["corrected"] == 0


def test_large_document_gets_foreign_negatives():
    sizes = np.array([2000, 2, 2])
    documents = np.concatenate([[0], np.cumsum(sizes)])
    sentences = np.arange(0, 3 * documents[-1] + 1, 3)
    text = Documents(np.arange(5, 5 + sentences[-1], dtype=np.int32), sentences, documents)
    for seed in range(5):
        pairs = draw_pairs(text, DataConfig(), np.random.default_rng(seed), UNK)
        false = pairs.take(~pairs.is_next)
        a, b = sentence_of(text, false.first), sentence_of(text, false.second)
        assert (document_of(text, a) != document_of(text, b)).all()


def test_large_document_gets_varied_negatives():
    sizes = np.array([5000] + [5] * 100)
    documents = np.concatenate([[0], np.cumsum(sizes)])
    sentences = np.arange(0, 3 * documents[-1] + 1, 3)
    text = Documents(np.arange(5, 5 + sentences[-1], dtype=np.int32), sentences, documents)
    pairs = draw_pairs(text, DataConfig(random_next_prob=1.0), np.random.default_rng(0), UNK)
    of_large = pairs.take(document_of(text, sentence_of(text, pairs.first)) == 0)
    times = np.bincount(sentence_of(text, of_large.second))
    times = times[times > 0]
    assert len(times) == 400  # every follower of the others
    assert times.max() < 4 * times.mean()


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_random_next_prob_0_and_1_are_exact(rate):
    pairs = draw_pairs(random_documents(), DataConfig(random_next_prob=rate), np.random.default_rng(0), UNK)
    assert (pairs.is_next == (rate == 0.0)).all()


def test_drop_keeps_exactly_the_pairs_that_fit():
    documents = random_documents()
    whole = draw_pairs(
        documents, DataConfig(max_seq_length=64, preparation="d2l"), np.random.default_rng(0), UNK
    )
    short = draw_pairs(
        documents, DataConfig(max_seq_length=16, preparation="d2l"), np.random.default_rng(0), UNK
    )
    fitting = whole.take(whole.lengths() <= 16)
    np.testing.assert_array_equal(short.first, fitting.first)
    np.testing.assert_array_equal(short.second, fitting.second)
    assert 0 < len(short) < len(whole)


@pytest.mark.parametrize("max_seq_length", [8, 9, 16])
def test_truncate_cuts_longer_segment_as_original(max_seq_length):
    rng = np.random.default_rng(0)
    a, b = rng.integers(1, 30, (2, 500))
    zeros = np.zeros(500, dtype=int)
    pairs = Pairs(np.stack([zeros, a], 1), np.stack([zeros, b], 1), zeros == 0)
    cut = _truncated(pairs, max_seq_length)
    for i in range(500):
        kept_a, kept_b = a[i], b[i]
        while kept_a + kept_b > max_seq_length - NUM_SPECIAL_IN_PAIR:  # truncate_seq_pair of the original
            if kept_a > kept_b:
                kept_a -= 1
            else:
                kept_b -= 1
        assert (cut.first[i, 1], cut.second[i, 1]) == (kept_a, kept_b)


def test_pair_of_unknown_words_is_left_out():
    text = [["<unk> <unk>", "<unk>"], ["a b", "<unk>", "b"], ["<unk>", "a a"]]
    documents = prepare_words([(d, False) for d in text], min_freq=1).train
    rng = np.random.default_rng(0)
    kept = draw_pairs(documents, DataConfig(random_next_prob=0.0), rng, UNK)
    assert len(kept) == 3
    assert len(draw_pairs(documents, DataConfig(random_next_prob=0.0, preparation="d2l"), rng, UNK)) == 4


def test_words_to_predict_are_found_anywhere():
    tokens = np.zeros(40, dtype=np.int32)
    tokens[[3, 12, 19]] = 7
    documents = Documents(tokens, np.arange(0, 41, 5), np.array([0, 6, 8]))
    pairs = draw_pairs(documents, DataConfig(random_next_prob=0.0), np.random.default_rng(0), UNK)
    # <unk> is 0: of the sentences 0 to 7 only 0, 2 and 3 have another token
    assert (pairs.first[:, 0] // 5).tolist() == [0, 1, 2, 3]


def spans(segments):
    return {tuple(segment) for segment in segments.tolist()}


def test_packed_pairs_fill_with_sentences_of_one_document():
    documents = Documents(np.arange(5, 45), np.arange(0, 41, 4), np.array([0, 7, 10]))
    config = DataConfig(
        pairs="packed", max_seq_length=8 + NUM_SPECIAL_IN_PAIR, short_seq_prob=0.0, random_next_prob=0.0
    )
    pairs = draw_pairs(documents, config, np.random.default_rng(0), UNK)
    # two sentences of four tokens a pair; the odd last ones are left out
    assert pairs.first.tolist() == [[0, 4], [8, 12], [16, 20], [28, 32]]
    assert pairs.second.tolist() == [[4, 8], [12, 16], [20, 24], [32, 36]]
    negative = DataConfig(pairs="packed", max_seq_length=11, short_seq_prob=0.0, random_next_prob=1.0)
    pairs = draw_pairs(documents, negative, np.random.default_rng(0), UNK)
    # what the second segment would have been is put back: each sentence but the last begins a pair
    assert (pairs.first[:, 0] // 4).tolist() == [0, 1, 2, 3, 4, 5, 7, 8]
    assert not pairs.is_next.any()


@st.composite
def any_documents(draw):
    """Documents of sentences with 0 to 12 tokens, all tokens different; at least two can be paired."""
    sizes = draw(st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=9), max_size=12))
    sizes += [[3, 2], [1, 4, 2]]
    sentences = np.concatenate([[0], np.cumsum([size for document in sizes for size in document])])
    documents = np.concatenate([[0], np.cumsum([len(document) for document in sizes])])
    return Documents(np.arange(5, 5 + sentences[-1], dtype=np.int32), sentences, documents)


@settings(max_examples=200, deadline=None)
@given(
    documents=any_documents(),
    max_seq_length=st.integers(8, 40),
    short=st.sampled_from([0.0, 0.3, 1.0]),
    negative=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 9),
)
def test_packed_pairs_of_any_documents_are_valid(documents, max_seq_length, short, negative, seed):
    config = DataConfig(
        pairs="packed", max_seq_length=max_seq_length, short_seq_prob=short, random_next_prob=negative
    )
    pairs = draw_pairs(documents, config, np.random.default_rng(seed), UNK)
    assert len(pairs)
    assert (np.diff(pairs.first) > 0).all() and (np.diff(pairs.second) > 0).all()
    assert pairs.lengths().max() <= max_seq_length
    bounds = documents.sentences[documents.documents]
    owners = [np.searchsorted(bounds, segment, side="right") for segment in (pairs.first, pairs.second)]
    ends = [np.searchsorted(bounds, segment - 1, side="right") for segment in (pairs.first, pairs.second)]
    for owner, end in zip(owners, ends):
        np.testing.assert_array_equal(owner[:, 0], end[:, 1])
    same = owners[0][:, 0] == owners[1][:, 0]
    np.testing.assert_array_equal(same, pairs.is_next)
    assert (pairs.second[same, 0] >= pairs.first[same, 1]).all()
    if negative in (0.0, 1.0):
        assert (pairs.is_next == (negative == 0.0)).all()


def packed_slowly(sizes, room, rng, short_rate, random_next_prob):
    """google-research/bert's create_instances_from_document, on numbers of sentences.

    sizes: tokens of each sentence of one document. Gives (start, middle, stop, is_next). Other than there,
    a pair has two sentences at least, and the length to aim at is drawn for each pair.
    """

    def target():
        return rng.randint(2, room) if rng.random() < short_rate else room

    chunk, aim, i = [], target(), 0
    while i < len(sizes):
        chunk.append(i)
        full = sum(sizes[j] for j in chunk) >= aim and len(chunk) >= 2
        if i == len(sizes) - 1 or full:
            if len(chunk) >= 2:
                parted = rng.randint(1, len(chunk) - 1)
                is_next = rng.random() >= random_next_prob
                yield chunk[0], chunk[parted], chunk[-1] + 1, is_next
                if not is_next:
                    i -= len(chunk) - parted
            chunk, aim = [], target()
        i += 1


@pytest.mark.parametrize(
    ("room", "short_rate", "random_next_prob"), [(40, 0.1, 0.5), (90, 0.5, 0.3), (20, 0.0, 0.9)]
)
def test_packed_pairs_match_original_distribution(room, short_rate, random_next_prob):
    documents = random_documents(400)
    sizes, starts = np.diff(documents.sentences).tolist(), documents.documents.tolist()
    config = DataConfig(pairs="packed", short_seq_prob=short_rate, random_next_prob=random_next_prob)
    ours, theirs = [], []
    for seed in range(40):
        drawn = _packed(documents, config, room, np.random.default_rng(seed))
        ours.append(figures_of_pairs(documents, *drawn))
        rng = random.Random(seed)
        slow = [
            (begin + a, begin + b, begin + c, is_next)
            for begin, end in zip(starts, starts[1:])
            for a, b, c, is_next in packed_slowly(sizes[begin:end], room, rng, short_rate, random_next_prob)
        ]
        theirs.append(figures_of_pairs(documents, *map(np.array, zip(*slow))))
    ours, theirs = np.array(ours), np.array(theirs)
    error = np.sqrt((ours.var(axis=0) + theirs.var(axis=0)) / 40)
    assert (abs(ours.mean(axis=0) - theirs.mean(axis=0)) <= 4 * error + 1e-9).all()


def figures_of_pairs(documents, start, middle, stop, is_next):
    """How many there are, how long, of how many sentences, and how many of each kind."""
    tokens = documents.sentences
    first, second = tokens[middle] - tokens[start], tokens[stop] - tokens[middle]
    sentences = [np.mean(middle - start == n) for n in (1, 2, 3)] + [
        np.mean(stop - start == n) for n in (2, 3)
    ]
    spread = [first.std(), second.std(), np.mean(first * second)]
    return [len(start), is_next.mean(), first.mean(), second.mean(), *spread, *sentences]


def cut_slowly(a, b, room, rng):
    """truncate_seq_pair of the original: what is cut off the front of each of two segments."""
    front = [0, 0]
    sizes = [a, b]
    while sum(sizes) > room:
        longer = 0 if sizes[0] > sizes[1] else 1
        sizes[longer] -= 1
        front[longer] += rng.random() < 0.5
    return [*front, *sizes]


@pytest.mark.parametrize(("a", "b", "room"), [(30, 12, 20), (9, 50, 21), (5, 5, 20), (40, 41, 33)])
def test_packed_pairs_are_cut_as_the_original(a, b, room):
    times = 4000
    pairs = Pairs(
        np.tile([100, 100 + a], (times, 1)), np.tile([300, 300 + b], (times, 1)), np.ones(times, bool)
    )
    cut = _truncated_at_random_ends(pairs, room, np.random.default_rng(0))
    ours = np.stack(
        [cut.first[:, 0] - 100, cut.second[:, 0] - 300, *np.diff([cut.first, cut.second]).T[0].T], 1
    )
    rng = random.Random(0)
    theirs = np.array([cut_slowly(a, b, room, rng) for _ in range(times)])
    np.testing.assert_array_equal(ours[:, 2:], theirs[:, 2:])
    error = np.sqrt((ours.var(axis=0) + theirs.var(axis=0)) / times)
    assert (abs(ours.mean(axis=0) - theirs.mean(axis=0)) <= 4 * error).all()
    assert (abs(ours.std(axis=0) - theirs.std(axis=0)) <= 0.1 * theirs.std(axis=0)).all()


def best_guess(features, is_next):
    """How often is_next is guessed from some whole numbers: by majority in one half, counted in the other."""
    kinds = np.unique(np.stack(features, axis=1), axis=0, return_inverse=True)[1].ravel()
    mix = np.random.default_rng(0).permutation(len(kinds))
    learnt, asked = mix[::2], mix[1::2]
    votes = np.bincount(kinds[learnt], np.where(is_next[learnt], 1, -1), minlength=kinds.max() + 1)
    return ((votes[kinds[asked]] > 0) == is_next[asked]).mean()


def giveaways(documents, pairs):
    """Return features without words: positions, lengths and cuts of segments."""
    second = sentence_of(documents, pairs.second)
    owner = document_of(documents, second)
    place = np.minimum(second - documents.documents[owner], 12)
    a, b = np.diff(pairs.first)[:, 0], np.diff(pairs.second)[:, 0]
    rest = np.minimum(documents.documents[owner + 1] - second, 12)
    at_end = np.isin(pairs.second[:, 1], documents.sentences[documents.documents])
    cut = [~np.isin(ends, documents.sentences) for ends in (pairs.second[:, 0], pairs.second[:, 1])]
    return {
        "place": [place],
        "length": [b // 3],
        "both lengths": [a // 8, b // 8],
        "whole length": [a + b],
        "place and length": [place, b // 8],
        "place and the first one's length": [place, a // 8],
        "sentences to come": [rest],
        "where it is cut": [at_end, *cut],
        "the document's end and the whole length": [at_end, (a + b) // 2],
    }


def original_negatives(documents, config, seed):
    """Packed pairs whose random segments are the original's: a random document from a random sentence on."""
    room, rng = config.max_seq_length - NUM_SPECIAL_IN_PAIR, np.random.default_rng(seed)
    start, middle, stop, is_next = _packed(documents, config, room, rng)
    tokens, bounds = documents.sentences, documents.documents
    owner = rng.integers(0, len(documents), len(start))
    begin = bounds[owner] + (rng.random(len(start)) * (bounds[owner + 1] - bounds[owner])).astype(int)
    wanted = room - (tokens[middle] - tokens[start])
    end = np.minimum(np.searchsorted(tokens, tokens[begin] + wanted), bounds[owner + 1])
    second = np.where(
        is_next, [tokens[middle], tokens[stop]], [tokens[begin], tokens[np.maximum(end, begin + 1)]]
    )
    pairs = Pairs(np.stack([tokens[start], tokens[middle]], axis=1), second.T, is_next)
    return _truncated_at_random_ends(pairs.take(np.diff(second.T)[:, 0] > 0), room, rng)


@pytest.mark.parametrize("max_seq_length", [64, 128])
def test_packed_pairs_do_not_leak_by_position_or_length(wikitext_prepared, max_seq_length):
    documents = wikitext_prepared.train
    config = DataConfig(pairs="packed", max_seq_length=max_seq_length)
    drawn = [draw_pairs(documents, config, np.random.default_rng(seed), UNK) for seed in range(3)]
    pairs = joined(drawn)
    chance = 2 / np.sqrt(len(pairs) / 2)  # four standard errors
    for name, features in giveaways(documents, pairs).items():
        assert abs(best_guess(features, pairs.is_next) - 0.5) < chance + 0.005, name
    original = joined([original_negatives(documents, config, seed) for seed in range(3)])
    seen = {name: best_guess(f, original.is_next) for name, f in giveaways(documents, original).items()}
    assert seen["place"] > 0.58 and seen["place and length"] > 0.6, seen


def joined(drawn):
    return Pairs(
        *(np.concatenate([getattr(p, name) for p in drawn]) for name in ("first", "second", "is_next"))
    )


def test_large_document_gets_foreign_packed_negatives():
    documents = np.concatenate([[0], np.cumsum([4000, 5, 5])])
    sentences = np.arange(0, 3 * documents[-1] + 1, 3)
    text = Documents(np.arange(5, 5 + sentences[-1], dtype=np.int32), sentences, documents)
    for seed in range(5):
        pairs = draw_pairs(text, PACKED, np.random.default_rng(seed), UNK)
        false = pairs.take(~pairs.is_next)
        a, b = sentence_of(text, false.first), sentence_of(text, false.second)
        assert (document_of(text, a) != document_of(text, b)).all()
        assert 0.3 < len(false) / len(pairs) < 0.7


def test_packed_pairs_cover_the_text_in_few_epochs(wikitext_prepared):
    documents = wikitext_prepared.train
    seen = np.zeros(len(documents.tokens) + 1, dtype=int)
    for epoch in range(8):
        pairs = draw_pairs(documents, preset("bert-tiny").data, np.random.default_rng(epoch), UNK)
        for segment in (pairs.first, pairs.second):
            np.add.at(seen, segment[:, 0], 1)
            np.add.at(seen, segment[:, 1], -1)
    with_pairs = np.repeat(
        np.diff(documents.documents) >= 2, np.diff(documents.sentences[documents.documents])
    )
    assert (np.cumsum(seen)[:-1][with_pairs] > 0).mean() > 0.99


def test_wikitext2_gives_d2l_examples(wikitext_prepared):
    pairs = draw_pairs(wikitext_prepared.train, SEED, np.random.default_rng(0), UNK)
    assert abs(len(pairs) - 43_600) < 150
    assert pairs.lengths().mean() == pytest.approx(46, abs=0.5)
    assert pairs.lengths().max() <= 64
