"""Products of small matrices (ops/native/gemm.h), float32 and bfloat16, against NumPy's in float64.

Both sizes of vectors are tried. The compiler spells out those of AVX-512 for a processor without them.
"""

import ctypes
import os
import platform
import subprocess

import numpy as np
import pytest
from conftest import ROOT
from support.compiled_operators import to_bf16

from gluon_bert import ops
from gluon_bert.ops import build

# bfloat16 has 8 bits, float32 24; a processor may take what is smaller than the smallest normal number for 0.
SMALLEST = 2.0**-126


# Flags beside those of the operators. -O1, since short vectors for longer ones take the compiler long.
VECTORS = {"as here": [], "avx2": ["-mno-avx512f"], "avx512": ["-D__AVX512F__=1", "-O1"]}


@pytest.fixture(scope="module", params=VECTORS)
def library(request, tmp_path_factory):
    """gemm.h, compiled as the operators are, or with the sizes for AVX2 or AVX-512."""
    if request.param == "avx2" and platform.machine() != "x86_64":
        pytest.skip("the processor has no AVX2")
    if ops.describe() != "compiled for this processor":
        pytest.skip(f"the operators are {ops.describe()}")
    path = tmp_path_factory.mktemp("products") / "products.so"
    flags = [*build.FLAGS, *VECTORS[request.param], f"-I{build.SOURCES}"]
    command = [os.environ.get("CXX", "c++"), *flags, "-o", str(path)]
    subprocess.run([*command, str(ROOT / "tests" / "support" / "gemm.cc")], check=True)
    return ctypes.CDLL(str(path))


def pointer(array):
    return None if array is None else array.ctypes.data_as(ctypes.c_void_p)


def multiply(library, bf16, left, right, start=None, bias=None, transposed=(False, False)):
    """start or bias or 0, + left (N, K) times right (K, M)."""
    out = np.full((len(left), right.shape[1]), np.nan, np.float32) if start is None else start.copy()
    sides = [np.ascontiguousarray(s.T if t else s, np.float32) for s, t in zip((left, right), transposed)]
    library.multiply_matrices(
        ctypes.c_bool(bf16),
        *(*out.shape, len(right)),
        *(pointer(sides[0]), ctypes.c_bool(transposed[0])),
        *(pointer(sides[1]), ctypes.c_bool(transposed[1])),
        *(pointer(bias), ctypes.c_bool(start is not None), pointer(out)),
    )
    return out


def round_each(library, numbers):
    numbers, out = np.asarray(numbers, np.float32), np.empty(len(numbers), np.uint32)
    library.round_each(len(numbers), pointer(numbers), pointer(out))
    return (out << 16).view(np.float32)


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_products_of_any_size_equal_numpys(library, bf16, seed):
    """Sizes that fill no vector, tile or block of terms, odd numbers of terms, and some that fill several."""
    rng = np.random.default_rng(seed)
    rows, columns, depth = (
        int(rng.integers(1, most)) for most in ((40, 500)[seed % 2], 100, (20, 700)[seed % 3 > 0])
    )
    left, right = (rng.normal(size=s).astype(np.float32) for s in ((rows, depth), (depth, columns)))
    start, bias = (
        rng.normal(size=(rows, columns)).astype(np.float32),
        rng.normal(size=columns).astype(np.float32),
    )
    took = [to_bf16(x) if bf16 else x.astype(np.float64) for x in (left, right)]
    tolerance = {"rtol": 0, "atol": 1e-5 * depth**0.5}
    for transposed in ((False, False), (False, True), (True, False)):
        for begin, given in ((0, {}), (start, {"start": start}), (bias, {"bias": bias})):
            found = multiply(library, bf16, left, right, **given, transposed=transposed)
            np.testing.assert_allclose(found, begin + took[0] @ took[1], **tolerance)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_products_of_small_integers_are_exact(library, bf16):
    """Whole numbers of 8 bits, whose sums float32 has, whatever the order."""
    rng = np.random.default_rng(0)
    left, right = rng.integers(-256, 257, (50, 301)), rng.integers(-100, 101, (301, 75))
    np.testing.assert_array_equal(multiply(library, bf16, left, right), left @ right)


def test_bf16_rounds_to_nearest_even(library):
    between = 1 + 2.0**-8  # halfway from 1 to the next bfloat16, 1 + 2^-7
    numbers = [
        between,
        between + 2.0**-23,
        1 + 3 * 2.0**-8,
        1 + 3 * 2.0**-8 - 2.0**-23,
        -between,
        0.0,
        SMALLEST,
    ]
    expected = [1, 1 + 2.0**-7, 1 + 2.0**-6, 1 + 2.0**-7, -1, 0.0, SMALLEST]
    np.testing.assert_array_equal(round_each(library, numbers), np.float32(expected))
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint32)
    any_number = bits.view(np.float32)[(bits & 0x7F800000 != 0x7F800000) & (bits & 0x7F800000 != 0)]
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(round_each(library, any_number), to_bf16(any_number).astype(np.float32))


def test_bf16_keeps_nan_and_infinity(library):
    not_numbers = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32)
    assert np.isnan(round_each(library, not_numbers.view(np.float32))).all()
    largest = np.finfo(np.float32).max
    assert round_each(library, [np.inf, -np.inf, largest, -largest]).tolist() == [np.inf, -np.inf] * 2
    left, right = np.ones((3, 5)), np.ones((5, 40))
    left[1, 4], right[0, 33] = np.nan, np.inf
    found = multiply(library, True, left, right)
    assert np.isnan(found[1]).all() and np.isinf(found[[0, 2], 33]).all()
    assert (np.delete(found[[0, 2]], 33, axis=1) == 5).all()
