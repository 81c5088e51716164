"""The optimizers against their formulas in float64, weight decay, and clipping."""

import dataclasses
import math

import numpy as np
import pytest

from gluon_bert import ops
from gluon_bert.config import TrainConfig
from gluon_bert.model.bert import BERTModel
from gluon_bert.model.encoder import Embeddings
from gluon_bert.model.parameters import named_parameters
from gluon_bert.model.relative_position import RelativeBias
from gluon_bert.presets import PRESETS
from gluon_bert.runtime import mx
from gluon_bert.training import optimizers
from gluon_bert.training.optimizers import (
    OPTIMIZERS,
    clip_factors,
    encoder_matrices,
    gluon_trainer,
    mark_undecayed,
    optimizer_arrays,
    orthogonalized,
    scale_gradients,
    set_optimizer_arrays,
    squared_norms,
)

SHAPES = {"a_weight": (5, 7), "a_bias": (7,), "a_gamma": (7,), "a_beta": (7,)}
# Far from the defaults, so that one left out shows.
OTHER = {"beta1": 0.8, "beta2": 0.95, "epsilon": 1e-3}


def numbers(seed, scale, shapes=SHAPES):
    rng = np.random.RandomState(seed)
    return {name: rng.normal(0, scale, shape).astype(np.float32) for name, shape in shapes.items()}


def after_steps(config, num_steps, trainer_of=gluon_trainer):
    """The parameters after steps along given gradients; the rate is another one at each step."""
    parameters = {name: mx.gluon.Parameter(name, shape=shape) for name, shape in SHAPES.items()}
    for name, value in numbers(0, 0.5).items():
        parameters[name].initialize(ctx=mx.cpu())
        parameters[name].set_data(mx.nd.array(value))
    trainer = trainer_of(parameters, config)
    for step in range(1, num_steps + 1):
        gradients = gradients_of_step(step)
        with mx.autograd.record():
            loss = mx.nd.add_n(
                *[(p.data() * mx.nd.array(gradients[name])).sum() for name, p in parameters.items()]
            )
        loss.backward()
        trainer.set_learning_rate(config.lr / step)
        trainer.update(1)
    return {name: parameter.data().asnumpy() for name, parameter in parameters.items()}


def gradients_of_step(step):
    """Return random gradients; a few are always zero, as for words that do not occur."""
    gradients = numbers(step, 0.1)
    gradients["a_weight"][2] = 0
    return gradients


def expected_after_steps(config, num_steps):
    """The same by the papers, in float64."""
    weights = {name: value.astype(np.float64) for name, value in numbers(0, 0.5).items()}
    m = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    v = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for t in range(1, num_steps + 1):
        rate = config.lr / t
        for name, g in gradients_of_step(t).items():
            w, decay = weights[name], config.weight_decay if name == "a_weight" else 0.0
            m[name] = config.beta1 * m[name] + (1 - config.beta1) * g
            v[name] = config.beta2 * v[name] + (1 - config.beta2) * g.astype(np.float64) ** 2
            first, second = m[name] / (1 - config.beta1**t), v[name] / (1 - config.beta2**t)
            if config.optimizer == "bertadam":  # Devlin et al., optimization.py
                weights[name] = w - rate * (m[name] / (np.sqrt(v[name]) + config.epsilon) + decay * w)
            elif config.optimizer in (
                "adamw",
                "muon",
            ):  # no matrices are named; Loshchilov and Hutter 2019, algorithm 2
                weights[name] = w - rate * (first / (np.sqrt(second) + config.epsilon) + decay * w)
            elif config.optimizer == "lamb":  # You et al. 2020, algorithm 2
                r = first / (np.sqrt(second) + config.epsilon) + decay * w
                weights[name] = w - rate * np.linalg.norm(w) / np.linalg.norm(r) * r
            else:  # Kingma and Ba 2015, the end of section 2
                root = np.sqrt(1 - config.beta2**t) / (1 - config.beta1**t)
                weights[name] = w - rate * root * m[name] / (np.sqrt(v[name]) + config.epsilon)
    return weights


