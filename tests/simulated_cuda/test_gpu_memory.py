"""The memory of simulated GPUs: the estimate against the peak of MXNet's pool, and runs that do not fit."""

from __future__ import annotations

import json
import re

import pytest

from .conftest import SimulatedGPUs

PEAKS = """
import ctypes, gc, json, sys
import numpy as np
from gluon_bert.data.batch import Batch
from gluon_bert.finetuning.dataset import TaskBatch
from gluon_bert.model.bert import BERTModel
from gluon_bert.model.classifier import BERTForTask
from gluon_bert.model.task import Task
from gluon_bert.presets import preset
from gluon_bert.runtime import mx
from gluon_bert.training.gpu_memory import estimate_gpu_memory
from gluon_bert.training.resources import Workload, max_masked
from gluon_bert.training.losses import pretraining_loss, task_loss
from gluon_bert.training.trainer import Trainer

name, num_gpus, changes = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
kind = changes.pop("task", "")
task = Task(kind, False, ("a", "b")) if kind else None
contexts = [mx.gpu(number) for number in range(num_gpus)]
words = 30006
cudart = ctypes.CDLL("libcudart.so.11.0")
cudart.gpusim_counts.restype = ctypes.c_char_p

def make_steps(config):
    net = BERTForTask(words, config.model, task) if task else BERTModel(words, config.model)
    net.initialize(mx.init.Zero(), ctx=contexts)
    net.hybridize()
    trainer = Trainer(net, config.train, contexts, loss=task_loss if task else pretraining_loss)
    rows, length, masked = config.train.batch_size, config.data.max_seq_length, max_masked(config)
    ones = lambda *shape: np.ones(shape, np.int32)
    places = np.stack([np.repeat(np.arange(rows), masked), np.tile(np.arange(masked), rows)])
    tokens, valid = ones(rows, length), length * ones(rows)
    if task:
        batch = TaskBatch(tokens, tokens, valid, ones(rows, 2) if task.scores_tokens else ones(rows))
    else:
        batch = Batch(tokens, tokens, valid, places.astype(np.int32), ones(rows * masked), ones(rows))
    for _ in range(2):
        trainer.step(batch)
    mx.nd.waitall()

found = {}
for precision in ("fp32", "fp16"):
    config = preset(name).replace(precision=precision, **changes)
    make_steps(config)
    counts = json.loads(cudart.gpusim_counts())
    assert counts["faults"] == counts["missing"] == 0
    peak = max(device["peak"] for device in counts["devices"][:num_gpus])
    found[precision] = [peak, estimate_gpu_memory(Workload(config, words, num_gpus, task=task)).memory]
    gc.collect()
    mx.nd.waitall()
    for context in contexts:
        context.empty_cache()
    left = max(device["used"] for device in json.loads(cudart.gpusim_counts())["devices"])
    assert left < 0.02 * peak, left
    cudart.gpusim_reset_peaks()
print(json.dumps(found))
"""
LARGE = {"GPUSIM_MEMORY": "400e9", "GPUSIM_MEMSET": "0"}


@pytest.fixture(scope="module")
def peaks(simulated_cuda, tmp_path_factory):
    """Returns by precision the peak of the fullest GPU and its estimate, in bytes. Runs a network once."""
    gpus, known = SimulatedGPUs(simulated_cuda, tmp_path_factory.mktemp("peaks")), {}

    def measured(name, num_gpus, **changes):
        given = name, str(num_gpus), json.dumps(changes, sort_keys=True)
        if given not in known:
            known[given] = json.loads(gpus.code(PEAKS, *given, **LARGE).output.splitlines()[-1])
        return known[given]

    return measured


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("name", "num_gpus", "changes"),
    [
        ("bert-base", 1, {"batch_size": 32}),
        ("bert-base", 1, {"batch_size": 64, "recompute": True}),
        ("bert-base", 1, {"batch_size": 32, "micro_batch": 8}),
        ("bert-base", 2, {"batch_size": 32}),
        ("bert-large", 1, {"batch_size": 16, "max_seq_length": 512, "recompute": True}),
        ("bert-large", 1, {"batch_size": 32, "micro_batch": 16}),
        ("bert-base", 1, {"batch_size": 32, "task": "classification"}),
        ("bert-base", 2, {"batch_size": 16, "micro_batch": 8, "task": "question-answering"}),
    ],
)
def test_memory_estimate_is_near_the_peak(peaks, name, num_gpus, changes, precision):
    peak, estimate = peaks(name, num_gpus, **changes)[precision]
    assert estimate == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize(
    "changes", [{"dropout": 0.0}, {"activation": "relu"}, {"norm": "pre"}, {"optimizer": "muon"}]
)
def test_memory_estimate_knows_other_settings(peaks, changes):
    for peak, estimate in peaks("bert-small", 1, batch_size=64, **changes).values():
        assert estimate == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize(
    ("name", "num_gpus", "changes"),
    [
        ("bert-base", 1, {"batch_size": 32}),
        ("bert-base", 1, {"batch_size": 64, "recompute": True}),
        ("bert-large", 1, {"batch_size": 32, "micro_batch": 16}),
    ],
    ids=["whole", "recompute", "micro-batches"],
)
def test_fp16_takes_no_more_memory_than_fp32(peaks, name, num_gpus, changes):
    found = peaks(name, num_gpus, **changes)
    assert found["fp16"][0] <= found["fp32"][0]


def test_run_too_large_for_the_gpu_is_rejected(pretrain, tmp_path):
    flags = ("--gpus", "0,1", "--batch-size", "256", "--num-steps", "2")
    result = pretrain(*flags, preset="bert-small", status=2, GPUSIM_MEMORY="2e9")
    assert re.search(
        r"needs about \d+\.\d GB of each GPU with .*, and 2\.0 GB are free\. Use --micro-batch", result.output
    )
    assert not (tmp_path / "run").exists()
    size = re.search(r"--micro-batch (\d+)", result.output)[1]
    pretrain(*flags, "--micro-batch", size, preset="bert-small", GPUSIM_MEMORY="2e9")


def test_out_of_memory_in_a_run_says_what_would_fit(pretrain):
    # So little that the check lets it pass and the run does not fit.
    flags = ("--gpus", "0", "--batch-size", "32", "--num-steps", "2")
    estimate = float(re.search(r"memory expected: ([\d.]+)", pretrain(*flags, preset="bert-small").output)[1])
    result = pretrain(
        *flags, preset="bert-small", name="other", status=1, GPUSIM_MEMORY=f"{estimate * 0.92}e9"
    )
    assert re.search(r"pretrain: the GPU is out of memory\. .*--micro-batch \d+", result.output)
    assert "Traceback" not in result.output and "MXNetError" not in result.output


def test_memory_taken_is_that_of_the_gpu(pretrain):
    result = pretrain("--gpus", "0,1", "--batch-size", "8", "--num-steps", "2")
    used = max(device["peak"] for device in result.processes[0]["devices"]) / 1e9
    assert float(re.search(r"GPU memory in use: ([\d.]+) GB", result.output)[1]) == pytest.approx(
        used, abs=0.06
    )
