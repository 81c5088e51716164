"""Text files to documents."""

import gzip
import os

import pytest
from conftest import small_text

from gluon_bert.config import DataConfig
from gluon_bert.data.corpora import pydoc
from gluon_bert.data.corpora.corpus import Corpus, text_files
from gluon_bert.data.corpora.text_file import read_chunks
from gluon_bert.data.corpora.text_formats import TextChunk, guess_format, is_validation, parse
from gluon_bert.data.prepared import prepare
from gluon_bert.errors import InputError

PROSE = """The crane is flying over the city. It is
a large bird, and nobody sees it.

A crane driver came. He just left.
"""


def sides(*paths, **changes):
    """Return the documents of a corpus, each with whether it is for validation."""
    config = DataConfig(corpus=tuple(map(str, paths)), **changes)
    parsed_pieces = [parse(piece, config) for piece in Corpus(config).chunks()]
    return [side for piece in parsed_pieces for side in zip(piece.documents, piece.validation)]


def documents(path, **changes):
    return [document for document, _ in sides(path, **changes)]


def parsed(text, text_format, **changes):
    return parse(TextChunk(text, text_format), DataConfig(**changes)).documents


def test_prose_is_split_across_line_ends():
    assert parsed(PROSE, "prose") == [
        ["the crane is flying over the city .", "it is a large bird , and nobody sees it ."],
        ["a crane driver came .", "he just left ."],
    ]


def test_paragraphs_line_is_a_document():
    text = "The crane flies. It is large.\nA driver came. He left. Why?\nalone\n"
    assert [len(document) for document in parsed(text, "paragraphs")] == [2, 3]


def test_sentences_are_split_before_lower_casing():
    text = "Das ist gut. Der Hund läuft hier. Er ist da."
    assert parsed(text, "prose", language="de") == [["das ist gut .", "der hund läuft hier .", "er ist da ."]]


@pytest.mark.parametrize("space", ["\u00a0", "\u2028", "\u0085", "\t"])
def test_unusual_white_space_separates_words(tmp_path, space):
    path = tmp_path / "t.txt"
    path.write_text(f"See section A{space}. And{space}section B{space}.\n\n" * 3, "utf-8")
    assert documents(path, text_format="prose") == [["see section a .", "and section b ."]] * 3
    assert documents(path)


def test_sentences_line_is_a_sentence():
    text = "One line. Two full stops.\nthe second line\n\n \nAnother document\nof two\n\nalone\n"
    assert parsed(text, "sentences") == [
        ["one line . two full stops .", "the second line"],
        ["another document", "of two"],
    ]


def test_wikitext_is_split_as_d2l_splits_it():
    # The book strips the line after it has counted: a paragraph may be left with one sentence.
    lines = " = Title = \n\n A crane . It flies . \n Only one . \n no end \n"
    assert parsed(lines, "wikitext") == [["a crane", "it flies ."], ["only one ."]]


WIKITEXT = (
    " \n = Crane = \n \n A Crane . It flies . \n \n = = Life = = \n \n Long . It is Key : Pld \n"
    " = Played , W = \n Won . \n \n = River = \n \n It runs . To the sea . \n"
)


def test_articles_are_documents():
    assert parsed(WIKITEXT, "articles") == [
        ["a crane", "it flies .", "long", "it is key : pld", "won ."],
        ["it runs", "to the sea ."],
    ]
    assert [len(d) for d in parsed(WIKITEXT, "wikitext")] == [2, 2, 1, 2]


def test_articles_are_never_cut_between_chunks(tmp_path, monkeypatch):
    path = tmp_path / "wiki.train.tokens"
    path.write_text(WIKITEXT * 20, "utf-8")
    whole = documents(path, text_format="articles")
    assert len(whole) == 40
    parts = []
    for size in (1, 7, 40, 100, 333, 1000):
        monkeypatch.setattr("gluon_bert.data.corpora.text_file.BLOCK_BYTES", size)
        parts.append(len(list(read_chunks(path, "articles"))))
        assert documents(path, text_format="articles") == whole
    assert min(parts[-2:]) > 3


def test_wordpiece_words_come_from_original_text():
    text = "It's 3.5 km. Don't: l'été!\n"
    assert parsed(text, "paragraphs", tokenizer="wordpiece") == [["it ' s 3 . 5 km .", "don ' t : l ' ete !"]]
    assert parsed(text, "paragraphs") == [["it's 3 . 5 km .", "don't : l'été !"]]
    lines = " The <unk> @-@ Crane . It flies . \n"
    assert parsed(lines, "wikitext", lowercase=False, tokenizer="wordpiece") == [
        ["The [UNK] @ - @ Crane", "It flies ."]
    ]