@pytest.mark.parametrize("changes", [{}, OTHER], ids=["defaults", "others"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_equal_the_papers(name, changes):
    decay = 0.0 if name == "adam" else 0.3
    config = TrainConfig(optimizer=name, lr=0.05, weight_decay=decay, **{"epsilon": 1e-6, **changes})
    for num_steps in (1, 2, 7):
        ours, expected = after_steps(config, num_steps), expected_after_steps(config, num_steps)
        for parameter, value in expected.items():
            # In float32 a beta of 0.999 leaves 1 - beta with an error of 1e-5; a step is 0.05 to 0.3.
            np.testing.assert_allclose(ours[parameter], value, rtol=0, atol=1e-5, err_msg=parameter)


def test_every_optimizer_of_the_config_exists():
    (field,) = (f for f in dataclasses.fields(TrainConfig) if f.name == "optimizer")
    assert tuple(OPTIMIZERS) == field.metadata["choices"]


@pytest.mark.parametrize("name", ["bertadam", "lamb"])
def test_steps_equal_the_libraries(name):
    if name == "bertadam":
        gluonnlp = pytest.importorskip("gluonnlp", reason="gluonnlp is not installed")
        other = gluonnlp.optimizer.BERTAdam
    else:
        other = mx.optimizer.LAMB

    def theirs(parameters, config):
        mark_undecayed(parameters)
        settings = {key: getattr(config, key) for key in ("beta1", "beta2", "epsilon")}
        made = other(learning_rate=config.lr, wd=config.weight_decay, **settings)
        return mx.gluon.Trainer(parameters, made, update_on_kvstore=False)

    config = TrainConfig(optimizer=name, lr=0.05, weight_decay=0.3, **OTHER)
    ours, expected = after_steps(config, 5), after_steps(config, 5, theirs)
    for parameter, value in expected.items():
        np.testing.assert_allclose(ours[parameter], value, rtol=1e-5, atol=1e-6, err_msg=parameter)


def test_lamb_steps_a_weight_of_zeros():
    updater = mx.optimizer.get_updater(
        OPTIMIZERS["lamb"](learning_rate=0.1, beta1=0.9, beta2=0.999, epsilon=1e-6)
    )
    weight = mx.nd.zeros((3,))
    updater([0], [mx.nd.array([1.0, -1.0, 0.0])], [weight])
    np.testing.assert_allclose(weight.asnumpy(), [-0.1, 0.1, 0.0], rtol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nonfinite_gradient_is_not_hidden(name):
    made = OPTIMIZERS[name](learning_rate=0.1, beta1=0.9, beta2=0.999, epsilon=1e-6)
    weight = mx.nd.ones((3,))
    mx.optimizer.get_updater(made)([0], [mx.nd.array([1.0, np.nan, 1.0])], [weight])
    assert np.isnan(weight.asnumpy()[1])


# Muon

MATRICES = {"wide": (5, 7), "other": (5, 7), "tall": (9, 4), "wider": (3, 12), "some_bias": (7,)}


def muon_on(contexts, config):
    """Return parameters of two shapes of matrices and a bias, and the trainer that steps them."""
    parameters = {name: mx.gluon.Parameter(name, shape=shape) for name, shape in MATRICES.items()}
    for name, value in numbers(0, 0.5, MATRICES).items():
        parameters[name].initialize(ctx=contexts)
        parameters[name].set_data(mx.nd.array(value))
    matrices = [parameters[name] for name in MATRICES if name != "some_bias"]
    return parameters, gluon_trainer(parameters, config, matrices=matrices)


def muon_step(trainer, parameters, gradients):
    for name, parameter in parameters.items():
        for context in parameter.list_ctx():
            parameter.grad(context)[:] = mx.nd.array(gradients[name])
            parameter.data(context)._fresh_grad = True
    trainer.update(1)


def expected_muon(config, num_steps):
    """Return the same by Jordan et al. 2024 and Liu et al. 2025, in float64; AdamW for the bias."""
    weights = {name: value.astype(np.float64) for name, value in numbers(0, 0.5, MATRICES).items()}
    momenta = {name: np.zeros(shape) for name, shape in MATRICES.items()}
    squares = np.zeros(MATRICES["some_bias"])
    for t in range(1, num_steps + 1):
        for name, g in numbers(t, 0.1, MATRICES).items():
            if name == "some_bias":
                momenta[name] = config.beta1 * momenta[name] + (1 - config.beta1) * g
                squares = config.beta2 * squares + (1 - config.beta2) * g.astype(np.float64) ** 2
                root = np.sqrt(squares / (1 - config.beta2**t)) + config.epsilon
                weights[name] = weights[name] - config.lr * momenta[name] / (1 - config.beta1**t) / root
                continue
            momenta[name] = config.momentum * momenta[name] + g
            x = g + config.momentum * momenta[name]
            x = x / np.linalg.norm(x)
            for _ in range(5):
                gram = x @ x.T
                x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
            step = 0.2 * np.sqrt(max(x.shape)) * x + config.weight_decay * weights[name]
            weights[name] = weights[name] - config.lr * step
    return weights


@pytest.mark.parametrize("num_contexts", [1, 2])
@pytest.mark.parametrize("changes", [{}, {**OTHER, "momentum": 0.7}], ids=["defaults", "others"])
@pytest.mark.parametrize("operators", ["chosen", "mxnet"])
def test_muon_steps_equal_those_of_numpy(num_contexts, changes, operators, monkeypatch):
    if operators == "mxnet":
        monkeypatch.setattr(ops, "compiled", lambda _: False)
    config = TrainConfig(optimizer="muon", lr=0.05, weight_decay=0.3, **{"epsilon": 1e-6, **changes})
    parameters, trainer = muon_on([mx.cpu(i) for i in range(num_contexts)], config)
    for step in (1, 2, 3, 4):
        muon_step(trainer, parameters, numbers(step, 0.1, MATRICES))
        for name, value in expected_muon(config, step).items():
            for array in parameters[name].list_data():
                np.testing.assert_allclose(array.asnumpy(), value, rtol=0, atol=3e-5, err_msg=name)


# Sides that do not fill the tiles of products, and all ways of the iterations: square, nearly, wide, tall.
# The large ones take several blocks.
SIDES = [
    *((33, 33), (130, 130), (70, 100), (100, 70), (30, 200), (200, 30), (1, 17), (17, 1), (1, 1)),
    *((128, 512), (512, 128), (300, 400), (400, 300)),
]


def test_compiled_muon_equals_mxnets_for_all_shapes(monkeypatch):
    if not ops.compiled([mx.cpu()]):
        pytest.skip(f"the operators are {ops.describe()}")
    found = []
    for compiled in (True, False):
        monkeypatch.setattr(ops, "compiled", lambda _, compiled=compiled: compiled)
        rng = np.random.default_rng(0)
        weights, gradients = ([mx.nd.array(rng.normal(size=shape)) for shape in SIDES] for _ in range(2))
        optimizer = OPTIMIZERS["muon"](learning_rate=0.1, wd=0.01, beta1=0.9, beta2=0.99, epsilon=1e-6)
        optimizer.matrices = frozenset(range(len(SIDES)))
        optimizer.set_lr_mult({0: 0.5, 3: 0.5})
        optimizer.set_wd_mult({1: 0.0, 3: 3.0})
        updater = mx.optimizer.get_updater(optimizer)
        updater(list(range(len(SIDES))), gradients, weights)
        found.append([array.asnumpy() for array in (*weights, *(m for (m,) in updater.states.values()))])
    for one, other in zip(*found):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5, err_msg=str(one.shape))


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8)])
def test_orthogonalized_singular_values_are_near_1(shape):
    rng = np.random.default_rng(0)
    matrices = [mx.nd.array(scale * rng.normal(size=shape)) for scale in (1e-6, 1.0, 1e6)]
    for each in orthogonalized(matrices).asnumpy():
        values = np.linalg.svd(each, compute_uv=False)
        assert values.min() > 0.5 and values.max() < 1.3


