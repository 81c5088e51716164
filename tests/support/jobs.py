"""Starts jobs of workers with tools/launch.py, disturbs them, and compares the runs they leave."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import uuid

import numpy as np
import pretrain
from conftest import ROOT

from gluon_bert import checkpoint
from support.runs import log_of

from .processes import processes_with, wait_for

NUM_STEPS = 20
SMALL = ["--preset", "d2l", "--units", "16", "--ffn-units", "32", "--max-seq-length", "16"]
SMALL += ["--batch-size", "64", "--dropout", "0", "--num-steps", str(NUM_STEPS), "--log-every", "3"]
SMALL += ["--eval-every", "8", "--checkpoint-every", "2", "--num-buckets", "2", "--dynamic-masking"]
SMALL += ["--clip-norm", "0.5"]

# A slow pretrain.py. Its worker 1 fails once if a file `fault` exists, or gets a NaN if `nan` is set.
DISTURBED = """\
import os, sys, time
sys.path.insert(0, {tools!r})
import pretrain
from gluon_bert.training.trainer import Trainer

rank, fault = os.environ.get("HOROVOD_RANK") or os.environ["DMLC_TASK_ID"], {fault!r}
step, update = Trainer.step, Trainer._update

def disturbed(self, *arguments, **options):
    time.sleep(0.05)
    if rank == "1" and self.state.step == 7 and os.path.exists(fault):
        os.remove(fault)
        raise RuntimeError("a worker's own error")
    return step(self, *arguments, **options)

def broken(self, broke=[]):
    if {nan!r} and rank == "1" and self.state.step == 5 and not broke:
        broke.append(True)
        self._gradients()[0][3][:] = float("nan")
    update(self)

Trainer.step, Trainer._update = disturbed, broken
from gluon_bert.cli import run; run(pretrain.main)
"""


def write_disturbed(script, fault="nowhere", nan=False):
    """Write the slow pretrain.py."""
    script.write_text(DISTURBED.format(tools=str(ROOT / "tools"), fault=str(fault), nan=nan))


class LaunchedJob:
    """A launcher in the background. An environment variable marks all its processes."""

    def __init__(self, folder, *words, **environment):
        value = uuid.uuid4().hex
        self.mark = f"LAUNCHED_BY_TEST={value}"
        self.output = folder / f"{value}.log"
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "LAUNCHED_BY_TEST": value}
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "tools" / "launch.py"), *map(str, words)],
                cwd=ROOT,
                env={**env, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, seconds=100):
        """Return the exit status and the output; fail if a process is left."""
        try:
            status = self.process.wait(seconds)
        finally:
            self.process.kill()
        print(self.printed())
        self.wait_until_gone()
        return status, self.printed()

    def printed(self):
        """Return the output so far."""
        return self.output.read_text("utf-8")

    def wait_until_gone(self):
        """Wait until no process of the job is left."""
        wait_for(lambda: not processes_with(self.mark), seconds=5, report=self.printed)

    def worker_or_server(self, role, rank=0):
        """Return the process ids of a worker, server or scheduler, without its supervisor."""
        pids = []
        for pid, (environment, command) in processes_with(self.mark).items():
            by_server = {f"DMLC_ROLE={role}", f"DMLC_TASK_ID={rank}"} <= environment
            by_horovod = role == "worker" and f"HOROVOD_RANK={rank}" in environment
            if (by_server or by_horovod) and "gluon_bert.distributed.supervisor" not in command:
                pids.append(pid)
        return sorted(pids)

    def wait_for(self, condition):
        """Wait for a condition while the launcher runs."""
        wait_for(condition, self.process, report=self.printed)

    def wait_for_step(self, run, step):
        """Wait for a checkpoint at or after a step."""
        self.wait_for(lambda: run.exists() and (checkpoint.steps(run) or [0])[-1] >= step)

    def disturb(self, run, step, number, role, rank=0):
        """Send a process a signal after a step; wait for the restart of the job."""
        self.wait_for_step(run, step)
        self.wait_for(lambda: self.worker_or_server(role, rank))
        before = self.printed().count("launch: restart")
        os.kill(self.worker_or_server(role, rank)[0], number)
        self.wait_for(lambda: self.printed().count("launch: restart") > before)


def path_with_ssh(folder, prefix):
    """Return a PATH whose ssh runs its command on this machine, after a prefix."""
    kept = 'HOME="$HOME" LAUNCHED_BY_TEST="$LAUNCHED_BY_TEST"'
    script = f'for word; do host="$command"; command="$word"; done\ncd /\nexec {prefix} env -i {kept} '
    (folder / "ssh").write_text(f'#!/bin/sh\n{script} sh -c "$command"\n')
    (folder / "ssh").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def weights(run):
    """Return the weights and the optimizer's state after the last step."""
    snapshot = checkpoint.read_checkpoint(run, checkpoint.steps(run)[-1])
    assert snapshot.step == NUM_STEPS
    return {**snapshot.weights, **snapshot.optimizer}


def assert_close(run, other, tolerance):
    """Compare the final weights of two runs."""
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys() and len(ours) > 40
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], rtol=0, atol=tolerance, err_msg=name)


def assert_restarted(job, run, undisturbed, num_restarts, reasons):
    """Wait for a job that was disturbed; it restarts for these reasons and ends as the undisturbed run."""
    status, printed = job.wait()
    assert status == 0
    assert printed.count("launch: restart") == num_restarts
    for reason in (
        *reasons,
        "launch: worker 1 ended with signal 9",
        "[worker 1] RuntimeError: a worker's own error",
    ):
        assert reason in printed
    assert re.search(r"\[worker 1\] .*step.timeout 10", printed)
    assert_close(run, undisturbed, 0)
    assert [record["step"] for record in log_of(run)] == [record["step"] for record in log_of(undisturbed)]


def assert_stops_and_resumes(job, run, one_process):
    """Send SIGTERM: all workers stop after one step. One process then resumes the run."""
    job.wait_for_step(run, 4)
    job.process.terminate()
    status, printed = job.wait()
    step = checkpoint.steps(run)[-1]
    assert status == 143 and f"after step {step}" in printed and f"--resume {run}" in printed
    assert 4 <= step < NUM_STEPS and "restart" not in printed
    assert pretrain.main(["--resume", str(run)]) == 0
    assert_close(run, one_process, 1e-4)


def losses_of(run):
    """Return the MLM and NSP losses of all records of a run's log."""
    of_losses = (record.get("validation", record) for record in log_of(run))
    return [(each["mlm_loss"], each["nsp_loss"]) for each in of_losses]
