"""The network against NumPy, against itself in other surroundings, and against published sizes."""

import dataclasses

import numpy as np
import pytest
from support import reference_bert as reference

from gluon_bert.config import ModelConfig
from gluon_bert.errors import InputError
from gluon_bert.model.bert import BERTModel
from gluon_bert.model.dropout import Dropout
from gluon_bert.presets import PRESETS, preset
from gluon_bert.runtime import mx
from gluon_bert.training.device_batch import split_and_load
from gluon_bert.training.losses import pretraining_loss

VOCAB = 23
WORDPIECES = 30522  # the vocabulary of the published uncased English BERT

D2L = ModelConfig(num_layers=2, units=8, ffn_units=12, num_heads=2, dropout=0.3, max_positions=16)
BERT = dataclasses.replace(
    D2L, activation="gelu", embedding_norm=True, tied_decoder=True, norm_epsilon=1e-12, init="normal"
)
VARIANTS = {
    "d2l": D2L,
    "bert": BERT,
    "tanh": dataclasses.replace(BERT, activation="gelu_tanh"),
    "pre": dataclasses.replace(BERT, norm="pre"),
    "pre-untied-relu": dataclasses.replace(D2L, norm="pre"),
    "one-head": dataclasses.replace(D2L, num_heads=1, num_layers=1),
    "four-heads": dataclasses.replace(BERT, num_heads=4, num_layers=3),
    "large-epsilon": dataclasses.replace(BERT, norm_epsilon=0.1),
    "relative": dataclasses.replace(BERT, position="relative-bias"),
    "relative-pre": dataclasses.replace(BERT, norm="pre", num_heads=4, position="relative-bias"),
}
LENGTHS = {"mixed": ([3, 12, 7, 5, 12], 12), "short": ([3, 3], 12), "full": ([9, 9, 9], 9), "alone": ([3], 3)}

every_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
both_kinds = pytest.mark.parametrize("config", [D2L, BERT], ids=["d2l", "bert"])


def build(config, seed=0, hybrid=True):
    """A network with random values in all its parameters."""
    net = BERTModel(VOCAB, config)
    net.initialize(ctx=mx.cpu(), seed=seed)
    net.hybridize()
    reference.randomise(net, seed)
    net.hybridize(active=hybrid, static_alloc=hybrid)
    return net


def inputs(batch):
    arrays = (batch.tokens, batch.token_types, batch.valid_length, batch.masked_positions)
    return [mx.nd.array(array, dtype=np.float32) for array in arrays]


def outputs(net, batch):
    return without_padding(batch, *(output.asnumpy() for output in net(*inputs(batch))))


def without_padding(batch, encoded, *others):
    """The outputs with zeros for the vectors of padding, which mean nothing."""
    real = np.arange(batch.tokens.shape[1]) < batch.valid_length[:, None]
    return [encoded * real[..., None], *others]


def backward(net, batch):
    """The loss of a batch, and its gradients by structural name."""
    (shard,) = split_and_load(batch, [mx.cpu()])
    with mx.autograd.record():
        loss = pretraining_loss(net, shard)
    loss.total.backward()
    return float(loss.total.asscalar()), reference.gradients(net)


def without_dropout(config):
    return dataclasses.replace(config, dropout=0.0)


def assert_close(ours, theirs, tolerance=1e-5):
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


# Against NumPy


@every_variant
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_forward_equals_reference(config, lengths):
    net, batch = build(config), reference.random_batch(*lengths, VOCAB)
    expected = without_padding(batch, *reference.forward(config, reference.values(net), batch))
    for ours, theirs in zip(outputs(net, batch), expected):
        assert ours.dtype == np.float32
        assert ours.shape == theirs.shape
        assert_close(ours, theirs)


@every_variant
def test_gradients_equal_finite_differences(config):
    config = without_dropout(config)
    net, batch = build(config), reference.random_batch([3, 10, 6], 10, VOCAB)
    loss, grads = backward(net, batch)
    values = reference.values(net)
    assert loss == pytest.approx(reference.losses(config, values, batch)[2], rel=1e-5)
    rng, step = np.random.default_rng(0), 1e-5

    def total(value, index, shift):
        before = value[index]
        value[index] = before + shift
        loss = reference.losses(config, values, batch)[2]
        value[index] = before
        return loss

    for name, value in values.items():
        largest = int(np.abs(grads[name]).argmax())
        for flat in {largest, *rng.integers(0, value.size, 4).tolist()}:
            index = np.unravel_index(flat, value.shape)
            slope = (total(value, index, step) - total(value, index, -step)) / (2 * step)
            assert grads[name][index] == pytest.approx(slope, rel=1e-3, abs=2e-6), (name, index)


