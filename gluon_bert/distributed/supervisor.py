"""Runs a command and ends it, with all that it started, when standard input closes; used by tools/launch.py.

Whoever holds the other end of that pipe, here or over ssh, need not do anything to end the command: to be
gone is enough. A line with a number sends the command that signal.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from typing import NoReturn

_PR_SET_PDEATHSIG = 1


def supervise(command: list[str]) -> int:
    """Run a command as long as standard input is open; its exit status, 128 + n if signal n ended it."""
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with_parent
        )
    except OSError as error:
        print(f"{command[0]}: {error.strerror or error}", file=sys.stderr)
        return 127
    threading.Thread(target=_obey, args=(process,), daemon=True).start()
    status = process.wait()
    _end(process)
    return status if status >= 0 else 128 - status


def _obey(process: subprocess.Popen[bytes]) -> None:
    for line in sys.stdin.buffer:
        with suppress(ProcessLookupError):
            os.kill(process.pid, int(line))
    _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the command's process group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> NoReturn:
    """Run the command of the command line and leave with its exit status."""
    status = supervise(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # the thread may still be reading


if __name__ == "__main__":
    main()
