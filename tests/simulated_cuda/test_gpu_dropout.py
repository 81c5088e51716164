"""The masks of dropout on simulated GPUs: seed, step, worker and part of the batch decide them."""

from __future__ import annotations

import re
import sys

DROPOUT = ("--gpus", "0", "--batch-size", "8")


def draws(result) -> list[str]:
    """Each draw of a mask: the seed, the position after it, and the number of values."""
    assert not result.lines("dropout-set", "dropout-forward"), "cuDNN has drawn a mask"
    return [re.sub(r"random-draw \d+ ", "", line) for line in result.lines("random-draw")]


def test_recomputed_layers_draw_the_same_masks(pretrain):
    result = pretrain(*DROPOUT, "--num-steps", "1", "--recompute", log=True)
    found = draws(result)
    assert len(found) == 2 * 7 and len(set(found)) == 7


def test_masks_differ_by_step_part_device_and_seed(pretrain):
    flags = ("--gpus", "0,1", "--batch-size", "8", "--micro-batch", "4", "--num-steps", "3")
    found = draws(pretrain(*flags, log=True))
    assert len(set(found)) == len(found)
    # 7 masks on each of 2 devices, for 3 steps and at least one part more.
    assert len(found) % (7 * 2) == 0 and len(found) > 3 * 7 * 2
    others = draws(pretrain(*flags, "--seed", "7", name="other", log=True))
    assert others and not set(others) & set(found)


def test_workers_draw_different_masks(gpus, corpus, tmp_path):
    given = (
        "--preset",
        "bert-tiny",
        "--corpus",
        corpus,
        "--output",
        tmp_path / "run",
        "--kvstore",
        "dist_sync",
    )
    command = (
        "-n",
        "2",
        "-s",
        "1",
        "--",
        sys.executable,
        "tools/pretrain.py",
        *given,
        *DROPOUT,
        "--num-steps",
        "2",
    )
    result = gpus.tool("launch", *command, log=True)
    by_process = [set(draws(log)) for log in result.by_process() if draws(log)]
    assert len(by_process) == 2 and not by_process[0] & by_process[1]


def test_resumed_step_draws_the_masks_of_the_unstopped_run(pretrain, gpus, tmp_path):
    unstopped = draws(pretrain(*DROPOUT, "--num-steps", "3", log=True))
    pretrain(*DROPOUT, "--num-steps", "2", name="stopped")
    resumed = gpus.tool("pretrain", "--resume", tmp_path / "stopped", "--num-steps", "3", log=True)
    assert draws(resumed) == unstopped[-7:]
