"""Text -> words and ids, equal to transformers' BertTokenizer for every setting that it has."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gluon_bert.data.basic_tokenizer import spaced_words, split_words
from gluon_bert.data.tokenizer import Tokenizer
from gluon_bert.data.vocab import Normalization
from gluon_bert.data.wordpiece import SPECIAL_TOKENS, WordPieceVocabulary
from gluon_bert.errors import InputError

LETTERS = "abdehnstABDEHNSTéÉßüÜİΣσ日本かカ한ก.,'!#[]<>-1９\u0301\u0308\u0327"
ADDED, SPECIAL = ["covid19", "[ent]", "Été", "日本", "ab"], ["<e1>", "[unused1]", "ABD", "[X]"]
TOKENS = [
    *SPECIAL_TOKENS,
    "[unused1]",
    *sorted(set(LETTERS.lower()) | set(LETTERS)),
    *("##" + letter for letter in sorted(set(LETTERS.lower()) | set(LETTERS))),
    *("the", "##ing", "東京", "cov", "##id", "ete", "été"),
]
VOCAB = [*TOKENS, *(token for token in ADDED + SPECIAL if token not in TOKENS)]
PIECES = st.one_of(
    st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(LETTERS + " \t\n\u2028\x00\u200b"))),
    st.sampled_from([*ADDED, *SPECIAL, "COVID19", "ÉTÉ", "the", "日 本", " "]),
)
TEXTS = st.lists(PIECES, max_size=6).map("".join)
SPELT = (*SPECIAL_TOKENS, "<unk>", "<mask>")


def theirs(text, normalization, tokens, added=(), special=()):
    """The ids of a text by transformers."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.BertTokenizer(
        {token: i for i, token in enumerate(tokens)},
        do_lower_case=normalization.lowercase,
        strip_accents={"auto": None, "yes": True, "no": False}[normalization.strip_accents],
        tokenize_chinese_chars=normalization.tokenize_chinese_chars,
    )
    tokenizer.add_tokens(list(added))
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def ours(text, normalization, vocab):
    """The ids of a text by this project; an empty text has none."""
    try:
        return Tokenizer(vocab, 10**6, normalization).text(text).ids[1:-1].tolist()
    except InputError as problem:
        assert "at least one word" in str(problem)
        return []


@settings(max_examples=400, deadline=None)
@given(TEXTS, st.booleans(), st.sampled_from(["auto", "yes", "no"]), st.booleans())
def test_ids_any_setting_match_transformers(text, lowercase, accents, chinese):
    for special in SPELT:
        text = text.replace(special, "")
    normalization = Normalization(lowercase, accents, chinese)
    assert ours(text, normalization, WordPieceVocabulary(VOCAB)) == theirs(text, normalization, VOCAB)


@settings(max_examples=400, deadline=None)
@given(TEXTS, st.booleans(), st.sampled_from(["auto", "yes", "no"]), st.booleans())
def test_ids_added_tokens_match_transformers(text, lowercase, accents, chinese):
    for special in SPELT:
        text = text.replace(special, "")
    normalization = Normalization(lowercase, accents, chinese, tuple(ADDED), tuple(SPECIAL))
    # transformers keeps the pieces apart from the added tokens, whose ids come after them.
    pieces = [token for token in VOCAB if token not in ADDED + SPECIAL or token == "[unused1]"]
    vocab = WordPieceVocabulary([*pieces, *ADDED, *(token for token in SPECIAL if token != "[unused1]")])
    assert ours(text, normalization, vocab) == theirs(text, normalization, pieces, ADDED, SPECIAL)


@pytest.mark.parametrize(
    ("text", "settings", "words"),
    [
        ("Möchte CAFÉ", {}, "mochte cafe"),
        ("Möchte CAFÉ", {"strip_accents": "no"}, "möchte café"),
        ("Möchte CAFÉ", {"lowercase": False}, "Möchte CAFÉ"),
        ("Möchte CAFÉ", {"lowercase": False, "strip_accents": "yes"}, "Mochte CAFE"),
        ("北京是 x", {}, "北 京 是 x"),
        ("北京是 x", {"tokenize_chinese_chars": False}, "北京是 x"),
        ("a COVID19-b", {"added_tokens": ("covid19",)}, "a covid19 - b"),
        ("a COVID19 covid19b", {"additional_special_tokens": ("COVID19",)}, "a COVID19 covid19b"),
        ("x[unused1]y", {"additional_special_tokens": ("[unused1]",)}, "x [unused1] y"),
    ],
)
def test_split_words_follows_settings(text, settings, words):
    normalization = Normalization(**{"lowercase": True, **settings})
    assert spaced_words(text, normalization) == words
    assert split_words(text, normalization) == words.split()


def test_added_token_with_space_stays_whole():
    normalization = Normalization(True, added_tokens=("New York",))
    assert split_words("in new york, ny", normalization) == ["in", "New York", ",", "ny"]


def test_unused_token_in_text_is_unknown():
    vocab, given = WordPieceVocabulary(VOCAB), ["[unused1]", "the"]
    plain = Tokenizer(vocab, 8, Normalization(True)).tokens(given)
    added = Tokenizer(vocab, 8, Normalization(True, additional_special_tokens=("[unused1]",))).tokens(given)
    assert vocab.to_tokens(plain.ids[1:-1]) == ["[UNK]", "the"]
    assert vocab.to_tokens(added.ids[1:-1]) == ["[unused1]", "the"]
