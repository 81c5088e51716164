"""Promises that every task of fine-tuning keeps. `command` runs finetune; it returns status and folder."""

import finetune
import numpy as np
import pretrain
from conftest import small_text

import gluon_bert as gb

# Flags that divide a step's work differently.
DIVISIONS = [["--cpus", "2"], ["--micro-batch", "5"], ["--recompute"]]


def pretrained_run(folder):
    """Pretrain a small network for three steps in a folder; return the run's folder."""
    (folder / "text.txt").write_text(small_text(), "utf-8")
    flags = ["--preset", "d2l", "--units", "32", "--ffn-units", "64", "--max-seq-length", "16"]
    flags += ["--corpus", str(folder / "text.txt"), "--min-freq", "1", "--validation-fraction", "0.3"]
    flags += ["--batch-size", "32", "--num-steps", "3", "--output", str(folder / "run")]
    assert pretrain.main(flags) == 0
    return folder / "run"


def weights(folder):
    """Return the weights of a run by name."""
    parameters = gb.load_run(folder).net._collect_params_with_prefix()
    return {name: parameter.data().asnumpy() for name, parameter in parameters.items()}


def assert_matches(command, flags):
    """Check that an epoch with these flags ends with the weights of one without them."""
    once = ["--epochs", "1", "--dropout", "0", "--lr", "0.0003"]
    _, one = command(*once, name="one")
    status, other = command(*once, *flags, name="other")
    assert status == 0
    ours, theirs = weights(one), weights(other)
    for name, value in ours.items():
        if not name.endswith("key.bias"):  # its gradient is rounding, which Adam enlarges
            np.testing.assert_allclose(theirs[name], value, rtol=0, atol=2e-4, err_msg=name)


def assert_resumes(command, monkeypatch, stop_at):
    """Check that a run stopped before a step ends with the bits of a whole one; return both folders."""
    _, whole = command("--epochs", "2", name="whole")
    step = gb.Trainer.step

    def stopping(self, batch, count_correct=False):
        if self.state.step == stop_at:
            raise KeyboardInterrupt
        return step(self, batch, count_correct)

    monkeypatch.setattr(gb.Trainer, "step", stopping)
    status, parts = command("--epochs", "2", name="parts")
    assert status == 130
    monkeypatch.undo()
    assert finetune.main(["--resume", str(parts)]) == 0
    for name, value in weights(whole).items():
        np.testing.assert_array_equal(weights(parts)[name], value, err_msg=name)
    return whole, parts
