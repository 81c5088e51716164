"""The supervisor ends a command and its children when standard input closes."""

import os
import signal
import subprocess
import sys

import pytest
from support.processes import wait_until_gone


def supervised(*command):
    return subprocess.Popen(
        [sys.executable, "-m", "gluon_bert.distributed.supervisor", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


@pytest.mark.parametrize(("script", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137)])
def test_supervise_returns_the_status_of_the_command(script, status):
    assert supervised("sh", "-c", script).wait(10) == status


def test_supervise_reports_a_missing_command():
    process = supervised("/no/such/command")
    assert process.wait(10) == 127
    assert "/no/such/command: No such file or directory" in process.stderr.read()


def test_supervise_forwards_signals_from_the_pipe():
    process = supervised("sh", "-c", "trap 'exit 9' TERM; echo ready; while :; do sleep 0.05; done")
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("15\n")
    process.stdin.flush()
    assert process.wait(10) == 9


@pytest.mark.parametrize("way", ["close", "kill", "end"])
def test_supervise_leaves_no_process(way):
    """The pipe closes, the supervisor is killed, or the command ends before its child."""
    script = "sleep 100 & echo $$ $!; wait" if way != "end" else "sleep 100 & echo $$ $!"
    process = supervised("sh", "-c", script)
    own, child = map(int, process.stdout.readline().split())
    if way == "close":
        process.stdin.close()
    elif way == "kill":
        process.kill()
    assert process.wait(10) == {"close": 137, "kill": -signal.SIGKILL, "end": 0}[way]
    wait_until_gone([own], seconds=5)
    if way == "kill":  # the launcher closes the pipe of the child's group otherwise
        os.kill(child, signal.SIGKILL)
    wait_until_gone([child], seconds=5)
