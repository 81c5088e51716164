"""Checkpoints of google-research/bert: the same numbers there and here."""

from __future__ import annotations

import dataclasses
import json

import convert
import numpy as np
import pytest
from support.conversion import (
    VOCAB_SIZE,
    WORDS,
    a_batch,
    assert_bits,
    assert_same,
    both_sizes,
    configured,
    converted,
    real,
)

from gluon_bert.conversion.converter import network, to_own_names
from gluon_bert.conversion.weight_names import TENSORFLOW
from gluon_bert.data.wordpiece import SPECIAL_TOKENS
from gluon_bert.model.parameters import weights_of
from gluon_bert.run import load_run

# TensorFlow's checkpoints


def tensorflow_folder(folder, weights, config, vocab_size=VOCAB_SIZE):
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


def tensorflow_forward(weights, config, batch):
    """What google-research/bert computes, in TensorFlow, by its names: scores, and gradients of the loss."""
    import tensorflow as tf

    v = {name: tf.Variable(tf.cast(value, tf.float64)) for name, value in weights.items()}
    with tf.GradientTape() as tape:
        found = _tensorflow_scores(tf, v, config, batch)
        entropy = tf.nn.sparse_softmax_cross_entropy_with_logits
        # Its label 1 is a random second segment.
        losses = entropy(batch.masked_ids, found[1]), entropy(1 - batch.next_sentence_labels, found[2])
        loss = sum(tf.reduce_mean(each) for each in losses)
    gradients = {n: tf.convert_to_tensor(g).numpy() for n, g in tape.gradient(loss, v).items()}
    encoded, mlm, nsp = (each.numpy() for each in found)
    return (real(encoded, batch), mlm, nsp[:, ::-1]), gradients


