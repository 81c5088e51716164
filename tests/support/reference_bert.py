"""BERT in NumPy float64, written from the papers, and random inputs to compare on. Not fast, on purpose.

Where gluon_bert adds a score to padding, this leaves padding out; where it batches, this loops. Parameters
are arrays by their structural names, such as "encoder.layers.0.attend.query.weight".
"""

from __future__ import annotations

import math
from contextlib import contextmanager

import numpy as np

from gluon_bert.data.batch import Batch


def nothing_dropped(place, x):
    """No dropout. Places are numbered: 0 the embeddings, then three a layer, attention weights first."""
    return x


def forward(config, parameters, batch, drop=nothing_dropped):
    """Encoded tokens (B, T, C), MLM scores (M, V) and NSP scores (B, 2) (Devlin et al. 2018, section 3)."""
    p = parameters
    encoded = encode(config, p, batch, drop)
    masked = np.stack([encoded[row, position] for row, position in batch.masked_positions.T])
    x = ACTIVATIONS[config.activation](dense(p, "mlm.transform.dense", masked))
    x = layer_norm(p, "mlm.transform.norm", x, config.norm_epsilon)
    decoder = p["encoder.embeddings.tokens.weight"] if config.tied_decoder else p["mlm.decoder.weight"]
    mlm_scores = product(x, decoder.T) + p["mlm.decoder.bias"]
    pooled = np.tanh(dense(p, "pooler.dense", encoded[:, 0]))
    return encoded, mlm_scores, dense(p, "nsp.dense", pooled)


def encode(config, p, batch, drop=nothing_dropped):
    """Embeddings and layers: a batch -> (B, T, C)."""
    epsilon = config.norm_epsilon
    x = p["encoder.embeddings.tokens.weight"][batch.tokens]
    x = x + p["encoder.embeddings.segments.weight"][batch.token_types]
    x = x + p["encoder.embeddings.positions.weight"][: batch.tokens.shape[1]]
    if config.embedding_norm:
        x = drop(0, layer_norm(p, "encoder.embeddings.norm", x, epsilon))
    for i in range(config.num_layers):
        name = f"encoder.layers.{i}"

        def attend(x, name=name, place=1 + 3 * i):
            heads = attention(p, f"{name}.attend", x, batch.valid_length, config.num_heads, place, drop)
            return drop(place + 1, heads)

        def feed_forward(x, name=name, place=3 + 3 * i):
            hidden = ACTIVATIONS[config.activation](dense(p, f"{name}.feed_forward.expand", x))
            return drop(place, dense(p, f"{name}.feed_forward.project", hidden))

        for sub_layer, norm in ((attend, f"{name}.norm1"), (feed_forward, f"{name}.norm2")):
            if config.norm == "pre":
                x = x + sub_layer(layer_norm(p, norm, x, epsilon))
            else:
                x = layer_norm(p, norm, x + sub_layer(x), epsilon)
    return layer_norm(p, "encoder.norm", x, epsilon) if config.norm == "pre" else x


def attention(p, name, x, lengths, num_heads, place=0, drop=nothing_dropped):
    """Softmax attention, a row and a head at a time, over the real tokens only (Vaswani et al. 2017, 3.2)."""
    size = x.shape[2] // num_heads
    query, key, value = (dense(p, f"{name}.{which}", x) for which in ("query", "key", "value"))
    kept = drop(place, np.ones((len(x), num_heads, x.shape[1], x.shape[1])))
    heads = np.zeros_like(x)
    for row, length in enumerate(lengths):
        for head in range(num_heads):
            part = slice(head * size, (head + 1) * size)
            scores = product(query[row, :, part], key[row, :length, part].T) / math.sqrt(size)
            scores += relative_bias(p, f"{name}.relative.bias", x.shape[1], head)[:, :length]
            weights = np.exp(log_softmax(scores)) * kept[row, head, :, :length]
            heads[row, :, part] = product(weights, value[row, :length, part])
    return dense(p, f"{name}.output", heads)


def relative_bias(p, name, size, head):
    """Return the bias of a head's scores for `size` queries and keys: (T, T), or 0 without relative biases.

    Buckets as in T5's code (Raffel et al. 2020): half of a side's 16 are single distances, the others go up
    to 128 in equal steps of the logarithm. Pairs with position 0 are in a bucket of their own, the last.
    """
    if name not in p:
        return np.zeros((size, size))
    bias = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            distance = abs(j - i)
            bucket = distance
            if distance >= 8:
                steps = 8 * math.log(distance / 8) / math.log(128 / 8)
                bucket = min(8 + math.floor(steps + 1e-9), 15)
            if j > i:
                bucket += 15
            if i == 0 or j == 0:
                bucket = 31
            bias[i, j] = 10 * p[name][bucket, head]
    return bias


def dense(p, name, x):
    """x W' + b."""
    return product(x, p[f"{name}.weight"].T) + p[f"{name}.bias"]


def product(x, y):
    """Of two matrices, or of a stack of them and one; a test may have it round what it multiplies."""
    return x @ y


