"""An ordered, bounded map over processes. Knows nothing of text."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, Callable, Iterable, Iterator, Tuple

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Tuple[Any, Any]]]


@contextmanager
def processes(number: int) -> Iterator[Map]:
    """A map over processes, or (0) in this one: item by item in their order, each with its result."""
    if not number:
        yield lambda function, items: ((item, function(item)) for item in items)
        return
    # Spawned, since a fork of a process in which MXNet runs may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(number, context, _follow_the_command) as pool:
        yield partial(_bounded_map, pool, 4 * number)


def _follow_the_command() -> None:
    """Ignore Ctrl-C in a worker, and end the worker when the command has ended or was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _bounded_map(
    pool: ProcessPoolExecutor, ahead: int, function: Callable[[Any], Any], items: Iterable[Any]
) -> Iterator[tuple[Any, Any]]:
    """Like pool.map, but reads only `ahead` items in advance, so that memory stays bounded."""
    waiting: deque[tuple[Any, Future[Any]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(function, item)))
        if len(waiting) > ahead:
            item, future = waiting.popleft()
            yield item, future.result()
    while waiting:
        item, future = waiting.popleft()
        yield item, future.result()
