"""Batches and their shards."""

import numpy as np
import pytest

from gluon_bert.config import DataConfig
from gluon_bert.data.batch import Batch, make_batch
from gluon_bert.data.masking import pair_noise
from gluon_bert.data.prepared import prepare_words
from gluon_bert.data.sentence_pairs import draw_pairs
from gluon_bert.presets import preset
from gluon_bert.runtime import mx
from gluon_bert.training.device_batch import split_and_load

NO_MASK = DataConfig(mask_token_rate=0.0, random_token_rate=0.0, random_next_prob=0.0)


def prepared():
    return prepare_words([(["a b c", "d", "e f"], False), (["g h", "a a a a"], False)], min_freq=1)


def batch_of(config, length=16, num_rows=None):
    text = prepared()
    pairs = draw_pairs(text.train, config, np.random.default_rng(0), text.vocab.unk).take(slice(num_rows))
    noise = pair_noise(0, 0, np.arange(len(pairs)), length)
    return make_batch(text.train, pairs, noise, text.vocab, config), text.vocab


def random_batch(num_rows, length=12, seed=0):
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 4, num_rows)
    rows = np.repeat(np.arange(num_rows), counts)
    positions = np.concatenate([np.sort(rng.permutation(length)[:n]) for n in counts])
    return Batch(
        rng.integers(0, 50, (num_rows, length)),
        rng.integers(0, 2, (num_rows, length)),
        rng.integers(5, length + 1, num_rows),
        np.stack([rows, positions]).astype(np.int32),
        np.arange(len(rows)),
        rng.integers(0, 2, num_rows),
    )


def test_make_batch_lays_out_pairs_as_in_paper():
    batch, vocab = batch_of(NO_MASK)
    spelt = [" ".join(vocab.to_tokens(row)) for row in batch.tokens]
    assert spelt == [
        "<cls> a b c <sep> d <sep>" + " <pad>" * 9,
        "<cls> d <sep> e f <sep>" + " <pad>" * 10,
        "<cls> g h <sep> a a a a <sep>" + " <pad>" * 7,
    ]
    assert batch.token_types[0].tolist() == [0, 0, 0, 0, 0, 1, 1] + [0] * 9
    assert batch.valid_length.tolist() == [7, 6, 9]
    assert batch.next_sentence_labels.tolist() == [1, 1, 1]


def test_make_batch_padding_changes_no_token():
    short, _ = batch_of(preset("d2l").data, length=10)
    long, _ = batch_of(preset("d2l").data, length=30)
    np.testing.assert_array_equal(long.tokens[:, :10], short.tokens)
    np.testing.assert_array_equal(long.masked_positions, short.masked_positions)
    np.testing.assert_array_equal(long.masked_ids, short.masked_ids)


def test_rows_carry_their_masked_positions():
    batch = random_batch(10)
    part = batch.rows(3, 7)
    assert len(part) == 4
    for row in range(4):
        ours = batch.masked_positions[1][batch.masked_positions[0] == row + 3]
        np.testing.assert_array_equal(part.masked_positions[1][part.masked_positions[0] == row], ours)
    inside = (batch.masked_positions[0] >= 3) & (batch.masked_positions[0] < 7)
    np.testing.assert_array_equal(part.masked_ids, batch.masked_ids[inside])


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 7, 64])
@pytest.mark.parametrize("num_contexts", [1, 2, 3, 4])
def test_split_and_load_holds_every_row_once(num_rows, num_contexts):
    batch = random_batch(num_rows)
    shards = split_and_load(batch, [mx.cpu(i) for i in range(num_contexts)])
    assert [shard.tokens.context for shard in shards] == [mx.cpu(i) for i in range(num_contexts)]
    used = [shard for shard in shards if shard.num_pairs]
    np.testing.assert_array_equal(np.concatenate([s.tokens.asnumpy() for s in used]), batch.tokens)
    np.testing.assert_array_equal(
        np.concatenate([s.next_sentence_labels.asnumpy() for s in used]), batch.next_sentence_labels
    )
    np.testing.assert_array_equal(np.concatenate([s.masked_ids.asnumpy() for s in used]), batch.masked_ids)
    assert sum(shard.num_tokens for shard in shards) == batch.valid_length.sum()
    sizes = [shard.num_pairs for shard in shards]
    assert sum(sizes) == num_rows and max(sizes) - min(sizes) <= 1
    assert sum(s.num_pairs * s.pair_weight for s in shards) == pytest.approx(1)
    assert sum(s.num_masked * s.masked_weight for s in shards) == pytest.approx(1)


def test_split_and_load_empty_shard_has_weight_zero():
    idle = [s for s in split_and_load(random_batch(1), [mx.cpu(i) for i in range(3)]) if not s.num_pairs]
    assert len(idle) == 2
    for shard in idle:
        assert (shard.masked_weight, shard.pair_weight) == (0.0, 0.0)
        assert shard.tokens.shape == (1, 12)
