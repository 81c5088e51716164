"""A command that lasts as long as somebody holds its standard input; with it goes all that it started."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def minded(*command):
    return subprocess.Popen(
        [sys.executable, "-m", "gluon_bert.distributed.supervisor", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def is_gone(pid):
    end = time.monotonic() + 5
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(("script", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137)])
def test_the_status_is_the_commands(script, status):
    assert minded("sh", "-c", script).wait(10) == status


def test_a_command_that_is_not_there_is_told():
    process = minded("/no/such/command")
    assert process.wait(10) == 127
    assert "/no/such/command: No such file or directory" in process.stderr.read()


def test_signals_come_through_the_pipe():
    process = minded("sh", "-c", "trap 'exit 9' TERM; echo ready; while :; do sleep 0.05; done")
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("15\n")
    process.stdin.flush()
    assert process.wait(10) == 9


@pytest.mark.parametrize("way", ["close", "kill", "end"])
def test_nothing_is_left(way):
    """Of a command and its own children, when the pipe closes, when the minder is killed, when it ends."""
    script = "sleep 100 & echo $$ $!; wait" if way != "end" else "sleep 100 & echo $$ $!"
    process = minded("sh", "-c", script)
    own, child = map(int, process.stdout.readline().split())
    if way == "close":
        process.stdin.close()
    elif way == "kill":
        process.kill()
    assert process.wait(10) == {"close": 137, "kill": -signal.SIGKILL, "end": 0}[way]
    assert is_gone(own)
    if way == "kill":  # nobody is there to end it
        os.kill(child, signal.SIGKILL)
    assert is_gone(child)
