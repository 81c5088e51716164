"""Weights of other packages and back: the same numbers in both, the same bits after a round trip."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pickle
import subprocess
import sys
import zipfile

import convert
import numpy as np
import pytest
import reference
import tokenizers
from conftest import ROOT

from gluon_bert.checkpoint import save_checkpoint
from gluon_bert.conversion.converter import network, shapes, to_foreign_names, to_own_names
from gluon_bert.conversion.huggingface import bert_config, read_huggingface
from gluon_bert.conversion.mxnet_params import read_parameters
from gluon_bert.conversion.torch_pickle import read_tensors
from gluon_bert.conversion.weight_names import D2L, GLUONNLP, HUGGINGFACE, TENSORFLOW
from gluon_bert.data.vocab import Vocabulary
from gluon_bert.data.wordpiece import SPECIAL_TOKENS, WordPieceVocabulary
from gluon_bert.errors import InputError
from gluon_bert.export.evaluation_texts import validation_texts
from gluon_bert.inference.predictor import Predictor
from gluon_bert.model.bert import BERTModel
from gluon_bert.model.parameters import weights_of
from gluon_bert.presets import preset
from gluon_bert.run import create_run, load_run
from gluon_bert.runtime import mx
from gluon_bert.training.device_batch import split_and_load
from gluon_bert.training.losses import shard_loss

WORDS = [f"w{i}" for i in range(96)]
VOCAB_SIZE = len(SPECIAL_TOKENS) + len(WORDS)
SIZES = {
    "small": {"num_layers": 2, "units": 16, "num_heads": 2, "ffn_units": 24, "max_positions": 13},
    "larger": {"num_layers": 4, "units": 96, "num_heads": 6, "ffn_units": 200, "max_positions": 40},
}
LENGTHS = {"small": ([3, 12, 7, 5], 12), "larger": ([40, 9, 33], 40)}
both_sizes = pytest.mark.parametrize("size", SIZES)
LAYOUTS = {"huggingface": HUGGINGFACE, "google": TENSORFLOW, "gluonnlp": GLUONNLP, "d2l": D2L}


def configured(size, like="bert-tiny", **changes):
    """A network's configuration without dropout."""
    return dataclasses.replace(preset(like).model, **SIZES[size], dropout=0.0, **changes)


def randomised(config, seed=0):
    """A network with random values in all its parameters."""
    net = BERTModel(len(SPECIAL_TOKENS) + len(WORDS), config)
    net.initialize(ctx=mx.cpu(), seed=seed)
    net.hybridize()
    reference.randomise(net, seed)
    return net


def a_batch(size):
    """Random pairs without [PAD] in them, whose embedding gets no gradient in PyTorch."""
    batch = reference.random_batch(*LENGTHS[size], VOCAB_SIZE)
    return dataclasses.replace(batch, tokens=np.maximum(batch.tokens, 1))


def ours(net, batch):
    """Encoded real tokens, MLM scores, NSP scores, and the gradients by name."""
    arrays = (batch.tokens, batch.token_types, batch.valid_length, batch.masked_positions)
    outputs = [each.asnumpy() for each in net(*(mx.nd.array(a, dtype=np.float32) for a in arrays))]
    (shard,) = split_and_load(batch, [mx.cpu()])
    with mx.autograd.record():
        loss = shard_loss(net, shard)
    loss.total.backward()
    gradients = {n: p.grad().asnumpy() for n, p in net._collect_params_with_prefix().items()}
    return real(outputs[0], batch), outputs[1], outputs[2], gradients


def real(encoded, batch):
    return encoded[np.arange(encoded.shape[1]) < batch.valid_length[:, None]]


def assert_same(net, batch, theirs, gradients, layout):
    """Scores to 1e-5 and gradients to 1e-4 of the other package's, relative to the largest.

    Both sides round to float32, each in its order. Scores may differ by four times what the last digit of
    the weights changes in them, where that is more than 1e-5.
    """
    *scores, own_gradients = ours(net, batch)
    with reference.moved_weights(net):
        moved = ours(net, batch)
    for one, other, after in zip(scores, theirs, moved):
        atol = max(1e-5 * np.abs(other).max(), 4 * np.abs(after - one).max())
        np.testing.assert_allclose(one, other, rtol=0, atol=atol)
    names = list(shapes(net.vocab_size, net.config))
    assert set(gradients) == {layout.name(name) for name in names}
    for name in names:
        expected = layout.to_ours(name, gradients[layout.name(name)])
        assert np.abs(expected).max() > 0
        # A floor for what is 0 but for rounding: the gradient of key biases.
        tolerance = 1e-4 * max(np.abs(expected).max(), 1)
        np.testing.assert_allclose(own_gradients[name], expected, rtol=0, atol=tolerance, err_msg=name)


