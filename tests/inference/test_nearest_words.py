"""The nearest words of a word, against a plain loop."""

import numpy as np
import pytest

from gluon_bert.data.tokenizer import Tokenizer
from gluon_bert.data.vocab import Normalization, Vocabulary
from gluon_bert.errors import InputError
from gluon_bert.inference.nearest_words import nearest_words

VOCAB = Vocabulary(["crane", "bird", "plane", "truck", "the"])
READER = Tokenizer(VOCAB, 16, Normalization(True))


def embeddings():
    return np.random.default_rng(0).normal(size=(len(VOCAB), 6)).astype(np.float32)


def test_nearest_words_equals_a_plain_loop():
    vectors = embeddings()
    own = vectors[VOCAB.to_indices(["crane"])[0]]
    cosines = {
        word: float(vector @ own / np.sqrt(vector @ vector) / np.sqrt(own @ own))
        for word, vector in zip(VOCAB.tokens, vectors)
        if not word.startswith("<") and word != "crane"
    }
    expected = sorted(cosines.items(), key=lambda each: -each[1])[:3]
    found = nearest_words(vectors, READER, "Crane", top=3)
    assert [word for word, _ in found] == [word for word, _ in expected]
    assert [cosine for _, cosine in found] == pytest.approx([cosine for _, cosine in expected], rel=1e-5)


def test_nearest_words_has_at_most_the_other_words():
    assert {word for word, _ in nearest_words(embeddings(), READER, "the", top=99)} == {
        *("crane", "bird", "plane", "truck")
    }


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("stork", "got 'stork'"),
        ("the crane", "read as the crane"),
        (" ", "empty|no word|one token"),
    ],
)
def test_nearest_words_refuses_what_is_not_one_token(word, problem):
    with pytest.raises(InputError, match=problem):
        nearest_words(embeddings(), READER, word)