def _tensorflow_scores(tf, v, config, batch):
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
    x = tf.gather(v[f"{e}/word_embeddings"], batch.tokens)
    x += (
        tf.gather(v[f"{e}/token_type_embeddings"], batch.token_types) + v[f"{e}/position_embeddings"][:length]
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


def tensorflow_weights(config):
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
def test_tensorflow_checkpoint_gives_same_numbers(size, tmp_path, capsys):
    config, batch = configured(size, activation="gelu_tanh"), a_batch(size)
    weights = tensorflow_weights(config)
    folder = tensorflow_folder(tmp_path / "theirs", weights, config)
    converted("--from", "tensorflow", folder, "--to", tmp_path / "run")
    assert '"gelu" is read as gelu_tanh (--gelu exact changes that)' in capsys.readouterr().out
    run = load_run(tmp_path / "run")
    assert run.net.config == dataclasses.replace(config, dropout=0.1)
    found = tensorflow_forward(weights, config, batch)
    assert_same(network(weights_of(run.net), VOCAB_SIZE, config), batch, *found, TENSORFLOW)
    converted("--from", "tensorflow", folder, "--gelu", "exact", "--to", tmp_path / "exact")
    exact = load_run(tmp_path / "exact")
    assert exact.net.config.activation == "gelu"
    assert_bits(run.net, exact.net)


def save_checkpoint_of(tf, folder, name, weights, state_name=None):
    """Save weights under a name, with what google-research/bert's training saves beside them."""
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        values = {
            **weights,
            "bert/pooler/dense/kernel/adam_m": np.zeros((2, 2), np.float32),
            "bert/pooler/dense/kernel/adam_v": np.zeros((2, 2), np.float32),
            "beta1_power": np.float32(0.9),
            "beta2_power": np.float32(0.999),
            "loss_scale": np.float32(1024),
        }
        variables = [tf.compat.v1.Variable(value, name=key) for key, value in values.items()]
        variables.append(tf.compat.v1.Variable(3, name="global_step"))
        session.run(tf.compat.v1.global_variables_initializer())
        saver = tf.compat.v1.train.Saver(variables)
        saver.save(session, str(folder / name), write_meta_graph=False, write_state=state_name is not None)


def test_tensorflow_training_folder_gives_the_latest(tmp_path, capsys):
    config = configured("small", activation="gelu_tanh")
    folder = tensorflow_folder(tmp_path / "theirs", tensorflow_weights(config), config)
    import tensorflow as tf

    for path in folder.glob("bert_model.ckpt*"):
        path.unlink()
    (folder / "checkpoint").unlink()
    states = {}
    for step in (10, 20, 5):
        states[step] = {n: a + np.float32(step) for n, a in tensorflow_weights(config).items()}
        save_checkpoint_of(tf, folder, f"model.ckpt-{step}", states[step])
    arguments = ["--from", "tensorflow", str(folder), "--to"]
    assert convert.main([*arguments, str(tmp_path / "none")]) == 2
    assert "holds several checkpoints, model.ckpt-10, model.ckpt-20" in capsys.readouterr().err
    (folder / "checkpoint").write_text(
        'model_checkpoint_path: "/gone/model.ckpt-20"\nall_model_checkpoint_paths: "/gone/model.ckpt-10"\n'
    )
    converted(*arguments, tmp_path / "latest")
    assert "checkpoint: model.ckpt-20" in capsys.readouterr().out
    converted(*arguments, tmp_path / "early", "--step", 5)
    for name, step in (("latest", 20), ("early", 5)):
        expected, _ = to_own_names(states[step], TENSORFLOW, VOCAB_SIZE, config, "here")
        found = weights_of(load_run(tmp_path / name).net)
        assert all(np.array_equal(found[each], array) for each, array in expected.items())
    assert convert.main([*arguments, str(tmp_path / "none"), "--step", "7"]) == 2
    assert "--step must be one of 5, 10, 20 for" in capsys.readouterr().err


@pytest.mark.parametrize("berts_names", [True, False])
def test_tensorflow_2_object_based_is_read_or_named(berts_names, tmp_path, capsys):
    config = configured("small", activation="gelu_tanh")
    weights = tensorflow_weights(config)
    folder = tensorflow_folder(tmp_path / "theirs", weights, config)
    import tensorflow as tf

    for path in folder.glob("bert_model.ckpt*"):
        path.unlink()
    prefix = "" if berts_names else "transformer/"
    variables = {str(i): tf.Variable(a, name=prefix + n) for i, (n, a) in enumerate(weights.items())}
    objects = {f"v{i}": variable for i, variable in variables.items()}
    tf.train.Checkpoint(**objects).write(str(folder / "bert_model.ckpt"))
    capsys.readouterr()
    status = convert.main(["--from", "tensorflow", str(folder), "--to", str(tmp_path / "run")])
    if berts_names:
        assert status == 0
        expected, _ = to_own_names(weights, TENSORFLOW, VOCAB_SIZE, config, "here")
        found = weights_of(load_run(tmp_path / "run").net)
        assert all(np.array_equal(found[each], array) for each, array in expected.items())
    else:
        assert status == 2
        shown = capsys.readouterr().err
        assert "is an object-based checkpoint of TensorFlow 2 with other names" in shown
        assert sum(line.startswith("convert: ") for line in shown.splitlines()) == 1


def test_tensorflow_damaged_or_missing_is_refused(tmp_path, capsys):
    config = configured("small")
    folder = tensorflow_folder(tmp_path / "theirs", tensorflow_weights(config), config)
    arguments = ["--from", "tensorflow", str(folder), "--to", str(tmp_path / "run")]
    data = next(folder.glob("*.data-*"))
    data.write_bytes(data.read_bytes()[:100])
    assert convert.main(arguments) == 2
    assert "bert_model.ckpt: cannot be read as a checkpoint" in capsys.readouterr().err
    for path in folder.glob("*.index"):
        path.unlink()
    assert convert.main(arguments) == 2
    assert "bert_model.ckpt.index must be there" in capsys.readouterr().err