def layer_norm(p, name, x, epsilon):
    """Ba et al. 2016, equation 4."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return p[f"{name}.gamma"] * centred / np.sqrt(variance + epsilon) + p[f"{name}.beta"]


def gelu(x):
    """x times the normal distribution function (Hendrycks and Gimpel 2016), exact."""
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def relu(x):
    """The positive part."""
    return np.maximum(x, 0)


def gelu_tanh(x):
    """The approximation of GELU (Hendrycks and Gimpel 2016, section 2)."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu}


def log_softmax(scores):
    """Over the last axis."""
    shifted = scores - scores.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def cross_entropy(scores, labels):
    """The sum over rows of -log softmax(scores)[label], in nats."""
    return -sum(row[label] for row, label in zip(log_softmax(np.asarray(scores, np.float64)), labels))


def losses(config, parameters, batch, drop=nothing_dropped):
    """The summed MLM loss, the summed NSP loss, and mean plus mean."""
    _, mlm_scores, nsp_scores = forward(config, parameters, batch, drop)
    mlm, nsp = (
        cross_entropy(mlm_scores, batch.masked_ids),
        cross_entropy(nsp_scores, batch.next_sentence_labels),
    )
    return mlm, nsp, mlm / len(batch.masked_ids) + nsp / len(batch.next_sentence_labels)


def hits(scores, labels):
    """How many rows have their highest score at the label."""
    return int((np.argmax(scores, axis=-1) == labels).sum())


def random_batch(lengths, padded_to, vocab_size, seed=0):
    """A batch of random tokens, rows of these lengths; every row has one to three words to predict."""
    rng = np.random.default_rng(seed)
    lengths = np.array(lengths, dtype=np.int32)
    real = np.arange(padded_to) < lengths[:, None]
    tokens = np.where(real, rng.integers(0, vocab_size, real.shape), 1).astype(np.int32)
    second = np.arange(padded_to) >= (lengths[:, None] + 1) // 2
    chosen = [rng.choice(n, size=rng.integers(1, min(3, n) + 1), replace=False) for n in lengths]
    predictions = [[row, position] for row, places in enumerate(chosen) for position in sorted(places)]
    return Batch(
        tokens,
        (second & real).astype(np.int32),
        lengths,
        np.array(predictions, dtype=np.int32).T,
        rng.integers(0, vocab_size, len(predictions)).astype(np.int32),
        rng.integers(0, 2, len(lengths)).astype(np.int32),
    )


def values(net, dtype=np.float64):
    """The network's parameters by structural name; a shared one is the same array under both names."""
    arrays, seen = {}, {}
    for name, parameter in net._collect_params_with_prefix().items():
        if parameter.name not in seen:
            seen[parameter.name] = parameter.data(parameter.list_ctx()[0]).asnumpy().astype(dtype)
        arrays[name] = seen[parameter.name]
    return arrays


def gradients(net, dtype=np.float64):
    """The gradients on the first context, by structural name."""
    parameters = net._collect_params_with_prefix()
    return {name: p.list_grad()[0].asnumpy().astype(dtype) for name, p in parameters.items()}


def randomise_relative_bias(net, seed=0):
    """Give the biases for distances values, if the network has any; they are zero at first."""
    rng = np.random.default_rng(seed)
    for name, parameter in net._collect_params_with_prefix().items():
        if name.endswith("relative.bias"):
            array = parameter.data(parameter.list_ctx()[0]).copy()
            array[:] = 0.5 * rng.normal(size=parameter.shape).astype(np.float32)
            parameter.set_data(array)


def randomise(net, seed=0):
    """Give every parameter, biases and LayerNorm's included, values that matter in the result."""
    rng = np.random.default_rng(seed)
    for name, parameter in net._collect_params_with_prefix().items():
        noise = rng.normal(size=parameter.shape)
        if name.endswith("weight"):
            value = noise * (0.7 if "embeddings" in name else parameter.shape[-1] ** -0.5)
        else:
            value = 0.2 * noise + name.endswith("gamma")
        # set_data wants an array of MXNet's own; the parameter's says which kind, without importing it.
        array = parameter.data(parameter.list_ctx()[0]).copy()
        array[:] = value.astype(np.float32)
        parameter.set_data(array)


@contextmanager
def moved_weights(net, seed=0):
    """Move each weight by float32's last digit, up or down, until the context ends.

    How far results move tells how well the network is conditioned. Two sides that round in different orders
    differ by a few times as much: a LayerNorm over few units, for instance, divides by a small deviation.
    """
    rng = np.random.default_rng(seed)
    parameters = net.collect_params().values()
    kept = [parameter.data(parameter.list_ctx()[0]).copy() for parameter in parameters]
    for parameter, array in zip(parameters, kept):
        moved = array.copy()
        signs = rng.choice(np.array([-1, 1], np.float32), array.shape)
        moved[:] = array.asnumpy() * (1 + np.finfo(np.float32).eps * signs)
        parameter.set_data(moved)
    try:
        yield
    finally:
        for parameter, array in zip(parameters, kept):
            parameter.set_data(array)
