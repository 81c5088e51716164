"""Positions of words in their text, for both kinds of vocabulary and any text."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gluon_bert.data.alignment import spans
from gluon_bert.data.tokenizer import Tokenizer
from gluon_bert.data.vocab import Normalization, Vocabulary
from gluon_bert.data.wordpiece import SPECIAL_TOKENS, WordPieceVocabulary

LETTERS = [*"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]
TOKENIZERS = {
    "words": Tokenizer(Vocabulary(["crane", "flies"]), 64, Normalization(lowercase=True)),
    "cased words": Tokenizer(Vocabulary(["Crane", "flies"]), 64, Normalization(lowercase=False)),
    "pieces": Tokenizer(
        WordPieceVocabulary([*SPECIAL_TOKENS, "crane", *LETTERS]), 64, Normalization(lowercase=True)
    ),
    "cased pieces": Tokenizer(
        WordPieceVocabulary([*SPECIAL_TOKENS, "Crane", *LETTERS]), 64, Normalization(lowercase=False)
    ),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    "text, words",
    [
        ("A crane.", ["A", "crane", "."]),
        (" Crane  FLIES\t! ", ["Crane", "FLIES", "!"]),
        ("the <mask> flies", ["the", "<mask>", "flies"]),
        ("caf\u00e9 cafe\u0301 na\u00efve", ["caf\u00e9", "cafe\u0301", "na\u00efve"]),
        ("\u0130stanbul \u1e9e stra\u00dfe", ["\u0130stanbul", "\u1e9e", "stra\u00dfe"]),
        ("\u6771\u4eac is", ["\u6771", "\u4eac", "is"]),
        ("a\u200bb \x07 c", None),
    ],
)
def test_spans_are_slices_of_the_text(kind, text, words):
    reader = TOKENIZERS[kind]
    found = [text[start:end] for start, end in spans(text, reader.words(text))]
    assert found == (words or ["a\u200bb", "c"])


def folded(text):
    """The letters of a text without case, accents, spaces and invisible characters."""
    kept = [c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn"]
    both = unicodedata.normalize("NFD", "".join(kept).casefold())
    return [c for c in both if unicodedata.category(c)[0] not in "CZM"]


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40))
def test_spans_of_any_text_rise_and_hold_their_words(kind, text):
    reader = TOKENIZERS[kind]
    words = reader.words(text)
    found = spans(text, words)
    assert len(found) == len(words)
    last = 0
    for word, (start, end) in zip(words, found):
        assert 0 <= start <= end <= len(text)
        assert start >= last or start == end
        last = end
        if word not in ("[UNK]", "[MASK]"):
            assert folded(text[start:end]) == folded(word)


def test_spans_of_pieces_split_words():
    reader = TOKENIZERS["pieces"]
    text = "Cranes Fly"
    pieces = [piece[2:] if piece.startswith("##") else piece for piece in reader.pieces(text)]
    assert [text[start:end] for start, end in spans(text, pieces)] == ["Crane", "s", "F", "l", "y"]