def test_orthogonalized_zero_is_zero():
    assert not orthogonalized([mx.nd.zeros((3, 5))]).asnumpy().any()


def test_muon_skips_a_step_that_is_not_finite():
    config = TrainConfig(optimizer="muon", lr=0.05, weight_decay=0.3)
    parameters, trainer = muon_on([mx.cpu()], config)
    muon_step(trainer, parameters, numbers(1, 0.1, MATRICES))
    before = {name: parameter.data().asnumpy() for name, parameter in parameters.items()}
    kept = optimizer_arrays(trainer, parameters)
    trainer.optimizer.is_finite = {mx.cpu(): mx.nd.array([np.nan])}
    bad = numbers(2, 0.1, MATRICES)
    bad["wide"][0, 0] = np.inf
    muon_step(trainer, parameters, bad)
    for name, parameter in parameters.items():
        np.testing.assert_array_equal(parameter.data().asnumpy(), before[name], err_msg=name)
    for name, array in optimizer_arrays(trainer, parameters).items():
        if not name.endswith("/updates"):
            np.testing.assert_array_equal(array, kept[name], err_msg=name)


def test_muon_states_continue_on_other_contexts():
    config = TrainConfig(optimizer="muon", lr=0.05, weight_decay=0.3)
    parameters, trainer = muon_on([mx.cpu()], config)
    muon_step(trainer, parameters, numbers(1, 0.1, MATRICES))
    arrays = optimizer_arrays(trainer, parameters)
    assert {"wide/momentum", "tall/momentum", "some_bias/mean", "some_bias/variance"} <= arrays.keys()
    assert "wide/variance" not in arrays
    others, other = muon_on([mx.cpu(0), mx.cpu(1)], config)
    for name, parameter in parameters.items():
        others[name].set_data(parameter.data())
    set_optimizer_arrays(other, others, arrays)
    for each, those in ((trainer, parameters), (other, others)):
        muon_step(each, those, numbers(2, 0.1, MATRICES))
    for name, parameter in parameters.items():
        for array in others[name].list_data():
            np.testing.assert_array_equal(array.asnumpy(), parameter.data().asnumpy(), err_msg=name)
    with pytest.raises(ValueError, match="must be a state of a parameter"):
        set_optimizer_arrays(other, others, {"wide/variance": arrays["wide/momentum"]})


