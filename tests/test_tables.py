"""Labelled rows of TSV, CSV and JSONL files: the same from each, and every broken line told."""

import json

import pytest

from gluon_bert.errors import InputError
from gluon_bert.finetuning.tables import Columns, choose_columns, read_table

ROWS = [('a "quoted" word, and a comma', "ein Wörtchen", "yes"), ("it rained", "she left", "0.5")]


def write(path, text):
    path.write_text(text, "utf-8")
    return path


def csv_field(text):
    return '"' + text.replace('"', '""') + '"'


@pytest.fixture(params=[".tsv", ".csv", ".jsonl"])
def table(request, tmp_path):
    """The same three columns in each format."""
    names = ("text", "pair", "label")
    lines = {
        ".tsv": ["\t".join(row) for row in [names, *ROWS]],
        ".csv": [",".join(map(csv_field, row)) for row in [names, *ROWS]],
        ".jsonl": [json.dumps(dict(zip(names, row))) for row in ROWS],
    }[request.param]
    return write(tmp_path / f"table{request.param}", "\n".join(lines) + "\n")


def read(path, header=True, texts=(), label=None, **options):
    return read_table(
        path, "--train", header, choose_columns(path, "--train", header, texts, label), **options
    )


def test_every_format_gives_the_same_rows(table):
    rows = read(table)
    assert [(*row.texts, row.label) for row in rows] == ROWS
    first = 1 if table.suffix == ".jsonl" else 2
    assert [row.where for row in rows] == [f"{table}, line {n}" for n in (first, first + 1)]


def test_columns_are_chosen_by_name(table):
    assert choose_columns(table, "--train", True) == Columns(("text", "pair"), "label")
    assert choose_columns(table, "--train", True, ["pair"], "text") == Columns(("pair",), "text")
    assert read(table, texts=["pair"])[1].texts == ("she left",)


def test_without_a_header_columns_have_numbers(tmp_path):
    path = write(tmp_path / "cola.tsv", "gj04\t1\t\tOur friends won't buy it.\ngj04\t0\t*\tThe more.\n")
    rows = read(path, header=False, texts=["4"], label="2")
    assert [(row.texts, row.label) for row in rows] == [
        (("Our friends won't buy it.",), "1"),
        (("The more.",), "0"),
    ]


def test_a_csv_field_may_have_lines_and_a_file_a_byte_order_mark(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes('\ufefftext,label\r\n"two\r\nlines",a\r\nnext,b\r\n'.encode())
    rows = read(path)
    assert [(row.texts[0], row.label, row.where) for row in rows] == [
        ("two\nlines", "a", f"{path}, line 2"),
        ("next", "b", f"{path}, line 4"),
    ]


def test_numbers_and_truths_of_json_are_labels(tmp_path):
    path = write(tmp_path / "t.jsonl", '{"text": "a", "score": 1}\n{"text": "b", "score": true}\n')
    assert [row.label for row in read(path)] == ["1", "true"]


def test_rows_to_predict_need_no_label(tmp_path):
    columns = Columns(("text",), "label")
    path = write(tmp_path / "test.tsv", "text\tother\na\tb\n")
    assert read_table(path, "--test", True, columns, labels_needed=False)[0].label is None
    with pytest.raises(
        InputError, match=r"--dev .*test\.tsv: has no column 'label', as the training file has"
    ):
        read_table(path, "--dev", True, columns)


@pytest.mark.parametrize(
    "name, content, told",
    [
        ("t.tsv", "text\tlabel\na\tb\nc\n\td\ne\tf\tg\n", [
            "line 3: has 1 columns, where the header has 2", "line 4: column 'text' is empty",
            "line 5: has 3 columns, where the header has 2"]),
        ("t.tsv", "text\tlabel\n\na\t \n", ["line 2: has 1 columns", "line 3: column 'label' is empty"]),
        ("t.csv", 'text,label\na,b\n"c,d\n', ["line 3: is no line of a CSV"]),
        ("t.csv", 'text,label\n"a"b,c\n', ["line 2: is no line of a CSV"]),
        ("t.jsonl", '{"text": "a", "label": "b"}\n{"text": \n[1]\n{"text": null, "label": "x"}\n', [
            "line 2: is not JSON", "line 3: is no JSON object", "line 4: has no 'text'"]),
        ("t.tsv", "text\ttext\na\tb\n", ["line 1: names the column 'text' twice"]),
        ("t.tsv", "words\tlabel\na\tb\n", ["say with --text which column has the texts, or which two"]),
        ("t.tsv", "text\tclass\na\tb\n", ["say with --label which column has the labels; it has"]),
        ("t.tsv", "text\tlabel\n", ["has no row"]),
        ("t.tsv", "", ["t.tsv: is empty"]),
        ("t.txt", "a", ["must end in .tsv, .csv, .jsonl"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_line(name, content, told, tmp_path):
    with pytest.raises(InputError) as raised:
        read(write(tmp_path / name, content))
    for sentence in told:
        assert sentence in str(raised.value)


def test_of_many_broken_lines_ten_are_told(tmp_path):
    path = write(tmp_path / "t.tsv", "text\tlabel\n" + "broken\n" * 25)
    with pytest.raises(InputError) as raised:
        read(path)
    lines = str(raised.value).splitlines()
    assert len(lines) == 11
    assert lines[-1].endswith("and 15 more lines")


def test_unknown_columns_bytes_and_files_are_told(tmp_path):
    path = write(tmp_path / "t.tsv", "text\tlabel\na\tb\n")
    with pytest.raises(
        InputError, match=r"has no column 'texts'; it has text, label\n.*has no column 'class'"
    ):
        read(path, texts=["texts"], label="class")
    path.write_bytes(b"text\tlabel\na\t\xff\n")
    with pytest.raises(InputError, match="line 2: byte 0xff is not UTF-8"):
        read(path)
    with pytest.raises(InputError, match=r"--train .*gone\.tsv: cannot be read"):
        read(tmp_path / "gone.tsv")
