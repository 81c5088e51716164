"""Many workers train what one would; whatever fails, nothing hangs, nothing is left, and the job goes on."""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import ClassVar

import launch
import numpy as np
import pretrain
import pytest
from conftest import ROOT, small_text

from gluon_bert import checkpoint, run
from gluon_bert.training.trainer import Trainer

SMALL = [
    "--units",
    "16",
    "--ffn-units",
    "32",
    "--max-seq-length",
    "16",
    "--batch-size",
    "64",
    "--dropout",
    "0",
]
SMALL += ["--num-steps", "20", "--log-every", "3", "--eval-every", "8", "--checkpoint-every", "2"]
SMALL += ["--num-buckets", "2", "--dynamic-masking", "yes", "--clip-norm", "0.5"]
DIST = ["--step-timeout", "10", "--kvstore"]

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")

# A pretrain.py that is slow enough to be disturbed, and fails as the file `fault` beside it says: once.
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
pretrain.leave(pretrain.main)
"""


def write_disturbed(script, fault="nowhere", nan=False):
    """Write the slow pretrain.py, whose worker 1 fails once where there is a file `fault`, or has a NaN."""
    script.write_text(DISTURBED.format(tools=str(ROOT / "tools"), fault=str(fault), nan=nan))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    (folder / "text.txt").write_text(small_text(), "utf-8")
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """The run of one process."""
    flags = ["--corpus", str(folder / "text.txt"), "--output", str(folder / "alone")]
    assert pretrain.main([*SMALL, *flags]) == 0
    return folder / "alone"


@pytest.fixture(autouse=True)
def ended():
    """Whatever a test began is ended with it."""
    yield
    for launched in Launched.all:
        launched.process.kill()
    Launched.all.clear()


class Launched:
    """A launcher in the background, and the processes that carry its mark."""

    all: ClassVar[list] = []

    def __init__(self, folder, *words, **environment):
        self.mark = f"LAUNCHED_BY_TEST={uuid.uuid4().hex}"
        name, value = self.mark.split("=")
        self.output = folder / f"{value}.log"
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", name: value}
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "tools" / "launch.py"), *map(str, words)],
                cwd=ROOT,
                env={**env, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        Launched.all.append(self)

    def wait(self, seconds=100):
        """Its exit status and all that was printed; nothing of it may be left."""
        try:
            status = self.process.wait(seconds)
        finally:
            self.process.kill()
        told = self.output.read_text("utf-8")
        print(told)
        assert self.all_gone(), told
        return status, told

    def all_gone(self, seconds=5.0):
        end = time.monotonic() + seconds
        while self.processes() and time.monotonic() < end:
            time.sleep(0.1)
        return not self.processes()

    def processes(self, role="", number=0):
        """The process ids, of a role without its minder."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                environment = (path / "environ").read_bytes().decode().split("\0")
                command = (path / "cmdline").read_bytes().decode()
                state = (path / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            by_server = {f"DMLC_ROLE={role}", f"DMLC_TASK_ID={number}"} <= set(environment)
            by_horovod = role == "worker" and f"HOROVOD_RANK={number}" in environment
            wanted = not role or ((by_server or by_horovod) and "minder.py" not in command)
            if self.mark in environment and wanted and state != "Z":
                found.append(int(path.name))
        return found

    def wait_for(self, condition, seconds=120):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end and self.process.poll() is None, self.output.read_text("utf-8")
            time.sleep(0.02)

    def wait_for_step(self, run, step):
        """Until a checkpoint of the run is at this step."""
        self.wait_for(lambda: run.exists() and (checkpoint.steps(run) or [0])[-1] >= step)

    def disturb(self, run, step, number, role, rank=0):
        """Send a process a signal after this step; then the job is restarted."""
        self.wait_for_step(run, step)
        self.wait_for(lambda: self.processes(role, rank))
        os.kill(min(self.processes(role, rank)), number)
        before = self.output.read_text("utf-8").count("launch: restart")
        self.wait_for(lambda: self.output.read_text("utf-8").count("launch: restart") > before)


def train(folder, name, *flags, script="tools/pretrain.py", kvstore="dist_sync"):
    """The command of a worker."""
    given = ["--corpus", folder / "text.txt", "--output", folder / name, *DIST, kvstore, *flags]
    return ["--", sys.executable, script, *SMALL, *given]


def weights(run):
    snapshot = checkpoint.read_checkpoint(run, checkpoint.steps(run)[-1])
    assert snapshot.step == 20
    return {**snapshot.weights, **snapshot.optimizer}


def assert_close(run, other, tolerance):
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys() and len(ours) > 40
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], rtol=0, atol=tolerance, err_msg=name)


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def two(folder):
    """The undisturbed run of two workers and a server."""
    status, told = Launched(folder, "-n", "2", "-s", "1", *train(folder, "two")).wait()
    assert status == 0 and "are not those of worker 0" not in told
    return folder / "two"


