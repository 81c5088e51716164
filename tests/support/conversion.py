"""Networks with random weights, and how they are compared with another package's."""

from __future__ import annotations

import dataclasses

import convert
import numpy as np
import pytest

from gluon_bert.checkpoint import save_checkpoint
from gluon_bert.conversion.converter import shapes
from gluon_bert.conversion.weight_names import D2L, GLUONNLP, HUGGINGFACE, TENSORFLOW
from gluon_bert.data.wordpiece import SPECIAL_TOKENS, WordPieceVocabulary
from gluon_bert.model.bert import BERTModel
from gluon_bert.model.parameters import weights_of
from gluon_bert.presets import preset
from gluon_bert.run import create_run, load_run
from gluon_bert.runtime import mx
from gluon_bert.training.device_batch import split_and_load
from gluon_bert.training.losses import pretraining_loss
from support import reference_bert as reference

WORDS = [f"w{i}" for i in range(96)]
VOCAB_SIZE = len(SPECIAL_TOKENS) + len(WORDS)
SIZES = {
    "small": {"num_layers": 2, "units": 16, "num_heads": 2, "ffn_units": 24, "max_positions": 13},
    "larger": {"num_layers": 4, "units": 96, "num_heads": 6, "ffn_units": 200, "max_positions": 40},
}
LENGTHS = {"small": ([3, 12, 7, 5], 12), "larger": ([40, 9, 33], 40)}
both_sizes = pytest.mark.parametrize("size", SIZES)
LAYOUTS = {"huggingface": HUGGINGFACE, "tensorflow": TENSORFLOW, "gluonnlp": GLUONNLP, "d2l": D2L}


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
        loss = pretraining_loss(net, shard)
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
