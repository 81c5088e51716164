"""Non-finite steps: found without waiting, reported, skipped, rolled back; the batch is saved."""

import os
import signal

import numpy as np
import pretrain
import pytest
from support.runs import SMALL_NETWORK, log_of

from gluon_bert import checkpoint
from gluon_bert.data.loader import Loader
from gluon_bert.npz import read_arrays
from gluon_bert.presets import preset
from gluon_bert.runtime import mx
from gluon_bert.training.optimizers import OPTIMIZERS, finite_on
from gluon_bert.training.progress import ProgressLogger
from gluon_bert.training.trainer import Trainer

SMALL = [*SMALL_NETWORK, "--num-steps", "12", "--log-every", "3", "--dynamic-masking"]
NAME = "encoder.layers.1.attend.query.weight"


@pytest.fixture
def breaking(monkeypatch):
    """Makes the gradients of these batches of epoch 0 no numbers, whenever they are used."""

    def break_batches(*bad, value=np.nan):
        current, walk, gradients = [], Loader.iter_from, Trainer._gradients

        def walking(self, start):
            for position, batch in walk(self, start):
                current[:] = [position]
                yield position, batch

        def broken(self):
            arrays = gradients(self)
            if current[0].epoch == 0 and current[0].batch in bad:
                for of_context in arrays:
                    of_context[list(self._trained()).index(NAME)][1, 2] = value
            return arrays

        monkeypatch.setattr(Loader, "iter_from", walking)
        monkeypatch.setattr(Trainer, "_gradients", broken)

    return break_batches


def weights(folder):
    step = checkpoint.steps(folder)[-1]
    snapshot = checkpoint.read_checkpoint(folder, step)
    return {**snapshot.weights, **snapshot.optimizer}


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_stop_reports_step_batch_and_gradients(command, breaking, capsys, value):
    breaking(4, value=value)
    status, folder = command("--checkpoint-every", "2", "--save-nonfinite-batch")
    assert status == 2
    err = capsys.readouterr().err
    assert "at step 5 (epoch 0, batch 4) the gradient is not finite" in err
    assert f"largest gradients, by norm: {NAME} {'nan' if np.isnan(value) else 'inf'}, " in err
    assert "Traceback" not in err
    assert checkpoint.steps(folder) == [2, 4]  # never weights that the bad step has touched
    (record,) = log_of(folder, "non_finite")
    assert record["step"] == 5 and record["non_finite"]["position"] == {"epoch": 0, "batch": 4}
    assert next(iter(record["non_finite"]["largest_gradients"].items())) == (NAME, None)
    batch = read_arrays(folder / "nonfinite-batches" / "step-00000005.npz")
    assert batch["tokens"].shape[1] == 16 and set(batch) >= {
        "masked_positions",
        "masked_ids",
        "next_sentence_labels",
    }
    # It continues with another answer to the same step.
    assert pretrain.main(["--resume", str(folder), "--on-nonfinite", "skip"]) == 0
    assert checkpoint.steps(folder)[-1] == 12


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("cpus", ["1", "2"])
def test_skip_equals_a_step_with_lr_0(command, breaking, capsys, optimizer, cpus):
    flags = ["--optimizer", optimizer, "--cpus", cpus, "--num-steps", "5", "--clip-norm", "1"]
    _, before = command(*flags, "--num-steps", "4", name="before")
    breaking(4)
    status, skipped = command(*flags, "--on-nonfinite", "skip", name="skipped")
    assert status == 0
    assert "at step 5 (epoch 0, batch 4) the gradient is not finite" in capsys.readouterr().err
    ours, theirs = weights(skipped), weights(before)
    for name, array in theirs.items():
        if not name.endswith("/updates"):
            np.testing.assert_array_equal(ours[name], array, err_msg=name)
    assert all(np.isfinite(array).all() for array in ours.values())
    assert log_of(skipped, "non_finite")[0]["step"] == 5


