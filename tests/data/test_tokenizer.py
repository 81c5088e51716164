"""A user's texts as a network's inputs."""

import numpy as np
import pytest

from gluon_bert.data.tokenizer import Tokenizer, bucket_by_length, chunks, pad
from gluon_bert.data.vocab import Normalization, Vocabulary
from gluon_bert.errors import InputError

VOCAB = Vocabulary(["a", "crane", "is", "flying", "@-@", "don", "'t", "he", "left", "A"])


def reader(max_seq_length=16, lowercase=True):
    return Tokenizer(VOCAB, max_seq_length, Normalization(lowercase))


def test_text_single_has_cls_and_sep():
    text = reader().text("A crane is <mask>.")
    assert text.tokens == ["<cls>", "a", "crane", "is", "<mask>", ".", "<sep>"]
    assert VOCAB.to_tokens(text.ids) == ["<cls>", "a", "crane", "is", "<mask>", "<unk>", "<sep>"]
    assert text.token_types.tolist() == [0] * 7
    assert (text.unknown, text.masks.tolist(), text.is_pair, text.truncated) == (["."], [4], False, 0)


def test_text_pair_has_token_types():
    text = reader().text("a crane", "he left")
    assert text.tokens == ["<cls>", "a", "crane", "<sep>", "he", "left", "<sep>"]
    assert text.token_types.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert text.is_pair


def test_tokens_and_ids_equal_text():
    by_text = reader().text("a crane", "he left")
    by_tokens = reader().tokens(["a", "crane"], ["he", "left"])
    by_ids = reader().ids(VOCAB.to_indices(["a", "crane"]).tolist(), VOCAB.to_indices(["he", "left"]))
    for other in (by_tokens, by_ids):
        assert other.tokens == by_text.tokens
        np.testing.assert_array_equal(other.ids, by_text.ids)


def test_text_of_separate_tokens_keeps_them():
    assert reader().text("a @-@ crane don 't").tokens[1:-1] == ["a", "@-@", "crane", "don", "'t"]
    assert reader().text("crane!").tokens[1:-1] == ["crane", "!"]


def test_text_cased_keeps_capitals():
    assert reader(lowercase=False).text("A a").ids[1] != reader(lowercase=False).text("A a").ids[2]


@pytest.mark.parametrize("special", ["<cls>", "<sep>", "<pad>"])
def test_text_with_special_token_has_unk(special):
    by_text, by_tokens = reader().text(f"a {special}"), reader().tokens(["a", special])
    for text in (by_text, by_tokens):
        assert VOCAB._ids[special] not in text.ids[1:-1]
    assert special in by_tokens.unknown


def test_text_lists_each_unknown_word_once():
    assert reader().text("zebra a zebra <unk> yak").unknown == ["zebra", "yak"]


def test_text_of_max_length_fits_longer_is_refused():
    assert len(reader(8).text("a " * 6)) == 8
    with pytest.raises(InputError, match=r"9 tokens .* the network takes 8"):
        reader(8).text("a " * 7)
    assert len(reader(8).text("a a a", "a a")) == 8
    with pytest.raises(InputError, match=r"9 tokens .* the network takes 8"):
        reader(8).text("a a a", "a a a")


@pytest.mark.parametrize(
    "first, second, kept", [(7, None, (6, 0)), (9, 2, (3, 2)), (2, 9, (2, 3)), (9, 9, (3, 2))]
)
def test_text_truncate_cuts_the_longer_one(first, second, kept):
    text = reader(8).text("a " * first, None if second is None else "he " * second, truncate=True)
    assert (text.tokens.count("a"), text.tokens.count("he")) == kept
    assert len(text) == 8
    assert text.truncated == first + (second or 0) - sum(kept)
    assert text.tokens[-1] == "<sep>"


@pytest.mark.parametrize("texts", [("",), (" \n",), ("a", ""), ("", "a")])
def test_text_empty_is_refused(texts):
    with pytest.raises(InputError, match="at least one word"):
        reader().text(*texts)


@pytest.mark.parametrize(
    "number, what",
    [(15, "ids must be from 0 to 14, got 15"), (-1, "got -1"),
     (3, "id 3 is <cls>"), (4, "id 4 is <sep>"), (1, "id 1 is <pad>"),
     (True, "whole numbers below 15, got True"), (2.0, "got 2.0"), ("a", "got 'a'")],
)  # fmt: skip
def test_ids_out_of_range_are_refused(number, what):
    assert len(VOCAB) == 15
    with pytest.raises(InputError, match=what):
        reader().ids([5, number])


def test_pad_fills_arrays():
    texts = [
        reader(20).text("a <mask> crane <mask>"),
        reader(20).text("a", "he <mask>"),
        reader(20).text("a"),
    ]
    batch = pad(texts, 20)
    assert batch.tokens.shape == batch.token_types.shape == (3, 8)
    assert batch.valid_length.tolist() == [6, 6, 3]
    assert batch.masked_positions.tolist() == [[0, 0, 1], [2, 4, 4]]
    for row, text in enumerate(texts):
        assert batch.tokens[row, : len(text)].tolist() == text.ids.tolist()
        assert batch.token_types[row, : len(text)].tolist() == text.token_types.tolist()
        assert (batch.tokens[row, len(text) :] == VOCAB.pad).all()
        assert not batch.token_types[row, len(text) :].any()


@pytest.mark.parametrize("length, width", [(3, 8), (8, 8), (9, 16), (17, 18)])
def test_pad_lengths_are_few_and_bounded(length, width):
    assert pad([reader(18).text("a " * (length - 2))], 18).tokens.shape == (1, width)


def random_texts(count=300, max_seq_length=40):
    rng = np.random.default_rng(0)
    for _ in range(count):
        words = rng.choice(
            ["a", "crane", "<mask>"], size=rng.integers(1, max_seq_length - 2), p=[0.6, 0.39, 0.01]
        )
        yield Tokenizer(VOCAB, max_seq_length, Normalization(True)).tokens(list(words))


def test_chunks_keep_order_and_bounds():
    texts = list(random_texts())
    parts = list(chunks(iter(texts), max_tokens=200, max_masks=3))
    assert [text for part in parts for text in part] == texts
    for part in parts:
        assert len(part) == 1 or sum(map(len, part)) <= 200
        assert len(part) == 1 or sum(len(text.masks) for text in part) <= 3


def test_chunks_read_lazily():
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield reader().text("a crane")

    next(chunks(endless(), max_tokens=100, max_masks=10))
    assert len(taken) == 26


def test_bucket_by_length_keeps_bounds():
    texts = list(random_texts())
    batches = list(bucket_by_length(texts, max_tokens=400, max_masks=5))
    assert sorted(i for batch in batches for i in batch) == list(range(len(texts)))
    wasted = total = 0
    for batch in batches:
        longest = max(len(texts[i]) for i in batch)
        most = max(len(texts[i].masks) for i in batch)
        assert len(batch) == 1 or (len(batch) * longest <= 400 and len(batch) * most <= 5)
        assert len({bool(len(texts[i].masks)) for i in batch}) == 1
        wasted += sum(longest - len(texts[i]) for i in batch)
        total += len(batch) * longest
    assert wasted < 0.1 * total