@pytest.mark.workers
def test_two_workers_train_what_one_does(alone, two):
    assert_close(two, alone, 1e-4)
    for ours, theirs in zip(log_of(two), log_of(alone)):
        assert ours["step"] == theirs["step"]
        of_losses = (record.get("validation", record) for record in (ours, theirs))
        our_losses, their_losses = ([each[n] for n in ("mlm_loss", "nsp_loss")] for each in of_losses)
        assert our_losses == pytest.approx(their_losses, abs=1e-3)
    assert checkpoint.best_step(two) == checkpoint.best_step(alone)
    assert run.read_environment(two / "config.json")["workers"] == 2


def path_with_ssh(folder, prefix):
    """A PATH where ssh takes its last word, a shell's command, to this machine, behind a prefix."""
    kept = 'HOME="$HOME" LAUNCHED_BY_TEST="$LAUNCHED_BY_TEST"'
    script = f'for word; do host="$command"; command="$word"; done\ncd /\nexec {prefix} env -i {kept} '
    (folder / "ssh").write_text(f'#!/bin/sh\n{script} sh -c "$command"\n')
    (folder / "ssh").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.workers
def test_so_do_two_of_two_contexts_with_two_servers_over_ssh(alone, folder, tmp_path):
    (tmp_path / "hosts").write_text("localhost  # twice\n\nme@localhost\n")
    words = ["-n", "2", "-s", "2", "--hostfile", tmp_path / "hosts"]
    command = train(folder, "ssh", "--cpus", "2")
    status, told = Launched(folder, *words, *command, PATH=path_with_ssh(tmp_path, "")).wait()
    assert status == 0 and "on [cpu(0), cpu(1)] of each of 2 workers" in told
    assert_close(folder / "ssh", alone, 1e-4)


