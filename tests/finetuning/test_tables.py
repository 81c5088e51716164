"""Labelled rows of TSV, CSV and JSONL files: the same from each, and every broken line is named."""

import gzip
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
    return read_table(path, "train", header, choose_columns(path, "train", header, texts, label), **options)


def test_read_table_any_format_gives_same_rows(table):
    rows = read(table)
    assert [(*row.texts, row.label) for row in rows] == ROWS
    first = 1 if table.suffix == ".jsonl" else 2
    assert [row.where for row in rows] == [f"{table}, line {n}" for n in (first, first + 1)]


def test_choose_columns_takes_known_and_given_names(table):
    assert choose_columns(table, "train", True) == Columns(("text", "pair"), "label")
    assert choose_columns(table, "train", True, ["pair"], "text") == Columns(("pair",), "text")
    assert read(table, texts=["pair"])[1].texts == ("she left",)


def test_read_table_without_header_numbers_columns(tmp_path):
    path = write(tmp_path / "cola.tsv", "gj04\t1\t\tOur friends won't buy it.\ngj04\t0\t*\tThe more.\n")
    rows = read(path, header=False, texts=["4"], label="2")
    assert [(row.texts, row.label) for row in rows] == [
        (("Our friends won't buy it.",), "1"),
        (("The more.",), "0"),
    ]


def test_csv_reads_multi_line_field_and_bom(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes('\ufefftext,label\r\n"two\r\nlines",a\r\nnext,b\r\n'.encode())
    rows = read(path)
    assert [(row.texts[0], row.label, row.where) for row in rows] == [
        ("two\nlines", "a", f"{path}, line 2"),
        ("next", "b", f"{path}, line 4"),
    ]


def test_jsonl_numbers_and_booleans_become_labels(tmp_path):
    path = write(tmp_path / "t.jsonl", '{"text": "a", "score": 1}\n{"text": "b", "score": true}\n')
    assert [row.label for row in read(path)] == ["1", "true"]


def test_read_table_for_prediction_needs_no_label(tmp_path):
    columns = Columns(("text",), "label")
    path = write(tmp_path / "test.tsv", "text\tother\na\tb\n")
    assert read_table(path, "test", True, columns, labels_needed=False)[0].label is None
    with pytest.raises(
        InputError, match=r"validation .*test\.tsv: has no column 'label', as the training file has"
    ):
        read_table(path, "validation", True, columns)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("t.tsv", "text\tlabel\na\tb\nc\n\td\ne\tf\tg\n", [
            "line 3: has 1 columns, where the header has 2", "line 4: column 'text' is empty",
            "line 5: has 3 columns, where the header has 2"]),
        ("t.tsv", "text\tlabel\n\na\t \n", ["line 2: is blank; remove", "line 3: column 'label' is empty"]),
        ("t.csv", 'text,label\na,b\n"c,d\n',
        ["line 3: has a quotation mark that opens a field and is never closed"]), ("t.csv",
        'text,label\n"a"b,c\n', ["line 2: must end a field after its closing"]), ("t.jsonl",
        '{"text": "a", "label": "b"}\n{"text": \n[1]\n{"text": null, "label": "x"}\n', [
            "line 2: is not JSON", "line 3: must be a JSON object", "line 4: has no 'text'"]),
        ("t.tsv", "text\ttext\na\tb\n", ["line 1: names the column 'text' twice"]),
        ("t.tsv", "words\tlabel\na\tb\n", ["text_columns must name the column with the texts, or both"]),
        ("t.tsv", "text\tclass\na\tb\n", ["label must name the column with the labels; it has"]),
        ("t.tsv", "text\tlabel\n", ["must have a line for each text, got none"]),
        ("t.tsv", "", ["t.tsv: is empty"]),
        ("t.txt", "a", ["must end in .tsv, .csv or .jsonl, got '.txt'"]),
    ],
)  # fmt: skip
def test_read_table_broken_line_is_named(name, content, message, tmp_path):
    with pytest.raises(InputError) as raised:
        read(write(tmp_path / name, content))
    for sentence in message:
        assert sentence in str(raised.value)


def test_read_table_shows_ten_broken_lines(tmp_path):
    path = write(tmp_path / "t.tsv", "text\tlabel\n" + "broken\n" * 25)
    with pytest.raises(InputError) as raised:
        read(path)
    lines = str(raised.value).splitlines()
    assert len(lines) == 11
    assert lines[-1].endswith("and 15 more lines")


def test_unreadable_table_is_refused(tmp_path):
    path = write(tmp_path / "t.tsv", "text\tlabel\na\tb\n")
    with pytest.raises(
        InputError,
        match=r"has no column 'texts'; it has the columns 'text', 'label'\n.*has no column 'class'",
    ):
        read(path, texts=["texts"], label="class")
    path.write_bytes(b"text\tlabel\na\t\xff\n")
    with pytest.raises(InputError, match="line 2: byte 0xff is not UTF-8"):
        read(path)
    with pytest.raises(InputError, match=r"train .*gone\.tsv: cannot be read"):
        read(tmp_path / "gone.tsv")


def labels_of(path, **options):
    return [row.label for row in read(path, **options)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.tsv", "text\tlabel\na\t1\nb\t1.0\nc\t 1 \nd\t+1.\n"),
        ("t.csv", "text,label\na,1\nb,1.00\nc, 1 \nd,1\n"),
        ("t.jsonl", "".join(f'{{"text": "a", "label": {each}}}\n' for each in ("1", "1.0", '"1 "', "1.00"))),
    ],
)
def test_labels_equal_numbers_become_equal(tmp_path, name, content):
    assert labels_of(write(tmp_path / name, content)) == ["1"] * 4


