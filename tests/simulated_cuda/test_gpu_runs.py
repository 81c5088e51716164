"""Pretraining on simulated GPUs: every call is right, and the main thread never waits for a device."""

from __future__ import annotations

import sys

import pytest

SMALL = ("--gpus", "0,1", "--batch-size", "8", "--num-steps", "2")
# Room for any network, in memory that nothing is written to.
LARGE = {"GPUSIM_MEMORY": "400e9", "GPUSIM_MEMSET": "0"}


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--precision", "fp16"),
        ("--micro-batch", "4"),
        ("--recompute",),
        ("--optimizer", "lamb", "--clip-norm", "1"),
        ("--norm", "pre", "--activation", "gelu_tanh", "--precision", "fp16", "--micro-batch", "4"),
        ("--position", "relative-bias", "--objective", "mlm"),
        ("--position", "relative-bias", "--precision", "fp16", "--recompute"),
    ],
    ids=lambda flags: "-".join(flags) or "plain",
)
def test_pretrain_two_gpus_makes_valid_calls(pretrain, flags):
    result = pretrain(*SMALL, *flags)
    result.assert_valid(2)
    assert all(device["p2p"] > 0 for device in result.processes[0]["devices"])


# Two more are in other tests here. test_gpu_memory has bert-base and bert-large.
@pytest.mark.parametrize("preset", ["demo", "bert-mini", "bert-small", "bert-medium"])
def test_pretrain_preset_makes_valid_calls(pretrain, preset):
    # The corpus has too few words for word vectors from it.
    flags = ("--gpus", "0,1", "--batch-size", "4", "--num-steps", "1", "--init-embeddings", "random")
    pretrain(*flags, preset=preset).assert_valid(2)


@pytest.mark.parametrize(
    ("num_gpus", "flags"),
    [
        (1, ()),
        (2, ("--precision", "fp16", "--micro-batch", "4")),
        (3, ("--precision", "fp16", "--on-nonfinite", "skip")),
    ],
)
def test_muon_makes_valid_calls_on_gpus(pretrain, num_gpus, flags):
    gpus = ",".join(map(str, range(num_gpus)))
    given = ("--gpus", gpus, "--batch-size", "8", "--num-steps", "2", "--init-embeddings", "random")
    result = pretrain(*given, "--optimizer", "muon", *flags, preset="quick", GPUSIM_DEVICES="3")
    result.assert_valid(num_gpus)


def test_gpu_run_needs_no_compiler(pretrain):
    result = pretrain(*SMALL, GLUON_BERT_OPERATORS="auto", CXX="/no/compiler")
    assert "operators: MXNet's own, " in result.output and "no C++ compiler" not in result.output


@pytest.mark.parametrize(
    ("preset", "flags", "variables"),
    [
        ("d2l", ("--gpus", "0,1,2", "--batch-size", "7"), {"GPUSIM_DEVICES": "3"}),
        ("bert-tiny", ("--gpus", "0,1,2", "--batch-size", "2"), {"GPUSIM_DEVICES": "3"}),
        ("bert-tiny", ("--gpus", "0,1", "--batch-size", "7"), {"GPUSIM_PEERS": "0"}),
    ],
    ids=["d2l, uneven batches", "fewer rows than GPUs", "no peer access"],
)
def test_pretrain_other_batches_and_gpus_are_valid(pretrain, preset, flags, variables):
    result = pretrain(*flags, "--num-steps", "2", preset=preset, **variables)
    # Of two rows on three GPUs, the third GPU still gets its part of the sums.
    result.assert_valid(flags[1].count(",") + 1)


def test_two_workers_of_two_gpus_make_valid_calls(gpus, corpus, tmp_path):
    command = [sys.executable, "tools/pretrain.py", "--preset", "bert-tiny", "--corpus", corpus, *SMALL]
    command += ["--output", tmp_path / "run", "--kvstore", "dist_sync", "--precision", "fp16"]
    result = gpus.tool("launch", "-n", "2", "-s", "1", "--", *command)
    result.assert_valid(2, num_processes=2)
    assert "on [gpu(0), gpu(1)] of each of 2 workers" in result.output


@pytest.mark.parametrize(
    "devices", [("--gpus", "0"), ("--cpus", "2"), ("--gpus", "0,1,2")], ids=["one GPU", "CPUs", "three GPUs"]
)
def test_gpu_run_resumes_on_other_devices(pretrain, gpus, tmp_path, devices):
    pretrain(*SMALL, "--optimizer", "lamb")
    resume = ("--resume", tmp_path / "run", "--num-steps")
    there = gpus.tool("pretrain", *resume, "3", *devices, GPUSIM_DEVICES="3")
    there.assert_valid(devices[1].count(",") + 1, num_processes=int(devices[0] == "--gpus"))
    gpus.tool("pretrain", *resume, "4", "--gpus", "0,1").assert_valid(2)
