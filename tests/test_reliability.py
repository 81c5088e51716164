"""Full disks, failing threads and processes: an error, nothing lost, nothing left behind."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import numpy as np
import pretrain
import pytest
from conftest import ROOT
from support.processes import children_of, wait_for, wait_until_gone
from support.runs import SMALL_NETWORK

from gluon_bert import checkpoint
from gluon_bert.training import checkpointer as saving
from gluon_bert.training.progress import ProgressLogger
from gluon_bert.training.run_log import LogFile

SMALL = [
    *(*SMALL_NETWORK, "--num-steps", "12", "--log-every", "3"),
    *("--dynamic-masking", "--checkpoint-every", "2"),
]


@contextmanager
def files_of_at_most(num_bytes):
    """The system refuses to make a file longer, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def all_of(folder):
    step = checkpoint.steps(folder)[-1]
    snapshot = checkpoint.read_checkpoint(folder, step)
    return step, {**snapshot.weights, **snapshot.optimizer}


def windows(folder):
    records = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [record["step"] for record in records if "mlm_loss" in record]


def assert_same(one, other):
    (step, ours), (other_step, theirs) = all_of(one), all_of(other)
    assert step == other_step and ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)
    assert windows(one) == windows(other)


def leftovers(folder):
    return [path for path in folder.rglob(".*") if path.name.endswith(".part")]


def test_full_disk_stops_and_resume_continues(command, capsys):
    _, undisturbed = command(name="undisturbed")
    _, folder = command("--num-steps", "4", "--log-every", "4")
    capsys.readouterr()
    with files_of_at_most(30_000):
        assert pretrain.main(["--resume", str(folder), "--num-steps", "12", "--log-every", "3"]) == 1
    err = capsys.readouterr().err
    assert "a checkpoint could not be written (File too large); the checkpoint after step 4 is kept" in err
    assert "Traceback" not in err
    assert checkpoint.steps(folder)[-1] == 4 and not leftovers(folder)
    assert pretrain.main(["--resume", str(folder)]) == 0
    assert all_of(folder)[0] == 12
    for name, array in all_of(undisturbed)[1].items():
        np.testing.assert_array_equal(array, all_of(folder)[1][name])


def test_full_disk_continue_costs_no_step(command, capsys, monkeypatch):
    _, undisturbed = command(name="undisturbed")
    stepped, real = ProgressLogger.on_step, os.fsync
    full = [False]

    def filling(self, trainer, step):
        stepped(self, trainer, step)
        full[0] = 3 < step < 9

    def syncing(handle):
        if full[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(ProgressLogger, "on_step", filling)
    monkeypatch.setattr(os, "fsync", syncing)
    status, folder = command("--on-checkpoint-error", "continue")
    assert status == 0
    assert capsys.readouterr().err.count("a checkpoint could not be written (No space left on device)") >= 3
    assert_same(undisturbed, folder)
    assert not leftovers(folder)


def test_full_disk_at_the_last_checkpoint_fails(command, capsys):
    with files_of_at_most(30_000):
        status, folder = command("--on-checkpoint-error", "continue")
    assert status == 1
    assert (
        "a checkpoint could not be written (File too large); the run has no checkpoint yet"
        in capsys.readouterr().err
    )
    assert checkpoint.steps(folder) == [] and not leftovers(folder)


def test_log_keeps_whole_lines_and_retries_the_rest(tmp_path):
    path = tmp_path / "log.jsonl"
    log = LogFile(path)
    averages = dict.fromkeys(("mlm_loss", "nsp_loss", "mlm_accuracy", "nsp_accuracy"), 0.5)
    log.append({"step": 1, **averages})
    size = path.stat().st_size
    with files_of_at_most(size + 20):
        for step in (2, 3):
            with pytest.raises(OSError, match="File too large"):
                log.append({"step": step, **averages})
            assert path.stat().st_size == size
        with pytest.raises(OSError, match="File too large"):
            log.synced()
    log.append({"step": 4, **averages})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    assert log.synced() == path.stat().st_size
    log.close()
    # What came after a checkpoint is cut off, and half a line too.
    again = LogFile(path, size + 10)
    assert [record["step"] for record in again.records] == [1]
    assert path.stat().st_size == size


def test_training_continues_while_writing(command, monkeypatch):
    """The thread that writes waits for a step to come: none would, if the training waited for it."""
    came, write, stepped = threading.Event(), saving.write_checkpoint, ProgressLogger.on_step

    def writing(*args, **options):
        came.clear()
        if args[1].step < 12:
            assert came.wait(timeout=60)
        return write(*args, **options)

    def stepping(self, trainer, step):
        stepped(self, trainer, step)
        came.set()

    monkeypatch.setattr(saving, "write_checkpoint", writing)
    monkeypatch.setattr(ProgressLogger, "on_step", stepping)
    status, folder = command()
    assert status == 0 and checkpoint.steps(folder)[-1] == 12


def test_failed_thread_ends_the_run_with_its_traceback(command, monkeypatch):
    def failing(*_, **__):
        raise ZeroDivisionError("in the thread")

    monkeypatch.setattr(saving, "write_checkpoint", failing)
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError, match="in the thread") as caught:
        command()
    assert any(entry.name == "failing" for entry in caught.traceback)
    assert threading.active_count() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_stop_while_reading_text_leaves_no_process(tmp_path, number):
    text = "\n".join(f"the crane number {i} lifts a tower . it leaves the city ." for i in range(400_000))
    (tmp_path / "text.txt").write_text(text, "utf-8")
    flags = [
        "--corpus",
        str(tmp_path / "text.txt"),
        "--text-format",
        "paragraphs",
        "--preprocessing-workers",
        "2",
    ]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tools/pretrain.py"), *flags, "--output", str(tmp_path / "run")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Nothing is compiled before the text is read.
        env={**os.environ, "MXNET_HOME": str(tmp_path / "home"), "GLUON_BERT_OPERATORS": "mxnet"},
    )
    wait_for(lambda: len(children_of(process.pid)) >= 2, process, seconds=60)
    time.sleep(0.3)
    children = children_of(process.pid)
    process.send_signal(number)
    status = process.wait(timeout=60)
    assert status == {signal.SIGTERM: 143, signal.SIGINT: 130}.get(number, -signal.SIGKILL)
    wait_until_gone(children)
    assert not (tmp_path / "run").exists()
