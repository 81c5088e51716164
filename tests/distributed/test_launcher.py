"""Workers of MXNet's kvstore train what one process trains; failures restart the job and leave nothing."""

import queue
import signal
import socket
import sys

import launch
import numpy as np
import pretrain
import pytest
from conftest import small_text
from support.jobs import (
    SMALL,
    assert_close,
    assert_restarted,
    assert_stops_and_resumes,
    losses_of,
    path_with_ssh,
    write_disturbed,
)
from support.processes import is_alive
from support.runs import log_of

from gluon_bert import checkpoint, run
from gluon_bert.distributed import launcher
from gluon_bert.training.trainer import Trainer

KVSTORE = "dist_sync"


@pytest.fixture(scope="module")
def two(folder, launch_job, pretrain_command):
    """The undisturbed run of two workers and a server."""
    status, printed = launch_job("-n", "2", "-s", "1", *pretrain_command("two")).wait()
    assert status == 0 and "are not those of worker 0" not in printed
    return folder / "two"


@pytest.mark.workers
def test_two_workers_match_one_process(one_process, two):
    assert_close(two, one_process, 1e-4)
    assert [record["step"] for record in log_of(two)] == [record["step"] for record in log_of(one_process)]
    np.testing.assert_allclose(losses_of(two), losses_of(one_process), rtol=0, atol=1e-3)
    assert checkpoint.best_step(two) == checkpoint.best_step(one_process)
    assert run.read_environment(two / "config.json")["workers"] == 2


@pytest.mark.workers
def test_two_workers_with_muon_match_one_process(folder, launch_job, pretrain_command):
    # A key's bias has only rounding errors as gradient. AdamW with a smaller epsilon turns them into steps.
    muon = ["--optimizer", "muon", "--weight-decay", "0.1", "--epsilon", "1e-6"]
    alone = ["--corpus", str(folder / "text.txt"), "--output", str(folder / "muon-alone")]
    assert pretrain.main([*SMALL, *muon, *alone]) == 0
    status, printed = launch_job("-n", "2", "-s", "1", *pretrain_command("muon", *muon)).wait()
    assert status == 0 and "are not those of worker 0" not in printed
    assert_close(folder / "muon", folder / "muon-alone", 1e-4)


@pytest.mark.workers
def test_two_workers_over_ssh_match_one_process(one_process, folder, launch_job, pretrain_command, tmp_path):
    """Each worker has two contexts; there are two servers."""
    (tmp_path / "hosts").write_text("localhost  # twice\n\nme@localhost\n")
    words = ["-n", "2", "-s", "2", "--hostfile", tmp_path / "hosts"]
    command = pretrain_command("ssh", "--cpus", "2")
    status, printed = launch_job(*words, *command, PATH=path_with_ssh(tmp_path, "")).wait()
    assert status == 0 and "on [cpu(0), cpu(1)] of each of 2 workers" in printed
    assert_close(folder / "ssh", one_process, 1e-4)


@pytest.mark.workers
def test_two_machines_match_two_workers(two, folder, launch_job, pretrain_command, tmp_path, two_machines):
    (tmp_path / "hosts").write_text("\n".join(two_machines))
    path = path_with_ssh(tmp_path, 'ip netns exec "$host"')
    words = ["-n", "2", "-s", "2", "--hostfile", tmp_path / "hosts"]
    status, printed = launch_job(*words, *pretrain_command("machines"), PATH=path).wait()
    assert status == 0 and "of each of 2 workers" in printed
    assert_close(folder / "machines", two, 1e-4)


@pytest.mark.workers
def test_restarted_job_matches_undisturbed_job(two, folder, launch_job, pretrain_command):
    script, fault, run = folder / "disturbed.py", folder / "fault", folder / "disturbed"
    write_disturbed(script, fault=fault)
    fault.write_text("")
    words = ["-n", "2", "-s", "1", "--max-restarts", "5"]
    job = launch_job(*words, *pretrain_command("disturbed", "--resume", "auto", script=str(script)))

    job.disturb(run, 2, signal.SIGKILL, "worker", 1)
    job.disturb(run, 4, signal.SIGKILL, "server")
    # After step 7 the file `fault` makes worker 1 raise.
    job.disturb(run, 8, signal.SIGKILL, "scheduler")
    job.disturb(run, 12, signal.SIGSTOP, "worker", 0)
    reasons = (
        "launch: server 0 ended with signal 9",
        "launch: worker 1 ended with exit status 1",
        "launch: scheduler ended with signal 9",
    )
    assert_restarted(job, run, two, 5, reasons)


