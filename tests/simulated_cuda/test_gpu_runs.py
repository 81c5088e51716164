"""Pretraining on simulated GPUs: every call is right, and the main thread never waits for a device."""

from __future__ import annotations

import pytest

SMALL = ("--gpus", "0,1", "--batch-size", "8", "--num-steps", "3")


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--precision", "fp16"),
        ("--micro-batch", "4"),
        ("--recompute",),
        ("--optimizer", "lamb", "--clip-norm", "1"),
    ],
    ids=lambda flags: "-".join(flags) or "plain",
)
def test_pretrain_two_gpus_makes_valid_calls(pretrain, flags):
    result = pretrain(*SMALL, *flags)
    assert (result.counts["faults"], result.counts["missing"]) == (0, 0)
    for device in result.counts["devices"]:
        assert device["launches"] > 1000 and device["p2p"] > 0
        assert device["main_syncs"] == device["main_d2h"] == 0


def assert_valid(result, num_gpus):
    """No wrong call, no call that is not simulated, and work on each of so many GPUs."""
    assert (result.counts["faults"], result.counts["missing"]) == (0, 0)
    assert all(device["launches"] > 0 for device in result.counts["devices"][:num_gpus])


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
    assert_valid(result, flags[1].count(",") + 1)


def test_resume_continues_on_another_number_of_gpus(pretrain, gpus, tmp_path):
    pretrain("--gpus", "0,1", "--batch-size", "8", "--num-steps", "1", "--seed", "3")
    resume = ("--resume", tmp_path / "run", "--num-steps")
    assert_valid(gpus.tool("pretrain", *resume, "2", "--gpus", "0"), 1)