@pytest.mark.parametrize("position", ["absolute", "relative-bias"])
def test_muon_matrices_are_those_of_the_layers(position):
    model = dataclasses.replace(PRESETS["quick"].model, position=position)
    net = BERTModel(100, model)
    net.initialize(ctx=[mx.cpu()])
    matrices = encoder_matrices(named_parameters(net))
    expected = [(128, 128)] * 4 + [(512, 128), (128, 512)]
    assert sorted(p.shape for p in matrices) == sorted(expected * model.num_layers)


# What decays


def blocks_of(block):
    yield block
    for child in block._children.values():
        yield from blocks_of(child)


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("name", PRESETS)
def test_decayed_and_undecayed_make_up_the_network(name, norm):
    model = dataclasses.replace(PRESETS[name].model, norm=norm)
    net = BERTModel(100, model)
    parameters = net.collect_params()
    mark_undecayed(parameters)
    # By the blocks, not by the names: all of a LayerNorm's, and of every other block what is called bias.
    undecayed, decayed = set(), set()
    for block in blocks_of(net):
        for attribute, parameter in block._reg_params.items():
            bare = isinstance(block, mx.gluon.nn.LayerNorm) or attribute == "bias"
            (undecayed if bare else decayed).add(parameter)
    assert {p for p in parameters.values() if p.wd_mult == 0} == undecayed
    assert {p for p in parameters.values() if p.wd_mult == 1} == decayed
    assert not undecayed & decayed and len(undecayed | decayed) == len(parameters.values())
    tables = {block.bias for block in blocks_of(net) if isinstance(block, RelativeBias)}
    assert all(len(p.shape) == 1 for p in undecayed - tables)
    assert all(len(p.shape) == 2 for p in decayed)
    # A layer has 6 matrices; then there are 3 embeddings, the pooler's, the two heads', a decoder of its own.
    assert len(decayed) == 6 * model.num_layers + 6 + (not model.tied_decoder)
    embeddings = next(block for block in blocks_of(net) if isinstance(block, Embeddings))
    assert embeddings.tokens.weight.wd_mult == 1
    assert (net.mlm.decoder.weight is embeddings.tokens.weight) == model.tied_decoder


# Clipping


def gradients_on(num_contexts, seed=3):
    values = list(numbers(seed, 2.0).values())
    return values, [[mx.nd.array(v, ctx=mx.cpu(i)) for v in values] for i in range(num_contexts)]


def norm_of(values):
    return np.sqrt(sum((np.asarray(value, np.float64) ** 2).sum() for value in values))


def clip(gradients, largest):
    contexts = [arrays[0].context for arrays in gradients]
    factors = clip_factors(squared_norms(gradients[0]), largest, contexts)
    scale_gradients(gradients, factors)


@pytest.mark.parametrize("num_contexts", [1, 3])
def test_clip_norm_shortens_on_every_context(num_contexts):
    values, gradients = gradients_on(num_contexts)
    clip(gradients, 1.5)
    assert norm_of(values) > 3
    for arrays in gradients:
        for array, value in zip(arrays, values):
            np.testing.assert_allclose(array.asnumpy(), value * 1.5 / norm_of(values), rtol=1e-5, atol=0)


def test_clip_norm_leaves_a_short_gradient():
    values, gradients = gradients_on(2)
    clip(gradients, 1e3)
    for arrays in gradients:
        for array, value in zip(arrays, values):
            np.testing.assert_array_equal(array.asnumpy(), value)


def test_clip_norm_leaves_a_zero_gradient():
    gradients = [[mx.nd.zeros((3, 2)), mx.nd.zeros((4,))]]
    clip(gradients, 1.0)
    assert not gradients[0][0].asnumpy().any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_clip_norm_nonfinite_marks_all_gradients(value):
    _, gradients = gradients_on(2)
    for arrays in gradients:
        arrays[0][1, 1] = value
    clip(gradients, 1.0)
    for arrays in gradients:
        assert all(np.isnan(array.asnumpy()).all() for array in arrays)


