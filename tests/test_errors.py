"""Errors of MXNet as one line, and the reason of a GPU that has failed."""

import pytest

from gluon_bert.errors import gpu_failure, one_line


class MXNetError(Exception):
    """Named as MXNet's own error, which the project knows by its name."""


TRACE = 'Traceback (most recent call last):\n  [bt] (3) libmxnet.so(f+0x1)\n  File "../src/a.cc", line 7\n'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            TRACE + "CUDA: Check failed: e == cudaSuccess: an illegal memory access was encountered",
            "an illegal memory access was encountered",
        ),
        ("MXNetError: cudaMalloc retry failed: out of memory", "out of memory"),
        (TRACE + "cuBLAS: Check failed: e == CUBLAS_STATUS_SUCCESS: CUBLAS_STATUS_EXECUTION_FAILED", None),
        ("MXNetError: Shape inconsistent, Provided = [2], inferred shape=[3]", None),
        ("MXNetError: could not allocate 7 bytes", None),
    ],
)
def test_gpu_failure_is_the_reason_of_cuda(text, reason):
    found = gpu_failure(MXNetError(text))
    assert found == ("CUBLAS_STATUS_EXECUTION_FAILED" if "cuBLAS" in text else reason)
    assert gpu_failure(RuntimeError(text)) is None


def test_one_line_leaves_the_trace_out():
    assert one_line(MXNetError(TRACE + "MXNetError: no such operator")) == "MXNetError: no such operator"
    assert one_line(MXNetError(TRACE + "Check failed: a == b")) == "Check failed: a == b"
    assert one_line(ValueError("first\nsecond")) == "first"
    assert one_line(ValueError()) == "ValueError()"
