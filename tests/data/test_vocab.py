"""Words and ids."""

import json

import pytest

from gluon_bert.data.vocab import SPECIAL_TOKENS, Vocabulary, split_words
from gluon_bert.errors import InputError


def test_from_counts_orders_by_frequency_then_name():
    vocab = Vocabulary.from_counts({"b": 5, "a": 5, "c": 9, "d": 4, "<unk>": 100}, min_freq=5)
    assert vocab.tokens == [*SPECIAL_TOKENS, "c", "a", "b"]


def test_to_indices_and_to_tokens_are_inverse():
    vocab = Vocabulary(["crane", "is", "flying"])
    assert vocab.to_tokens(vocab.to_indices(["is", "flying", "<mask>", "crane"])) == [
        "is",
        "flying",
        "<mask>",
        "crane",
    ]
    assert vocab.to_tokens(vocab.to_indices(["never", "seen"])) == ["<unk>", "<unk>"]
    assert vocab.to_indices([]).shape == (0,)


def test_save_and_load_round_trip(tmp_path):
    vocab = Vocabulary(["crane", "naïve", "\u2028", '"'])
    vocab.save(tmp_path / "vocab.json")
    assert Vocabulary.load(tmp_path / "vocab.json").tokens == vocab.tokens


def test_gluonnlp_reads_saved_file_with_same_ids(tmp_path):
    import gluon_bert.runtime as runtime

    runtime.import_mxnet()
    gluonnlp = pytest.importorskip("gluonnlp", reason="gluonnlp is not installed")
    vocab = Vocabulary.from_counts({"crane": 7, "is": 9, "flying": 6}, min_freq=5)
    vocab.save(tmp_path / "vocab.json")
    theirs = gluonnlp.Vocab.from_json((tmp_path / "vocab.json").read_text("utf-8"))
    assert theirs.idx_to_token == vocab.tokens
    assert theirs[["flying", "never"]] == vocab.to_indices(["flying", "never"]).tolist()
    assert (theirs.mask_token, theirs.padding_token) == ("<mask>", "<pad>")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as a vocabulary"),
        ("[]", "cannot be read as a vocabulary"),
        (json.dumps({"idx_to_token": [1]}), "must be a list of strings"),
        (json.dumps({"idx_to_token": ["a"]}), "must begin with <unk>"),
        (json.dumps({"idx_to_token": [*SPECIAL_TOKENS, "a", "a"]}), "twice"),
    ],
)
def test_load_other_file_is_refused(tmp_path, content, message):
    path = tmp_path / "vocab.json"
    path.write_text(content, "utf-8")
    with pytest.raises(InputError, match=message):
        Vocabulary.load(path)
    with pytest.raises(InputError, match=r"none\.json"):
        Vocabulary.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A crane, flying!", ["A", "crane", ",", "flying", "!"]),
        ("it's well-known <unk> <mask>", ["it's", "well-known", "<unk>", "<mask>"]),
        ("x<y", ["x", "<", "y"]),
        ("", []),
        ("日本語 été", ["日", "本", "語", "été"]),
        ("हिन्दी भाषा।", ["हिन्दी", "भाषा", "।"]),
        ("cafe\u0301 cre\u0300me", ["caf\u00e9", "cr\u00e8me"]),
    ],
)
def test_split_words_gives_words_and_marks(text, words):
    assert split_words(text) == words
