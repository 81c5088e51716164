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
        ("--recompute", "yes"),
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
