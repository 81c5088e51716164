"""WordPiece: words and pieces as the published tokenizer has them, vocabularies made and read."""

import os
import subprocess
import sys

import numpy as np
import pretrain
import pytest
from conftest import ROOT, small_text
from hypothesis import given, settings
from hypothesis import strategies as st

from gluon_bert import run
from gluon_bert.config import DataConfig
from gluon_bert.data.basic_tokenizer import split_words
from gluon_bert.data.loader import Loader
from gluon_bert.data.prepared import prepare, prepare_documents
from gluon_bert.data.tokenizer import Tokenizer, pad
from gluon_bert.data.vocab import Normalization, Vocabulary
from gluon_bert.data.wordpiece import SPECIAL_TOKENS, WordPieceVocabulary, load_vocabulary
from gluon_bert.errors import InputError
from gluon_bert.presets import preset

# As in the published vocabularies: [PAD] at 0, the other special tokens at 100 to 103, free places between.
PUBLISHED = [
    "[PAD]",
    *(f"[unused{i}]" for i in range(99)),
    *("[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused99]"),
    *("the", "crane", "##s", "fly", "##ing", "un", "##fly", "##able", ".", ",", "'", "a", "bird", "sees"),
    *("##é", "e", "##te", "été", "日", "i"),
]
CASED = [*PUBLISHED, "The", "Crane", "É", "A", *(f"Name{i}" for i in range(10))]
TEXTS = [
    "Cranes are flying, unflyable cranes!",
    "Été à l'été; NAÏVE cafe\u0301 e\u0301te\u0301",
    "日本語 and 日 kanji日mixed",
    "tab\tand\nline \u00a0 \u2028 \u200b control\x00\x1f\x85 soft\u00adhyphen",
    "a" * 100 + " " + "a" * 101,
    "it's un-flying... $5+5=10 ~`^ a<b>c",
    "İstanbul ΣΑΣ ﬁn Ⅷ ß",
    "ก็ हिन्दी אָ عربي \U0001f426\u200d\U0001f525",
    "##s crane##s # [PAD] [CLS] <cls>",
    "",
    "   ",
]


def vocabulary(tokens=PUBLISHED):
    return WordPieceVocabulary(tokens)


def pieces_of(vocab, text, lowercase):
    """The tokens that a text becomes, with [UNK] for words that have none."""
    tokens = [piece for word in vocab.split(text, Normalization(lowercase)) for piece in vocab.pieces(word)]
    return vocab.to_tokens(vocab.to_indices(tokens))


def published_pieces(tokens, text, lowercase):
    """The same by the tokenizer that Hugging Face publishes for BERT."""
    from tokenizers import BertWordPieceTokenizer

    theirs = BertWordPieceTokenizer({token: i for i, token in enumerate(tokens)}, lowercase=lowercase)
    return theirs.encode(text, add_special_tokens=False).tokens


def small_counts():
    counts: dict = {}
    for word in split_words(small_text(), Normalization(True)):
        counts[word] = counts.get(word, 0) + 1
    return counts


@pytest.fixture
def vocab_file(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("".join(token + "\n" for token in PUBLISHED), "utf-8")
    return path


@pytest.mark.parametrize("lowercase", [True, False], ids=["uncased", "cased"])
@pytest.mark.parametrize("text", [text for text in TEXTS if "[" not in text])
def test_pieces_match_published_tokenizer(text, lowercase):
    tokens = PUBLISHED if lowercase else CASED
    assert pieces_of(vocabulary(tokens), text, lowercase) == published_pieces(tokens, text, lowercase)


@pytest.fixture(scope="module")
def made():
    """A vocabulary that was made of the texts above, so that most of their words have pieces."""
    counts: dict = {}
    for lowercase in (True, False):
        for text in TEXTS:
            for word in split_words(text, Normalization(lowercase)):
                counts[word] = counts.get(word, 0) + 1
    return WordPieceVocabulary.from_counts(counts, min_freq=3, size=1000)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(
        st.one_of(st.characters(codec="utf-8"), st.sampled_from("abés ßİΣ.,'日\u0301\t\n\u2028\x00"))
    ),
    lowercase=st.booleans(),
)
def test_pieces_of_any_text_match_published_tokenizer(made, text, lowercase):
    for special in (*SPECIAL_TOKENS, "<unk>", "<mask>"):
        text = text.replace(special, "")
    assert pieces_of(made, text, lowercase) == published_pieces(made.tokens, text, lowercase)