def a_run(folder, config, vocab=None, seed=3, **data):
    """A run with random weights."""
    like = preset("bert-tiny" if config.embedding_norm else "d2l")
    vocab = vocab or WordPieceVocabulary([*SPECIAL_TOKENS, *WORDS])
    tokenizer = "wordpiece" if isinstance(vocab, WordPieceVocabulary) else "words"
    values = {
        **dataclasses.asdict(config),
        "max_seq_length": config.max_positions,
        "tokenizer": tokenizer,
        **data,
    }
    create_run(folder, like.replace(**values), vocab)
    save_checkpoint(folder, randomised(config, seed), step=7)
    return load_run(folder)


def converted(*arguments):
    assert convert.main([str(argument) for argument in arguments]) == 0


def assert_bits(one, other):
    one, other = weights_of(one), weights_of(other)
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.tobytes() == other[name].tobytes(), name


# The tables of names


@pytest.mark.parametrize("name", LAYOUTS)
def test_names_are_one_to_one_and_back_again(name):
    like = "d2l" if name == "d2l" else "bert-tiny"
    net = randomised(configured("small", like))
    arrays = to_foreign_names(weights_of(net), LAYOUTS[name])
    assert len(arrays) == len(weights_of(net))
    back = to_own_names(arrays, LAYOUTS[name], net.vocab_size, net.config, "here")
    assert_bits(net, network(back, net.vocab_size, net.config))


# transformers


def transformers_model(config, vocab_size):
    """BertForPreTraining with random weights of a size that matters, and torch."""
    torch = pytest.importorskip("torch", reason="needs the extra test-others")
    transformers = pytest.importorskip("transformers", reason="needs the extra test-others")
    torch.manual_seed(5)
    model = transformers.BertForPreTraining(transformers.BertConfig(**bert_config(config, vocab_size))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return torch, model


def theirs_of_transformers(torch, model, batch):
    """What its BertForPreTraining gives, and the gradients of the same loss."""
    real_tokens = torch.arange(batch.tokens.shape[1]) < torch.from_numpy(batch.valid_length)[:, None]
    found = model(
        input_ids=torch.from_numpy(batch.tokens).long(),
        token_type_ids=torch.from_numpy(batch.token_types).long(),
        attention_mask=real_tokens.long(),
        output_hidden_states=True,
    )
    rows, positions = torch.from_numpy(batch.masked_positions).long()
    mlm = found.prediction_logits[rows, positions]
    entropy = torch.nn.functional.cross_entropy
    # Its label 0 is "follows" (see the documentation of next_sentence_label).
    labels = 1 - torch.from_numpy(batch.next_sentence_labels).long()
    loss = entropy(mlm, torch.from_numpy(batch.masked_ids).long()) + entropy(
        found.seq_relationship_logits, labels
    )
    loss.backward()
    nsp = found.seq_relationship_logits.detach().numpy()[:, ::-1]
    encoded = real(found.hidden_states[-1].detach().numpy(), batch)
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    # Of the two names of the bias one is used, by the version and by whether the decoder is tied.
    bias = gradients.pop("cls.predictions.decoder.bias", None)
    gradients.setdefault("cls.predictions.bias", bias)
    return (encoded, mlm.detach().numpy(), nsp), gradients


def save_transformers(model, folder, vocab_size, safe=True, lowercase=True):
    model.save_pretrained(folder)
    if not safe:
        import torch

        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    tokens = [*SPECIAL_TOKENS, *WORDS][:vocab_size]
    (folder / "vocab.txt").write_text("".join(token + "\n" for token in tokens), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lowercase}))


