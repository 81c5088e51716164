"""Text of users: file formats, compression, text without full stops, invisible characters."""

import bz2
import gzip
import json
import lzma

import pytest

from gluon_bert.config import DataConfig
from gluon_bert.data.corpora.corpus import Corpus, text_files
from gluon_bert.data.corpora.text_file import read_chunks
from gluon_bert.data.corpora.text_formats import guess_format, parse, split_sentences
from gluon_bert.data.prepared import prepare
from gluon_bert.errors import InputError

STORIES = ["The crane flies. It is large.", "She left early.\nHe saw it!\n\nIt rained. Nobody came."]
WORDS = [
    ["the crane flies .", "it is large ."],
    ["she left early .", "he saw it !", "it rained .", "nobody came ."],
]
ARTICLES = (
    '<doc id="1" url="https://example.org" title="Crane">\nCrane\n\nThe crane flies. It is large.\n\n</doc>\n'
    '<doc id="2" url="https://example.org" title="Rain &amp; sun">\nRain &amp; sun\n\n'
    "She left early.\nHe saw it!\n\nIt rained. Nobody came.\n\n</doc>\n"
)


def documents(path, **changes):
    config = DataConfig(corpus=(str(path),), **changes)
    return [document for chunk in Corpus(config).chunks() for document in parse(chunk, config).documents]


def write(path, text):
    path.write_text(text, "utf-8")
    return path


def json_lines(**more):
    return "".join(json.dumps({"id": i, "text": text, **more}) + "\n" for i, text in enumerate(STORIES))


def test_jsonl_object_is_a_document(tmp_path):
    assert documents(write(tmp_path / "t.jsonl", "\n" + json_lines() + "\n")) == WORDS


@pytest.mark.parametrize(
    ("line", "got"),
    [
        ("broken", "no object"),
        ('{"content": "a", "id": 1}', "the fields 'content', 'id'"),
        ("[1]", "no object"),
    ],
)
def test_jsonl_line_without_text_is_named(tmp_path, line, got):
    path = write(tmp_path / "t.jsonl", json_lines() + line + "\n")
    with pytest.raises(InputError, match=rf"line 3: must be a JSON object with the text .*, got {got}"):
        documents(path)


def test_jsonl_line_number_counts_all_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("gluon_bert.data.corpora.text_file.BLOCK_BYTES", 64)
    path = write(tmp_path / "t.jsonl", json_lines() * 50 + "{}\n")
    assert len(list(read_chunks(path, "auto"))) > 20
    with pytest.raises(InputError, match="line 101: must be a JSON object"):
        documents(path)


@pytest.mark.parametrize("name", ["AA/wiki_00", "wiki_00.txt", "BB/wiki_07.bz2"])
def test_wikiextractor_article_is_a_document(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bz2.compress(ARTICLES.encode()) if name.endswith("bz2") else ARTICLES.encode())
    assert documents(tmp_path) == WORDS


def test_wikiextractor_json_output_is_read(tmp_path):
    write(tmp_path / "wiki_00", json_lines(title="x"))
    assert documents(tmp_path) == WORDS


def test_wikiextractor_article_is_never_cut(tmp_path, monkeypatch):
    path = write(tmp_path / "wiki_00", ARTICLES * 20)
    for size in (1, 50, 333, 1000):
        monkeypatch.setattr("gluon_bert.data.corpora.text_file.BLOCK_BYTES", size)
        assert documents(path) == WORDS * 20


def zstd_compress(content):
    return pytest.importorskip("backports.zstd", reason="needs the extra zstd").compress(content)


@pytest.mark.parametrize(
    ("ending", "compress"),
    [(".gz", gzip.compress), (".BZ2", bz2.compress), (".xz", lzma.compress), (".zst", zstd_compress)],
)
def test_compressed_file_is_read_and_damage_named(tmp_path, ending, compress):
    content = compress("\n\n".join(STORIES).encode())
    (tmp_path / f"T.TXT{ending}").write_bytes(content)
    assert len(documents(tmp_path)) == 3
    (tmp_path / f"T.TXT{ending}").write_bytes(content[:-12])
    with pytest.raises(InputError, match=rf"T\.TXT{ending}: the {ending} file is damaged"):
        documents(tmp_path)
    (tmp_path / f"T.TXT{ending}").write_bytes(b"no compressed file")
    with pytest.raises(InputError, match=rf"T\.TXT{ending}: "):
        documents(tmp_path)


def test_zst_file_without_its_package_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr("gluon_bert.data.corpora.text_file.import_module", missing)
    with pytest.raises(
        InputError, match=r"needs the package backports\.zstd and Python 3\.9\. Run pip install"
    ):
        documents(write(tmp_path / "a.txt.zst", "text"))


def missing(name):
    raise ImportError(name)


def test_folder_counts_what_is_left_out(tmp_path, caplog):
    caplog.set_level("INFO")
    for name in ("a.txt", "b.JSONL", "c.csv", "d.CSV", "e.zip", "README", ".hidden"):
        write(tmp_path / name, "")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    assert [file.path.name for file in text_files(tmp_path)] == ["a.txt", "b.JSONL"]
    assert (
        f"{tmp_path}: read 2 files, left out 5 (.csv 2, .zip 1, link to nothing 1, no ending 1)"
        in caplog.text
    )


