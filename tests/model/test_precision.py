"""Products in simulated float16 and in bfloat16: errors, the loss scale, and refusals."""

import dataclasses
import json
import math
import sys
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pretrain
import pytest
from conftest import ROOT
from support import reference_bert as reference
from support.jobs import LaunchedJob
from support.runs import SMALL_NETWORK, log_of
from support.simulated_fp16 import simulate
from support.trainers import BERT, MODEL, NOISY, gradients_of, random_batch, small_data, trainer_on

from gluon_bert import checkpoint, ops, run
from gluon_bert.errors import InputError
from gluon_bert.export.mxnet_symbol import trace
from gluon_bert.model import parameters
from gluon_bert.model.bert import BERTModel
from gluon_bert.model.precision import check_precision
from gluon_bert.runtime import mx
from gluon_bert.training import loss_scale, losses, trainer
from gluon_bert.training.loss_scale import FIRST, LARGEST, SMALLEST, LossScale
from gluon_bert.training.optimizers import OPTIMIZERS

SMALL = [*SMALL_NETWORK, "--num-steps", "12", "--log-every", "3", "--dynamic-masking"]
HALF = {"precision": "fp16"}

# A pretrain.py that simulates float16, and begins with that scale.
SCALED = """\
import sys
sys.path.insert(0, {tests!r})
import pytest
from support.simulated_fp16 import pretrain, simulate
from gluon_bert.training import loss_scale

loss_scale.FIRST = {first}
simulate(pytest.MonkeyPatch())
from gluon_bert.cli import run; run(pretrain.main)
"""


@pytest.fixture(scope="module")
def data():
    return small_data()


@pytest.fixture
def half(monkeypatch):
    """Simulates float16; the flag that asks for it."""
    simulate(monkeypatch)
    return ["--precision", "fp16"]


@pytest.fixture
def brain(monkeypatch):
    """Lets the compiled operators multiply in bfloat16 where they have to emulate it, too."""
    if ops.describe() != "compiled for this processor":
        pytest.skip(f"the operators are {ops.describe()}")
    monkeypatch.setattr(ops, "bf16_unsupported_reason", lambda: "")


def scaled(made, value, good=0):
    """The trainer, at that scale."""
    made.state.scale = LossScale.from_json({"value": value, "good": good}, made.devices[0])
    return made


def assert_near(ours, theirs, tolerance):
    """All arrays together are equal, relative to the norm of all."""
    distance = sum(((ours[name] - theirs[name]) ** 2).sum() for name in theirs)
    assert math.sqrt(distance / sum((array**2).sum() for array in theirs.values())) < tolerance


def directed(arrays):
    """The same, at a norm of 1."""
    length = math.sqrt(sum((array**2).sum() for array in arrays.values()))
    return {name: array / length for name, array in arrays.items()}


def state_of(made):
    return {**made.snapshot().weights, **made.snapshot().optimizer}


def everything(folder):
    snapshot = checkpoint.read_checkpoint(folder, checkpoint.steps(folder)[-1])
    return {**snapshot.weights, **snapshot.optimizer}, snapshot.state["loss_scale"]


# The graph