@pytest.mark.parametrize(
    ("text", "text_format"),
    [
        (PROSE, "prose"),
        (small_text(20), "sentences"),
        ("A long paragraph of running text. " * 10 + "\n" + "And one more line of it. " * 12, "paragraphs"),
        ("\n\n", "prose"),
    ],
)
def test_guess_format_of_each_kind(text, text_format):
    assert guess_format(text, "en") == text_format


def test_chunks_end_between_documents(tmp_path, monkeypatch):
    monkeypatch.setattr("gluon_bert.data.corpora.text_file.BLOCK_BYTES", 500)
    path = tmp_path / "t.txt"
    text = small_text(100)
    path.write_text(text, "utf-8")
    cut = [piece.text for piece in read_chunks(path, "sentences")]
    assert len(cut) > 10
    assert "".join(cut) == text
    whole = parsed(text, "sentences")
    assert [document for part in cut for document in parsed(part, "sentences")] == whole
    assert len(whole) == 100


def test_document_longer_than_blocks_stays_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("gluon_bert.data.corpora.text_file.BLOCK_BYTES", 50)
    path = tmp_path / "t.txt"
    long = "".join(f"sentence number {i} .\n" for i in range(100))
    path.write_text(f"{long}\nshort one .\nshort two .\n", "utf-8")
    assert [len(document) for document in documents(path, text_format="sentences")] == [100, 2]


def test_line_ends_and_bom_do_not_matter(tmp_path):
    plain, windows = tmp_path / "a.txt", tmp_path / "b.txt"
    plain.write_bytes(PROSE.encode())
    windows.write_bytes(b"\xef\xbb\xbf" + PROSE.replace("\n", "\r\n").encode())
    assert documents(plain) == documents(windows)


def test_gzip_reads_like_plain_file(tmp_path, text_file):
    packed = tmp_path / "text.txt.gz"
    packed.write_bytes(gzip.compress(text_file.read_bytes()))
    assert documents(packed) == documents(text_file)
    assert len(documents(packed)) == 200


