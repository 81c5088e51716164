"""Training clears the mark of an untrained head, from a converted folder to the one written again."""

import encode
import pretrain
import pytest
import safetensors.numpy
from conftest import small_text
from support.conversion import converted, huggingface_folder, rewrite

import gluon_bert as gb
from gluon_bert.errors import InputError


@pytest.fixture(scope="module")
def headless(tmp_path_factory):
    """A run that was converted from a BERT without its pretraining heads, and a text beside it."""
    folder = tmp_path_factory.mktemp("headless")
    _, theirs = huggingface_folder(folder)
    rewrite(theirs, lambda arrays: {n: a for n, a in arrays.items() if not n.startswith("cls.")})
    converted("--from", "huggingface", theirs, "--to", folder / "run")
    words = [f"w{i}" for i in range(96)]
    lines = small_text().splitlines()
    text = "\n".join(" ".join(words[len(word) * 7 % 96] for word in line.split()) for line in lines)
    (folder / "text.txt").write_text(text, "utf-8")
    return folder


def train(headless, output, *flags):
    command = ["--init", str(headless / "run"), "--corpus", str(headless / "text.txt")]
    command += ["--num-steps", "2", "--batch-size", "8", "--min-freq", "1", "--output", str(output), *flags]
    return pretrain.main(command)


def fill_mask(folder):
    return encode.main([str(folder), "--fill-mask", "w1 [MASK] w3"])


def test_pretraining_clears_the_marks_of_its_heads(headless, tmp_path, capsys):
    assert fill_mask(headless / "run") == 2
    assert "untrained" in capsys.readouterr().err
    assert train(headless, tmp_path / "run") == 0
    assert gb.load_run(tmp_path / "run").untrained == ()
    assert fill_mask(tmp_path / "run") == 0
    assert encode.main([str(tmp_path / "run"), "--next", "w1 w2", "w3"]) == 0
    converted("--from", tmp_path / "run", "--to", "huggingface", tmp_path / "theirs")
    names = safetensors.numpy.load_file(str(tmp_path / "theirs" / "model.safetensors"))
    assert {"cls.predictions.bias", "cls.seq_relationship.weight"} <= names.keys()


def test_pretraining_of_masks_alone_leaves_the_other_marks(headless, tmp_path, capsys):
    assert train(headless, tmp_path / "run", "--objective", "mlm") == 0
    assert gb.load_run(tmp_path / "run").untrained == ("pooler", "nsp")
    assert fill_mask(tmp_path / "run") == 0
    capsys.readouterr()
    assert encode.main([str(tmp_path / "run"), "--next", "w1 w2", "w3"]) == 2
    assert "untrained" in capsys.readouterr().err


def test_pretrain_returns_the_marks_of_its_run(headless, tmp_path):
    config = gb.preset("d2l").replace(
        **{"corpus": str(headless / "text.txt"), "objective": "mlm", "num_steps": 1, "batch_size": 8},
        **{"units": 16, "ffn_units": 16, "num_layers": 1, "min_freq": 1},
    )
    run = gb.pretrain(config, tmp_path / "run")
    assert run.untrained == gb.load_run(tmp_path / "run").untrained == ("pooler", "nsp")
    with pytest.raises(InputError, match="untrained"):
        run.next_sentence("w1 w2", "w3")
