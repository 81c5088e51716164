"""Epochs: what is in them, and what they depend on."""

import dataclasses
import hashlib
import itertools

import numpy as np
import pytest

from gluon_bert.config import DataConfig, preset
from gluon_bert.data.documents import prepare
from gluon_bert.data.loader import Loader, load_data
from gluon_bert.errors import BadInput


@pytest.fixture
def loader_of(text_file, tmp_path):
    def build(batch_size=32, seed=0, config=None, **changes):
        data = dataclasses.replace(
            config or DataConfig(), **{"corpus": (str(text_file),), "max_len": 16, **changes}
        )
        prepared = prepare(data, tmp_path / "cache")
        return Loader(prepared.train, prepared.vocab, data, batch_size, seed)

    return build


def rows(batches):
    """Every row as one hashable value: tokens, labels and is_next."""
    result = []
    for batch in batches:
        for i in range(len(batch)):
            part = batch.rows(i, i + 1)
            tokens = tuple(part.tokens[0, : part.lengths[0]])
            result.append((tokens, tuple(part.predictions[1]), tuple(part.labels), part.is_next[0]))
    return result


def test_the_same_arguments_give_the_same_batches(loader_of):
    first, second = (rows(loader_of(seed=3).epoch(1)) for _ in range(2))
    assert first == second
    assert rows(loader_of(seed=4).epoch(1)) != first


@pytest.mark.parametrize("masking", ["tokens", "words", "ngrams"])
@pytest.mark.parametrize("pairs", ["sentences", "packed"])
def test_an_epoch_holds_every_pair_once_whatever_the_batches(loader_of, pairs, masking):
    changes = {"pairs": pairs, "masking": masking, "tokenizer": "wordpiece", "vocab_size": 70}
    whole = sorted(rows(loader_of(batch_size=10_000, **changes).epoch(0)))
    assert sorted(rows(loader_of(batch_size=7, **changes).epoch(0))) == whole
    assert sorted(rows(loader_of(batch_size=16, num_buckets=3, **changes).epoch(0))) == whole
    assert len(whole) == len(loader_of(**changes).pairs(0)) > 100


def test_masks_are_drawn_anew_each_epoch_unless_it_is_the_books_preparation(loader_of):
    corrected = loader_of()
    assert sorted(rows(corrected.epoch(0))) != sorted(rows(corrected.epoch(1)))
    book = loader_of(config=preset("d2l").data)
    assert sorted(rows(book.epoch(0))) == sorted(rows(book.epoch(1)))
    assert rows(book.epoch(0)) != rows(book.epoch(1))


def test_the_books_batches_stay_what_they_were(wikitext_prepared):
    # The losses of runs with the preset d2l can be compared as long as this hash stands.
    loader = Loader(wikitext_prepared.train, wikitext_prepared.vocab, preset("d2l").data, 512, seed=7)
    content = hashlib.sha256()
    for epoch in (0, 1):
        for batch in itertools.islice(loader.epoch(epoch), 12):
            for field in dataclasses.fields(batch):
                array = getattr(batch, field.name)
                content.update(str((array.dtype, array.shape)).encode() + array.tobytes())
    assert content.hexdigest()[:24] == "007a0356cc68f1a4a08a7be1"


def test_forever_goes_on_with_the_next_epoch(loader_of):
    loader = loader_of()
    batches = loader.forever(2)
    per_epoch = sum(1 for _ in loader.epoch(2))
    first = [next(batches) for _ in range(per_epoch)]
    assert rows(first) == rows(loader.epoch(2))
    np.testing.assert_array_equal(next(batches).tokens, next(loader.epoch(3)).tokens)


def test_buckets_pad_to_few_known_lengths(loader_of):
    loader = loader_of(num_buckets=4)
    lengths = {batch.tokens.shape[1] for batch in loader.epoch(0)}
    assert lengths <= {4, 8, 12, 16}
    assert len(lengths) > 1
    for batch in loader.epoch(0):
        assert batch.lengths.max() <= batch.tokens.shape[1]
    plain = loader_of()
    assert {batch.tokens.shape[1] for batch in plain.epoch(0)} == {16}


def test_load_data_tells_when_no_pair_fits(tmp_path):
    path = tmp_path / "long.txt"
    sentence = "word " * 30
    path.write_text(f"{sentence}\n{sentence}\n\n" * 3, "utf-8")
    config = DataConfig(
        corpus=(str(path),), text_format="sentences", max_len=16, long_pairs="drop", held_out=0.0
    )
    with pytest.raises(BadInput, match="--max-len 16: no pair of sentences fits"):
        load_data(config, batch_size=4)


def test_load_data_does_without_held_out_text_where_there_is_too_little(text_file):
    config = DataConfig(corpus=(str(text_file),), max_len=16, held_out=0.0)
    data = load_data(config, batch_size=4)
    assert data.held_out is None
    assert load_data(preset("bert-tiny").replace(corpus=(str(text_file),)).data, 4).held_out is not None
