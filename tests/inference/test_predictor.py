"""Tokens to vectors."""

import numpy as np
import pytest
from support.token_vectors import encode

from gluon_bert.data.tokenizer import Tokenizer
from gluon_bert.data.vocab import Normalization, Vocabulary
from gluon_bert.errors import InputError
from gluon_bert.inference import predictor as encoding
from gluon_bert.inference.predictor import GluonNetwork, Predictor
from gluon_bert.model.bert import BERTModel
from gluon_bert.presets import preset
from gluon_bert.runtime import mx

VOCAB = Vocabulary(["a", "crane", "is", "flying", "driver", "came", "he", "just", "left"])


@pytest.fixture(scope="module")
def net():
    net = BERTModel(len(VOCAB), preset("d2l").replace(max_positions=12).model)
    net.initialize(ctx=[mx.cpu()], seed=0)
    net.hybridize()
    return net


def test_encode_d2l_sentences_have_the_shapes_of_d2l(net):
    single = encode(net, VOCAB, ["a", "crane", "is", "flying"])
    pair = encode(net, VOCAB, ["a", "crane", "driver", "came"], ["he", "just", "left"])
    assert single.shape == (1, 6, 128)
    assert pair.shape == (1, 10, 128)
    assert abs(single[0, 2] - pair[0, 2]).max().asscalar() > 1e-3


def test_inputs_equal_those_of_training(net):
    words = ["a", "crane"], ["he", "left"]
    ids = [VOCAB.cls, *VOCAB.to_indices(words[0]), VOCAB.sep, *VOCAB.to_indices(words[1]), VOCAB.sep]
    inputs = (mx.nd.array(x) for x in ([ids], [[0, 0, 0, 0, 1, 1, 1]], [7]))
    np.testing.assert_array_equal(encode(net, VOCAB, *words).asnumpy(), net.encoder(*inputs).asnumpy())


def test_encode_without_dropout_is_repeatable(net):
    first, second = (encode(net, VOCAB, ["a", "crane"]).asnumpy() for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_encode_unsplit_text_is_refused(net):
    with pytest.raises(InputError, match=r"a list, got a string\. Split"):
        encode(net, VOCAB, "a crane is flying")


def test_encode_too_long_text_is_refused(net):
    assert encode(net, VOCAB, ["a"] * 10).shape == (1, 12, 128)
    with pytest.raises(InputError, match=r"13 tokens .* the network takes 12"):
        encode(net, VOCAB, ["a"] * 11)


TEXTS = [
    "a crane is flying",
    "a <mask> is <mask>",
    ("a crane driver came", "he just left"),
    "crane",
    "a strange <mask>",
    ("he", "left a <mask> <mask> crane"),
]


@pytest.fixture(scope="module")
def predictor(net):
    return Predictor(GluonNetwork(net), Tokenizer(VOCAB, 12, Normalization(lowercase=True)))


def read(predictor, texts=TEXTS):
    return [predictor.reader.text(*((text,) if isinstance(text, str) else text)) for text in texts]


def test_predict_in_batches_equals_each_text_alone(predictor, monkeypatch):
    texts = read(predictor) * 3
    alone = [next(iter(predictor.predict([text]))) for text in texts]
    for chunk_tokens, batch_tokens, batch_masks in ((65536, 4096, 256), (20, 16, 2), (100, 40, 3)):
        monkeypatch.setattr(encoding, "CHUNK_TOKENS", chunk_tokens)
        monkeypatch.setattr(encoding, "BATCH_TOKENS", batch_tokens)
        monkeypatch.setattr(encoding, "BATCH_MASKS", batch_masks)
        together = list(predictor.predict(iter(texts)))
        assert [answer.text for answer in together] == texts
        for one, other in zip(alone, together):
            np.testing.assert_allclose(one.vectors, other.vectors, atol=1e-5)
            np.testing.assert_allclose(one.pooled, other.pooled, atol=1e-5)
            np.testing.assert_allclose(one.next_scores, other.next_scores, atol=1e-5)
            if len(one.text.masks):
                np.testing.assert_allclose(one.mask_scores, other.mask_scores, atol=1e-4)


def test_predict_vectors_equal_encode(net, predictor):
    (answer,) = predictor.predict(read(predictor, [("a crane", "he left")]))
    expected = encode(net, VOCAB, ["a", "crane"], ["he", "left"]).asnumpy()[0]
    np.testing.assert_allclose(answer.vectors, expected, atol=1e-5)
    np.testing.assert_array_equal(answer.cls, answer.vectors[0])
    np.testing.assert_allclose(answer.mean, expected.mean(axis=0), atol=1e-5)


def test_predict_heads_equal_the_network(net, predictor):
    (answer,) = predictor.predict(read(predictor, [("a <mask>", "he <mask> left")]))
    text = answer.text
    inputs = ([text.ids], [text.token_types], [len(text)], [[0, 0], text.masks])
    _, mlm, nsp = net(*(mx.nd.array(x) for x in inputs))
    np.testing.assert_allclose(answer.mask_scores, mlm.asnumpy(), atol=1e-4)
    np.testing.assert_allclose(answer.next_scores, nsp.asnumpy()[0], atol=1e-5)


def test_top_words_are_the_likeliest(predictor):
    (answer,) = predictor.predict(read(predictor, ["a <mask> is <mask>"]))
    everything = answer.fill_masks(VOCAB, top=len(VOCAB))
    assert len(everything) == 2
    for words, scores in zip(everything, answer.mask_scores):
        assert {word for word, _ in words} == set(VOCAB.tokens)
        probabilities = [probability for _, probability in words]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert words[0][0] == VOCAB.tokens[scores.argmax()]
        expected = np.exp(np.float64(scores)) / np.exp(np.float64(scores)).sum()
        assert dict(words)["crane"] == pytest.approx(expected[VOCAB.to_indices(["crane"])[0]], abs=1e-6)
    assert [words[:3] for words in everything] == answer.fill_masks(VOCAB, top=3)


def test_next_sentence_is_a_probability(predictor):
    (answer,) = predictor.predict(read(predictor, [("a crane", "he left")]))
    no, yes = np.exp(np.float64(answer.next_scores))
    assert answer.next_sentence_probability == pytest.approx(yes / (no + yes), abs=1e-6)


def test_text_without_mask_or_pair_is_refused(predictor):
    single, pair = predictor.predict(read(predictor, ["a crane", ("a", "he")]))
    with pytest.raises(InputError, match="must have a <mask>"):
        pair.fill_masks(VOCAB)
    with pytest.raises(InputError, match="must be a pair"):
        _ = single.next_sentence_probability