def test_skip_leaves_losses_and_repeats_on_resume(command, breaking):
    breaking(3, 4)
    flags = ["--on-nonfinite", "skip", "--checkpoint-every", "4"]
    status, folder = command(*flags)
    assert status == 0
    assert all(np.isfinite(record["mlm_loss"]) for record in log_of(folder, "mlm_loss"))
    # Stopped between the two, which are in a row: the checkpoint after step 4 knows of the first.
    state = checkpoint.read_checkpoint(folder, 12).state
    _, shorter = command(*flags, "--num-steps", "4", "--log-every", "4", name="shorter")
    assert checkpoint.read_checkpoint(shorter, 4).state["skipped"] == 1
    assert pretrain.main(["--resume", str(shorter), "--num-steps", "12"]) == 0
    ours, theirs = weights(folder), weights(shorter)
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)
    assert state["skipped"] == 0


def test_skip_stops_after_ten_steps_in_a_row(command, breaking, capsys):
    breaking(*range(1, 100))
    status, folder = command("--on-nonfinite", "skip", "--num-steps", "60", "--batch-size", "8")
    assert status == 2
    assert "at step 11 (epoch 0, batch 10)" in capsys.readouterr().err
    assert len(log_of(folder, "non_finite")) == 10


def test_rollback_continues_with_other_batches(command, breaking, capsys):
    breaking(5)
    flags = ["--on-nonfinite", "rollback", "--checkpoint-every", "4", "--num-steps", "10"]
    status, folder = command(*flags)
    assert status == 0
    assert "back to the checkpoint after step 4, with other batches" in capsys.readouterr().err
    (record,) = log_of(folder, "rollback")
    assert record == {"step": 4, "rollback": {"from": 6, "why": "the gradient is not finite"}}
    steps = [record["step"] for record in log_of(folder, "mlm_loss")]
    assert steps == [3, 6, 9, 10]
    # Of the ten steps the fifth was made with batch 6 or later: what was in the queue is behind it too.
    state = checkpoint.read_checkpoint(folder, 10).state
    assert state["position"]["epoch"] == 1 or state["position"]["batch"] >= 12


def test_rollback_stops_after_max_rollbacks(command, breaking, capsys):
    breaking(*range(5, 100))
    status, folder = command(
        "--on-nonfinite", "rollback", "--checkpoint-every", "4", "--num-steps", "60", "--batch-size", "8"
    )
    assert status == 2
    assert capsys.readouterr().err.count("back to the checkpoint after step 4") == 3
    assert checkpoint.steps(folder)[-1] == 4


def test_rollback_without_a_checkpoint_stops(command, breaking, capsys):
    breaking(1)
    assert command("--on-nonfinite", "rollback")[0] == 2
    assert "at step 2 (epoch 0, batch 1)" in capsys.readouterr().err


def test_interrupt_after_rollback_names_the_right_step(command, breaking, monkeypatch, capsys):
    breaking(5)
    on_rollback = ProgressLogger.on_rollback

    def interrupting(self, trainer, found):
        on_rollback(self, trainer, found)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ProgressLogger, "on_rollback", interrupting)
    status, folder = command("--on-nonfinite", "rollback", "--checkpoint-every", "4")
    assert status == 130
    assert f"stopped after step 4; --resume {folder} continues" in capsys.readouterr().err
    assert checkpoint.steps(folder)[-1] == 4


def test_finite_check_waits_for_no_step(monkeypatch):
    """The verdict is computed on the device: asking for it reads nothing."""

    def reading(*_):
        raise AssertionError("waited for a device")

    squared = mx.nd.array([1.0, np.inf])
    for name in ("asnumpy", "wait_to_read", "asscalar"):
        monkeypatch.setattr(mx.nd.NDArray, name, reading)
    verdicts = finite_on(squared, [mx.cpu(0), mx.cpu(1)])
    monkeypatch.undo()
    assert [np.isnan(verdict.asscalar()) for verdict in verdicts.values()] == [True, True]
    assert finite_on(mx.nd.array([1e18, 0]), [mx.cpu()])[mx.cpu()].asscalar() == 1


def test_on_nonfinite_may_change_on_resume():
    fields = type(preset("d2l").train).__dataclass_fields__
    assert all(fields[name].metadata["may_change"] for name in ("on_nonfinite", "save_nonfinite_batch"))