@pytest.mark.parametrize("config", [D2L, BERT], ids=["d2l", "bert"])
def test_gradients_are_nonzero_except_for_key_biases(config):
    _, grads = backward(build(without_dropout(config)), reference.random_batch([12, 7, 9], 12, VOCAB))
    largest = {name: np.abs(grad).max() for name, grad in grads.items()}
    # A key's bias adds the same to all scores of a query, which softmax takes out again.
    still = {name for name, grad in largest.items() if grad < 1e-6}
    assert still == {f"encoder.layers.{i}.attend.key.bias" for i in range(config.num_layers)}


# Against itself


@every_variant
def test_hybridized_equals_imperative(config):
    batch = reference.random_batch([3, 12, 7], 12, VOCAB)
    imperative, hybrid = (build(without_dropout(config), hybrid=hybrid) for hybrid in (False, True))
    for ours, theirs in zip(outputs(hybrid, batch), outputs(imperative, batch)):
        assert_close(ours, theirs)
    (loss, grads), (other_loss, other_grads) = backward(hybrid, batch), backward(imperative, batch)
    assert loss == pytest.approx(other_loss, rel=1e-5)
    for name in grads:
        assert_close(grads[name], other_grads[name])


@pytest.mark.parametrize("hybrid", [False, True])
@both_kinds
def test_dropout_acts_only_in_training(config, hybrid):
    net, batch = build(config, hybrid=hybrid), reference.random_batch([12, 7], 12, VOCAB)
    calm = outputs(net, batch)
    with mx.autograd.record():
        first, second = outputs(net, batch), outputs(net, batch)
    for one, other, still, again in zip(first, second, calm, outputs(net, batch)):
        assert np.abs(one - other).max() > 1e-3
        np.testing.assert_array_equal(still, again)


@every_variant
def test_dropout_places_are_those_of_bert(config):
    net, batch = build(config, hybrid=False), reference.random_batch([12, 7], 12, VOCAB)
    net.hybridize(active=False)
    seen = []

    def note(block, arguments, result):
        x = arguments[0].asnumpy()
        weights = x.shape == (2 * config.num_heads, 12, 12) and np.allclose(x.sum(axis=-1), 1, atol=1e-5)
        seen.append("attention weights" if weights else x.shape)
        assert (result.asnumpy() == 0).mean() == pytest.approx(config.dropout, abs=0.15)

    def listen(block):
        if isinstance(block, Dropout):
            block.register_forward_hook(note)

    net.apply(listen)
    with mx.autograd.record():
        net(*inputs(batch))
    states = (2, 12, config.units)
    embeddings = [states] if config.embedding_norm else []
    assert seen == embeddings + ["attention weights", states, states] * config.num_layers


@every_variant
def test_padding_changes_nothing(config):
    net, batch = build(config), reference.random_batch([3, 12, 7, 5], 12, VOCAB)
    real = np.arange(12) < batch.valid_length[:, None]
    rng = np.random.default_rng(1)
    refilled = dataclasses.replace(
        batch,
        tokens=np.where(real, batch.tokens, rng.integers(0, VOCAB, real.shape)),
        token_types=np.where(real, batch.token_types, rng.integers(0, 2, real.shape)),
    )
    widened = dataclasses.replace(
        batch,
        tokens=np.pad(batch.tokens, ((0, 0), (0, 4)), constant_values=5),
        token_types=np.pad(batch.token_types, ((0, 0), (0, 4)), constant_values=1),
    )
    encoded, mlm, nsp = outputs(net, batch)
    for other in (refilled, widened):
        other_encoded, other_mlm, other_nsp = outputs(net, other)
        assert_close(other_encoded[:, :12][real], encoded[real])
        assert_close(other_mlm, mlm)
        assert_close(other_nsp, nsp)


@every_variant
def test_row_does_not_depend_on_other_rows(config):
    net, batch = build(config), reference.random_batch([3, 12, 7, 5], 12, VOCAB)
    encoded, mlm, nsp = outputs(net, batch)
    for row in range(4):
        alone = outputs(net, batch.rows(row, row + 1))
        assert_close(alone[0][0], encoded[row])
        assert_close(alone[1], mlm[batch.masked_positions[0] == row])
        assert_close(alone[2][0], nsp[row])


def test_result_outlives_the_next_call():
    net = build(BERT)
    first, second = (reference.random_batch([5, 8], 8, VOCAB, seed) for seed in (0, 1))
    kept = net(*inputs(first))
    before = [output.asnumpy() for output in kept]
    outputs(net, second)
    for ours, theirs in zip(kept, before):
        np.testing.assert_array_equal(ours.asnumpy(), theirs)