def test_labels_with_leading_zeros_stay_names(tmp_path):
    assert labels_of(write(tmp_path / "t.tsv", "text\tlabel\na\t01\nb\t1\n")) == ["01", "1"]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"], ids=["unix", "windows", "mac"])
@pytest.mark.parametrize("name", ["t.tsv", "T.TSV", "t.csv", "t.Csv", "t.jsonl", "t.JSONL"])
def test_read_table_takes_any_line_end_and_case(tmp_path, name, ending):
    lines = {
        ".tsv": ["text \t label", "a\tyes", "b\tno"],
        ".csv": ["text , label", "a,yes", "b,no"],
        ".jsonl": ['{"text": "a", "label ": "yes"}', '{"text": "b", "label": "no"}'],
    }[f".{name.split('.')[1].lower()}"]
    path = tmp_path / name
    path.write_bytes(("\ufeff" + ending.join([*lines, "", "  ", ""])).encode())
    assert [(*row.texts, row.label) for row in read(path)] == [("a", "yes"), ("b", "no")]


QUOTED = ['He said "hi"', "plain", 'a "quoted" one', "tab\there", "two\nlines"]


@pytest.mark.parametrize("kind", ["tsv", "csv"])
def test_read_table_takes_what_pandas_writes(tmp_path, kind):
    pandas = pytest.importorskip("pandas")
    path, separator = tmp_path / f"t.{kind}", "\t" if kind == "tsv" else ";"
    frame = pandas.DataFrame({"text": QUOTED, "label": list("ababa")})
    frame.to_csv(path, sep=separator, index=False)
    assert [row.texts[0] for row in read(path)] == QUOTED


def test_tsv_quoted_fields_follow_quoting(tmp_path):
    path = write(tmp_path / "t.tsv", 'text\tlabel\n"He said ""hi"""\ta\n"so"\tb\n')
    assert [row.texts[0] for row in read(path)] == ['He said "hi"', "so"]
    columns = Columns(("text",), "label")
    kept = read_table(path, "train", True, columns, quoting="none")
    assert [row.texts[0] for row in kept] == ['"He said ""hi"""', '"so"']


@pytest.mark.parametrize("text", ['"Hello"', '"he said', 'a 5" pipe', '"', '""'])
def test_tsv_plain_quotation_marks_are_kept(tmp_path, text):
    path = write(tmp_path / "t.tsv", f"text\tlabel\n{text}\ta\nit\tb\n")
    assert [row.texts[0] for row in read(path)] == [text, "it"]


def test_tsv_quoted_in_part_keeps_marks_and_warns(tmp_path, caplog):
    path = write(tmp_path / "t.tsv", 'text\tlabel\n"He ""hi"""\ta\n"he said\tb\n')
    assert [row.texts[0] for row in read(path)] == ['"He ""hi"""', '"he said']
    assert "t.tsv: line 2: a field looks quoted" in caplog.text and "quoting=minimal" in caplog.text


def test_csv_separator_and_long_field_are_read(tmp_path):
    long = "word " * 60_000
    path = write(tmp_path / "t.csv", f'text;label\n"{long}";a\n5" pipe, long;b\n')
    assert [row.texts[0] for row in read(path)] == [long.strip(), '5" pipe, long']


def test_csv_nul_character_is_dropped(tmp_path):
    assert read(write(tmp_path / "t.csv", "text,label\nhel\0lo,a\n"))[0].texts == ("hello",)


def test_tsv_line_separator_stays_in_text(tmp_path):
    assert read(write(tmp_path / "t.tsv", "text\tlabel\na\u2028b\x85c\tx\n"))[0].texts == ("a\u2028b\x85c",)


@pytest.mark.parametrize(
    ("line", "column"),
    [('{"text": "a \\ud83d", "label": "x"}', "text"), ('{"text": "a", "label": "x\\ude00"}', "label")],
)
def test_jsonl_half_surrogate_pair_is_refused(tmp_path, line, column):
    path = write(tmp_path / "t.jsonl", '{"text": "\\ud83d\\ude00", "label": "y"}\n' + line + "\n")
    with pytest.raises(InputError, match=f"line 2: column '{column}' holds half a surrogate pair"):
        read(path)


@pytest.mark.parametrize("line, separator", [("sep=;", ";"), ('"sep=|"', "|"), ("sep=\t", "\t")])
def test_csv_with_excels_separator_line_is_read(line, separator, tmp_path):
    rows = "text,label\na,b\nc d,\n".replace(",", separator)
    path = write(tmp_path / "t.csv", f"{line}\r\n{rows}")
    with pytest.raises(InputError, match="line 4: column 'label' is empty"):
        read(path)
    write(path, f"{line}\n{rows[:-1]}e\n")
    assert [(row.texts, row.label) for row in read(path)] == [(("a",), "b"), (("c d",), "e")]


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (gzip.compress(b"text\tlabel\n"), "gzip"),
        (b"PK\3\4\xff", "a zip archive, which Excel's files are too"),
    ],
    ids=["gzip", "zip"],  # those of xdist's workers must be equal, and gzip writes the time
)
def test_table_that_is_not_text_is_named(content, name, tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"must be text in UTF-8, got {name}. Extract the text first"):
        read(path)


def test_utf16_table_is_refused_with_command(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_bytes("text\tlabel\na\tb\n".encode("utf-16"))
    with pytest.raises(InputError, match=r"t\.tsv: must be UTF-8, got UTF-16\. Convert it: iconv"):
        read(path)


def test_glue_columns_have_known_names(tmp_path):
    path = write(tmp_path / "qqp.tsv", "id\tquestion1\tquestion2\tis_duplicate\n0\ta\tb\t1\n")
    assert choose_columns(path, "train", True) == Columns(("question1", "question2"), "is_duplicate")
