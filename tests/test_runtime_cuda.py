"""The CUDA wheel on a machine without a GPU: loaded with a stub driver, counted, and trained on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict

import pytest
from support.stub_libcuda import build_stub

from gluon_bert import runtime

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not runtime.has_cuda_wheel(), reason=f"needs {runtime.INSTALL_CUDA}"),
]


def run(code: str, driver: Path) -> Dict[str, Any]:
    """What the code puts into `found`, run in a fresh interpreter whose loader finds the stub driver."""
    search = os.pathsep.join(filter(None, [str(driver.parent), os.environ.get("LD_LIBRARY_PATH")]))
    done = subprocess.run(
        [sys.executable, "-c", f"import json\nfound = {{}}\n{code}\nprint(json.dumps(found))"],
        cwd=str(ROOT),
        env={**os.environ, "LD_LIBRARY_PATH": search},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


REFUSAL = """
from gluon_bert.devices import contexts
from gluon_bert.errors import InputError
for gpus in None, [0]:
    try:
        found[str(gpus)] = str(contexts(gpus=gpus))
    except InputError as refusal:
        found[str(gpus)] = str(refusal)
found["cpus"] = str(contexts(cpus=2))
"""


def test_cuda_wheel_without_gpu_gives_cpu_refuses_gpu(tmp_path: Path) -> None:
    found = run(REFUSAL, build_stub(tmp_path))
    assert found["None"] == "[cpu(0)]"
    assert found["[0]"].startswith("gpus=0 needs a GPU, and MXNet sees none")
    assert found["cpus"] == "[cpu(0), cpu(1)]"


def test_cuda_wheel_without_gpu_counts_none(tmp_path: Path) -> None:
    code = """
from gluon_bert import devices, runtime
found.update(gpus=runtime.mx.context.num_gpus(), cuda=devices.built_with_cuda())
found.update(mxnet=runtime.versions()["mxnet"])
"""
    found = run(code, build_stub(tmp_path))
    assert found == {"gpus": 0, "cuda": True, "mxnet": "mxnet-cu112 1.9.1"}


def test_cuda_wheel_loads_libraries_of_wheels(tmp_path: Path) -> None:
    code = """
from gluon_bert.runtime import CUDA_LIBRARIES, mx
maps = open("/proc/self/maps").read()
found["absent"] = [name for name in CUDA_LIBRARIES if f"/{name}" not in maps]
"""
    assert run(code, build_stub(tmp_path)) == {"absent": []}


def test_old_driver_is_refused_not_cpu(tmp_path: Path) -> None:
    driver = build_stub(tmp_path, "-DDRIVER_VERSION=9000", "-DCAPABILITIES={8,6},")
    found = run(REFUSAL, driver)
    assert found["None"].startswith("the NVIDIA driver lists GPU 0 but is too old")
    assert found["[0]"] == found["None"]
    assert found["cpus"] == "[cpu(0), cpu(1)]"


def test_cuda_failure_is_one_sentence_not_cpu(tmp_path: Path) -> None:
    # The stub has a GPU, but not the inner tables of a driver: CUDA fails while it counts.
    found = run(REFUSAL, build_stub(tmp_path, "-DCAPABILITIES={8,6},"))
    assert found["None"].startswith("CUDA cannot count the GPUs (")
    assert found["[0]"] == found["None"]
    assert "\n" not in found["None"]


def test_missing_driver_is_refused(tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").write_bytes(b"no driver")  # found before the machine's own
    code = """
from gluon_bert.errors import InputError
try:
    from gluon_bert.runtime import mx
except InputError as refusal:
    found["refusal"] = str(refusal)
"""
    found = run(code, tmp_path / "libcuda.so.1")
    assert found["refusal"].startswith("mxnet-cu112 needs an NVIDIA driver")


def test_cuda_wheel_trains_on_the_cpu(tmp_path: Path) -> None:
    code = """
from gluon_bert.devices import contexts
from gluon_bert.runtime import mx
context, = contexts()
mx.random.seed(0)
net = mx.gluon.nn.HybridSequential()
net.add(mx.gluon.nn.Dense(8, activation="tanh"), mx.gluon.nn.LayerNorm(), mx.gluon.nn.Dense(1))
net.initialize(mx.init.Xavier(), ctx=context)
net.hybridize()
trainer = mx.gluon.Trainer(net.collect_params(), "adam", {"learning_rate": 0.01})
x = mx.nd.random.normal(shape=(32, 4), ctx=context)
y = x.sum(axis=1, keepdims=True)
found["losses"] = []
for _ in range(20):
    with mx.autograd.record():
        loss = ((net(x) - y) ** 2).mean()
    loss.backward()
    trainer.step(1)
    found["losses"].append(float(loss.asscalar()))
"""
    losses = run(code, build_stub(tmp_path))["losses"]
    assert losses[-1] < 0.9 * losses[0]
