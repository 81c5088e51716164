"""The command convert.py: flags, errors and results."""

from __future__ import annotations

import sys

import convert
import pytest
from support.conversion import (
    converted,
    huggingface_folder,
)

from gluon_bert.errors import InputError
from gluon_bert.export.evaluation_texts import validation_texts
from gluon_bert.inference.predictor import Predictor
from gluon_bert.run import load_run

# The command


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--from a --to b", "--from and --to: both are runs"),
        ("--from huggingface a --to tensorflow b", "--to tensorflow b: tensorflow can only be read"),
        ("--from huggingface a --to d2l b", "neither is a run"),
        ("--from pytorch a --to b", "--from pytorch a: the format must be one of huggingface, tensorflow"),
        ("--from gluonnlp a --to b", "--from gluonnlp a: must be gluonnlp PARAMS VOCAB"),
        (
            "--from huggingface a --num-heads 2 --to b",
            "--num-heads must be omitted unless --from is gluonnlp or d2l: huggingface",
        ),
        (
            "--from a --to huggingface b --no-lowercase",
            "--lowercase must be omitted unless --from is huggingface or tensorflow",
        ),
        ("--from huggingface nowhere --to b", "nowhere/config.json: cannot be read"),
        (
            "--from huggingface a --checkpoint best --to b",
            "--checkpoint must be omitted unless --from is a run",
        ),
    ],
)
def test_convert_contradicting_flags_are_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert convert.main(arguments.split()) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "package, kind, message",
    [
        ("safetensors.numpy", "huggingface", "needs the package safetensors: pip install -e '.[convert]'"),
        ("tensorflow", "tensorflow", "needs TensorFlow: pip install -e '.[convert-google]'"),
    ],
)
def test_convert_without_a_package_names_it(package, kind, message, tmp_path, monkeypatch, capsys):
    _, folder = huggingface_folder(tmp_path)
    (folder / "bert_config.json").write_text((folder / "config.json").read_text())
    (folder / "bert_model.ckpt.index").write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)
    assert convert.main(["--from", kind, str(folder), "--to", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err


def test_convert_to_a_taken_folder_is_refused(tmp_path, capsys):
    _, folder = huggingface_folder(tmp_path)
    for arguments in (("--from", "huggingface", folder, "--to", tmp_path / "original"),
                      ("--from", tmp_path / "original", "--to", "huggingface", folder)):  # fmt: skip
        assert convert.main([str(each) for each in arguments]) == 2
        assert "--to" in capsys.readouterr().err


def test_converted_run_predicts_and_has_no_corpus(tmp_path):
    _, folder = huggingface_folder(tmp_path)
    converted("--from", "huggingface", folder, "--to", tmp_path / "run")
    run = load_run(tmp_path / "run")
    (answer,) = Predictor.of(run).predict([run.reader.text("w3 [MASK]")])
    assert len(answer.fill_masks(run.vocab)[0]) == 5
    with pytest.raises(InputError, match="the run has no corpus"):
        validation_texts(run)
