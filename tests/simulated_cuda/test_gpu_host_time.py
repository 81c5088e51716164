"""The host's cost of a step with simulated GPUs: launches and copies of the optimizer, and waits."""

from __future__ import annotations

import json

import pytest

COUNT = """
import ctypes, json, sys
from gluon_bert.data.batch import Batch
from gluon_bert.model.bert import BERTModel
from gluon_bert.presets import preset
from gluon_bert.runtime import mx
from gluon_bert.training.trainer import Trainer
import numpy as np

cudart = ctypes.CDLL("libcudart.so.11.0")
cudart.gpusim_counts.restype = ctypes.c_char_p

def counts():
    mx.nd.waitall()
    return json.loads(cudart.gpusim_counts())["devices"][0]

changes = json.loads(sys.argv[1])
config = preset("bert-tiny").replace(batch_size=4, **changes)
contexts = [mx.gpu(0), mx.gpu(1)]
net = BERTModel(50, config.model)
net.initialize(ctx=contexts)
net.hybridize()
trainer = Trainer(net, config.train, contexts)
ones = lambda *shape: np.ones(shape, np.int32)
places = np.array([[0, 1, 2, 3], [1, 1, 1, 1]], np.int32)
batch = Batch(ones(4, 8), 0 * ones(4, 8), 8 * ones(4), places, ones(4), ones(4))
update, found = trainer._update, []

def counted():
    before = counts()
    update()
    after = counts()
    found.append({name: after[name] - before[name] for name in ("launches", "d2h")})

trainer._update = counted
for _ in range(3):
    trainer.step(batch)
found = {"update": found[-1], "parameters": len(trainer._trained())}

# Inside a step the main thread waits for nothing.
waits = []
for owner, name in (mx.nd.NDArray, "asnumpy"), (mx.nd.NDArray, "wait_to_read"), (mx.nd, "waitall"):
    setattr(owner, name, lambda *_, name=name: waits.append(name))
trainer._update = update
trainer.step(batch)
print(json.dumps({**found, "waits": waits}))
"""


@pytest.mark.parametrize(
    ("changes", "launches_per_parameter"),
    [
        ({}, 2),
        ({"on_nonfinite": "skip"}, 2),
        ({"precision": "fp16"}, 3.2),
        ({"optimizer": "lamb"}, 4),
        ({"optimizer": "muon"}, 7),
        ({"optimizer": "muon", "precision": "fp16"}, 9),
    ],
    ids=["bertadam", "skip", "fp16", "lamb", "muon", "muon-fp16"],
)
def test_optimizer_takes_few_launches_and_no_wait(gpus, changes, launches_per_parameter):
    found = json.loads(gpus.code(COUNT, json.dumps(changes)).output.splitlines()[-1])
    assert found["waits"] == []
    # With an operator for each parameter it was 10 launches and a copy each, and 15 launches for lamb.
    assert found["update"]["launches"] < launches_per_parameter * found["parameters"]
    assert found["update"]["d2h"] <= 4
