"""Masks: their number, positions and replacements."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gluon_bert.config import DataConfig
from gluon_bert.data.masking import _ngram_lengths, _Words, mask, num_draws, pair_noise
from gluon_bert.data.vocab import Vocabulary
from gluon_bert.data.wordpiece import SPECIAL_TOKENS, WordPieceVocabulary
from gluon_bert.presets import preset

V = 1000
NUM_SPECIAL = 5  # of a word vocabulary, at its start
VOCAB = Vocabulary(map(str, range(V - NUM_SPECIAL)))
SEED = preset("d2l").data


def rows(num_rows=400, length=40, seed=0):
    """Rows `<cls> words <sep> words <sep>`, some of the words <unk>, padded."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, length + 1, num_rows)
    tokens = np.full((num_rows, length), Vocabulary.pad, dtype=np.int32)
    for i, n in enumerate(lengths):
        tokens[i, :n] = rng.integers(NUM_SPECIAL, V, n)
        tokens[i, :n][rng.random(n) < 0.1] = Vocabulary.unk
        tokens[i, [0, n // 2, n - 1]] = Vocabulary.cls, Vocabulary.sep, Vocabulary.sep
    return tokens, lengths


def masked(config, tokens, lengths, seed=0):
    noise = np.random.default_rng(seed).random((3, *tokens.shape))
    return mask(tokens, lengths, noise, VOCAB, config)


def is_word(tokens, unknown):
    return (tokens >= NUM_SPECIAL) | (unknown & (tokens == Vocabulary.unk))


@pytest.mark.parametrize("config", [SEED, DataConfig()], ids=["book", "corrected"])
def test_masked_ids_are_the_original_tokens(config):
    tokens, lengths = rows()
    result = masked(config, tokens, lengths)
    row, position = result.masked_positions
    np.testing.assert_array_equal(result.masked_ids, tokens[row, position])
    untouched = np.ones_like(tokens, dtype=bool)
    untouched[row, position] = False
    np.testing.assert_array_equal(result.tokens[untouched], tokens[untouched])
    assert is_word(result.masked_ids, config.predict_unknown).all()
    assert (np.diff(row.astype(int) * tokens.shape[1] + position) > 0).all()


@pytest.mark.parametrize("config", [SEED, DataConfig()], ids=["book", "corrected"])
def test_mask_count_per_row_is_as_documented(config):
    tokens, lengths = rows()
    counts = np.bincount(masked(config, tokens, lengths).masked_positions[0], minlength=len(tokens))
    for row, length, count in zip(tokens, lengths, counts):
        words = int(is_word(row, True).sum())
        wanted = round(length * 0.15) if config.preparation == "d2l" else words * 15 // 100
        candidates = int(is_word(row, config.predict_unknown).sum())
        assert count == min(max(1, wanted), candidates)


def test_mask_extreme_rates_mask_all_or_one():
    tokens, lengths = rows()
    everything = masked(DataConfig(mlm_probability=1.0), tokens, lengths)
    assert len(everything.masked_ids) == is_word(tokens, False).sum()
    one_each = masked(DataConfig(mlm_probability=0.001), tokens, lengths)
    has_word = is_word(tokens, False).any(axis=1)
    np.testing.assert_array_equal(one_each.masked_positions[0], np.flatnonzero(has_word))


@pytest.mark.parametrize(
    ("mask_token_rate", "random_token_rate"),
    [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)],
    ids=["mask", "random", "keep"],
)
def test_mask_replacement_rates_0_and_1_are_exact(mask_token_rate, random_token_rate):
    config = DataConfig(
        mlm_probability=1.0, mask_token_rate=mask_token_rate, random_token_rate=random_token_rate
    )
    result = masked(config, *rows())
    shown = result.tokens[tuple(result.masked_positions)]
    if mask_token_rate:
        assert (shown == Vocabulary.mask).all()
    elif random_token_rate:
        assert (shown >= NUM_SPECIAL).all() and (shown < V).all()
        assert (shown == result.masked_ids).mean() < 0.01
        assert len(np.unique(shown)) > V / 2
    else:
        np.testing.assert_array_equal(shown, result.masked_ids)


def test_mask_default_rates_are_80_10_10():
    tokens, lengths = rows(4000)
    result = masked(dataclasses.replace(DataConfig(), mlm_probability=0.5), tokens, lengths)
    shown = result.tokens[tuple(result.masked_positions)]
    n = len(shown)
    assert n > 20_000
    bound = 4 * np.sqrt(0.1 * 0.9 / n)
    as_mask, kept = (shown == Vocabulary.mask).mean(), (shown == result.masked_ids).mean()
    assert abs(as_mask - 0.8) < 2 * bound
    assert abs(kept - 0.1) < bound + 1 / V
    assert abs(1 - as_mask - kept - 0.1) < bound + 1 / V


def test_mask_random_token_is_special_only_for_d2l():
    tokens, lengths = rows(4000)
    everything = {"mlm_probability": 1.0, "mask_token_rate": 0.0, "random_token_rate": 1.0}
    book = masked(dataclasses.replace(SEED, **everything), tokens, lengths)
    corrected = masked(DataConfig(**everything), tokens, lengths)
    assert (book.tokens[tuple(book.masked_positions)] < NUM_SPECIAL).any()
    assert not (corrected.tokens[tuple(corrected.masked_positions)] < NUM_SPECIAL).any()


def test_mask_every_position_equally_often():
    tokens = np.full((20_000, 20), 7, dtype=np.int32)
    noise = pair_noise(0, 0, np.arange(20_000), 20)
    result = mask(tokens, np.full(20_000, 20), noise, VOCAB, DataConfig())
    times = np.bincount(result.masked_positions[1], minlength=20)
    assert abs(times / times.mean() - 1).max() < 0.1


def test_noise_depends_on_pair_not_on_batch():
    alone = pair_noise(3, 2, np.array([17]), 16)
    among = pair_noise(3, 2, np.array([4, 17, 99]), 64)
    np.testing.assert_array_equal(alone[:, 0], among[:, 1, :16])


def test_noise_is_uniform_and_differs_by_each_key():
    noise = pair_noise(0, 0, np.arange(500), 64)
    assert noise.min() >= 0 and noise.max() < 1
    counts, _ = np.histogram(noise, bins=20, range=(0, 1))
    assert abs(counts / counts.mean() - 1).max() < 0.05
    assert len(np.unique(noise)) == noise.size
    others = [pair_noise(1, 0, np.arange(500), 64), pair_noise(0, 1, np.arange(500), 64)]
    assert len(np.unique(np.stack([noise, *others]))) == 3 * noise.size
    for axis in range(3):
        shifted = np.roll(noise, 1, axis=axis)
        assert abs(np.corrcoef(noise.ravel(), shifted.ravel())[0, 1]) < 0.02


PIECES = WordPieceVocabulary(
    [*SPECIAL_TOKENS, *(f"w{i}" for i in range(60)), *(f"##p{i}" for i in range(40))]
)


def rows_of_pieces(seed, num_rows=60, length=40):
    """Rows of words of one to several pieces and some [UNK], in two segments that may begin with a `##`."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, length + 1, num_rows)
    tokens = rng.integers(5, len(PIECES), (num_rows, length)).astype(np.int32)
    tokens[rng.random(tokens.shape) < 0.1] = PIECES.unk
    for row, n in zip(tokens, lengths):
        row[n:] = PIECES.pad
        row[[0, n // 2, n - 1]] = PIECES.cls, PIECES.sep, PIECES.sep
    # after an unknown word a piece cannot follow
    after = np.roll(tokens == PIECES.unk, 1, axis=1)
    tokens[after & PIECES.is_continuation[tokens]] = 7
    return tokens, lengths


def words_slowly(row, length, predict_unknown):
    """The words of a row, each as its positions and whether it may be predicted."""
    words = []
    for i in range(length):
        token = PIECES.tokens[row[i]]
        if token in ("[CLS]", "[SEP]", "[PAD]"):
            continue
        if token.startswith("##") and words and words[-1][0][-1] == i - 1:
            words[-1][0].append(i)
        else:
            words.append(([i], predict_unknown or token != "[UNK]"))
    return words


def chosen_slowly(row, length, noise, config):
    """What is masked of one row: whole words or n-grams by their noise, shortened or left out to fit."""
    words = words_slowly(row, length, config.predict_unknown)
    count = sum(len(positions) for positions, _ in words)
    wanted = int(config.mlm_probability * count + 1e-9)
    if config.preparation == "d2l":
        wanted = round(config.mlm_probability * length)
    usable = [w for w, (_, may) in enumerate(words) if may]
    if not usable:
        return set()
    wanted = min(max(wanted, 1), sum(len(words[w][0]) for w in usable))
    wanted = max(wanted, min(len(words[w][0]) for w in usable))
    most = config.max_ngram if config.masking == "ngrams" else 1
    chosen = set()
    for w in sorted(usable, key=lambda w: noise[0, words[w][0][0]]):
        run = 1
        while run < most and w + run in usable and words[w + run][0][0] == words[w + run - 1][0][-1] + 1:
            run += 1
        n = 1
        if most > 1:
            weights = [1 / k for k in range(1, run + 1)]
            point = noise[3, words[w][0][0]] * sum(weights)
            while n < run and point >= sum(weights[:n]):
                n += 1
        for m in range(n, 0, -1):
            positions = {i for positions, _ in words[w : w + m] for i in positions}
            if len(chosen) + len(positions) <= wanted:
                if not positions & chosen:
                    chosen |= positions
                break
    return chosen


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rate=st.sampled_from([0.001, 0.05, 0.15, 0.5, 1.0]),
    masking=st.sampled_from(["words", "ngrams"]),
    max_ngram=st.integers(2, 5),
    preparation=st.sampled_from(["bert", "d2l"]),
)
def test_whole_words_and_ngrams_match_slow_reference(seed, rate, masking, max_ngram, preparation):
    config = DataConfig(
        masking=masking,
        mlm_probability=rate,
        max_ngram=max_ngram,
        preparation=preparation,
    )
    tokens, lengths = rows_of_pieces(seed, num_rows=12)
    noise = np.random.default_rng(seed).random((num_draws(config), *tokens.shape))
    row, position = mask(tokens, lengths, noise, PIECES, config).masked_positions
    for i in range(len(tokens)):
        expected = chosen_slowly(tokens[i], lengths[i], noise[:, i], config)
        assert set(position[row == i].tolist()) == expected


@pytest.mark.parametrize("masking", ["words", "ngrams"])
def test_words_are_masked_whole_within_budget(masking):
    tokens, lengths = rows_of_pieces(0, num_rows=3000)
    config = DataConfig(masking=masking)
    noise = pair_noise(0, 0, np.arange(3000), tokens.shape[1], num_draws(config))
    result = mask(tokens, lengths, noise, PIECES, config)
    plain = mask(tokens, lengths, noise, PIECES, DataConfig())
    ours, theirs = (np.bincount(r.masked_positions[0], minlength=3000) for r in (result, plain))
    # the same number, but for rows whose words do not add up to it, and those with long words only
    assert (ours <= np.maximum(theirs, 3)).mean() > 0.99
    assert (ours == theirs).mean() > 0.9
    masked_places = np.zeros(tokens.shape, dtype=bool)
    masked_places[tuple(result.masked_positions)] = True
    for row, length, hit in zip(tokens, lengths, masked_places):
        for positions, _ in words_slowly(row, length, False):
            assert len(set(hit[positions].tolist())) == 1
    assert (np.bincount(result.masked_positions[0], minlength=3000) > 0).all()


@pytest.mark.parametrize("config", [SEED, DataConfig()], ids=["book", "corrected"])
def test_whole_words_of_word_vocabulary_equal_tokens(config):
    tokens, lengths = rows()
    plain, whole = (
        masked(config, tokens, lengths),
        masked(dataclasses.replace(config, masking="words"), tokens, lengths),
    )
    for name in ("tokens", "masked_positions", "masked_ids"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(whole, name))


def test_ngram_lengths_follow_1_over_n():
    shape = (1, 60_000)
    draw = (np.arange(60_000) / 60_000).reshape(shape)
    ones = np.ones(shape, dtype=int)
    words = _Words(np.arange(60_000).reshape(shape), ones, ones > 0)
    lengths = _ngram_lengths(words, draw, 3)[0, :-3]
    shares = np.bincount(lengths)[1:] / len(lengths)
    np.testing.assert_allclose(shares, np.array([6, 3, 2]) / 11, atol=1e-3)


def test_ngrams_are_longer_than_words():
    tokens, lengths = np.full((4000, 64), 7, dtype=np.int32), np.full(4000, 64)
    runs = {}
    for masking in ("words", "ngrams"):
        config = DataConfig(masking=masking)
        noise = pair_noise(0, 0, np.arange(4000), 64, num_draws(config))
        row, position = mask(tokens, lengths, noise, PIECES, config).masked_positions
        runs[masking] = 1 / (1 - ((np.diff(position) == 1) & (np.diff(row) == 0)).mean())
        assert len(row) == 4000 * 9  # 15 % of 64, whatever the spans
    assert runs["words"] < 1.2 and runs["ngrams"] > 1.6


def test_noise_further_draw_keeps_the_others():
    np.testing.assert_array_equal(
        pair_noise(1, 2, np.arange(9), 12),
        pair_noise(1, 2, np.arange(9), 12, num_draws(DataConfig(masking="ngrams")))[:3],
    )