@pytest.mark.parametrize("usable", [None, 1.0, math.nan])
@pytest.mark.parametrize("name", ["adam", "adamw", "bertadam", "muon"])
def test_compiled_step_equals_mxnets(name, usable, monkeypatch):
    if not ops.compiled([mx.cpu()]):
        pytest.skip(f"the operators are {ops.describe()}")
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=(30, 7)), rng.normal(size=(3, 30, 7))
    found = []
    for compiled in (True, False):
        monkeypatch.setattr(ops, "compiled", lambda _, compiled=compiled: compiled)
        optimizer = OPTIMIZERS[name](learning_rate=0.1, wd=0.01, beta1=0.9, beta2=0.99, epsilon=1e-6)
        if name == "muon":
            optimizer.matrices = frozenset({0})
        if usable is not None:
            optimizer.is_finite = {mx.cpu(0): mx.nd.array([usable])}
        updater, weight = mx.optimizer.get_updater(optimizer), mx.nd.array(start)
        for gradient in map(mx.nd.array, gradients):
            if optimizer.scales([mx.cpu()]):
                optimizer.factor = {mx.cpu(0): mx.nd.array([0.25])}
            else:
                scale_gradients([[gradient]], {mx.cpu(0): mx.nd.array([0.25])})
            updater(0, gradient, weight)
        found.append([array.asnumpy() for array in (weight, *updater.states[0])])
    for one, other in zip(*found):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert np.array_equal(found[0][0], start.astype(np.float32)) == (
        usable is not None and math.isnan(usable)
    )


def test_norm_of_many_values_is_exact():
    # 2.6 million, as D2L's embedding has. MXNet's own norm and multi_sum_sq are wrong by 1e-3 here.
    value = np.random.RandomState(0).normal(0, 1e-3, (20256, 128)).astype(np.float32)
    norm = squared_norms([mx.nd.array(value)]).sqrt().asscalar()
    assert norm == pytest.approx(norm_of([value]), rel=1e-4)


def test_optimizer_states_survive_pickling():
    # Gluon's Trainer.save_states pickles the optimizer, which is found again by its name.
    for name, made in OPTIMIZERS.items():
        updater = mx.optimizer.get_updater(made(learning_rate=0.1, beta1=0.9, beta2=0.999, epsilon=1e-6))
        updater([0], [mx.nd.ones((2,))], [mx.nd.ones((2,))])
        again = mx.optimizer.get_updater(made(learning_rate=0.5, beta1=0.5, beta2=0.5, epsilon=1e-6))
        again.set_states(updater.get_states(dump_optimizer=True))
        one, other = (weight_after_a_step(u) for u in (updater, again))
        np.testing.assert_array_equal(one, other, err_msg=name)


def weight_after_a_step(updater):
    weight = mx.nd.array([1.0, 2.0])
    updater([0], [mx.nd.array([0.5, -0.25])], [weight])
    return weight.asnumpy()


@pytest.mark.parametrize("name", ["adam", "adamw", "bertadam", "lamb", "muon"])
@pytest.mark.parametrize("usable", [None, 1.0, math.nan])
def test_optimizer_lists_equal_single_parameters(name, usable, monkeypatch):
    monkeypatch.setattr(ops, "compiled", lambda _: False)  # which takes one at a time
    found = []
    for at_once in (0, 2):
        monkeypatch.setattr(optimizers, "_takes_lists", lambda _, lists=at_once > 0: lists)
        rng = np.random.default_rng(0)
        optimizer = OPTIMIZERS[name](learning_rate=0.1, wd=0.01, beta1=0.9, beta2=0.99, epsilon=1e-6)
        optimizer.aggregate_num = at_once
        if usable is not None:
            optimizer.is_finite = {mx.cpu(0): mx.nd.array([usable])}
        updater = mx.optimizer.get_updater(optimizer)
        weights = [mx.nd.array(rng.normal(size=shape)) for shape in ((3, 4), (5,), (2, 2, 2))]
        for _ in range(3):
            gradients = [mx.nd.array(rng.normal(size=weight.shape)) for weight in weights]
            if at_once:
                updater([0, 1, 2], gradients, weights)
            else:
                for each in zip(range(3), gradients, weights):
                    updater(*each)
        states = [array for state in updater.states.values() for array in state]
        found.append([array.asnumpy() for array in (*weights, *states)])
    for one, other in zip(*found):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)
