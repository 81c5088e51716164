"""Text that UTF-8 cannot encode: half a surrogate pair in texts and tokens, Latin-1 file names."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, small_text
from support.runs import SMALL_SIZES

from gluon_bert.data.vocab import Vocabulary
from gluon_bert.data.wordpiece import SPECIAL_TOKENS, WordPieceVocabulary
from gluon_bert.errors import InputError
from gluon_bert.fileio import json_text, write_json

HALF = "\ud83d"


def command(tool, *arguments):
    """Run a tool; returns its exit status, output and messages."""
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / tool, *arguments],
        capture_output=True,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_json_half_pair_comes_back_the_same(tmp_path):
    content = {"text": f"a {HALF} b", "é": ["\ude00\ud83d", "😀"], "path": os.fsdecode(b"caf\xe9")}
    write_json(tmp_path / "t.json", content)
    assert json.loads((tmp_path / "t.json").read_text("utf-8")) == content
    assert json.loads(json_text(content).encode()) == content


@pytest.mark.parametrize("kind", ["words", "wordpiece"])
def test_vocabulary_half_pair_is_refused(tmp_path, kind):
    message = r"token 'po\\ud83d' holds half a surrogate pair"
    if kind == "wordpiece":
        with pytest.raises(InputError, match=message):
            WordPieceVocabulary([*SPECIAL_TOKENS, f"po{HALF}"])
        return
    Vocabulary(["po"]).save(tmp_path / "vocab.json")
    path = tmp_path / "vocab.json"
    path.write_text(path.read_text().replace('"po"', r'"po\ud83d"'))
    with pytest.raises(InputError, match=rf"vocab\.json: {message}"):
        Vocabulary.load(path)


def test_run_with_latin1_names_is_trained_and_encoded(tmp_path):
    corpus, run = (tmp_path / os.fsdecode(name) for name in (b"caf\xe9.txt", b"run\xe9"))
    corpus.write_text(small_text(), "utf-8")
    small = [*SMALL_SIZES, "--num-steps", "1", "--batch-size", "8", "--min-freq", "1"]
    status, _, err = command("pretrain.py", "--corpus", corpus, "--output", run, *small)
    assert status == 0, err
    assert json.loads((run / "config.json").read_text("utf-8"))["data"]["corpus"] == [str(corpus)]
    status, out, err = command("encode.py", run, b"the crane\xe9 <mask>", "--fill-mask", "--json")
    assert status == 0, err
    assert json.loads(out)["tokens"][1:3] == ["the", "crane"]
    exported = tmp_path / os.fsdecode(b"export\xe9")
    status, _, err = command("export.py", run, "--output", exported)
    assert (status, exported.exists()) == (2, False)
    assert "must be a path in UTF-8" in err and err.count("\n") == 1
