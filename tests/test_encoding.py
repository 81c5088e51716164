"""Tokens to vectors."""

import numpy as np
import pytest

from gluon_bert.config import preset
from gluon_bert.data.vocab import Vocabulary
from gluon_bert.encoding import encode
from gluon_bert.errors import BadInput
from gluon_bert.model.bert import BERTModel
from gluon_bert.runtime import mx

VOCAB = Vocabulary(["a", "crane", "is", "flying", "driver", "came", "he", "just", "left"])


@pytest.fixture(scope="module")
def net():
    net = BERTModel(len(VOCAB), preset("d2l").replace(max_positions=12).model)
    net.setup([mx.cpu()], seed=0)
    return net


def test_the_books_sentences_have_the_books_shapes(net):
    single = encode(net, VOCAB, ["a", "crane", "is", "flying"])
    pair = encode(net, VOCAB, ["a", "crane", "driver", "came"], ["he", "just", "left"])
    assert single.shape == (1, 6, 128)
    assert pair.shape == (1, 10, 128)
    assert abs(single[0, 2] - pair[0, 2]).max().asscalar() > 1e-3


def test_the_segments_and_special_tokens_are_those_of_training(net):
    words = ["a", "crane"], ["he", "left"]
    ids = [VOCAB.cls, *VOCAB.ids(words[0]), VOCAB.sep, *VOCAB.ids(words[1]), VOCAB.sep]
    inputs = (mx.nd.array(x) for x in ([ids], [[0, 0, 0, 0, 1, 1, 1]], [7]))
    np.testing.assert_array_equal(encode(net, VOCAB, *words).asnumpy(), net.encoder(*inputs).asnumpy())


def test_encoding_draws_nothing(net):
    first, second = (encode(net, VOCAB, ["a", "crane"]).asnumpy() for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_a_text_that_was_not_split_is_refused(net):
    with pytest.raises(BadInput, match="list of them: split"):
        encode(net, VOCAB, "a crane is flying")


def test_what_is_too_long_is_refused(net):
    assert encode(net, VOCAB, ["a"] * 10).shape == (1, 12, 128)
    with pytest.raises(BadInput, match="13 tokens .* the network takes 12"):
        encode(net, VOCAB, ["a"] * 11)