@pytest.mark.parametrize(
    "model", [MODEL, NOISY, dataclasses.replace(BERT, norm="pre", activation="gelu_tanh")]
)
def test_fp16_casts_matmuls_and_their_inputs_only(model):
    net = BERTModel(30, model)
    inputs = [mx.sym.var(name) for name in ("tokens", "token_types", "valid_length", "masked_positions")]
    plain = mx.sym.Group(net(*inputs))
    net.set_matmul_precision("fp16")
    graph = mx.sym.Group(net(*inputs))
    net.set_matmul_precision("fp32")
    operators = {node["name"]: node["op"] for node in json.loads(graph.tojson())["nodes"]}
    inner = graph.get_internals()
    _, types, _ = inner.infer_type(**{each.name: np.float32 for each in inputs})
    halves = [
        operators[name[: -len("_output")]]
        for name, kind in zip(inner.list_outputs(), types)
        if np.dtype(kind) == np.float16
    ]
    attention = {"_contrib_interleaved_matmul_selfatt_qk", "_contrib_interleaved_matmul_selfatt_valatt"}
    products = attention | {"FullyConnected"}
    # Between products are only casts, activations, and operators that move or drop factors of attention.
    others = {"Cast", "Reshape", "stack", "SwapAxis"}
    others |= {"gelu": {"LeakyReLU"}, "relu": {"Activation"}}.get(model.activation, set())
    others |= {"Dropout"} if model.dropout else set()
    assert set(halves) == products | others
    made = [op for op in operators.values() if op in products]
    assert len([op for op in halves if op in products]) == len(made) == 8 * model.num_layers + 4
    assert set(graph.list_arguments()) == set(plain.list_arguments())
    assert "Cast" not in plain.tojson()


def test_fp32_network_is_unchanged(data):
    before = trainer_on(1, data).net
    compiled = before.encoder._cached_graph
    trainer.Trainer(before, trainer_on(1, data).config, [mx.cpu(0)])
    assert before.encoder._cached_graph is compiled


# What float16 cannot hold


@pytest.mark.parametrize(
    ("model", "num_contexts", "changes"),
    [
        (MODEL, 1, {}),
        (BERT, 2, {}),
        (BERT, 1, {"micro_batch": 3}),
        (BERT, 2, {"micro_batch": 3, "recompute": True}),
    ],
)
def test_fp16_gradient_equals_fp32_up_to_rounding(data, half, model, num_contexts, changes):
    exact = gradients_of(trainer_on(1, data, model, lr=0.0), random_batch())
    ours = trainer_on(num_contexts, data, model, lr=0.0, **HALF, **changes)
    gradients = gradients_of(scaled(ours, 1024), random_batch())
    assert_near(gradients, exact, 0.02)  # of which ReLU makes the most, where its sign is another
    assert any((gradients[name] != array).any() for name, array in exact.items())


def test_loss_scale_keeps_small_gradients(data, half):
    exact = gradients_of(trainer_on(1, data, BERT, lr=0.0), random_batch())
    right, share = losses.pretraining_loss, 2.0**-22

    def of_a_batch_of_millions(*arguments):
        loss = right(*arguments)
        return loss._replace(total=loss.total * share)

    exact = {name: gradient * share for name, gradient in exact.items()}
    small, large = (
        gradients_of(
            scaled(trainer_on(1, data, BERT, lr=0.0, loss=of_a_batch_of_millions, **HALF), value),
            random_batch(),
        )
        for value in (SMALLEST, 2.0**22)
    )
    assert_near(large, exact, 5e-3)
    name = "encoder.layers.0.attend.query.weight"
    assert np.abs(exact[name]).max() > 0 and not small[name].any()


@pytest.mark.parametrize("clip_norm", [0.0, 0.1])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_overflow_skips_the_step_and_halves_the_scale(data, half, optimizer, clip_norm):
    ours = trainer_on(2, data, BERT, **HALF, optimizer=optimizer, clip_norm=clip_norm)
    ours.step(random_batch())
    before = state_of(ours)
    scaled(ours, LARGEST, good=7).step(random_batch(seed=1))
    assert ours.state.scale.to_json() == {"value": LARGEST / 2, "good": 0}
    after = state_of(ours)
    for name, array in before.items():
        # How often an array was updated is counted by the host, which has not heard of it yet.
        if not name.endswith("/updates"):
            np.testing.assert_array_equal(after[name], array, err_msg=name)
    scaled(ours, 1024, good=7).step(random_batch(seed=1))
    assert ours.state.scale.to_json() == {"value": 1024, "good": 8}
    assert any((array != before[name]).any() for name, array in state_of(ours).items())


