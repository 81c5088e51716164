"""Drivers of several versions under simulated GPUs."""

from __future__ import annotations

import pytest

RUN = ("--gpus", "0", "--batch-size", "8", "--num-steps", "1")
NO_FUSION = "MXNet runs without fused kernels: they need a driver for CUDA 11.8, and this one is for 11.2\n"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_driver_too_old_for_ptx_runs_without_fusion(pretrain, precision):
    result = pretrain(*RUN, "--precision", precision, log=True, GPUSIM_DRIVER="11020")
    assert result.output.count(NO_FUSION) == 1
    assert not result.lines("compile")


def test_driver_of_nvrtc_version_runs_fused_kernels(pretrain):
    result = pretrain(*RUN, log=True, GPUSIM_DRIVER="11080")
    assert "fused kernels" not in result.output
    assert result.lines("compile")


def test_driver_too_old_for_cuda_11_is_rejected(pretrain):
    result = pretrain(*RUN, status=2, GPUSIM_DRIVER="10020")
    assert "too old for CUDA 11" in result.output and "450.80.02" in result.output