@pytest.fixture
def two_machines():
    """The addresses of two network namespaces with a cable between them, each named after its address."""
    addresses = ["10.77.0.1", "10.77.0.2"]

    def ip(*words):
        return subprocess.run(["ip", *words], stderr=subprocess.PIPE, encoding="utf-8", check=True)

    try:
        ip("netns", "add", addresses[0])
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces can be made here ({error})")
    try:
        ip("netns", "add", addresses[1])
        ends = ["name", "cable", "netns", addresses[0]], ["name", "cable", "netns", addresses[1]]
        ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for address in addresses:
            ip("-n", address, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", address, "link", "set", "cable", "up")
            ip("-n", address, "link", "set", "lo", "up")
        yield addresses
    finally:
        for address in addresses:
            subprocess.run(["ip", "netns", "delete", address], stderr=subprocess.DEVNULL)


@pytest.mark.workers
def test_so_do_two_machines_with_a_network_between_them(two, folder, tmp_path, two_machines):
    (tmp_path / "hosts").write_text("\n".join(two_machines))
    path = path_with_ssh(tmp_path, 'ip netns exec "$host"')
    words = ["-n", "2", "-s", "2", "--hostfile", tmp_path / "hosts"]
    status, told = Launched(folder, *words, *train(folder, "machines"), PATH=path).wait()
    assert status == 0 and "of each of 2 workers" in told
    assert_close(folder / "machines", two, 1e-4)


@pytest.mark.workers
def test_whatever_fails_the_job_ends_as_the_undisturbed_one(two, folder):
    script, fault, run = folder / "disturbed.py", folder / "fault", folder / "disturbed"
    write_disturbed(script, fault=fault)
    fault.write_text("")
    words = ["-n", "2", "-s", "1", "--max-restarts", "5"]
    launched = Launched(folder, *words, *train(folder, "disturbed", script=str(script)))

    launched.disturb(run, 2, signal.SIGKILL, "worker", 1)
    launched.disturb(run, 4, signal.SIGKILL, "server")
    # An error in worker 1 after step 7, of which `disturbed` takes care, then:
    launched.disturb(run, 8, signal.SIGKILL, "scheduler")
    launched.disturb(run, 12, signal.SIGSTOP, "worker", 0)
    status, told = launched.wait()
    assert status == 0
    assert told.count("launch: restart") == 5
    for why in (
        "launch: worker 1 ended with signal 9",
        "launch: server 0 ended with signal 9",
        "[worker 1] RuntimeError: a worker's own error",
        "launch: worker 1 ended with exit status 1",
        "launch: scheduler ended with signal 9",
        "[worker 1] pretrain: --step-timeout 10: step ",
    ):
        assert why in told
    assert_close(run, two, 0)
    assert [record["step"] for record in log_of(run)] == [record["step"] for record in log_of(two)]


@pytest.mark.workers
def test_sigterm_stops_all_workers_after_one_step_and_one_process_can_go_on(alone, folder):
    script, run = folder / "slow.py", folder / "stopped"
    write_disturbed(script)
    launched = Launched(folder, "-n", "2", *train(folder, "stopped", script=str(script)))
    launched.wait_for_step(run, 4)
    launched.process.terminate()
    status, told = launched.wait()
    step = checkpoint.steps(run)[-1]
    assert status == 143 and f"the weights after step {step} are kept in {run}" in told
    assert 4 <= step < 20 and "restart" not in told
    assert pretrain.main(["--resume", str(run)]) == 0
    assert_close(run, alone, 1e-4)


@pytest.mark.workers
def test_nothing_is_left_of_a_job_whose_launcher_is_killed(folder):
    script = folder / "slow.py"
    write_disturbed(script)
    launched = Launched(folder, "-n", "2", *train(folder, "orphaned", script=str(script)))
    launched.wait_for(lambda: (folder / "orphaned" / "checkpoints").exists())
    assert launched.processes("worker", 1)
    launched.process.kill()
    assert launched.all_gone()


@pytest.mark.workers
def test_workers_of_different_runs_are_refused_with_what_differs(folder):
    (folder / "other.txt").write_text(small_text(seed=1), "utf-8")
    (folder / "text0.txt").write_text(small_text(), "utf-8")
    (folder / "text1.txt").write_text(small_text(seed=1), "utf-8")
    flags = f"--output {folder}/different --corpus {folder}/text$DMLC_TASK_ID.txt --lr 0.00${{DMLC_TASK_ID}}1"
    command = f"exec {sys.executable} tools/pretrain.py {' '.join([*SMALL, *DIST, 'dist_sync'])} {flags}"
    words = ["-n", "2", "--max-restarts", "3", "--", "sh", "-c", command, "--output=unused"]
    status, told = Launched(folder, *words).wait()
    assert status == 2 and "restart" not in told
    assert (
        "worker 1 differs from worker 0 in --lr and the text of --corpus: all workers of a run need" in told
    )
    assert not (folder / "different").exists()


@pytest.mark.workers
@pytest.mark.parametrize(
    ("flags", "told_once"),
    [
        (["--on-nonfinite", "skip"], "at step 6 (epoch 0, batch 5) the gradient is no number any more"),
        # In two parts on each worker, in four on one alone.
        (
            ["--on-nonfinite", "rollback", "--micro-batch", "16"],
            "back to the checkpoint after step 4, and on with",
        ),
    ],
)
def test_a_gradient_that_is_no_number_on_one_worker_is_skipped_or_gone_back_from_by_all(
    folder, tmp_path, monkeypatch, flags, told_once
):
    script = folder / "broken.py"
    write_disturbed(script, nan=True)
    name = f"bad-{flags[1]}"
    status, told = Launched(folder, "-n", "2", *train(folder, name, *flags, script=str(script))).wait()
    assert status == 0 and told.count(told_once) == 1
    update, broke = Trainer._update, []

    def broken(self):
        if self.state.step == 5 and not broke:
            broke.append(True)
            self._gradients()[0][3][:] = np.nan
        update(self)

    monkeypatch.setattr(Trainer, "_update", broken)
    where = ["--corpus", str(folder / "text.txt"), "--output", str(tmp_path / "alone")]
    assert pretrain.main([*SMALL, *where, *flags]) == 0
    assert_close(folder / name, tmp_path / "alone", 1e-4)


# Bad input


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["-n", "0", "--", "x"], "--workers 0: at least 1"),
        (["-n", "1", "-s", "0", "--", "x"], "--servers 0: at least 1"),
        (["-n", "1", "-s", "1", "--", "x", "--kvstore=horovod"], "--servers 1: Horovod's workers do without"),
        (["-n", "1", "--max-restarts", "-1", "--", "x"], "--max-restarts -1: at least 0"),
        (["-n", "1"], "-- COMMAND: is missing"),
        (["-n", "1", "--max-restarts", "1", "--", "x"], "needs --output or --resume in the command"),
        (["-n", "1", "--port", "70000", "--", "x"], "--port 70000: from 1 to 65535"),
        (["-n", "1", "--hostfile", "no/such/file", "--", "x"], "--hostfile no/such/file: cannot be read"),
    ],
)
def test_what_cannot_be_launched_is_refused(capsys, words, told):
    assert launch.main(words) == 2
    assert told in capsys.readouterr().err