def test_folder_is_read_in_order_without_hidden_files(tmp_path):
    for name, word in (("b.txt", "two"), ("a/z.md", "one"), (".hidden.txt", "no"), ("c.png", "no")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{word} line\nand its next\n", "utf-8")
    read = documents(tmp_path, text_format="sentences")
    assert [document[0] for document in read] == ["one line", "two line"]


def test_wikitext_valid_file_is_validation(tmp_path):
    inner = tmp_path / "wikitext-2"
    inner.mkdir()
    for name in ("train", "valid", "test"):
        (inner / f"wiki.{name}.tokens").write_text(f" {name} one . {name} two . \n" * 3, "utf-8")
    (inner / "README.md").write_text("No part of the corpus. Not a bit of it.\n", "utf-8")
    for path in (inner, inner / "wiki.train.tokens"):
        read = [(d[0], validation) for d, validation in sides(path)]
        assert read == [("train one", False)] * 3 + [("valid one", True)] * 3


def test_wikitext_outer_folder_is_read(tmp_path):
    (tmp_path / "wikitext-2").mkdir()
    for name in ("train", "valid", "test"):
        (tmp_path / "wikitext-2" / f"wiki.{name}.tokens").write_text(
            f" {name} one . {name} two . \n", "utf-8"
        )
    assert [d[0] for d in documents(tmp_path)] == ["train one", "valid one"]


def test_no_file_is_read_twice(tmp_path):
    for name in ("train", "valid", "test"):
        (tmp_path / f"wiki.{name}.tokens").write_text(f" {name} one . {name} two . \n", "utf-8")
    read = sides(*sorted(tmp_path.iterdir()), tmp_path)
    assert [(d[0], validation) for d, validation in read] == [("train one", False), ("valid one", True)]


def test_validation_share_depends_on_text_alone(text_file):
    read = sides(text_file, validation_fraction=0.3)
    share = sum(validation for _, validation in read) / len(read)
    assert 0.15 < share < 0.45
    assert all(is_validation(document, 0.3) == validation for document, validation in read)
    assert not any(held for _, held in sides(text_file, validation_fraction=0.0))


def test_text_not_utf8_names_file_and_line(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"first line\n" * 3 + "caf\xe9\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin.txt, line 4: byte 0xe9 is not UTF-8"):
        documents(path)


def test_text_not_utf8_in_later_block_names_line(tmp_path, monkeypatch):
    monkeypatch.setattr("gluon_bert.data.corpora.text_file.BLOCK_BYTES", 64)
    path = tmp_path / "latin.txt"
    path.write_bytes(b"a line of text\n" * 50 + b"\xff\n")
    with pytest.raises(InputError, match="line 51"):
        documents(path)


def test_damaged_gz_is_refused(tmp_path):
    path = tmp_path / "cut.gz"
    path.write_bytes(gzip.compress(small_text().encode())[:-20])
    with pytest.raises(InputError, match=r"cut.gz: the .gz file is damaged"):
        documents(path)


@pytest.mark.parametrize("text", ["one sentence a line .\n" * 30, "no end of a line at all " * 30])
def test_text_without_document_ends_is_refused_early(tmp_path, monkeypatch, text):
    monkeypatch.setattr("gluon_bert.data.corpora.text_file.BLOCK_BYTES", 100)
    monkeypatch.setattr("gluon_bert.data.corpora.text_file._LARGEST_DOCUMENT", 600)
    path = tmp_path / "t.txt"
    path.write_text(f"first document\n\n{text}", "utf-8")
    message = r"t.txt, line 3: a document of more than .* begins here\. Put blank lines between documents"
    with pytest.raises(InputError, match=message):
        list(read_chunks(path, "sentences"))


@pytest.mark.parametrize("name", ["t.txt", "t.txt.gz"])
def test_chunks_count_bytes_of_the_file(tmp_path, monkeypatch, name):
    monkeypatch.setattr("gluon_bert.data.corpora.text_file.BLOCK_BYTES", 500)
    path = tmp_path / name
    content = small_text(100).encode()
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    corpus = Corpus(DataConfig(corpus=(str(path),), text_format="sentences"))
    read = [piece.num_bytes for piece in corpus.chunks()]
    assert len(read) > 5
    assert sum(read) == corpus.num_bytes == path.stat().st_size


def test_documents_of_one_sentence_are_counted():
    piece = TextChunk("alone here\n\na b\nc d\n\nand alone\n", "sentences")
    assert parse(piece, DataConfig()).dropped == (2, 4)
    assert parse(TextChunk(" Only one . \n", "wikitext"), DataConfig()).dropped == (0, 0)


def test_all_missing_paths_are_reported(tmp_path):
    with pytest.raises(InputError) as message:
        Corpus(DataConfig(corpus=("/no/where", "pydoc", "/not/there")))
    assert [line.split("got ")[1] for line in str(message.value).splitlines()] == [
        "/no/where, which does not exist.",
        "/not/there, which does not exist.",
    ]


def test_pydoc_paragraph_is_read_once(tmp_path, monkeypatch):
    prose = "This function returns the first of the values that it is given. It never changes any of them."
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text(f'"""{prose}"""\n', "utf-8")
    sources = [pydoc.Source(name, tmp_path / name) for name in ("a.py", "b.py")]
    monkeypatch.setattr(pydoc, "source_files", lambda: sources)
    other = tmp_path / "other.txt"
    other.write_text("One bird . It flies .\n" * 2, "utf-8")  # a user's text is taken as it is
    config = DataConfig(
        corpus=("pydoc", str(other)), text_format="paragraphs", min_freq=1, validation_fraction=0.0
    )
    prepared = prepare(config, tmp_path / "cache")
    train = prepared.train
    assert len(train) == 3
    second = prepared.vocab.to_tokens(train.tokens[train.sentences[1] : train.sentences[2]])
    assert " ".join(second) == "it never changes any of them ."


def test_irregular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: must be a regular file"):
        text_files(tmp_path / "pipe")


def test_folder_gives_text_files_only(tmp_path):
    for name in ("a.TXT", "b.txt.gz", "c.tar.gz", "d.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b""))
    assert [file.path.name for file in text_files(tmp_path)] == ["a.TXT", "b.txt.gz"]


def test_missing_or_empty_path_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"corpus must be .*, got .*nowhere, which does not exist"):
        text_files(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"must hold a file that ends in \.txt.*got an empty folder"):
        text_files(tmp_path)


def test_no_corpus_is_refused():
    with pytest.raises(InputError, match="corpus must name a corpus, a file or a folder"):
        Corpus(DataConfig(corpus=()))
