"""A run's folder: written, read back, refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from gluon_bert.checkpoint import create_run, latest, load_run, save_checkpoint
from gluon_bert.config import preset
from gluon_bert.data.vocab import Vocabulary
from gluon_bert.encoding import encode
from gluon_bert.errors import BadInput
from gluon_bert.model.bert import BERTModel
from gluon_bert.runtime import mx

CONFIG = preset("bert-tiny").replace(units=16, ffn_units=32, num_heads=2, max_positions=16, max_len=16)
VOCAB = Vocabulary(["a", "crane", "is", "flying"])


@pytest.fixture
def net():
    net = BERTModel(len(VOCAB), CONFIG.model)
    net.setup([mx.cpu()], seed=1)
    return net


@pytest.fixture
def run_folder(tmp_path, net):
    folder = tmp_path / "run"
    create_run(folder, CONFIG, VOCAB, {"versions": {}})
    save_checkpoint(folder, net, step=9)
    save_checkpoint(folder, net, step=100)
    return folder


def test_a_run_read_back_is_the_same(run_folder, net):
    run = load_run(run_folder)
    assert (run.config, run.vocab.tokens, run.step) == (CONFIG, VOCAB.tokens, 100)
    ours, theirs = encode(net, VOCAB, ["a", "crane"]), encode(run.net, run.vocab, ["a", "crane"])
    np.testing.assert_array_equal(ours.asnumpy(), theirs.asnumpy())


def test_the_latest_checkpoint_is_that_of_the_highest_step(run_folder):
    (run_folder / "checkpoints" / "step-99999999x.params").write_bytes(b"")
    (run_folder / "checkpoints" / ".step-00000999.params.part").write_bytes(b"")
    assert latest(run_folder) == 100


def test_a_failing_write_leaves_the_checkpoint_before(run_folder, net, monkeypatch):
    def half(name, **options):
        Path(name).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(net, "save_parameters", half)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(run_folder, net, step=100)
    assert sorted(p.name for p in (run_folder / "checkpoints").iterdir()) == [
        "step-00000009.params",
        "step-00000100.params",
    ]
    assert load_run(run_folder).step == 100


def test_a_folder_with_a_run_is_not_written_over(run_folder):
    with pytest.raises(BadInput, match="holds a run already"):
        create_run(run_folder, CONFIG, VOCAB, {})


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"--output .*file/run: cannot be written"):
        create_run(tmp_path / "file" / "run", CONFIG, VOCAB, {})


def test_what_is_no_run_is_told(tmp_path, run_folder):
    with pytest.raises(BadInput, match=r"nowhere: is no run: it has no config\.json"):
        load_run(tmp_path / "nowhere")
    config = json.loads((run_folder / "config.json").read_text())
    for change, told in (
        ({"format": 99}, "format 99, where this gluon_bert reads 1"),
        ({"model": {"unitz": 1}}, r"config\.json: unknown key model\.unitz"),
    ):
        (run_folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(BadInput, match=told):
            load_run(run_folder)


@pytest.mark.parametrize("content", [b"", b"no parameters", None], ids=["empty", "foreign", "truncated"])
def test_damaged_weights_are_told(run_folder, content):
    path = run_folder / "checkpoints" / "step-00000100.params"
    path.write_bytes(path.read_bytes()[:2000] if content is None else content)
    with pytest.raises(BadInput, match=r"step-00000100\.params: cannot be read as the weights"):
        load_run(run_folder)


def test_weights_of_another_size_are_told(run_folder):
    Vocabulary(["a"]).save(run_folder / "vocab.json")
    with pytest.raises(BadInput, match="cannot be read as the weights"):
        load_run(run_folder)


def test_a_run_without_a_checkpoint_is_told(tmp_path):
    create_run(tmp_path / "run", CONFIG, VOCAB, {})
    with pytest.raises(BadInput, match="no checkpoint yet"):
        load_run(tmp_path / "run")