def test_network_takes_changing_shapes():
    net = build(BERT)
    for lengths, padded_to in (([3, 12], 12), ([5], 6), ([16, 4, 9], 16), ([3, 12], 12)):
        batch = reference.random_batch(lengths, padded_to, VOCAB)
        expected = without_padding(batch, *reference.forward(BERT, reference.values(net), batch))
        for ours, theirs in zip(outputs(net, batch), expected):
            assert_close(ours, theirs)


# Positions


@pytest.mark.parametrize("hybrid", [False, True])
def test_more_tokens_than_max_positions_raise(hybrid):
    net = build(BERT, hybrid=hybrid)
    outputs(net, reference.random_batch([16], 16, VOCAB))
    with pytest.raises(mx.MXNetError):
        outputs(net, reference.random_batch([3], 17, VOCAB))


# Sizes


def count(net):
    """Parameters of a network that is not initialized; a shared one counts once."""
    return sum(int(np.prod(parameter.shape)) for parameter in net.collect_params().values())


TURC = {"bert-tiny": 4.4, "bert-mini": 11.3, "bert-small": 29.1, "bert-medium": 41.7, "bert-base": 110.1}


@pytest.mark.parametrize(("name", "millions"), TURC.items())
def test_presets_have_the_sizes_of_turc_2019(name, millions):
    # Table 1 of arXiv 1908.08962. It counts the whole pretraining network: embeddings, encoder, pooler and
    # both heads, the tied decoder once. (Without the heads Mini would have 11.2 and Small 28.8.)
    assert round(count(BERTModel(WORDPIECES, preset(name).model)) / 1e6, 1) == millions


@pytest.mark.parametrize(("name", "millions"), [("bert-base", 110), ("bert-large", 340)])
def test_presets_have_the_sizes_of_devlin_2018(name, millions):
    assert count(BERTModel(WORDPIECES, preset(name).model)) == pytest.approx(millions * 1e6, rel=0.02)


def test_d2l_preset_has_5_63_million_parameters():
    assert count(BERTModel(20_256, preset("d2l").model)) == 5_632_546


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_heads_of_64_units(name):
    model = preset(name).model
    assert model.units == 64 * model.num_heads


# The tied decoder


def test_tied_decoder_is_the_token_embedding():
    net = build(BERT)
    assert net.mlm.decoder.weight is net.encoder.embeddings.tokens.weight
    untied = BERTModel(VOCAB, dataclasses.replace(BERT, tied_decoder=False))
    assert count(untied) - count(net) == VOCAB * BERT.units


def test_tied_weight_adds_gradients_of_both_uses():
    config = without_dropout(BERT)
    tied, untied = build(config), build(dataclasses.replace(config, tied_decoder=False))
    shared = untied._collect_params_with_prefix()
    for name, parameter in tied._collect_params_with_prefix().items():
        shared[name].set_data(parameter.data())
    batch = reference.random_batch([3, 12, 7], 12, VOCAB)
    (loss, grads), (untied_loss, apart) = backward(tied, batch), backward(untied, batch)
    assert loss == pytest.approx(untied_loss, rel=1e-6)
    both = apart["encoder.embeddings.tokens.weight"] + apart["mlm.decoder.weight"]
    assert_close(grads["encoder.embeddings.tokens.weight"], both, 1e-6)


# Initial weights


def initial(config, seed=0, contexts=None):
    net = BERTModel(VOCAB, config)
    net.initialize(ctx=contexts or mx.cpu(), seed=seed)
    net.hybridize()
    return reference.values(net, np.float32)


@pytest.mark.parametrize("name", ["d2l", "bert", "pre"])
def test_initial_biases_are_zero_and_norms_identity(name):
    values = initial(VARIANTS[name])
    for parameter, value in values.items():
        if parameter.endswith(("bias", "beta")):
            assert not value.any(), parameter
        elif parameter.endswith("gamma"):
            assert (value == 1).all(), parameter
        else:
            assert value.any(axis=-1).all(), parameter


def test_initial_normal_weights_deviate_by_0_02():
    net = BERTModel(500, dataclasses.replace(BERT, units=64, ffn_units=128, max_positions=128))
    net.initialize(ctx=mx.cpu())
    net.hybridize()
    for name, value in reference.values(net).items():
        if name.endswith("weight") and value.size > 4000:
            # Five standard errors, of the mean and of the deviation.
            assert abs(value.mean()) < 0.02 * 5 / np.sqrt(value.size), name
            assert value.std() == pytest.approx(0.02, rel=5 / np.sqrt(2 * value.size)), name
            assert np.abs(value).max() > 0.05, name  # not a uniform distribution


