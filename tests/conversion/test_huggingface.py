"""BERTs of transformers: the same numbers there and here, the same bits after a round trip."""

from __future__ import annotations

import dataclasses
import json

import convert
import numpy as np
import pytest
import tokenizers
from support.conversion import (
    VOCAB_SIZE,
    WORDS,
    a_batch,
    a_run,
    assert_bits,
    assert_same,
    both_sizes,
    configured,
    converted,
    huggingface_folder,
    real,
    rewrite,
)

from gluon_bert.conversion.converter import network
from gluon_bert.conversion.huggingface import bert_config, read_huggingface
from gluon_bert.conversion.weight_names import HUGGINGFACE
from gluon_bert.data.wordpiece import SPECIAL_TOKENS
from gluon_bert.errors import InputError
from gluon_bert.model.parameters import weights_of
from gluon_bert.run import load_run

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
def test_huggingface_model_gives_same_numbers(size, activation, tmp_path):
    config = configured(size, activation=activation, norm_epsilon=1e-3 if activation == "relu" else 1e-12)
    torch, model = transformers_model(config, VOCAB_SIZE)
    save_transformers(model, tmp_path / "theirs", VOCAB_SIZE, safe=activation != "relu")
    converted("--from", "huggingface", tmp_path / "theirs", "--to", tmp_path / "run")
    run = load_run(tmp_path / "run")
    assert run.net.config == dataclasses.replace(config, init="normal")
    batch = a_batch(size)
    assert_same(run.net, batch, *theirs_of_transformers(torch, model, batch), HUGGINGFACE)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_run_to_huggingface_and_back_is_bit_identical(tied, tmp_path):
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
    model, message = transformers.BertForPreTraining.from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert not any(message[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = transformers.BertTokenizer.from_pretrained(tmp_path / "theirs")
    text = run.reader.text("W3 w5 [MASK]", "w7 nothing")
    assert tokenizer("W3 w5 [MASK]", "w7 nothing")["input_ids"] == text.ids.tolist()
    found, gradients = theirs_of_transformers(torch, model.eval(), a_batch("small"))
    assert_same(run.net, a_batch("small"), found, gradients, HUGGINGFACE)


def test_huggingface_old_names_and_copies_are_read(tmp_path):
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


def test_huggingface_half_precision_becomes_single(tmp_path):
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


def test_vocabulary_rows_without_token_become_unused(tmp_path, capsys):
    _, folder = huggingface_folder(tmp_path)
    tokens = (folder / "vocab.txt").read_text().split()
    (folder / "vocab.txt").write_text("\n".join([*tokens[:-3], "[unused0]"]) + "\n")
    converted("--from", "huggingface", folder, "--to", tmp_path / "back")
    assert "the others are [unused1] to [unused2]" in capsys.readouterr().out
    back = load_run(tmp_path / "back")
    assert back.vocab.tokens[-3:] == ["[unused0]", "[unused1]", "[unused2]"]
    assert back.vocab.special[-3:].all()


@pytest.mark.parametrize("lowercase", [True, False])
def test_vocabulary_in_tokenizer_json_is_read(lowercase, tmp_path):
    run, folder = huggingface_folder(tmp_path)
    tokens = (folder / "vocab.txt").read_text().split()
    (folder / "vocab.txt").unlink()
    (folder / "tokenizer_config.json").unlink()
    tokenizer = tokenizers.BertWordPieceTokenizer(
        {token: i for i, token in enumerate(tokens)}, lowercase=lowercase
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    foreign = read_huggingface(folder)
    assert (foreign.vocab.tokens, foreign.notes) == (run.vocab.tokens, [])
    assert foreign.tokenizer["lowercase"] == lowercase
    with pytest.raises(InputError, match=r"lowercase must be .* or omitted, as the tokenizer in "):
        read_huggingface(folder, lowercase=not lowercase)
    content = json.loads((folder / "tokenizer.json").read_text())
    for change, message in (
        ({"type": "BPE"}, r"model\.type must be 'WordPiece', got 'BPE'"),
        ({"vocab": {"a": 7}}, r"must have at most|has no \[PAD\]"),
    ):
        changed = {**content, "model": {**content["model"], **change}}
        (folder / "tokenizer.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=message):
            read_huggingface(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"must hold vocab\.txt or tokenizer\.json"):
        read_huggingface(folder)


def without(*names):
    return lambda arrays: {n: a for n, a in arrays.items() if not n.startswith(names)}


ZEROS = np.zeros(3, np.float32)


def with_other(**arrays):
    return lambda before: {**before, **{name.replace("__", "."): array for name, array in arrays.items()}}


@pytest.mark.parametrize(
    "change, message",
    [
        (
            without("cls.seq_relationship.bias", "bert.pooler.dense.weight"),
            r"missing: bert\.pooler\.dense\.weight cls\.seq_relationship\.bias",
        ),
        (
            without("bert.encoder.layer.0.output.dense.bias"),
            r"missing: bert\.encoder\.layer\.0\.output\.dense",
        ),
        (with_other(bert__more=ZEROS, qa=ZEROS), r"unexpected: bert\.more$"),
        (
            with_other(cls__seq_relationship__bias=ZEROS),
            r"bias must be \(2,\) in the network as configured, got \(3,\)",
        ),
        (
            with_other(cls__seq_relationship__bias=np.full(2, np.nan, np.float32)),
            "bias contains NaN or infinite values",
        ),
    ],
    ids=["heads", "one", "more", "shape", "nan"],
)
def test_huggingface_wrong_weights_are_all_listed(change, message, tmp_path):
    _, folder = huggingface_folder(tmp_path)
    rewrite(folder, change)
    with pytest.raises(InputError, match=message):
        read_huggingface(folder)


def test_huggingface_missing_heads_are_marked_untrained(tmp_path, capsys):
    run, folder = huggingface_folder(tmp_path)
    rewrite(folder, without("cls."))
    converted("--from", "huggingface", folder, "--to", tmp_path / "back")
    assert "untrained: the masked-language-model head and the next-sentence head" in capsys.readouterr().out
    back = load_run(tmp_path / "back")
    assert back.untrained == ("mlm", "nsp")
    before, after = weights_of(run.net), weights_of(back.net)
    for name in before:
        drawn = name.split(".")[0] in ("mlm", "nsp")
        assert drawn != np.array_equal(before[name], after[name]) or "bias" in name
    rewrite(folder, without("bert.pooler.dense.bias"))
    with pytest.raises(InputError, match=r"missing: bert\.pooler\.dense\.bias$"):
        read_huggingface(folder)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"model_type": "roberta"}, "model_type must be 'bert', got 'roberta'"),
        ({"type_vocab_size": 1}, "type_vocab_size must be 2, got 1, which is another number of segments"),
        ({"position_embedding_type": "relative_key"},
        "position_embedding_type must be 'absolute', got 'relative_key'"), ({"hidden_act": "silu"},
        "hidden_act must be one of gelu, relu, .* got 'silu'"), ({"num_hidden_layers": 0, "hidden_size": "x"},
        "hidden_size must be .* got 'x'\n.*num_hidden_layers must be .* got 0"), ({"vocab_size": 90},
        r"word_embeddings\.weight must be \(90, 16\) .* got \(101, 16\)"), ({"num_attention_heads": 3},
        "num_heads must divide units=16, got 3"),
    ],
)  # fmt: skip
def test_huggingface_other_architecture_is_refused(settings, message, tmp_path):
    _, folder = huggingface_folder(tmp_path)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **settings}))
    with pytest.raises(InputError, match=message):
        read_huggingface(folder)


def test_huggingface_other_vocabulary_is_refused(tmp_path, capsys):
    _, folder = huggingface_folder(tmp_path)
    with (folder / "vocab.txt").open("a") as file:
        file.write("one-more\n")
    arguments = ["--from", "huggingface", str(folder), "--to", str(tmp_path / "back")]
    assert convert.main(arguments) == 2
    assert "must have at most 101 tokens, a row of the weights each, got 102" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"norm": "pre"}, "needs a run trained with --norm post, got --norm pre."),
        ({"embedding_norm": False}, "needs a run trained with --embedding-norm, got --no-embedding-norm"),
        ({"position": "relative-bias"}, "with --position absolute, got --position relative-bias"),
    ],
)
def test_huggingface_without_place_is_refused(changes, message, tmp_path, capsys):
    a_run(tmp_path / "run", configured("small", **changes))
    assert convert.main(["--from", str(tmp_path / "run"), "--to", "huggingface", str(tmp_path / "x")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_huggingface_damaged_safetensors_is_refused(tmp_path):
    _, folder = huggingface_folder(tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors: cannot be read as safetensors"):
        read_huggingface(folder)
