"""Files with one text per line, and vectors on disk."""

import tracemalloc

import numpy as np
import pytest

from gluon_bert.data.tokenizer import Tokenizer
from gluon_bert.data.vocab import Normalization, Vocabulary
from gluon_bert.errors import InputError
from gluon_bert.inference.predictor import Prediction
from gluon_bert.inference.text_files import count_lines, parse_line, read_lines, vector_file

READER = Tokenizer(Vocabulary(["a", "crane"]), 8, Normalization(lowercase=True))


def answers(count, units=4, pooled=True):
    rng = np.random.default_rng(0)
    for i in range(count):
        text = READER.text("a crane " * (1 + i % 5), truncate=True)
        vectors = rng.standard_normal((len(text), units)).astype(np.float32)
        yield Prediction(text, vectors, vectors[0] * 2 if pooled else None, None, None)


def test_parse_line_reads_a_text_or_a_pair():
    assert parse_line("here", " a crane \n").given == ("a crane",)
    assert parse_line("here", "a crane || it flies\r\n").given == ("a crane", "it flies")


@pytest.mark.parametrize(
    "line, what",
    [
        ("\n", "here: the text must have at least one word"),
        ("a || \n", "here: each text of the pair must have"),
        ("||", "here: each text of"),
        ("a || b || c", "here: must have at most two texts with \\|\\| between them, got 3"),
    ],
)
def test_parse_line_other_lines_are_refused(line, what):
    with pytest.raises(InputError, match=what):
        parse_line("here", line)


def test_read_lines_reads_line_by_line(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_bytes("\ufeffa crane\r\nder Kranich || fliegt, hö".encode())
    assert [line.given for line in read_lines(path)] == [("a crane",), ("der Kranich", "fliegt, hö")]
    assert [line.where for line in read_lines(path)] == [f"{path}, line 1", f"{path}, line 2"]
    assert count_lines(path) == 2


def test_read_lines_names_a_bad_line(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_bytes(b"a crane\n\xff\n")
    with pytest.raises(InputError, match=r"texts.txt, line 2: byte 0xff is not UTF-8"):
        count_lines(path)
    path.write_bytes(b"a crane\n\nagain\n")
    with pytest.raises(InputError, match=r"texts.txt, line 2: the text must have"):
        count_lines(path)
    path.write_bytes(b"")
    with pytest.raises(
        InputError, match=r"input must have one text per line, got .*texts.txt, which is empty"
    ):
        count_lines(path)
    with pytest.raises(InputError, match=r"input must be a file that can be read, got .*nothing"):
        count_lines(tmp_path / "nothing")


@pytest.mark.parametrize("pooled", [True, False])
def test_vector_file_round_trip(tmp_path, pooled):
    path = tmp_path / "vectors.npz"
    with vector_file(path, token_vectors=True) as vectors:
        for answer in answers(7, pooled=pooled):
            vectors.add(answer)
    with np.load(path, allow_pickle=False) as arrays:
        assert ("pooled" in arrays) == pooled
        assert arrays["truncated"].tolist() == [answer.text.truncated for answer in answers(7)]
        assert any(arrays["truncated"])
        starts = arrays["starts"]
        for i, answer in enumerate(answers(7)):
            np.testing.assert_array_equal(arrays["cls"][i], answer.cls)
            np.testing.assert_array_equal(arrays["mean"][i], answer.mean)
            np.testing.assert_array_equal(arrays["vectors"][starts[i] : starts[i + 1]], answer.vectors)
            if pooled:
                np.testing.assert_array_equal(arrays["pooled"][i], answer.pooled)
    assert list(tmp_path.iterdir()) == [path]


def test_vector_file_interrupted_leaves_nothing(tmp_path):
    path = tmp_path / "vectors.npz"
    with pytest.raises(KeyboardInterrupt), vector_file(path) as vectors:
        vectors.add(next(answers(1)))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_vector_file_memory_is_constant(tmp_path):
    path = tmp_path / "vectors.npz"
    tracemalloc.start()
    with vector_file(path) as vectors:
        for answer in answers(2000, units=2048):
            vectors.add(answer)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 40e6
    assert peak < 10e6


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b"\r"], ids=["unix", "windows", "mac"])
def test_read_lines_takes_any_line_end(tmp_path, ending):
    path = tmp_path / "t.txt"
    path.write_bytes(b"\xef\xbb\xbfthe crane" + ending + b"it rained || she left" + ending)
    assert [line.given for line in read_lines(path)] == [("the crane",), ("it rained", "she left")]
    path.write_bytes(b"a" + ending + b"\xff" + ending)
    with pytest.raises(InputError, match=r"t\.txt, line 2: byte 0xff is not UTF-8"):
        list(read_lines(path))
