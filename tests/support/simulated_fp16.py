"""tools/pretrain.py with --precision fp16 on a CPU, which simulates it: what rounds on a GPU rounds here.

MXNet's own operators compute, in float32, with factors and results, and their gradients, rounded to float16.
"""

import sys
from pathlib import Path

import pytest

from gluon_bert.model import precision

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import pretrain


def simulate(patch):
    """Let this process simulate float16, until the pytest.MonkeyPatch is undone."""
    from gluon_bert import ops
    from gluon_bert.model.precision import Float16Matmul

    def rounded(self, array):
        return self._F.cast(self._F.cast(array, dtype="float16"), dtype="float32")

    def dense(self, *factors, **others):
        factors = [rounded(self, each) for each in factors]
        return lambda x: rounded(self, self._F.FullyConnected(rounded(self, x), *factors, **others))

    values = Float16Matmul.attention_values

    def attention_values(self, interleaved, weights, num_heads):
        # Dropout has scaled the weights in float16.
        return values(self, interleaved, rounded(self, weights), num_heads)

    patch.setattr(Float16Matmul, "dense", dense)
    patch.setattr(Float16Matmul, "attention_values", attention_values)
    patch.setattr(Float16Matmul, "_half", rounded)
    patch.setattr(Float16Matmul, "_whole", rounded)
    patch.setattr(ops, "use_compiled", lambda *_: False)
    patch.setattr(precision, "check_precision", lambda *_: None)


if __name__ == "__main__":
    from gluon_bert.cli import run

    simulate(pytest.MonkeyPatch())
    run(pretrain.main)
