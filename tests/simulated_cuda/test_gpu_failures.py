"""A simulated GPU fails or runs out of memory: one sentence says so, and the launcher restarts the job."""

from __future__ import annotations

import pytest

RUN = ("--gpus", "0,1", "--batch-size", "8", "--num-steps", "8")
SENTENCE = "the GPU failed: an illegal memory access was encountered."


def assert_plain(output: str) -> None:
    """No trace, no name of an exception, and no talk of divergence."""
    assert not any(word in output for word in ("Traceback", "MXNetError", "diverged", "Exception")), output


@pytest.mark.parametrize("kernels", [300, 4000, 5200, 7000])
def test_failing_gpu_ends_the_run_with_its_reason(pretrain, kernels):
    result = pretrain(*RUN, status=1, GPUSIM_FAIL_AFTER=str(kernels))
    assert f"pretrain: {SENTENCE}" in result.output
    assert_plain(result.output)


@pytest.mark.parametrize("flags", [("--on-nonfinite", "skip"), ("--precision", "fp16")])
def test_failing_gpu_is_no_bad_step(pretrain, flags):
    result = pretrain(*RUN, *flags, status=1, GPUSIM_FAIL_AFTER="4500")
    assert SENTENCE in result.output
    assert_plain(result.output)