@both_sizes
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_a_model_of_transformers_gives_the_same_numbers(size, activation, tmp_path):
    config = configured(size, activation=activation, norm_epsilon=1e-3 if activation == "relu" else 1e-12)
    torch, model = transformers_model(config, VOCAB_SIZE)
    save_transformers(model, tmp_path / "theirs", VOCAB_SIZE, safe=activation != "relu")
    converted("--from", "huggingface", tmp_path / "theirs", "--to", tmp_path / "run")
    run = load_run(tmp_path / "run")
    assert run.net.config == dataclasses.replace(config, init="normal")
    batch = a_batch(size)
    assert_same(run.net, batch, *theirs_of_transformers(torch, model, batch), HUGGINGFACE)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_run_gives_the_same_numbers_in_transformers_and_comes_back_bit_for_bit(tied, tmp_path):
    config = configured("small", tied_decoder=tied)
    run = a_run(tmp_path / "run", config)
    converted("--from", tmp_path / "run", "--to", "huggingface", tmp_path / "theirs")
    converted("--from", "huggingface", tmp_path / "theirs", "--to", tmp_path / "back")
    back = load_run(tmp_path / "back")
    assert_bits(run.net, back.net)
    assert (back.net.config, back.vocab.tokens, back.step) == (run.net.config, run.vocab.tokens, 0)
    assert (back.config.data.lowercase, back.config.data.max_seq_length) == (True, 13)

    torch = pytest.importorskip("torch", reason="needs the extra test-others")
    transformers = pytest.importorskip("transformers", reason="needs the extra test-others")
    model, told = transformers.BertForPreTraining.from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = transformers.BertTokenizer.from_pretrained(tmp_path / "theirs")
    text = run.reader.text("W3 w5 [MASK]", "w7 nothing")
    assert tokenizer("W3 w5 [MASK]", "w7 nothing")["input_ids"] == text.ids.tolist()
    found, gradients = theirs_of_transformers(torch, model.eval(), a_batch("small"))
    assert_same(run.net, a_batch("small"), found, gradients, HUGGINGFACE)


def huggingface_folder(tmp_path, size="small", **changes):
    """A folder as write_huggingface leaves it, without PyTorch."""
    run = a_run(tmp_path / "original", configured(size, **changes))
    converted("--from", tmp_path / "original", "--to", "huggingface", tmp_path / "theirs")
    return run, tmp_path / "theirs"


def rewrite(folder, change):
    """Change the arrays of a safetensors file."""
    import safetensors.numpy

    path = folder / "model.safetensors"
    arrays = safetensors.numpy.load_file(str(path))
    safetensors.numpy.save_file(change(arrays), str(path))


def test_old_names_buffers_and_copies_are_understood(tmp_path):
    run, folder = huggingface_folder(tmp_path)

    def old(arrays):
        arrays = {
            n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): a
            for n, a in arrays.items()
        }
        arrays["bert.embeddings.position_ids"] = np.arange(13)[None]
        arrays["cls.predictions.decoder.weight"] = arrays["bert.embeddings.word_embeddings.weight"].copy()
        arrays["cls.predictions.decoder.bias"] = arrays["cls.predictions.bias"].copy()
        return arrays

    rewrite(folder, old)
    foreign = read_huggingface(folder)
    assert foreign.notes == []
    assert_bits(run.net, network(foreign.weights, len(foreign.vocab), foreign.model))


def test_half_precision_becomes_single_and_is_told(tmp_path):
    _, folder = huggingface_folder(tmp_path)
    halves = {}

    def half(arrays):
        halves.update({name: array.astype(np.float16) for name, array in arrays.items()})
        return dict(halves)

    rewrite(folder, half)
    foreign = read_huggingface(folder)
    assert "float16 became float32" in foreign.notes[0]
    name = "encoder.embeddings.tokens.weight"
    np.testing.assert_array_equal(foreign.weights[name], halves[HUGGINGFACE.name(name)].astype(np.float32))


def test_rows_without_a_token_get_the_names_of_unused_ones(tmp_path, capsys):
    _, folder = huggingface_folder(tmp_path)
    tokens = (folder / "vocab.txt").read_text().split()
    (folder / "vocab.txt").write_text("\n".join([*tokens[:-3], "[unused0]"]) + "\n")
    converted("--from", "huggingface", folder, "--to", tmp_path / "back")
    assert "the others are named [unused1] to [unused2]" in capsys.readouterr().out
    back = load_run(tmp_path / "back")
    assert back.vocab.tokens[-3:] == ["[unused0]", "[unused1]", "[unused2]"]
    assert back.vocab.special[-3:].all()


