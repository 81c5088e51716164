"""Masks: how many, where, and what is shown."""

import dataclasses

import numpy as np
import pytest

from gluon_bert.config import DataConfig, preset
from gluon_bert.data.masking import mask, pair_noise
from gluon_bert.data.vocab import Vocabulary

V = 1000
SEED = preset("d2l").data


def rows(num_rows=400, length=40, seed=0):
    """Rows `<cls> words <sep> words <sep>`, some of the words <unk>, padded."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, length + 1, num_rows)
    tokens = np.full((num_rows, length), Vocabulary.pad, dtype=np.int32)
    for i, n in enumerate(lengths):
        tokens[i, :n] = rng.integers(Vocabulary.num_special, V, n)
        tokens[i, :n][rng.random(n) < 0.1] = Vocabulary.unk
        tokens[i, [0, n // 2, n - 1]] = Vocabulary.cls, Vocabulary.sep, Vocabulary.sep
    return tokens, lengths


def masked(config, tokens, lengths, seed=0):
    noise = np.random.default_rng(seed).random((3, *tokens.shape))
    return mask(tokens, lengths, noise, V, config)


def is_word(tokens, unknown):
    return (tokens >= Vocabulary.num_special) | (unknown & (tokens == Vocabulary.unk))


@pytest.mark.parametrize("config", [SEED, DataConfig()], ids=["book", "corrected"])
def test_labels_are_the_words_that_stood_there_and_the_rest_is_untouched(config):
    tokens, lengths = rows()
    result = masked(config, tokens, lengths)
    row, position = result.predictions
    np.testing.assert_array_equal(result.labels, tokens[row, position])
    untouched = np.ones_like(tokens, dtype=bool)
    untouched[row, position] = False
    np.testing.assert_array_equal(result.tokens[untouched], tokens[untouched])
    assert is_word(result.labels, config.predict_unknown).all()
    assert (np.diff(row.astype(int) * tokens.shape[1] + position) > 0).all()


@pytest.mark.parametrize("config", [SEED, DataConfig()], ids=["book", "corrected"])
def test_the_count_per_row_is_as_documented(config):
    tokens, lengths = rows()
    counts = np.bincount(masked(config, tokens, lengths).predictions[0], minlength=len(tokens))
    for row, length, count in zip(tokens, lengths, counts):
        words = int(is_word(row, True).sum())
        wanted = round(length * 0.15) if config.mask_count == "round" else words * 15 // 100
        candidates = int(is_word(row, config.predict_unknown).sum())
        assert count == min(max(1, wanted), candidates)


def test_a_rate_of_1_masks_every_word_and_a_tiny_rate_exactly_one():
    tokens, lengths = rows()
    everything = masked(DataConfig(mask_rate=1.0), tokens, lengths)
    assert len(everything.labels) == is_word(tokens, False).sum()
    one_each = masked(DataConfig(mask_rate=0.001), tokens, lengths)
    has_word = is_word(tokens, False).any(axis=1)
    np.testing.assert_array_equal(one_each.predictions[0], np.flatnonzero(has_word))


@pytest.mark.parametrize(
    ("mask_token_rate", "random_token_rate"),
    [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)],
    ids=["mask", "random", "keep"],
)
def test_replacement_rates_of_0_and_1_are_exact(mask_token_rate, random_token_rate):
    config = DataConfig(mask_rate=1.0, mask_token_rate=mask_token_rate, random_token_rate=random_token_rate)
    result = masked(config, *rows())
    shown = result.tokens[tuple(result.predictions)]
    if mask_token_rate:
        assert (shown == Vocabulary.mask).all()
    elif random_token_rate:
        assert (shown >= Vocabulary.num_special).all() and (shown < V).all()
        assert (shown == result.labels).mean() < 0.01
        assert len(np.unique(shown)) > V / 2
    else:
        np.testing.assert_array_equal(shown, result.labels)


def test_80_10_10():
    tokens, lengths = rows(4000)
    result = masked(dataclasses.replace(DataConfig(), mask_rate=0.5), tokens, lengths)
    shown = result.tokens[tuple(result.predictions)]
    n = len(shown)
    assert n > 20_000
    bound = 4 * np.sqrt(0.1 * 0.9 / n)
    as_mask, kept = (shown == Vocabulary.mask).mean(), (shown == result.labels).mean()
    assert abs(as_mask - 0.8) < 2 * bound
    assert abs(kept - 0.1) < bound + 1 / V
    assert abs(1 - as_mask - kept - 0.1) < bound + 1 / V


def test_random_tokens_may_be_special_only_in_the_books_preparation():
    tokens, lengths = rows(4000)
    everything = {"mask_rate": 1.0, "mask_token_rate": 0.0, "random_token_rate": 1.0}
    book = masked(dataclasses.replace(SEED, **everything), tokens, lengths)
    corrected = masked(DataConfig(**everything), tokens, lengths)
    assert (book.tokens[tuple(book.predictions)] < Vocabulary.num_special).any()
    assert not (corrected.tokens[tuple(corrected.predictions)] < Vocabulary.num_special).any()


def test_every_word_is_masked_equally_often():
    tokens = np.full((20_000, 20), 7, dtype=np.int32)
    noise = pair_noise(0, 0, np.arange(20_000), 20)
    result = mask(tokens, np.full(20_000, 20), noise, V, DataConfig())
    times = np.bincount(result.predictions[1], minlength=20)
    assert abs(times / times.mean() - 1).max() < 0.1


def test_noise_belongs_to_the_pair_whatever_its_batch_and_padding():
    alone = pair_noise(3, 2, np.array([17]), 16)
    among = pair_noise(3, 2, np.array([4, 17, 99]), 64)
    np.testing.assert_array_equal(alone[:, 0], among[:, 1, :16])


def test_noise_is_uniform_and_differs_by_seed_epoch_pair_draw_and_position():
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
