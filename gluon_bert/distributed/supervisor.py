"""Runs a command and ends its whole process group when standard input closes.

The launcher holds the other end of that pipe, here or over ssh. If the launcher dies, the command ends too.
A line with a number sends the command that signal.
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
    """Run a command while standard input is open. Return its exit status: 128 + n after signal n."""
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with_parent
        )
    except OSError as error:
        print(f"{command[0]}: {error.strerror or error}", file=sys.stderr)
        return 127
    threading.Thread(target=_follow_input, args=(process,), daemon=True).start()
    status = process.wait()
    _kill_group(process)
    return status if status >= 0 else 128 - status


def _follow_input(process: subprocess.Popen[bytes]) -> None:
    for line in sys.stdin.buffer:
        with suppress(ProcessLookupError):
            os.kill(process.pid, int(line))
    _kill_group(process)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the remaining processes of the command's group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> NoReturn:
    """Run the given command and exit with its status."""
    status = supervise(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # the reading thread may still block


if __name__ == "__main__":
    main()