def test_most_pieces_compared_are_known_ones(made):
    pieces = [piece for text in TEXTS for piece in pieces_of(made, text, True)]
    assert pieces.count("[UNK]") < 0.1 * len(pieces)
    assert sum(piece.startswith("##") for piece in pieces) > 0.1 * len(pieces)


def test_half_surrogate_pair_is_left_out():
    assert split_words("cra\ud83dne \udc00", Normalization(True)) == ["crane"]
    assert reader().text("the cra\ud83dne").tokens[2] == "crane"


def test_accents_auto_follows_lowercase():
    assert split_words("Été", Normalization(True)) == ["ete"]
    assert split_words("Été", Normalization(False)) == ["Été"]


def test_special_tokens_keep_their_ids():
    vocab = vocabulary()
    assert (vocab.pad, vocab.unk, vocab.cls, vocab.sep, vocab.mask) == (0, 100, 101, 102, 103)
    assert vocab.special[:105].all() and not vocab.special[105:].any()
    np.testing.assert_array_equal(vocab.ordinary_ids, np.arange(105, len(PUBLISHED)))
    marked = {"##s", "##ing", "##fly", "##able", "##é", "##te"}
    assert {vocab.tokens[i] for i in np.flatnonzero(vocab.is_continuation)} == marked


def test_wordpiece_save_and_load_round_trip(tmp_path):
    vocab = vocabulary([*PUBLISHED, "\u2028", "\x85", "#", "##", "###"])
    vocab.save(tmp_path / "vocab.txt")
    again = load_vocabulary(tmp_path)
    assert type(again) is WordPieceVocabulary
    assert again.tokens == vocab.tokens
    np.testing.assert_array_equal(again.is_continuation, vocab.is_continuation)
    assert again.is_continuation[-3:].tolist() == [False, False, True]


def test_load_vocabulary_of_words(tmp_path):
    Vocabulary(["crane"]).save(tmp_path / "vocab.json")
    assert type(load_vocabulary(tmp_path)) is Vocabulary
    with pytest.raises(InputError, match=r"none.*vocab\.json"):
        load_vocabulary(tmp_path / "none")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[PAD]\n[CLS]\n[SEP]\na\n", [r"must have \[UNK\] \[MASK\], as"]),
        (
            b"a\nb\na\n\nb\n",
            [
                "line 3: 'a' must occur once, and is in line 1",
                "line 4: must have a token",
                "line 5: 'b'",
                "must have .PAD",
            ],
        ),
        (b"[PAD]\n\xff\n", ["line 2: byte 0xff is not UTF-8"]),
    ],
)
def test_load_broken_file_reports_every_line(tmp_path, content, message):
    path = tmp_path / "vocab.txt"
    path.write_bytes(content)
    for problem in message:
        with pytest.raises(InputError, match=problem):
            WordPieceVocabulary.load(path)
    with pytest.raises(InputError, match=r"none\.txt: cannot be read as a vocabulary \(No such file"):
        WordPieceVocabulary.load(tmp_path / "none.txt")


def test_load_takes_windows_line_ends(tmp_path):
    (tmp_path / "vocab.txt").write_bytes("\r\n".join(PUBLISHED).encode())
    assert load_vocabulary(tmp_path).tokens == PUBLISHED