@pytest.mark.workers
def test_sigterm_stops_all_workers_after_one_step(one_process, folder, launch_job, pretrain_command):
    """One process then resumes the run."""
    script, run = folder / "slow.py", folder / "stopped"
    write_disturbed(script)
    job = launch_job("-n", "2", *pretrain_command("stopped", script=str(script)))
    assert_stops_and_resumes(job, run, one_process)


@pytest.mark.workers
def test_killed_launcher_leaves_no_process(folder, launch_job, pretrain_command):
    script = folder / "slow.py"
    write_disturbed(script)
    job = launch_job("-n", "2", *pretrain_command("orphaned", script=str(script)))
    job.wait_for(lambda: (folder / "orphaned" / "checkpoints").exists())
    assert is_alive(job.worker_or_server("worker", 1)[0])
    job.process.kill()
    job.process.wait()
    job.wait_until_gone()


@pytest.mark.workers
def test_workers_with_different_options_are_refused(folder, launch_job):
    (folder / "text0.txt").write_text(small_text(), "utf-8")
    (folder / "text1.txt").write_text(small_text(seed=1), "utf-8")
    flags = f"--output {folder}/different --corpus {folder}/text$DMLC_TASK_ID.txt --lr 0.00${{DMLC_TASK_ID}}1"
    command = f"exec {sys.executable} tools/pretrain.py {' '.join(SMALL)} --kvstore dist_sync {flags}"
    status, printed = launch_job("-n", "2", "--max-restarts", "3", "--", "sh", "-c", command).wait()
    assert status == 2 and "restart" not in printed
    assert "--lr and the text of the corpus must be the same on all workers, and worker 1 " in printed
    assert not (folder / "different").exists()


@pytest.mark.workers
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--on-nonfinite", "skip"], "at step 6 (epoch 0, batch 5)"),
        # Two micro-batches on each worker, four in one process.
        (["--on-nonfinite", "rollback", "--micro-batch", "16"], "back to the checkpoint after step 4"),
    ],
)
def test_nan_on_one_worker_is_handled_by_all(
    folder, launch_job, pretrain_command, tmp_path, monkeypatch, flags, message
):
    script = folder / "broken.py"
    write_disturbed(script, nan=True)
    name = f"bad-{flags[1]}"
    status, printed = launch_job("-n", "2", *pretrain_command(name, *flags, script=str(script))).wait()
    assert status == 0 and printed.count(message) == 1
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


def test_failed_command_runs_again_unchanged(folder, launch_job):
    """A command that is not pretrain.py needs no flag for restarts. Status 2, bad input, is final."""
    marks = folder / "marks"
    script = f'echo "$0" "$@" >> {marks}; test $(wc -l < {marks}) -eq 3 && exit 2; exit 9'
    command = ["--", "sh", "-c", script, "one word", "--output=x"]
    status, printed = launch_job("-n", "1", "--max-restarts", "3", *command).wait()
    assert status == 2 and printed.count("launch: worker 0 ended with exit status 9") == 2
    assert "launch: restart 2 of 3: sh -c " in printed
    assert marks.read_text() == "one word --output=x\n" * 3


def test_failed_command_ends_after_last_restart(launch_job):
    status, printed = launch_job("-n", "1", "--max-restarts", "1", "--", "sh", "-c", "exit 9").wait()
    assert status == 9 and printed.count("launch: restart") == 1


# Bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-n", "0", "--", "x"], "--workers must be at least 1, got 0"),
        (["-n", "1", "-s", "0", "--", "x"], "--servers must be at least 1, got 0"),
        (["-n", "1", "-s", "1", "--kvstore=horovod", "--", "x"], "--servers must be omitted with --kvstore"),
        (["-n", "1", "--kvstore=dist_async", "--", "x"], "--kvstore"),
        (["-n", "1", "--max-restarts", "-1", "--", "x"], "--max-restarts must be at least 0, got -1"),
        (["-n", "1"], "a command must follow --"),
        (["-n", "1", "--max-restarts", "1", "--", "python", "tools/pretrain.py"], "needs --resume auto"),
        (["-n", "1", "--port", "70000", "--", "x"], "--port must be between 1 and 65535, got 70000"),
        (
            ["-n", "1", "--hostfile", "no/such/file", "--", "x"],
            "--hostfile must be a file that can be read, got no/such/file",
        ),
    ],
)
def test_launch_refuses_bad_flags(capsys, words, message):
    assert launch.main(words) == 2
    assert message in capsys.readouterr().err