def test_trainer_finds_a_scale_without_overflow(data, half):
    ours = scaled(trainer_on(1, data, BERT, **HALF, lr=0.0), LARGEST)
    for _ in range(16):
        ours.step(random_batch())
    found, good = ours.state.scale.to_json().values()
    largest = max(np.abs(gradient).max() for gradient in reference.gradients(ours.net).values())
    assert 0 < good < 16 and 65504 / 64 < largest * found < 65504 * 2


def test_many_good_steps_double_the_scale(monkeypatch):
    monkeypatch.setattr(loss_scale, "GOOD_STEPS", 3)
    yes, no = mx.nd.ones(1), mx.nd.array([np.nan])
    scale, seen = LossScale.first(mx.cpu(0)), []
    for usable in (yes, yes, no, yes, yes, yes, yes):
        scale = scale.after(usable)
        seen.append(tuple(scale.to_json().values()))
    h = FIRST / 2
    assert seen == [(FIRST, 1), (FIRST, 2), (h, 0), (h, 1), (h, 2), (FIRST, 0), (FIRST, 1)]
    for value, usable in ((LARGEST, yes), (SMALLEST, no)):
        end = LossScale.from_json({"value": value, "good": 2}, mx.cpu(0)).after(usable)
        assert end.value.asscalar() == value


def test_fp16_step_does_not_wait_for_the_device(data, half, monkeypatch):
    ours = trainer_on(2, data, **HALF, clip_norm=1.0)
    ours.step(random_batch())

    def reading(*_):
        raise AssertionError("waited for a device")

    for name in ("asnumpy", "wait_to_read", "asscalar"):
        monkeypatch.setattr(mx.nd.NDArray, name, reading)
    ours.step(random_batch())


# The same, however it is computed


@pytest.mark.parametrize(
    ("num_contexts", "changes"), [(2, {}), (1, {"micro_batch": 3}), (2, {"micro_batch": 5})]
)
def test_fp16_clipped_steps_match_one_context_and_fp32(data, half, num_contexts, changes):
    def moved(count, **others):
        recipe = {"optimizer": "bertadam", "clip_norm": 0.1, "weight_decay": 0.01, "warmup_ratio": 0.3}
        made = trainer_on(count, data, BERT, **recipe, **others)
        start = reference.values(made.net)
        for batch, _ in zip(data.train.epoch(0), range(6)):
            made.step(batch)
        # A key's bias has only rounding errors as gradient. Adam turns them into steps.
        return {n: v - start[n] for n, v in reference.values(made.net).items() if not n.endswith("key.bias")}

    exact, one, many = moved(1), moved(1, **HALF), moved(num_contexts, **HALF, **changes)
    assert_near(one, exact, 0.05)
    assert_near(many, exact, 0.05)
    assert_near(many, one, 0.05)


def test_fp16_skipped_muon_steps_match_one_context(data, half):
    def after(num_contexts, **changes):
        recipe = {"optimizer": "muon", "clip_norm": 0.1, "weight_decay": 0.01, **HALF, **changes}
        made = scaled(trainer_on(num_contexts, data, BERT, **recipe), LARGEST)
        for batch in islice(data.train.batches(), 20):
            made.step(batch)
        return made

    # In parts, since the gradients that float16 must hold are those of as many pairs as a context has.
    one, two = after(1, micro_batch=4), after(2)
    scale = one.state.scale.to_json()
    assert scale["value"] < LARGEST and scale["good"] > 0
    assert two.state.scale.to_json() == scale
    assert_near(state_of(two), state_of(one), 1e-3)


@pytest.mark.parametrize("model", [MODEL, BERT], ids=["d2l", "bert"])
def test_bf16_gradients_match_one_context_and_fp32(data, brain, model):
    exact = gradients_of(trainer_on(1, data, model, lr=0.0), random_batch())
    one = gradients_of(trainer_on(1, data, model, lr=0.0, precision="bf16"), random_batch())
    assert_near(one, exact, 0.05)
    for part in ("encoder.layers.0.attend.query.weight", "mlm.transform.dense.weight"):
        assert (one[part] != exact[part]).any(), part
    changes = {"lr": 0.0, "micro_batch": 3, "recompute": True, "clip_norm": 0.1}
    many = gradients_of(trainer_on(2, data, model, precision="bf16", **changes), random_batch())
    assert_near(directed(many), directed(one), 1e-5)