def test_folder_without_text_says_what_it_holds(tmp_path):
    write(tmp_path / "a.pdf", "")
    with pytest.raises(InputError, match=r"must hold a file that ends in .*\.jsonl.*; got \.pdf 1"):
        text_files(tmp_path)


def test_raw_wikitext_has_its_valid_file(tmp_path):
    for part in ("train", "valid"):
        write(tmp_path / f"wiki.{part}.raw", f" \n = {part} = \n \n The crane flies. It is {part}. \n")
    assert [(file.path.name, file.validation) for file in text_files(tmp_path)] == [
        ("wiki.train.raw", False),
        ("wiki.valid.raw", True),
    ]
    assert documents(tmp_path) == [["the crane flies .", f"it is {part} ."] for part in ("train", "valid")]


NO_STOPS = "the crane flies over the city\nit is large\nnobody sees it there\n\nshe left early\nhe came\n"


@pytest.mark.parametrize(
    ("text", "text_format"),
    [
        (NO_STOPS, "sentences"),
        (NO_STOPS.replace("there", "there.") * 5, "sentences"),
        ("A headline\nIt rained.\nNobody came\n\nSo\nit is.\n", "sentences"),
        ("今天天气好。\n我们走。\n\n他在城里。\n很好！\n", "sentences"),
        ("今天天气好。我们走。\n\n他在城里。很好！\n", "prose"),
        ("โสตวอิจ บดกชเท ลโีอรง\n\nดุผขผิ พโชขง\n", "prose"),
        ("โสตวอิจบดกชเท\nลโีอรง\n\nดุผขผิพ\nโชขง\n", "sentences"),
        (
            "This text is wrapped at\nsome width. It goes on\nin the next line. So\nit is "
            "prose.\n\nNew\none.\n",
            "prose",
        ),
        ('{"text": "a"}\n', "jsonl"),
        ("{braces} in a text. They are text.\n", "prose"),
        (ARTICLES, "wikiextractor"),
    ],
)
def test_guess_format_of_text_of_the_world(text, text_format):
    assert guess_format(text, "en") == text_format


def test_text_without_full_stops_gives_pairs(tmp_path):
    text = write(tmp_path / "t.txt", (NO_STOPS + "\n") * 5)
    prepared = prepare(
        DataConfig(corpus=(str(text),), min_freq=1, validation_fraction=0.0), tmp_path / "cache"
    )
    assert prepared.train.with_pairs() == 10


def test_split_sentences_thai_and_chinese():
    assert split_sentences("โสตวอิจ บดกชเท", "th") == ["โสตวอิจ", "บดกชเท"]
    assert split_sentences("今天天气好。我们走。", "zh") == ["今天天气好。", "我们走。"]


def test_split_sentences_long_text_is_that_of_its_parts():
    sentences = [f"This is sentence {number}, said Mr. Brown." for number in range(1000)]
    assert split_sentences(" ".join(sentences), "en") == sentences


@pytest.mark.parametrize("repeated", ['"', "字", "word ", "(. "])
def test_split_sentences_long_text_keeps_every_character(repeated):
    text = repeated * 12_000
    sentences = split_sentences(text, "en")
    assert all(sentences)
    assert "".join(sentences).replace(" ", "") == text.replace(" ", "")


def test_chinese_words_are_characters(tmp_path):
    text = write(tmp_path / "t.txt", "今天天气好。我们走。\n\n" * 3)
    config = DataConfig(corpus=(str(text),), min_freq=1, validation_fraction=0.0)
    assert set(prepare(config, tmp_path / "cache").vocab.tokens[5:]) == set("今天气好我们走。")


@pytest.mark.parametrize("tokenizer", ["words", "wordpiece"])
def test_invisible_characters_make_no_words(tmp_path, tokenizer):
    text = "The\u200b cra\u00adne\ufeff \u200d flies\0 .\nIt \u200b is\u2060 large .\n\n"
    path = write(tmp_path / "t.txt", "\ufeff" + text)
    found = documents(path, text_format="sentences", tokenizer=tokenizer)
    assert found == [["the crane flies .", "it is large ."]]


def test_lone_carriage_returns_end_lines(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(b"The crane flies.\rIt is large.\r\rShe left.\rHe came.\r")
    assert len(documents(path)) == 2


def test_compressed_text_under_a_plain_name_is_named(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(bz2.compress(b"The crane flies.\n"))
    with pytest.raises(InputError, match=r"t\.txt: must be text in UTF-8, got bzip2"):
        documents(path)


def test_utf16_text_is_refused_with_command(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes("The crane flies.\n".encode("utf-16"))
    with pytest.raises(InputError, match=r"t\.txt: must be UTF-8, got UTF-16\. Convert it: iconv"):
        documents(path)


def test_one_document_is_refused_with_its_guess(tmp_path):
    path = write(tmp_path / "t.txt", "The crane flies.\nIt is large.\n")
    with pytest.raises(
        InputError, match=r"got 1 in .*\(read as sentences\).*\. Put blank lines between documents"
    ):
        prepare(DataConfig(corpus=(str(path),), validation_fraction=0.0), tmp_path / "cache")
