"""The machine, as the system reports it."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from gluon_bert.system import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones((64, 1024, 1024), np.uint8)  # freed at once
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults_of_64_mib(what):
    """Return the page faults of taking 64 MiB again, after they were freed."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, what], capture_output=True, encoding="utf-8", check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the C library is not glibc")
def test_freed_memory_is_not_taken_again():
    assert faults_of_64_mib("keep") < 8 <= faults_of_64_mib("return")