def test_from_counts_keeps_frequent_pieces():
    vocab = WordPieceVocabulary.from_counts({"crane": 50, "cranes": 20, "lone": 1}, min_freq=5, size=1000)
    assert vocab.tokens[:5] == list(SPECIAL_TOKENS)
    assert "crane" in vocab and "cranes" in vocab and "lone" not in vocab
    assert vocab.pieces("cranes") == ["cranes"]
    assert vocab.pieces("canes")[0] == "c" and vocab.pieces("canes")[-1] == "##s"
    assert vocab.pieces("crane!") == ["crane!"]  # an unknown character makes the whole word unknown
    assert vocab.to_indices(["crane!"]).tolist() == [vocab.unk]


def test_from_counts_size_is_a_bound():
    counts = small_counts()
    assert len(WordPieceVocabulary.from_counts(counts, min_freq=1, size=60)) == 60
    with pytest.raises(InputError, match="vocab_size must be at least 4"):
        WordPieceVocabulary.from_counts(counts, min_freq=1, size=20)
    needed = 5 + len({c for w in counts for c in w}) + len({c for w in counts for c in w[1:]})
    assert len(WordPieceVocabulary.from_counts(counts, min_freq=1, size=needed)) == needed


def test_from_counts_keeps_frequent_characters():
    counts = {chr(0x4E00 + i): 1 + i // 500 for i in range(1500)}
    vocab = WordPieceVocabulary.from_counts(counts, min_freq=1)
    assert len(vocab.ordinary_ids) == 1000
    # of the equally frequent ones, those that come first
    assert chr(0x4E00) not in vocab.tokens[5:505]
    assert {ord(token) - 0x4E00 for token in vocab.tokens[5:]} == set(range(500, 1500))


def test_from_counts_is_the_same_in_any_process(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(small_text(400), "utf-8")
    code = f"""if True:
        import random, sys
        from gluon_bert.data.basic_tokenizer import Normalization, split_words
        from gluon_bert.data.wordpiece import WordPieceVocabulary
        read = open({str(text)!r}, encoding="utf-8").read().replace("\\n", " ")
        words = split_words(read, Normalization(True))
        random.shuffle(words)
        words = [a + b for a, b in zip(sorted(set(words)) * 40, sorted(set(words) | {{"x"}}) * 40)] + words
        counts = {{word: words.count(word) for word in dict.fromkeys(words)}}
        print(WordPieceVocabulary.from_counts(counts, 1, 120).tokens)"""
    seen = set()
    for threads in ("1", "2", "2", "2"):
        environment = {**os.environ, "RAYON_NUM_THREADS": threads}
        run = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        seen.add(run.stdout)
    assert len(seen) == 1
    assert "crane" in seen.pop()


def test_wordpiece_vocabulary_comes_from_training_text():
    def build(counts):
        assert set(counts) == {"cranes", "crane"}
        return WordPieceVocabulary.from_counts(counts, min_freq=1)

    documents = [(["cranes crane", "crane"], False), (["zebra zebra", "cranes"], True)]
    prepared = prepare_documents(documents, build)
    assert prepared.vocab.to_tokens(prepared.validation.tokens) == ["[UNK]", "[UNK]", "cranes"]


def test_documents_hold_pieces_by_sentence():
    vocab = vocabulary()
    text = ["the cranes flying .", "unflyable zebra", "", "[UNK] [MASK] a [unused3]"]
    train = prepare_documents(
        [(text, False), (["a"], True), (["cranes", "fly"], False)], lambda _: vocab
    ).train
    spelt = [
        " ".join(vocab.to_tokens(train.tokens[start:stop]))
        for start, stop in zip(train.sentences, train.sentences[1:])
    ]
    assert spelt == [
        "the crane ##s fly ##ing .",
        "un ##fly ##able [UNK]",
        "",
        "[UNK] [UNK] a [UNK]",  # a special token in the text is an unknown word, never the token itself
        "crane ##s",
        "fly",
    ]
    assert train.documents.tolist() == [0, 4, 6]
    assert (train.tokens.dtype, train.sentences.dtype) == (np.int32, np.int64)


def test_sentences_above_a_block_are_joined(monkeypatch):
    documents = [(["the cranes", "flying", ""] * 5, False), (["unflyable"] * 4, False)]
    whole = prepare_documents(documents, lambda _: vocabulary()).train
    monkeypatch.setattr("gluon_bert.data.document_arrays._BLOCK", 4)
    in_blocks = prepare_documents(documents, lambda _: vocabulary()).train
    for name in ("tokens", "sentences", "documents"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(in_blocks, name))


def config_of(path, **changes):
    return DataConfig(corpus=(str(path),), text_format="sentences", tokenizer="wordpiece", **changes)


def test_batches_of_published_vocabulary_have_its_ids(text_file, vocab_file, tmp_path):
    config = config_of(
        text_file, vocab_file=str(vocab_file), max_seq_length=16, mlm_probability=0.9, pairs="packed"
    )
    prepared = prepare(config, tmp_path / "cache")
    vocab = prepared.vocab
    shown = []
    for batch in Loader(prepared.train, vocab, config, 64, seed=0).epoch(0):
        assert (batch.tokens[:, 0] == 101).all()
        row = np.arange(len(batch))
        assert (batch.tokens[row, batch.valid_length - 1] == 102).all()
        padding = np.arange(16) >= batch.valid_length[:, None]
        assert (batch.tokens[padding] == 0).all() and not (batch.tokens[~padding] == 0).any()
        assert not vocab.special[batch.masked_ids].any()
        shown.append(batch.tokens[tuple(batch.masked_positions)])
    shown = np.concatenate(shown)
    assert (shown == 103).mean() > 0.7
    random_or_kept = shown[shown != 103]
    assert not vocab.special[random_or_kept].any()
    assert len(np.unique(random_or_kept)) == len(vocab.ordinary_ids)


def test_cache_differs_by_vocabulary(text_file, vocab_file, tmp_path):
    cache = tmp_path / "cache"
    first = prepare(config_of(text_file, vocab_file=str(vocab_file)), cache)
    assert prepare(config_of(text_file, vocab_file=str(vocab_file)), cache).vocab.tokens == first.vocab.tokens
    assert len(list(cache.iterdir())) == 1
    prepare(config_of(text_file, vocab_size=100), cache)
    prepare(config_of(text_file, vocab_size=90), cache)
    prepare(DataConfig(corpus=(str(text_file),), text_format="sentences"), cache)
    vocab_file.write_text(vocab_file.read_text("utf-8") + "river\n", "utf-8")
    other = prepare(config_of(text_file, vocab_file=str(vocab_file)), cache)
    assert len(list(cache.iterdir())) == 5
    assert "river" in other.vocab and other.vocab.to_indices(["river"])[0] in other.train.tokens


def test_wordpiece_any_number_of_processes_agrees(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text(small_text(12_000), "utf-8")
    assert path.stat().st_size > 1 << 20  # more than one piece of text
    one, two = (
        prepare(config_of(path, preprocessing_workers=n, vocab_size=80), tmp_path / f"cache{n}")
        for n in (0, 2)
    )
    assert one.vocab.tokens == two.vocab.tokens
    np.testing.assert_array_equal(one.train.tokens, two.train.tokens)
    np.testing.assert_array_equal(one.validation.sentences, two.validation.sentences)


def test_unk_of_wikitext_is_an_unknown_word(tmp_path):
    path = tmp_path / "wiki.train.tokens"
    path.write_text(" The <unk> Crane . Cranes fly \n" * 3, "utf-8")
    vocab_file = tmp_path / "vocab.txt"
    vocabulary().save(vocab_file)
    config = DataConfig(
        corpus=(str(path),),
        tokenizer="wordpiece",
        vocab_file=str(vocab_file),
        validation_fraction=0.0,
        min_freq=1,
    )
    prepared = prepare(config, tmp_path / "cache")
    assert prepared.vocab.to_tokens(prepared.train.tokens[:6]) == [
        "the",
        "[UNK]",
        "crane",
        "crane",
        "##s",
        "fly",
    ]


@pytest.mark.parametrize(
    ("tokens", "lowercase", "message"),
    [
        (CASED, True, "lowercase must be off with the cased vocabulary .*v.txt"),
        (PUBLISHED, False, "lowercase must be on with the uncased vocabulary .*v.txt"),
        ([*SPECIAL_TOKENS, "q"], True, "vocab_file must have tokens for words of .*v.txt, which has none"),
    ],
)
def test_vocabulary_for_other_text_is_refused(text_file, tmp_path, tokens, lowercase, message):
    vocabulary(tokens).save(tmp_path / "v.txt")
    with pytest.raises(InputError, match=message):
        prepare(config_of(text_file, vocab_file=str(tmp_path / "v.txt"), lowercase=lowercase), tmp_path / "c")


def test_missing_tokenizers_is_reported_first(text_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    monkeypatch.setattr("gluon_bert.data.prepared.Corpus", None)
    with pytest.raises(InputError, match=r"needs the package tokenizers .*pip install -e '\.\[wordpiece\]'"):
        prepare(config_of(text_file), tmp_path / "cache")


def test_word_vocabulary_needs_no_tokenizers(text_file):
    code = f"""if True:
        import sys; sys.modules["tokenizers"] = None
        import pathlib, tempfile
        from gluon_bert.data.prepared import prepare
        from gluon_bert.config import DataConfig
        with tempfile.TemporaryDirectory() as cache:
            print(len(prepare(DataConfig(corpus=({str(text_file)!r},)), pathlib.Path(cache)).vocab))"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(run.stdout) > 10


def test_unseen_tokens_count_once():
    vocab = vocabulary()
    prepared = prepare_documents(
        [(["the the crane", "the"], False), (["the bird", "bird"], True)], lambda _: vocab
    )
    # the 3 times, crane once, and bird as if once
    assert prepared.unigram_loss(prepared.validation, False) == pytest.approx(
        -(np.log(3 / 5) + 2 * np.log(1 / 5)) / 3
    )
    train = -(3 * np.log(3 / 4) + np.log(1 / 4)) / 4
    assert prepared.unigram_loss(prepared.train, False) == pytest.approx(train)


def reader(max_seq_length=20):
    return Tokenizer(vocabulary(), max_seq_length, Normalization(lowercase=True))


def test_text_pieces_know_their_words():
    text = reader().text("The unflyable <mask>, [MASK] zebra.", "Cranes fly")
    assert text.tokens == [
        *("[CLS]", "the", "un", "##fly", "##able", "[MASK]", ",", "[MASK]", "zebra", ".", "[SEP]"),
        *("crane", "##s", "fly", "[SEP]"),
    ]
    assert text.words.tolist() == [-1, 0, 1, 1, 1, 2, 3, 4, 5, 6, -1, 7, 7, 8, -1]
    assert text.masks.tolist() == [5, 7]
    assert text.unknown == ["zebra"]
    assert text.ids[[0, 5, 8, 10]].tolist() == [101, 103, 100, 102]
    assert text.token_types.tolist() == [0] * 11 + [1] * 4


def test_first_piece_begins_a_word():
    assert reader().tokens(["##s", "##ing"], ["##s", "a"]).words.tolist() == [-1, 0, 0, -1, 1, 2, -1]


def test_wordpiece_tokens_and_ids_equal_text():
    by_text = reader().text("the cranes <mask>")
    by_tokens = reader().tokens(["the", "crane", "##s", "<mask>"])
    by_ids = reader().ids([105, 106, 107, 103])
    for other in (by_tokens, by_ids):
        np.testing.assert_array_equal(other.ids, by_text.ids)
    assert by_ids.tokens == by_text.tokens
    for special in (0, 101, 102):
        with pytest.raises(InputError, match=f"id {special} is .*, which no text holds"):
            reader().ids([105, special])
    assert reader().tokens(["[unused3]", "[PAD]"]).ids.tolist() == [101, 100, 100, 102]


def test_pad_uses_pad_of_the_vocabulary():
    batch = pad([reader().text("the cranes"), reader().text("the <mask> cranes fly , a bird sees")], 20)
    assert batch.tokens[0].tolist() == [101, 105, 106, 107, 102] + [0] * 11
    assert batch.masked_positions.tolist() == [[1], [2]]


@pytest.mark.parametrize("made", [True, False], ids=["made", "published"])
def test_run_keeps_its_vocabulary(text_file, vocab_file, tmp_path, made):
    from gluon_bert.inference.predictor import Predictor

    size = ["--vocab-size", "90"] if made else ["--vocab-file", str(vocab_file)]
    flags = [
        *("--tokenizer", "wordpiece", *size, "--pairs", "packed"),
        *("--preset", "d2l", "--preparation", "bert", "--masking", "ngrams", "--max-seq-length", "32"),
        *("--corpus", str(text_file), "--output", str(tmp_path / "run"), "--num-steps", "2"),
        *("--batch-size", "16", "--units", "16", "--ffn-units", "16", "--cpus", "1"),
    ]
    assert pretrain.main(flags) == 0
    assert not (tmp_path / "run" / "vocab.json").exists()
    found = run.load_run(tmp_path / "run")
    assert type(found.vocab) is WordPieceVocabulary
    assert len(found.vocab) == (90 if made else len(PUBLISHED))
    predictor = Predictor.of(found)
    (answer,) = predictor.predict([predictor.reader.text("the crane <mask> it.")])
    assert len(answer.vectors) == len(answer.text)
    assert len(answer.fill_masks(found.vocab)[0]) == 5


def test_wikitext2_in_pieces(wikitext):
    config = preset("bert-tiny").replace(corpus=[str(wikitext)], tokenizer="wordpiece").data
    prepared = prepare(config)
    vocab, train = prepared.vocab, prepared.train
    assert len(vocab) <= 30_522
    # a word in twenty is in pieces, fewer than with words are unknown
    assert 0.01 < vocab.is_continuation[train.tokens].mean() < 0.1
    assert (train.tokens == vocab.unk).mean() < 0.03
    assert set(np.unique(train.tokens)) <= {*vocab.ordinary_ids.tolist(), vocab.unk}


GERMAN = "Möchten Sie heute fahren?\nWir fahren nach [ORT] und nach Zürich.\n\n" * 3


def test_corpus_without_strip_accents_keeps_umlauts(tmp_path):
    text, options = tmp_path / "german.txt", {"min_freq": 2, "vocab_size": 100, "validation_fraction": 0.0}
    text.write_text(GERMAN, "utf-8")
    kept = prepare(config_of(text, strip_accents="no", **options), tmp_path / "cache")
    assert set("öü") <= set("".join(kept.vocab.tokens))
    stripped = prepare(config_of(text, **options), tmp_path / "cache")
    assert not set("öü") & set("".join(stripped.vocab.tokens))
    assert kept.fingerprint != stripped.fingerprint


def test_corpus_added_tokens_are_one_token_each(tmp_path):
    text, options = tmp_path / "german.txt", {"min_freq": 1, "vocab_size": 100, "validation_fraction": 0.0}
    text.write_text(GERMAN, "utf-8")
    config = config_of(text, added_tokens=("Zürich",), additional_special_tokens=("[ORT]",), **options)
    prepared = prepare(config, tmp_path / "cache")
    assert prepared.vocab.tokens[-2:] == ["Zürich", "[ORT]"] and len(prepared.vocab) <= 100
    counts = prepared.train.counts(len(prepared.vocab))
    assert counts[-2:].tolist() == [3, 3]
    with pytest.raises(InputError, match=r"added_tokens must not hold white space.*'New York'"):
        prepare(config_of(text, added_tokens=("New York",)), tmp_path / "cache")
