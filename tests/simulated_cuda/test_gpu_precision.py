"""Matrix products on simulated GPUs: the types of their factors, and the type of their sums."""

from __future__ import annotations

import re

import pytest

RUN = ("--gpus", "0", "--batch-size", "8", "--num-steps", "2")


def products(result) -> set[str]:
    """The function, the types (0: float32, 2: float16), the type of the sums, and the math mode."""
    return {re.sub(r"gemm \d+ (\w+) .* (types .*)", r"\1 \2", line) for line in result.lines("gemm")}


@pytest.mark.parametrize("flags", [(), ("--recompute",), ("--norm", "pre", "--activation", "gelu_tanh")])
def test_fp16_products_are_summed_in_float32(pretrain, flags):
    # 68 is CUBLAS_COMPUTE_32F.
    assert products(pretrain(*RUN, "--precision", "fp16", *flags, log=True)) == {
        "cublasGemmEx types 2 2 2 compute 68 math 1",
        "cublasGemmStridedBatchedEx types 2 2 2 compute 68 math 0",
    }


def test_fp32_dense_layers_use_tf32(pretrain):
    # Math mode 3 is CUBLAS_TF32_TENSOR_OP_MATH. docs/memory-and-precision.md says so.
    assert products(pretrain(*RUN, log=True)) == {
        "cublasSgemmEx types 0 0 0 compute 0 math 3",
        "cublasSgemmStridedBatched types 0 0 0 compute 0 math 0",
    }