def test_initial_xavier_weights_fill_their_bound():
    net = BERTModel(500, dataclasses.replace(D2L, units=64, ffn_units=128, max_positions=128))
    net.initialize(ctx=mx.cpu())
    net.hybridize()
    for name, value in reference.values(net).items():
        if name.endswith("weight") and value.size > 4000:
            # Glorot and Bengio 2010, equation 16. It sees D2L's position embeddings as (1, P, C).
            fans = sum(value.shape) if "positions" not in name else 64 * (128 + 1)
            bound = np.sqrt(6 / fans)
            assert np.abs(value).max() <= bound * (1 + 1e-6), name
            assert value.std() == pytest.approx(bound / np.sqrt(3), rel=0.05), name


@both_kinds
def test_initial_weights_depend_on_the_seed_alone(config):
    first, other = initial(config, 3), initial(config, 4)
    mx.nd.random.normal(shape=(5,))  # whatever was drawn before
    again, on_three = initial(config, 3), initial(config, 3, [mx.cpu(i) for i in range(3)])
    for name, value in first.items():
        np.testing.assert_array_equal(again[name], value)
        np.testing.assert_array_equal(on_three[name], value)
        if name.endswith("weight"):
            assert (other[name] != value).any(), name


# Files and symbols


@every_variant
def test_saved_parameters_load_bit_for_bit(config, tmp_path):
    net, batch = build(config), reference.random_batch([3, 12], 12, VOCAB)
    net.save_parameters(str(tmp_path / "net.params"))
    again = BERTModel(VOCAB, config)
    again.load_parameters(str(tmp_path / "net.params"), ctx=mx.cpu())
    again.hybridize(static_alloc=True)
    ours, theirs = reference.values(again, np.float32), reference.values(net, np.float32)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])
    for one, other in zip(outputs(again, batch), outputs(net, batch)):
        np.testing.assert_array_equal(one, other)


SHAPES = [([3, 12], 12), ([5], 6), ([16, 4, 9], 16)]


@pytest.mark.filterwarnings("ignore:Cannot decide type:UserWarning")  # of inputs, which have no fixed one
@every_variant
def test_encoder_symbol_takes_any_batch_and_length(config, tmp_path):
    net, names = build(config), ["tokens", "token_types", "valid_length"]
    symbol = net.encoder(*map(mx.sym.Variable, names))
    assert set(names) < set(symbol.list_arguments())
    assert len(symbol.list_outputs()) == 1
    symbol.save(str(tmp_path / "symbol.json"))
    parameters = net.encoder.collect_params().values()
    mx.nd.save(str(tmp_path / "net.params"), {f"arg:{p.name}": p.data() for p in parameters})
    served = mx.gluon.SymbolBlock.imports(str(tmp_path / "symbol.json"), names, str(tmp_path / "net.params"))
    for lengths, padded_to in SHAPES:
        batch = reference.random_batch(lengths, padded_to, VOCAB)
        encoded = served(*inputs(batch)[:3]).asnumpy()
        assert_close(encoded, reference.encode(config, reference.values(net), batch))


@both_kinds
def test_network_symbol_takes_any_shapes(config):
    net, names = build(config), ["tokens", "token_types", "valid_length", "masked_positions"]
    symbol = mx.sym.Group(list(net(*map(mx.sym.Variable, names))))
    parameters = {p.name: p.data() for p in net.collect_params().values()}
    for lengths, padded_to in SHAPES:
        batch = reference.random_batch(lengths, padded_to, VOCAB)
        bound = symbol.eval(ctx=mx.cpu(), **dict(zip(names, inputs(batch))), **parameters)
        bound = without_padding(batch, *(each.asnumpy() for each in bound))
        for ours, theirs in zip(bound, outputs(net, batch)):
            assert_close(ours, theirs)


def test_numpy_mode_is_refused_with_the_remedy():
    mx.npx.set_np()
    try:
        with pytest.raises(InputError, match=r"reset_np\(\)"):
            BERTModel(VOCAB, D2L)
    finally:
        mx.npx.reset_np()
    BERTModel(VOCAB, D2L)


def test_force_reinit_draws_the_weights_again():
    net = build(D2L)
    drawn = []
    for seed in (0, 1, 0):
        net.initialize(ctx=mx.cpu(), force_reinit=True, seed=seed)
        drawn.append(reference.values(net)["encoder.embeddings.tokens.weight"])
    assert (drawn[0] != drawn[1]).any()
    np.testing.assert_array_equal(drawn[0], drawn[2])


def test_unigram_bias_gives_word_frequencies_as_scores():
    net = BERTModel(VOCAB, dataclasses.replace(BERT, decoder_bias="unigram"))
    counts = np.arange(VOCAB)
    net.initialize(ctx=mx.cpu())
    net.set_unigram_bias(counts)
    shares = np.exp(net.mlm.decoder.bias.data().asnumpy())
    np.testing.assert_allclose(shares, (counts + 1) / (counts + 1).sum(), rtol=1e-5)