def test_a_port_in_use_is_told(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        assert launch.main(["-n", "1", "--port", str(port), "--", "x"]) == 2
    assert f"--port {port}: cannot be taken (Address already in use); choose" in capsys.readouterr().err


def test_hosts_that_are_not_known_are_told_with_their_lines(tmp_path, capsys):
    path = tmp_path / "hosts"
    path.write_text("localhost\n# none\nno.such.host.invalid\n-oProxyCommand=x\ntwo words\n127.0.0.2 # me\n")
    assert launch.main(["-n", "1", "--hostfile", str(path), "--", "x"]) == 2
    told = capsys.readouterr().err
    assert f"{path}, line 3: the host no.such.host.invalid is not known" in told
    assert f"{path}, line 4: '-oProxyCommand=x' is no host" in told
    assert f"{path}, line 5: 'two words' is no host" in told
    assert "localhost is a loopback address, which the other hosts do not reach" in told
    path.write_text("# nothing\n")
    assert launch.main(["-n", "1", "--hostfile", str(path), "--", "x"]) == 2
    assert f"--hostfile {path}: names no host" in capsys.readouterr().err


def test_a_command_that_is_not_there_ends_the_job(folder):
    status, told = Launched(folder, "-n", "1", "--", "/no/such/command").wait()
    assert status == 127
    assert "[worker 0] /no/such/command: No such file or directory" in told
    assert "launch: worker 0 ended with exit status 127" in told


def test_a_job_goes_on_with_its_run_where_that_has_a_checkpoint(tmp_path):
    run = tmp_path / "run"
    command = [
        "python",
        "tools/pretrain.py",
        "--cpus=2",
        "--lr",
        "1",
        f"--output={run}",
        "--kvstore",
        "dist_sync",
    ]
    assert launch.to_go_on(command) == command
    (run / "checkpoints" / "step-00000000").mkdir(parents=True)
    went_on = ["python", "tools/pretrain.py", "--resume", str(run), "--kvstore=dist_sync", "--cpus=2"]
    assert launch.to_go_on(command) == went_on
    assert launch.to_go_on(went_on) == went_on
    assert {word.split("=")[0] for word in launch.WHERE} <= set(pretrain.parser()._option_string_actions)


@pytest.mark.workers
def test_a_server_runs_nothing_that_it_is_sent(folder):
    sent = f"""\
import os, pickle
from gluon_bert.runtime import mx
from gluon_bert.distributed.join import joined

class Sent:
    def __reduce__(self):
        return os.system, ("touch {folder}/ran",)

with joined("dist_sync") as workers:
    workers.kvstore._send_command_to_servers(0, pickle.dumps(Sent(), 0).decode())
"""
    status, told = Launched(folder, "-n", "1", "--", sys.executable, "-c", sent).wait()
    assert status == 0 and "a server of gluon_bert adds up gradients, and takes no optimizer" in told
    assert not (folder / "ran").exists()


# The end of a job


class Ended:
    """A member as `wait_for` sees it."""

    def __init__(self, name, status=None):
        self.name, self.status, self.sent = name, status, []
        self.trains, self.stays = name.startswith("worker"), name == "rendezvous"

    def send(self, number):
        self.sent.append(number)

    def in_words(self):
        return f"{self.name} ended with {self.status}"


def outcome_of(members, *events):
    queued = queue.SimpleQueue()
    for event in events:
        queued.put(event)
    return launch.wait_for(members, queued)


def test_a_job_has_ended_when_all_have():
    members = [Ended("scheduler", 0), Ended("server 0", 0), Ended("worker 0", 0)]
    assert outcome_of(members, *members).status == 0
    assert outcome_of(members, Ended("worker 0", 9), *members).status == 0  # one of the job before
    assert outcome_of([Ended("rendezvous"), *members], *members).status == 0


def test_the_first_that_fails_ends_the_job():
    members = [Ended("server 0", 0), Ended("worker 0", 0), Ended("worker 1", 137)]
    assert outcome_of(members, *members) == (137, "worker 1 ended with 137")


def test_who_does_not_end_with_the_others_is_told(monkeypatch):
    monkeypatch.setattr(launch, "END_TIMEOUT", 0.05)
    members = [Ended("worker 0", 0), Ended("worker 1")]
    assert outcome_of(members, members[0]) == (1, "worker 1 has not ended, while others have")


def test_a_signal_is_for_the_workers_and_a_second_one_for_all(monkeypatch):
    members = [Ended("server 0", 0), Ended("worker 0", 143), Ended("worker 1", 130)]
    assert outcome_of(members, signal.SIGINT, *members).status == 130
    assert outcome_of(members, signal.SIGINT, *members[1:]).status == 130  # the server is ended
    assert [member.sent for member in members] == [[], [signal.SIGTERM] * 2, [signal.SIGTERM] * 2]
    assert outcome_of(members, signal.SIGTERM, signal.SIGTERM) == (143, "stopped")
    monkeypatch.setattr(launch, "STOP_TIMEOUT", 0.05)
    assert outcome_of(members, signal.SIGTERM) == (143, "stopped")
    monkeypatch.setattr(launch, "END_TIMEOUT", 0.05)
    assert outcome_of(members, members[1]) == (143, "worker 0 was stopped")