def test_resume_restores_the_loss_scale(command, half, monkeypatch, capsys):
    monkeypatch.setattr(loss_scale, "GOOD_STEPS", 3)
    monkeypatch.setattr(loss_scale, "FIRST", 2.0**21)
    status, whole = command(*half)
    assert status == 0
    overflowed = log_of(whole, "overflowed")
    message = (
        "is skipped: float16 cannot hold the gradient of 2,097,152 times the loss. The next step uses half"
    )
    assert overflowed and message in capsys.readouterr().err
    assert all(record["loss_scale"] for record in log_of(whole, "mlm_loss"))
    stop = overflowed[0]["step"] + 1
    _, parts = command(*half, "--num-steps", str(stop), name="parts")
    assert pretrain.main(["--resume", str(parts), "--num-steps", "12"]) == 0
    (ours, our_scale), (theirs, their_scale) = everything(parts), everything(whole)
    assert our_scale == their_scale
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


def test_nonfinite_at_the_smallest_scale_stops(command, half, monkeypatch, capsys):
    monkeypatch.setattr(loss_scale, "FIRST", 4.0)
    gradients = trainer.Trainer._gradients

    def broken(self):
        arrays = gradients(self)
        arrays[0][0][0, 0] = np.nan
        return arrays

    monkeypatch.setattr(trainer.Trainer, "_gradients", broken)
    status, folder = command(*half)
    assert status == 2
    assert "at step 3 (epoch 0, batch 2) the gradient is not finite" in capsys.readouterr().err
    assert [record["overflowed"] for record in log_of(folder, "overflowed")] == [
        {"loss_scale": 4.0},
        {"loss_scale": 2.0},
    ]


