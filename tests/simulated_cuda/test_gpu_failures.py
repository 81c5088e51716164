"""A simulated GPU fails or runs out of memory: one sentence says so, and the launcher restarts the job."""

from __future__ import annotations

import sys

import pytest

from .conftest import SimulatedGPUs

RUN = ("--gpus", "0,1", "--batch-size", "8", "--num-steps", "8")
SENTENCE = "the GPU failed: an illegal memory access was encountered."


def assert_plain(output: str) -> None:
    """No trace, no name of an exception, and no talk of divergence."""
    assert not any(word in output for word in ("Traceback", "MXNetError", "diverged", "Exception")), output


@pytest.fixture(scope="module")
def launches(simulated_cuda, corpus, tmp_path_factory):
    """The launches of an undisturbed run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    given = ("--preset", "bert-tiny", "--corpus", corpus, "--output", folder / "run", *RUN)
    return SimulatedGPUs(simulated_cuda, folder).tool("pretrain", *given).launches


@pytest.mark.parametrize("share", [0.05, 0.6, 0.8, 0.98])
def test_failing_gpu_ends_the_run_with_its_reason(pretrain, launches, share):
    result = pretrain(*RUN, status=1, GPUSIM_FAIL_AFTER=str(int(share * launches)))
    assert f"pretrain: {SENTENCE}" in result.output
    assert_plain(result.output)


@pytest.mark.parametrize("flags", [("--on-nonfinite", "skip"), ("--precision", "fp16")])
def test_failing_gpu_is_no_bad_step(pretrain, launches, flags):
    result = pretrain(*RUN, *flags, status=1, GPUSIM_FAIL_AFTER=str(int(0.7 * launches)))
    assert SENTENCE in result.output
    assert_plain(result.output)


def test_launcher_restarts_the_job_after_a_gpu_failure(gpus, corpus, tmp_path, launches):
    # Each start computes for so long that a checkpoint comes before the failure, until the run is complete.
    command = [sys.executable, "tools/pretrain.py", "--preset", "bert-tiny", "--corpus", corpus, *RUN]
    command += [
        "--output",
        tmp_path / "run",
        "--checkpoint-every",
        "2",
        "--resume",
        "auto",
        "--kvstore",
        "dist_sync",
    ]
    result = gpus.tool(
        "launch", "-n", "1", "--max-restarts", "5", "--", *command, GPUSIM_FAIL_AFTER=str(int(0.7 * launches))
    )
    assert SENTENCE in result.output and "launch: restart 1 of 5" in result.output
    assert "resuming after step" in result.output
    assert_plain(result.output)


def test_failing_gpu_ends_a_fine_tuning_with_its_reason(gpus, gpu_run, table, tmp_path):
    given = ("--train", table, "--validation", table, "--output", tmp_path / "tuned", "--gpus", "0,1")
    result = gpus.tool("finetune", gpu_run, *given, status=1, GPUSIM_FAIL_AFTER="1500")
    assert f"finetune: {SENTENCE}" in result.output
    assert_plain(result.output)


def test_encode_out_of_gpu_memory_says_so(gpus, gpu_run):
    result = gpus.tool("encode", gpu_run, "w1 w2", "--gpus", "0", status=1, GPUSIM_MEMORY="2e6")
    assert "encode: the GPU is out of memory." in result.output
    assert_plain(result.output)


def test_fine_tuning_too_large_for_the_gpu_is_rejected(gpus, gpu_run, table, tmp_path):
    given = ("--train", table, "--validation", table, "--output", tmp_path / "tuned", "--gpus", "0")
    result = gpus.tool("finetune", gpu_run, *given, status=2, GPUSIM_MEMORY="4e6")
    assert "finetune: the run needs about " in result.output
    assert "of each GPU with --batch-size 32 and --max-seq-length " in result.output
    assert not (tmp_path / "tuned").exists()
    ignoring = gpus.tool(
        "finetune", gpu_run, *given, "--ignore-memory-estimate", status=1, GPUSIM_MEMORY="4e6"
    )
    assert "It trains anyway" in ignoring.output
    assert "finetune: the GPU is out of memory. Each has 0.0 GB, and the run needs about " in ignoring.output
    assert_plain(ignoring.output)
