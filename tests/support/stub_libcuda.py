"""Compiles stub_libcuda.c; not a test."""

import shutil
import subprocess
from pathlib import Path

import pytest


def build_stub(folder: Path, *options: str) -> Path:
    """Compiles the stub driver with `options` into folder/libcuda.so.1; skips the test without a compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler for the stub driver")
    source = Path(__file__).with_name("stub_libcuda.c")
    library = folder / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", *options, str(source), "-o", str(library)], check=True)
    return library