def test_launch_refuses_port_in_use(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        assert launch.main(["-n", "1", "--port", str(port), "--", "x"]) == 2
    assert f"--port must be free, got {port} (Address already in use)" in capsys.readouterr().err


def test_hostfile_errors_name_their_lines(tmp_path, capsys):
    path = tmp_path / "hosts"
    path.write_text("localhost\n# none\nno.such.host.invalid\n-oProxyCommand=x\ntwo words\n127.0.0.2 # me\n")
    assert launch.main(["-n", "1", "--hostfile", str(path), "--", "x"]) == 2
    printed = capsys.readouterr().err
    assert f"{path}, line 3: host no.such.host.invalid is unknown" in printed
    assert f"{path}, line 4: must be one host name, got '-oProxyCommand=x'" in printed
    assert f"{path}, line 5: must be one host name, got 'two words'" in printed
    assert "localhost has a loopback address, which other hosts cannot reach" in printed
    path.write_text("# nothing\n")
    assert launch.main(["-n", "1", "--hostfile", str(path), "--", "x"]) == 2
    assert f"--hostfile must name at least one host, got {path}" in capsys.readouterr().err


def test_missing_command_ends_the_job(launch_job):
    status, printed = launch_job("-n", "1", "--", "/no/such/command").wait()
    assert status == 127
    assert "[worker 0] /no/such/command: No such file or directory" in printed
    assert "launch: worker 0 ended with exit status 127" in printed


@pytest.mark.workers
def test_server_runs_no_received_code(folder, launch_job):
    sent = f"""\
import os, pickle
from gluon_bert.distributed.join import init_distributed

class Sent:
    def __reduce__(self):
        return os.system, ("touch {folder}/ran",)

with init_distributed("dist_sync") as communicator:
    communicator.kvstore._send_command_to_servers(0, pickle.dumps(Sent(), 0).decode())
"""
    status, printed = launch_job("-n", "1", "--", sys.executable, "-c", sent).wait()
    assert status == 0 and "servers of gluon_bert sum gradients only; they accept no optimizer" in printed
    assert not (folder / "ran").exists()


# The end of a job


class EndedProcess:
    """Stands in for a JobProcess."""

    def __init__(self, name, status=None):
        self.name, self.status, self.sent = name, status, []
        self.is_worker, self.ends_itself = name.startswith("worker"), name != "rendezvous"

    def send(self, number):
        self.sent.append(number)

    def describe_end(self):
        return f"{self.name} ended with {self.status}"


def outcome_of(processes, *events):
    queued = queue.SimpleQueue()
    for event in events:
        queued.put(event)
    return launcher.wait_for_end(processes, queued)


def test_job_ends_when_all_processes_have_ended():
    processes = [EndedProcess("scheduler", 0), EndedProcess("server 0", 0), EndedProcess("worker 0", 0)]
    assert outcome_of(processes, *processes).status == 0
    of_previous_attempt = EndedProcess("worker 0", 9)
    assert outcome_of(processes, of_previous_attempt, *processes).status == 0
    assert outcome_of([EndedProcess("rendezvous"), *processes], *processes).status == 0


def test_job_ends_with_its_first_failure():
    processes = [EndedProcess("server 0", 0), EndedProcess("worker 0", 0), EndedProcess("worker 1", 137)]
    assert outcome_of(processes, *processes) == (137, "worker 1 ended with 137")


def test_job_reports_a_process_that_does_not_end(monkeypatch):
    monkeypatch.setattr(launcher, "END_TIMEOUT", 0.05)
    processes = [EndedProcess("worker 0", 0), EndedProcess("worker 1")]
    assert outcome_of(processes, processes[0]) == (1, "worker 1 has not ended, while others have")


def test_first_signal_stops_workers_second_ends_all(monkeypatch):
    processes = [EndedProcess("server 0", 0), EndedProcess("worker 0", 143), EndedProcess("worker 1", 130)]
    assert outcome_of(processes, signal.SIGINT, *processes).status == 130
    assert outcome_of(processes, signal.SIGINT, *processes[1:]).status == 130  # the server is ended
    assert [process.sent for process in processes] == [[], [signal.SIGTERM] * 2, [signal.SIGTERM] * 2]
    assert outcome_of(processes, signal.SIGTERM, signal.SIGTERM) == (143, "stopped")
    monkeypatch.setattr(launcher, "STOP_TIMEOUT", 0.05)
    assert outcome_of(processes, signal.SIGTERM) == (143, "stopped")
    monkeypatch.setattr(launcher, "END_TIMEOUT", 0.05)
    assert outcome_of(processes, processes[1]) == (143, "worker 0 was stopped")