@pytest.mark.parametrize("lowercase", [True, False])
def test_the_vocabulary_may_stand_in_tokenizer_json(lowercase, tmp_path):
    run, folder = huggingface_folder(tmp_path)
    tokens = (folder / "vocab.txt").read_text().split()
    (folder / "vocab.txt").unlink()
    (folder / "tokenizer_config.json").unlink()
    tokenizer = tokenizers.BertWordPieceTokenizer(
        {token: i for i, token in enumerate(tokens)}, lowercase=lowercase
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    foreign = read_huggingface(folder)
    assert (foreign.vocab.tokens, foreign.lowercase, foreign.notes) == (run.vocab.tokens, lowercase, [])
    with pytest.raises(InputError, match=r"the tokenizer in .* says the contrary"):
        read_huggingface(folder, lowercase=not lowercase)
    content = json.loads((folder / "tokenizer.json").read_text())
    for change, told in (
        ({"type": "BPE"}, "not WordPiece"),
        ({"vocab": {"a": 7}}, "are not 0, 1, 2 and so on"),
    ):
        changed = {**content, "model": {**content["model"], **change}}
        (folder / "tokenizer.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=told):
            read_huggingface(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"has neither vocab\.txt nor tokenizer\.json"):
        read_huggingface(folder)


def without(*names):
    return lambda arrays: {n: a for n, a in arrays.items() if not n.startswith(names)}


ZEROS = np.zeros(3, np.float32)


def with_other(**arrays):
    return lambda before: {**before, **{name.replace("__", "."): array for name, array in arrays.items()}}


@pytest.mark.parametrize(
    "change, told",
    [
        (
            without("cls.seq", "bert.pooler"),
            r"missing: bert\.pooler\.dense\.weight bert\.pooler\.dense\.bias "
            r"cls\.seq_relationship\.weight cls\.seq_relationship\.bias; --init-missing-heads yes",
        ),
        (
            without("bert.encoder.layer.0.output.dense.bias"),
            r"missing: bert\.encoder\.layer\.0\.output\.dense",
        ),
        (with_other(bert__more=ZEROS, qa=ZEROS), r"unexpected: bert\.more qa"),
        (with_other(cls__seq_relationship__bias=ZEROS), r"bias is \(3,\), where .* has \(2,\)"),
        (
            with_other(cls__seq_relationship__bias=np.full(2, np.nan, np.float32)),
            "bias contains NaN or infinite values",
        ),
    ],
    ids=["heads", "one", "more", "shape", "nan"],
)
def test_weights_that_do_not_fit_are_all_listed(change, told, tmp_path):
    _, folder = huggingface_folder(tmp_path)
    rewrite(folder, change)
    with pytest.raises(InputError, match=told):
        read_huggingface(folder)


def test_heads_that_are_missing_as_a_whole_are_drawn_when_asked(tmp_path):
    run, folder = huggingface_folder(tmp_path)
    rewrite(folder, without("cls."))
    converted("--from", "huggingface", folder, "--to", tmp_path / "back", "--init-missing-heads", "yes")
    before, after = weights_of(run.net), weights_of(load_run(tmp_path / "back").net)
    for name in before:
        drawn = name.split(".")[0] in ("mlm", "nsp")
        assert drawn != np.array_equal(before[name], after[name]) or "bias" in name
    rewrite(folder, without("bert.pooler.dense.bias"))
    with pytest.raises(InputError, match=r"missing: bert\.pooler\.dense\.bias$"):
        read_huggingface(folder, init_missing_heads=True)


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"model_type": "roberta"}, "model_type 'roberta': is another network"),
        ({"type_vocab_size": 1}, "type_vocab_size 1: is another number of segments"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
        ({"hidden_act": "silu"}, "hidden_act 'silu': must be one of gelu, relu"),
        ({"num_hidden_layers": 0, "hidden_size": "x"}, "hidden_size 'x': .*\n.*num_hidden_layers 0: must be"),
        ({"vocab_size": 90}, r"word_embeddings\.weight is \(101, 16\), where .* has \(90, 16"),
        ({"num_attention_heads": 3}, "--num-heads 3: must divide --units 16"),
    ],
)  # fmt: skip
def test_another_architecture_is_refused_in_words(settings, told, tmp_path):
    _, folder = huggingface_folder(tmp_path)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **settings}))
    with pytest.raises(InputError, match=told):
        read_huggingface(folder)


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path, capsys):
    _, folder = huggingface_folder(tmp_path)
    with (folder / "vocab.txt").open("a") as file:
        file.write("one-more\n")
    arguments = ["--from", "huggingface", str(folder), "--to", str(tmp_path / "back")]
    assert convert.main(arguments) == 2
    assert "has 102 tokens, where the weights have rows for 101" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    "changes, told",
    [({"norm": "pre"}, "--norm pre"), ({"embedding_norm": False}, "--embedding-norm no")],
)
def test_what_transformers_has_no_place_for_is_refused(changes, told, tmp_path, capsys):
    a_run(tmp_path / "run", configured("small", **changes))
    assert convert.main(["--from", str(tmp_path / "run"), "--to", "huggingface", str(tmp_path / "x")]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_damaged_safetensors_file_is_told(tmp_path):
    _, folder = huggingface_folder(tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors: cannot be read as safetensors"):
        read_huggingface(folder)


# pytorch_model.bin, without PyTorch


class Evil:
    def __reduce__(self):
        return (print, ("this ran",))


def a_bin(path, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/data/0", np.arange(6, dtype="<f4").tobytes())


def test_a_bin_that_would_run_something_runs_nothing(tmp_path, capsys):
    a_bin(tmp_path / "x.bin", pickle.dumps({"a": Evil()}))
    with pytest.raises(
        InputError, match=r"it asks for (builtins|__builtin__)\.print, which weights do not need"
    ):
        read_tensors(tmp_path / "x.bin")
    assert capsys.readouterr().out == ""


def tensor_pickle(offset, size, stride):
    """What torch.save writes for one tensor, spelt out."""
    return (
        b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage"
        b"ctorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQ"
        + b"".join(_pickled(each) for each in (offset, size, stride))
        + b"\x89}tRs."
    )


def _pickled(value):
    if isinstance(value, int):
        return b"J" + np.int32(value).tobytes()
    return b"(" + b"".join(_pickled(each) for each in value) + b"t"


def test_tensors_of_a_bin_are_read_with_offset_and_stride(tmp_path):
    a_bin(tmp_path / "x.bin", tensor_pickle(1, (2, 2), (1, 2)))
    np.testing.assert_array_equal(read_tensors(tmp_path / "x.bin")["a"], [[1, 3], [2, 4]])


@pytest.mark.parametrize("offset, size, stride", [(3, (4,), (1,)), (-1, (2,), (1,)), (0, (2,), (-1,))])
def test_a_tensor_outside_its_storage_is_refused(offset, size, stride, tmp_path):
    a_bin(tmp_path / "x.bin", tensor_pickle(offset, size, stride))
    with pytest.raises(InputError, match="reaches outside its storage"):
        read_tensors(tmp_path / "x.bin")


def test_what_is_no_bin_is_told(tmp_path):
    (tmp_path / "x.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError, match=r"is not a file that torch\.save of PyTorch 1\.6 or later wrote"):
        read_tensors(tmp_path / "x.bin")


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
def test_a_model_of_gluonnlp_gives_the_same_numbers(size, tmp_path):
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


# The book's model


def books_model(config, batch, folder, load=""):
    """The parameter file of the book's model, what it gives, and its gradients; loaded or drawn."""
    if importlib.util.find_spec("d2l") is None:
        pytest.skip("needs the package d2l 0.17, installed without what it asks for")
    folder.mkdir(exist_ok=True)
    sizes = {name: getattr(config, name) for name in SIZES["small"]}
    arrays = dataclasses.asdict(batch)
    np.savez(folder / "job.npz", load=str(load), vocab_size=VOCAB_SIZE, **sizes, **arrays)
    command = [sys.executable, str(ROOT / "tests" / "d2l_model.py"), str(folder / "job.npz")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    given = np.load(folder / "given.npz")
    gradients = {name[5:]: given[name] for name in given.files if name.startswith("grad ")}
    outputs = real(given["encoded"], batch), given["mlm"], given["nsp"]
    return folder / "theirs.params", outputs, gradients


@both_sizes
def test_the_books_model_gives_the_same_numbers(size, tmp_path):
    config, batch = configured(size, "d2l"), a_batch(size)
    path, given, gradients = books_model(config, batch, tmp_path / "one")
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
    _, again, _ = books_model(config, batch, tmp_path / "two", load=tmp_path / "again" / "bert.params")
    for one, other in zip(given, again):
        np.testing.assert_array_equal(one, other)


def test_the_number_of_heads_must_be_said(tmp_path, capsys):
    a_run(tmp_path / "run", configured("small", "d2l"), Vocabulary(WORDS))
    converted("--from", tmp_path / "run", "--to", "d2l", tmp_path / "theirs")
    paths = [str(tmp_path / "theirs" / name) for name in ("bert.params", "vocab.json")]
    assert convert.main(["--from", "d2l", *paths, "--to", str(tmp_path / "back")]) == 2
    assert "--num-heads" in capsys.readouterr().err
    converted("--from", "d2l", *paths, "--num-heads", 2, "--to", tmp_path / "back", "--max-seq-length", 9)
    back = load_run(tmp_path / "back")
    assert_bits(load_run(tmp_path / "run").net, back.net)
    assert (back.vocab.tokens, back.config.data.max_seq_length) == (Vocabulary(WORDS).tokens, 9)


def test_a_run_of_the_package_is_no_parameter_file_of_another(tmp_path):
    run = a_run(tmp_path / "run", configured("small", "d2l"), Vocabulary(WORDS))
    run.vocab.save(tmp_path / "vocab.json")
    path = tmp_path / "ours.params"
    run.net.save_parameters(str(path))
    for kind in ("d2l", "gluonnlp"):
        with pytest.raises(InputError, match=r"it is another network's; it has encoder\.embeddings"):
            read_parameters(kind, path, tmp_path / "vocab.json", num_heads=2)


# TensorFlow's checkpoints


def google_folder(folder, weights, config, vocab_size=VOCAB_SIZE):
    """A folder as google-research/bert publishes it, written by TensorFlow with its optimizer's variables."""
    tf = pytest.importorskip("tensorflow", reason="needs the extra test-others")
    folder.mkdir()
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        values = {**weights, "bert/pooler/dense/kernel/adam_m": np.zeros((2, 2), np.float32)}
        variables = [tf.compat.v1.Variable(value, name=name) for name, value in values.items()]
        variables.append(tf.compat.v1.Variable(3, name="global_step"))
        session.run(tf.compat.v1.global_variables_initializer())
        saver = tf.compat.v1.train.Saver(variables)
        saver.save(session, str(folder / "bert_model.ckpt"), write_meta_graph=False)
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": config.units,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.ffn_units,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": 2,
        "initializer_range": 0.02,
    }
    (folder / "bert_config.json").write_text(json.dumps(settings))
    (folder / "vocab.txt").write_text("".join(t + "\n" for t in [*SPECIAL_TOKENS, *WORDS]))
    return folder


def google_forward(weights, config, batch):
    """What google-research/bert computes, in TensorFlow, by its names: scores, and gradients of the loss."""
    import tensorflow as tf

    v = {name: tf.Variable(tf.cast(value, tf.float64)) for name, value in weights.items()}
    with tf.GradientTape() as tape:
        found = _google_scores(tf, v, config, batch)
        entropy = tf.nn.sparse_softmax_cross_entropy_with_logits
        # Its label 1 is a random second segment.
        losses = entropy(batch.masked_ids, found[1]), entropy(1 - batch.next_sentence_labels, found[2])
        loss = sum(tf.reduce_mean(each) for each in losses)
    gradients = {n: tf.convert_to_tensor(g).numpy() for n, g in tape.gradient(loss, v).items()}
    encoded, mlm, nsp = (each.numpy() for each in found)
    return (real(encoded, batch), mlm, nsp[:, ::-1]), gradients


def _google_scores(tf, v, config, batch):
    def dense(x, name):
        return x @ v[f"{name}/kernel"] + v[f"{name}/bias"]

    def norm(x, name):
        mean, variance = tf.nn.moments(x, [-1], keepdims=True)
        x = (x - mean) / tf.sqrt(variance + 1e-12)
        return x * v[f"{name}/gamma"] + v[f"{name}/beta"]

    def gelu(x):
        return 0.5 * x * (1 + tf.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    rows, length = batch.tokens.shape
    e = "bert/embeddings"
    x = tf.all_gather(v[f"{e}/word_embeddings"], batch.tokens)
    x += (
        tf.all_gather(v[f"{e}/token_type_embeddings"], batch.token_types)
        + v[f"{e}/position_embeddings"][:length]
    )
    x = norm(x, f"{e}/LayerNorm")
    padding = -1e4 * (np.arange(length) >= batch.valid_length[:, None]).astype(float)[:, None, None]
    for i in range(config.num_layers):
        layer = f"bert/encoder/layer_{i}"

        def heads(name, x=x, layer=layer):
            split = tf.reshape(
                dense(x, f"{layer}/attention/self/{name}"), (rows, length, config.num_heads, -1)
            )
            return tf.transpose(split, (0, 2, 1, 3))

        scores = tf.matmul(heads("query"), heads("key"), transpose_b=True)
        scores = scores / np.sqrt(config.units // config.num_heads) + padding
        context = tf.transpose(tf.nn.softmax(scores) @ heads("value"), (0, 2, 1, 3))
        context = tf.reshape(context, (rows, length, config.units))
        x = norm(x + dense(context, f"{layer}/attention/output/dense"), f"{layer}/attention/output/LayerNorm")
        inside = gelu(dense(x, f"{layer}/intermediate/dense"))
        x = norm(x + dense(inside, f"{layer}/output/dense"), f"{layer}/output/LayerNorm")
    masked = tf.gather_nd(x, batch.masked_positions.T)
    masked = norm(
        gelu(dense(masked, "cls/predictions/transform/dense")), "cls/predictions/transform/LayerNorm"
    )
    mlm = tf.matmul(masked, v[f"{e}/word_embeddings"], transpose_b=True) + v["cls/predictions/output_bias"]
    pooled = tf.tanh(dense(x[:, 0], "bert/pooler/dense"))
    nsp = tf.matmul(pooled, v["cls/seq_relationship/output_weights"], transpose_b=True)
    return x, mlm, nsp + v["cls/seq_relationship/output_bias"]


def google_weights(config):
    """Random weights under the names of google-research/bert."""
    rng = np.random.default_rng(8)
    units, inside = config.units, config.ffn_units
    sizes = {
        "bert/embeddings/word_embeddings": (VOCAB_SIZE, units),
        "bert/embeddings/token_type_embeddings": (2, units),
        "bert/embeddings/position_embeddings": (config.max_positions, units),
        "cls/predictions/output_bias": (VOCAB_SIZE,),
        "cls/seq_relationship/output_weights": (2, units),
        "cls/seq_relationship/output_bias": (2,),
    }
    norms = ["bert/embeddings/LayerNorm", "cls/predictions/transform/LayerNorm"]
    dense = {"bert/pooler/dense": (units, units), "cls/predictions/transform/dense": (units, units)}
    for i in range(config.num_layers):
        layer = f"bert/encoder/layer_{i}"
        norms += [f"{layer}/attention/output/LayerNorm", f"{layer}/output/LayerNorm"]
        for name in ("attention/self/query", "attention/self/key", "attention/self/value"):
            dense[f"{layer}/{name}"] = (units, units)
        dense[f"{layer}/attention/output/dense"] = (units, units)
        dense[f"{layer}/intermediate/dense"] = (units, inside)
        dense[f"{layer}/output/dense"] = (inside, units)
    for name in norms:
        sizes.update({f"{name}/gamma": (units,), f"{name}/beta": (units,)})
    for name, (wide, out) in dense.items():
        sizes.update({f"{name}/kernel": (wide, out), f"{name}/bias": (out,)})
    return {
        name: rng.normal(float(name.endswith("gamma")), 0.2, shape).astype(np.float32)
        for name, shape in sizes.items()
    }


@both_sizes
def test_a_checkpoint_of_google_gives_the_same_numbers(size, tmp_path, capsys):
    config, batch = configured(size, activation="gelu_tanh"), a_batch(size)
    weights = google_weights(config)
    folder = google_folder(tmp_path / "theirs", weights, config)
    converted("--from", "google", folder, "--to", tmp_path / "run")
    assert '"gelu" is taken for gelu_tanh (--gelu)' in capsys.readouterr().out
    run = load_run(tmp_path / "run")
    assert run.net.config == dataclasses.replace(config, dropout=0.1)
    found = google_forward(weights, config, batch)
    assert_same(network(weights_of(run.net), VOCAB_SIZE, config), batch, *found, TENSORFLOW)
    converted("--from", "google", folder, "--gelu", "exact", "--to", tmp_path / "exact")
    exact = load_run(tmp_path / "exact")
    assert exact.net.config.activation == "gelu"
    assert_bits(run.net, exact.net)


def test_a_damaged_or_missing_checkpoint_is_told(tmp_path, capsys):
    config = configured("small")
    folder = google_folder(tmp_path / "theirs", google_weights(config), config)
    arguments = ["--from", "google", str(folder), "--to", str(tmp_path / "run")]
    data = next(folder.glob("*.data-*"))
    data.write_bytes(data.read_bytes()[:100])
    assert convert.main(arguments) == 2
    assert "bert_model.ckpt: cannot be read as a checkpoint" in capsys.readouterr().err
    for path in folder.glob("*.index"):
        path.unlink()
    assert convert.main(arguments) == 2
    assert "bert_model.ckpt.index is missing" in capsys.readouterr().err


# The command


@pytest.mark.parametrize(
    "arguments, told",
    [
        ("--from a --to b", "--from and --to: both are runs"),
        ("--from huggingface a --to google b", "--to google b: google can only be read"),
        ("--from huggingface a --to d2l b", "neither is a run"),
        ("--from pytorch a --to b", "--from pytorch a: pytorch is no kind; they are huggingface, google"),
        ("--from gluonnlp a --to b", "--from gluonnlp a: must be gluonnlp PARAMS VOCAB"),
        ("--from huggingface a --num-heads 2 --to b", "--num-heads 2: is for --from gluonnlp and d2l"),
        ("--from a --to huggingface b --lowercase no", "--lowercase: a run has its own"),
        ("--from huggingface nowhere --to b", "nowhere/config.json: cannot be read"),
        ("--from huggingface a --checkpoint best --to b", "--checkpoint best: is for --from a run"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert convert.main(arguments.split()) == 2
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "package, kind, told",
    [
        ("safetensors.numpy", "huggingface", "needs the package safetensors: pip install -e '.[convert]'"),
        ("tensorflow", "google", "is read by TensorFlow: pip install -e '.[convert-google]'"),
    ],
)
def test_a_package_that_is_missing_is_named(package, kind, told, tmp_path, monkeypatch, capsys):
    _, folder = huggingface_folder(tmp_path)
    (folder / "bert_config.json").write_text((folder / "config.json").read_text())
    (folder / "bert_model.ckpt.index").write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)
    assert convert.main(["--from", kind, str(folder), "--to", str(tmp_path / "run")]) == 2
    assert told in capsys.readouterr().err


def test_a_folder_that_is_taken_is_not_written_over(tmp_path, capsys):
    _, folder = huggingface_folder(tmp_path)
    for arguments in (("--from", "huggingface", folder, "--to", tmp_path / "original"),
                      ("--from", tmp_path / "original", "--to", "huggingface", folder)):  # fmt: skip
        assert convert.main([str(each) for each in arguments]) == 2
        assert "--to" in capsys.readouterr().err


def test_a_converted_run_answers_and_says_that_it_has_no_corpus(tmp_path):
    _, folder = huggingface_folder(tmp_path)
    converted("--from", "huggingface", folder, "--to", tmp_path / "run")
    run = load_run(tmp_path / "run")
    (answer,) = Predictor.of(run).ask([run.reader.text("w3 [MASK]")])
    assert len(answer.fill_masks(run.vocab)[0]) == 5
    with pytest.raises(InputError, match="the run has no corpus: name a text"):
        validation_texts(run)
