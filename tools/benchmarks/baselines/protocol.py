"""The protocol between the benchmark and the process of a baseline: lines of JSON. Needs Python only.

The process reports once that it is ready. Each input line is a number of optimizer steps to take. The report
of these steps has their wall-clock and CPU seconds, pairs, mean losses and the peak memory of the process. A
preparation reports once and exits.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import IO, Any, Callable, Iterator, Tuple

# Pairs, MLM loss and NSP loss of a finished step.
Step = Tuple[int, float, float]


def serve(prepare: Callable[[], tuple[Iterator[Step], dict[str, Any]]]) -> None:
    """Take steps until standard input closes. prepare: returns the steps and details to report."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps prints of libraries out of the protocol
    began = time.perf_counter()
    steps, details = prepare()
    _report(output, {"ready_seconds": time.perf_counter() - began, **details})
    for line in sys.stdin:
        before, used = time.perf_counter(), time.process_time()
        taken = [next(steps) for _ in range(int(line))]
        seconds, cpu_seconds = time.perf_counter() - before, time.process_time() - used
        pairs, mlm, nsp = map(sum, zip(*taken))
        _report(
            output,
            {
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "pairs": pairs,
                "mlm_loss": mlm / len(taken),
                "nsp_loss": nsp / len(taken),
                "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
            },
        )


def report_preparation(prepare: Callable[[], str]) -> None:
    """Time a preparation and report it. prepare: returns an identifier of the first batch."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    before = time.perf_counter()
    first_batch = prepare()
    seconds = time.perf_counter() - before
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    _report(
        output,
        {
            "seconds": seconds,
            "first_batch": first_batch,
            # Of the process with the highest peak.
            "peak_gigabytes": max(usage.ru_maxrss for usage in usages) / 1e6,
        },
    )


def _report(output: IO[str], content: dict[str, Any]) -> None:
    output.write(json.dumps(content) + "\n")
    output.flush()
