"""End a process whose steps take too long, for example because another worker died."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import Callable, Iterator


@contextmanager
def watched(seconds: float, end: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Yield a function to call at least every `seconds`; otherwise `end` is called. 0: never.

    A thread calls `end`, because the block itself hangs. `end` must end the process. The thread ends with the
    block.
    """
    heard, over = [time.monotonic()], threading.Event()

    def alive() -> None:
        heard[0] = time.monotonic()

    def watch() -> None:
        while not over.wait(max(0.0, heard[0] + seconds - time.monotonic())):
            if time.monotonic() >= heard[0] + seconds:
                end()
                return

    if not seconds:
        yield alive
        return
    thread = threading.Thread(target=watch, name="watchdog")
    thread.start()
    try:
        yield alive
    finally:
        over.set()
        thread.join()
