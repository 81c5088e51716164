"""Parameter files of GluonNLP and D2L: the same numbers there and here."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys

import convert
import numpy as np
import pytest
from conftest import ROOT
from support import reference_bert as reference
from support.conversion import (
    SIZES,
    VOCAB_SIZE,
    WORDS,
    a_batch,
    a_run,
    assert_bits,
    assert_same,
    both_sizes,
    configured,
    converted,
    real,
)

from gluon_bert.conversion.converter import network
from gluon_bert.conversion.mxnet_params import read_parameters
from gluon_bert.conversion.weight_names import D2L, GLUONNLP
from gluon_bert.data.vocab import Vocabulary
from gluon_bert.data.wordpiece import SPECIAL_TOKENS
from gluon_bert.errors import InputError
from gluon_bert.model.parameters import weights_of
from gluon_bert.run import load_run
from gluon_bert.runtime import mx

# GluonNLP 0.10


def gluonnlp_model(config, vocab_size):
    bert = pytest.importorskip("gluonnlp.model.bert", reason="needs the extra gluonnlp")
    encoder = bert.BERTEncoder(
        num_layers=config.num_layers,
        units=config.units,
        hidden_size=config.ffn_units,
        max_length=config.max_positions,
        num_heads=config.num_heads,
    )
    net = bert.BERTModel(
        encoder, vocab_size, token_type_vocab_size=2, units=config.units, embed_size=config.units
    )
    net.initialize(mx.init.Normal(0.3))
    return net


def theirs_of_gluonnlp(net, batch):
    """What its BERTModel gives, and the gradients of the same loss."""
    rows, positions = batch.masked_positions
    width = np.bincount(rows).max()
    places = np.zeros((len(batch.valid_length), width), np.float32)
    column = np.arange(len(rows)) - np.searchsorted(rows, rows)
    places[rows, column] = positions
    arrays = (batch.tokens, batch.token_types, batch.valid_length, places)
    inputs = [mx.nd.array(array, dtype=np.float32) for array in arrays]
    with mx.autograd.record():
        encoded, _, nsp, mlm = net(*inputs)
        mlm = mx.nd.gather_nd(mlm, mx.nd.array(np.stack([rows, column])))
        labels = mx.nd.array(batch.masked_ids), mx.nd.array(1 - batch.next_sentence_labels)
        loss = sum(
            mx.nd.softmax_cross_entropy(scores, label) / len(label)
            for scores, label in zip((mlm, nsp), labels)
        )
    loss.backward()
    gradients = {n: p.grad().asnumpy() for n, p in net._collect_params_with_prefix().items()}
    del gradients["decoder.3.weight"]  # that of the embeddings, to which it is tied
    return (real(encoded.asnumpy(), batch), mlm.asnumpy(), nsp.asnumpy()[:, ::-1]), gradients


@both_sizes
def test_gluonnlp_model_converted_gives_same_numbers(size, tmp_path):
    nlp = pytest.importorskip("gluonnlp", reason="needs the extra gluonnlp")
    config, batch = configured(size), a_batch(size)
    net = gluonnlp_model(config, VOCAB_SIZE)
    net(*(mx.nd.ones((1, 3)), mx.nd.zeros((1, 3)), mx.nd.array([3]), mx.nd.array([[1]])))
    reference.randomise(net, 4)
    net.save_parameters(str(tmp_path / "theirs.params"))
    tokens = [*SPECIAL_TOKENS, *WORDS]
    # Its own vocabulary class, whose JSON is what its users have.
    vocab = nlp.vocab.BERTVocab(dict.fromkeys(WORDS, 1), token_to_idx={t: i for i, t in enumerate(tokens)})
    (tmp_path / "vocab.json").write_text(vocab.to_json())
    converted("--from", "gluonnlp", tmp_path / "theirs.params", tmp_path / "vocab.json",
              "--num-heads", config.num_heads, "--to", tmp_path / "run")  # fmt: skip
    run = load_run(tmp_path / "run")
    assert run.net.config == dataclasses.replace(config, dropout=0.1)
    found = theirs_of_gluonnlp(net, batch)
    without_dropout = network(weights_of(run.net), VOCAB_SIZE, config)
    assert_same(without_dropout, batch, *found, GLUONNLP)

    converted("--from", tmp_path / "run", "--to", "gluonnlp", tmp_path / "again")
    other = gluonnlp_model(config, VOCAB_SIZE)
    other.load_parameters(str(tmp_path / "again" / "bert.params"))
    for name, parameter in net._collect_params_with_prefix().items():
        back = other._collect_params_with_prefix()[name].data().asnumpy()
        assert back.tobytes() == parameter.data().asnumpy().tobytes()


# D2L's model


def d2l_model(config, batch, folder, load=""):
    """The parameter file of D2L's model, what it gives, and its gradients; loaded or drawn."""
    if importlib.util.find_spec("d2l") is None:
        pytest.skip("needs the package d2l 0.17, installed without what it asks for")
    folder.mkdir(exist_ok=True)
    sizes = {name: getattr(config, name) for name in SIZES["small"]}
    arrays = dataclasses.asdict(batch)
    np.savez(folder / "job.npz", load=str(load), vocab_size=VOCAB_SIZE, **sizes, **arrays)
    command = [sys.executable, str(ROOT / "tests" / "support" / "d2l_model.py"), str(folder / "job.npz")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    given = np.load(folder / "given.npz")
    gradients = {name[5:]: given[name] for name in given.files if name.startswith("grad ")}
    outputs = real(given["encoded"], batch), given["mlm"], given["nsp"]
    return folder / "theirs.params", outputs, gradients


@both_sizes
def test_d2l_model_converted_gives_same_numbers(size, tmp_path):
    config, batch = configured(size, "d2l"), a_batch(size)
    path, given, gradients = d2l_model(config, batch, tmp_path / "one")
    (tmp_path / "vocab.txt").write_text("\n".join(Vocabulary(WORDS).tokens) + "\n", "utf-8")
    converted("--from", "d2l", path, tmp_path / "vocab.txt", "--num-heads", config.num_heads,
              "--to", tmp_path / "run")  # fmt: skip
    run = load_run(tmp_path / "run")
    assert (run.net.config, run.config.data.lowercase) == (dataclasses.replace(config, dropout=0.2), True)
    assert_same(network(weights_of(run.net), VOCAB_SIZE, config), batch, given, gradients, D2L)

    converted("--from", tmp_path / "run", "--to", "d2l", tmp_path / "again")
    with mx.util.np_shape(True):
        before, after = (mx.nd.load(str(p)) for p in (path, tmp_path / "again" / "bert.params"))
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert array.asnumpy().tobytes() == after[name].asnumpy().tobytes()
    _, again, _ = d2l_model(config, batch, tmp_path / "two", load=tmp_path / "again" / "bert.params")
    for one, other in zip(given, again):
        np.testing.assert_array_equal(one, other)


def test_num_heads_missing_is_refused(tmp_path, capsys):
    a_run(tmp_path / "run", configured("small", "d2l"), Vocabulary(WORDS))
    converted("--from", tmp_path / "run", "--to", "d2l", tmp_path / "theirs")
    paths = [str(tmp_path / "theirs" / name) for name in ("bert.params", "vocab.json")]
    assert convert.main(["--from", "d2l", *paths, "--to", str(tmp_path / "back")]) == 2
    assert "--num-heads must be given" in capsys.readouterr().err
    converted("--from", "d2l", *paths, "--num-heads", 2, "--to", tmp_path / "back", "--max-seq-length", 9)
    back = load_run(tmp_path / "back")
    assert_bits(load_run(tmp_path / "run").net, back.net)
    assert (back.vocab.tokens, back.config.data.max_seq_length) == (Vocabulary(WORDS).tokens, 9)


def test_own_parameters_as_another_package_are_refused(tmp_path):
    run = a_run(tmp_path / "run", configured("small", "d2l"), Vocabulary(WORDS))
    run.vocab.save(tmp_path / "vocab.json")
    path = tmp_path / "ours.params"
    run.net.save_parameters(str(path))
    for kind in ("d2l", "gluonnlp"):
        with pytest.raises(InputError, match=r"it is another network's and has encoder\.embeddings"):
            read_parameters(kind, path, tmp_path / "vocab.json", num_heads=2)