@pytest.mark.workers
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_two_workers_skip_the_same_steps_as_one(command, half, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(loss_scale, "FIRST", LARGEST)
    flags = [*half, "--dropout", "0", "--num-steps", "20", "--corpus", str(text_file)]
    # In parts, since the gradients that float16 must hold are those of as many pairs as a worker has.
    status, alone = command(*flags, "--micro-batch", "32", name="alone")
    assert status == 0
    script = tmp_path / "scaled.py"
    script.write_text(SCALED.format(tests=str(ROOT / "tests"), first=LARGEST))
    given = [*SMALL, *flags, "--output", tmp_path / "two", "--kvstore", "dist_sync", "--step-timeout", "30"]
    status, message = LaunchedJob(tmp_path, "-n", "2", "-s", "1", "--", sys.executable, script, *given).wait()
    assert status == 0 and "worker 1 are not those of worker 0" not in message
    (one, one_scale), (two, two_scale) = everything(alone), everything(tmp_path / "two")
    assert one_scale == two_scale and one_scale["value"] < LARGEST
    assert log_of(alone, "overflowed") == log_of(tmp_path / "two", "overflowed")
    # Half of float16's rounding, 2^-11: the workers' sums are rounded in another order.
    assert_near(two, one, 2.4e-4)


@pytest.mark.parametrize(("precision", "with_it"), [("fp16", "half"), ("bf16", "brain")])
def test_fp16_learning_curve_is_that_of_fp32(command, request, precision, with_it):
    """Rounding moves the curve by less than a quarter of what another seed does.

    The learning rate is one at which no step is a cliff: where a network leaves its plateau all at once, a
    rounding moves that moment by several steps.
    """
    request.getfixturevalue(with_it)
    flags = ["--dropout", "0", "--num-steps", "80", "--log-every", "10", "--lr", "0.003"]
    curves = []
    for each, seed in (("fp32", "0"), (precision, "0"), ("fp32", "1")):
        status, folder = command(*flags, "--precision", each, "--seed", seed, name=each + seed)
        assert status == 0
        curves.append(np.array([record["mlm_loss"] for record in log_of(folder, "mlm_loss")]))
    exact, ours, other_seed = curves
    assert exact[0] - exact[-1] > 0.5
    assert np.abs(ours - exact).max() < np.abs(other_seed - exact).max() / 4


# Refusals


def test_fp16_on_a_cpu_is_refused_before_reading_text(tmp_path, data, capsys):
    flags = ["--corpus", str(tmp_path / "none"), "--output", str(tmp_path / "run"), "--cpus", "1"]
    assert pretrain.main([*flags, "--precision", "fp16"]) == 2
    message = "precision must be fp32 or bf16 on a CPU, got fp16"
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert pretrain.main([*flags, "--precision", "fp8"]) == 2
    assert "--precision must be one of fp32, fp16, bf16, got fp8" in capsys.readouterr().err
    with pytest.raises(InputError, match="precision must be fp32 or bf16 on a CPU, got fp16"):
        trainer_on(1, data, **HALF)


def test_bf16_without_hardware_is_refused(command, monkeypatch, capsys):
    status, folder = command("--precision", "bf16", "--num-steps", "2")
    assert (status == 0) == (not ops.bf16_unsupported_reason()) == (folder / "config.json").exists()
    monkeypatch.setattr(ops, "bf16_unsupported_reason", lambda: "this processor cannot")
    assert command("--precision", "bf16", name="refused")[0] == 2
    assert "precision must be fp32 here, got bf16: this processor cannot" in capsys.readouterr().err
    with pytest.raises(InputError, match="precision must be fp32 or fp16 on a GPU, got bf16"):
        check_precision("bf16", [SimpleNamespace(device_type="gpu")])


def test_bf16_with_mxnet_operators_is_refused(command, monkeypatch, capsys):
    monkeypatch.setenv(ops.VARIABLE, "auto")  # and back to what it was
    try:
        assert command("--precision", "bf16", "--operators", "mxnet")[0] == 2
    finally:
        monkeypatch.undo()
        ops.select()
    message = (
        "precision must be fp32 here, got bf16: bf16 needs the compiled operators, which are not available"
    )
    assert message in capsys.readouterr().err


def test_resume_keeps_the_precision(command, half, data, capsys):
    status, folder = command(*half, "--num-steps", "2")
    assert status == 0
    assert pretrain.main(["--resume", str(folder), "--num-steps", "4", "--precision", "fp32"]) == 2
    message = f"{folder} was started with --precision fp16, got --precision fp32."
    assert message in capsys.readouterr().err
    snapshot = checkpoint.read_checkpoint(folder, 2)
    assert snapshot.state["loss_scale"] == {"value": FIRST, "good": 2}
    ours, plain = trainer_on(1, data, **HALF), trainer_on(1, data)
    plain.step(random_batch())
    with pytest.raises(InputError, match="cannot be resumed with precision fp16"):
        ours.restore(plain.snapshot())
    state = plain.snapshot().state
    for scale in ({"value": 0.0, "good": 1}, {"value": 8.0}, {"value": "x", "good": 0}):
        with pytest.raises(InputError, match="cannot be resumed"):
            ours.restore(plain.snapshot()._replace(state={**state, "loss_scale": scale}))


def test_fp16_run_is_loaded_and_exported_in_fp32(command, half, monkeypatch):
    status, folder = command(*half, "--num-steps", "2")
    assert status == 0
    monkeypatch.undo()
    found = run.load_run(folder)
    assert {weight.dtype for weight in parameters.weights_of(found.net).values()} == {np.dtype(np.float32)}
    found.net.set_matmul_precision("fp16")
    assert "Cast" not in trace(found.net, "all", 16).symbol.tojson()
