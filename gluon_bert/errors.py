"""The exception for bad input, and one-line messages of other exceptions."""

from __future__ import annotations

import re
from typing import Sequence


class InputError(ValueError):
    """Bad input: the message says what is wrong, where, and what would be right.

    The commands print the message and exit with status 2. In Python it is a ValueError.
    """


class OutOfGPUMemory(RuntimeError):
    """A GPU had too little memory for a run; the message says what would fit. The exit status is 1."""


# Lines of the traces that MXNet puts before its errors, and of Python's.
_TRACE = ("Traceback", "Stack trace", "[bt]", "File ")
_GPU_ERROR = re.compile(r"\b(?:CUDA|cuda|cuBLAS|CUBLAS|cuDNN|CUDNN|cuRAND|NVRTC).*: *([^:]+)$")


def one_line(error: BaseException) -> str:
    """Return the reason of an error as one line.

    MXNet's errors begin with a trace and end with the reason.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reasons = [line for line in lines if not line.startswith(_TRACE)]
    if not reasons:
        return repr(error)
    last_or_first = reasons[-1] if len(reasons) < len(lines) else reasons[0]
    return next((line for line in reversed(reasons) if "Error" in line), last_or_first)


def gpu_failure(error: BaseException) -> str | None:
    """Return CUDA's reason where one of its libraries has failed, else None.

    MXNet raises all as MXNetError.
    """
    found = _GPU_ERROR.search(one_line(error)) if type(error).__name__ == "MXNetError" else None
    return found[1].strip().rstrip(".") if found else None


def join_words(items: Sequence[str]) -> str:
    """Join words for a sentence: ["a"] -> "a", ["a", "b", "c"] -> "a, b and c"."""
    *others, last = items
    return f"{', '.join(others)} and {last}" if others else last


class Terminated(BaseException):
    """SIGTERM, as KeyboardInterrupt is SIGINT."""
