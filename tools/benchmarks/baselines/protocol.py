"""What a contestant's process and the benchmark say to each other: lines of JSON. Needs nothing but Python.

The process says once that it is ready. Each line with a number asks for so many optimizer steps; the answer
tells their seconds on the clock and on all cores together, their pairs and mean losses, and the process's
peak memory. A preparation is a process each time, and tells of itself once. The rest is for people.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any, Callable, Iterator, Tuple

# Pairs, MLM loss, NSP loss of one step, of which the losses are read when it is done.
Step = Tuple[int, float, float]


def serve(prepare: Callable[[], tuple[Iterator[Step], dict[str, Any]]]) -> None:
    """Answer the benchmark until it closes the line; `prepare` gives the steps, and facts to tell."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand between the answers
    began = time.perf_counter()
    steps, facts = prepare()
    _say(answers, {"ready_seconds": time.perf_counter() - began, **facts})
    for line in sys.stdin:
        before, used = time.perf_counter(), time.process_time()
        made = [next(steps) for _ in range(int(line))]
        seconds, cpu_seconds = time.perf_counter() - before, time.process_time() - used
        pairs, mlm, nsp = map(sum, zip(*made))
        _say(
            answers,
            {
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "pairs": pairs,
                "mlm_loss": mlm / len(made),
                "nsp_loss": nsp / len(made),
                "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
            },
        )


def tell_preparation(prepare: Callable[[], str]) -> None:
    """Prepare a text once and tell of it; `prepare` returns what says which batch was made."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    before = time.perf_counter()
    made = prepare()
    seconds = time.perf_counter() - before
    each = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    _say(
        answers,
        {
            "seconds": seconds,
            "made": made,
            # Of the process that took the most.
            "peak_gigabytes": max(usage.ru_maxrss for usage in each) / 1e6,
        },
    )


def _say(answers: Any, content: dict[str, Any]) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()
