"""Attention weights against NumPy and transformers, and their picture."""

import dataclasses
import math

import numpy as np
import pytest
from matplotlib.image import imread
from support import reference_bert as reference
from support.compiled_operators import VARIANTS
from support.conversion import huggingface_folder

from gluon_bert.data.tokenizer import Tokenizer
from gluon_bert.data.vocab import Normalization, Vocabulary
from gluon_bert.errors import InputError
from gluon_bert.inference.attention import Attention, attention_of, check_picture
from gluon_bert.model.bert import BERTModel
from gluon_bert.runtime import mx

VOCAB = Vocabulary([f"word{i}" for i in range(40)])
PAIR = (" ".join(f"word{i}" for i in range(9)), " ".join(f"word{i}" for i in range(20, 30)))


def network(config):
    net = BERTModel(len(VOCAB), config)
    net.initialize(ctx=mx.cpu(), seed=0)
    net.hybridize()
    reference.randomise(net)
    return net


@pytest.fixture(scope="module")
def text():
    return Tokenizer(VOCAB, 64, Normalization(True)).text(*PAIR)


def expected(config, parameters, text, monkeypatch):
    """Return the weights in float64: a layer's input is that of the reference, the rest is written out."""
    inputs = []
    attention = reference.attention

    def recorded(p, name, x, *others):
        inputs.append((name, x[0]))
        return attention(p, name, x, *others)

    monkeypatch.setattr(reference, "attention", recorded)
    batch = reference.random_batch([len(text)], len(text), len(VOCAB))
    batch = dataclasses.replace(batch, tokens=text.ids[None], token_types=text.token_types[None])
    reference.encode(config, parameters, batch)
    heads, size = config.num_heads, config.units // config.num_heads
    weights = np.zeros((config.num_layers, heads, len(text), len(text)))
    for layer, (name, x) in enumerate(inputs):
        query, key = (reference.dense(parameters, f"{name}.{which}", x) for which in ("query", "key"))
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = query[:, part] @ key[:, part].T / math.sqrt(size)
            scores += reference.relative_bias(parameters, f"{name}.relative.bias", len(text), head)
            powers = np.exp(scores)
            weights[layer, head] = powers / powers.sum(axis=1, keepdims=True)
    return weights


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_attention_of_equals_numpy(config, text, monkeypatch):
    net = network(config)
    found = attention_of(net, text)
    weights = expected(config, reference.values(net), text, monkeypatch)
    assert found.tokens == text.tokens
    assert found.weights.dtype == np.float32
    np.testing.assert_allclose(found.weights, weights, atol=1e-5)


def test_run_attention_equals_that_of_transformers(tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra test-others")
    transformers = pytest.importorskip("transformers", reason="needs the extra test-others")
    run, folder = huggingface_folder(tmp_path, "larger")
    model = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    pair = ("w1 w2 w3 w4", "w5 w6 w7")
    text = run.reader.text(*pair)
    with torch.no_grad():
        found = model(
            input_ids=torch.tensor(text.ids[None]).long(),
            token_type_ids=torch.tensor(text.token_types[None]).long(),
            output_attentions=True,
        )
    theirs = np.concatenate([each.numpy() for each in found.attentions])
    np.testing.assert_allclose(run.attention(pair).weights, theirs, atol=1e-5)


@pytest.mark.parametrize(("layers", "heads", "tokens"), [(2, 2, 6), (1, 1, 2), (12, 12, 30), (1, 2, 400)])
def test_save_draws_every_weight_in_a_bounded_picture(layers, heads, tokens, tmp_path):
    weights = np.full((layers, heads, tokens, tokens), 1 / tokens, np.float32)
    Attention([f"token{i}" for i in range(tokens)], weights).save(tmp_path / "picture.png")
    height, width, _ = imread(tmp_path / "picture.png").shape
    assert max(height, width) < 5000
    assert min(height / layers, width / heads) > min(tokens, 100)


@pytest.mark.parametrize(
    ("name", "problem"), [("a.jpeg", "must end in .png"), ("no/a.png", "folder that exists")]
)
def test_check_picture_refuses_other_files(name, problem, tmp_path):
    with pytest.raises(InputError, match=problem):
        check_picture(tmp_path / name)
