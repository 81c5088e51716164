"""The relative bias in whole runs: resumed bit for bit, and not in the original presets."""

import numpy as np
import pretrain
import pytest
from support.runs import SMALL_SIZES

from gluon_bert.checkpoint import read_checkpoint
from gluon_bert.presets import PRESETS

SMALL = [*SMALL_SIZES, "--batch-size", "16"]
SMALL += ["--position", "relative-bias", "--checkpoint-every", "3", "--lr", "0.01"]
BIAS = "encoder.layers.1.attend.relative.bias"


def test_relative_bias_resumes_bit_for_bit(command):
    assert command("--num-steps", "6", name="undisturbed")[0] == 0
    status, stopped = command("--num-steps", "3", name="stopped")
    assert status == 0
    assert pretrain.main(["--resume", str(stopped), "--num-steps", "6"]) == 0
    undisturbed = read_checkpoint(stopped.parent / "undisturbed", 6).weights
    resumed = read_checkpoint(stopped, 6).weights
    assert undisturbed[BIAS].any()
    for name, array in undisturbed.items():
        np.testing.assert_array_equal(resumed[name], array, err_msg=name)


@pytest.mark.parametrize("name", PRESETS)
def test_original_presets_have_no_relative_bias(name):
    if name.startswith("bert-") or name == "d2l":
        assert PRESETS[name].model.position == "absolute"
