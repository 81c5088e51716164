"""Workers of Horovod train what one process trains; failures restart the job and leave nothing."""

import importlib.util
import os
import signal
import subprocess
import sys

import launch
import numpy as np
import pretrain
import pytest
from conftest import ROOT
from support.jobs import (
    assert_close,
    assert_restarted,
    assert_stops_and_resumes,
    losses_of,
    path_with_ssh,
    write_disturbed,
)

from gluon_bert import checkpoint, run

KVSTORE = "horovod"

needs_horovod = pytest.mark.skipif(
    not importlib.util.find_spec("horovod"),
    reason="the extra horovod is not installed: see docs/distributed.md",
)


@pytest.fixture(scope="module")
def two(folder, launch_job, pretrain_command):
    """The undisturbed run of two workers."""
    status, printed = launch_job("-n", "2", *pretrain_command("two")).wait()
    assert status == 0 and "of each of 2 workers" in printed and "are not those of worker 0" not in printed
    return folder / "two"


@needs_horovod
@pytest.mark.workers
def test_two_workers_match_one_process(one_process, two):
    assert_close(two, one_process, 1e-4)
    np.testing.assert_allclose(losses_of(two), losses_of(one_process), rtol=0, atol=1e-3)
    assert run.read_environment(two / "config.json")["workers"] == 2


@needs_horovod
@pytest.mark.workers
def test_two_workers_over_ssh_match_one_process(one_process, folder, launch_job, pretrain_command, tmp_path):
    """Each worker has two contexts and accumulates gradients."""
    (tmp_path / "hosts").write_text("localhost  # twice\n\nme@localhost\n")
    command = pretrain_command("ssh", "--cpus", "2", "--micro-batch", "16")
    words = ["-n", "2", "--hostfile", tmp_path / "hosts", *command]
    status, printed = launch_job(*words, PATH=path_with_ssh(tmp_path, "")).wait()
    assert status == 0 and "on [cpu(0), cpu(1)] of each of 2 workers" in printed
    assert_close(folder / "ssh", one_process, 1e-4)


@needs_horovod
@pytest.mark.workers
def test_two_machines_match_two_workers(two, folder, launch_job, pretrain_command, tmp_path, two_machines):
    (tmp_path / "hosts").write_text("\n".join(two_machines))
    # Each machine's host name is its address.
    named = """unshare --uts sh -c 'hostname "$0" && exec "$@"' "$host" """
    path = path_with_ssh(tmp_path, f'ip netns exec "$host" {named}')
    words = ["-n", "2", "--hostfile", tmp_path / "hosts", *pretrain_command("machines")]
    status, printed = launch_job(*words, PATH=path).wait()
    assert status == 0 and "of each of 2 workers" in printed
    assert_close(folder / "machines", two, 0)


@needs_horovod
@pytest.mark.workers
def test_three_workers_repeat_bit_for_bit(folder, launch_job, pretrain_command):
    for name in ("three", "three-again"):
        command = pretrain_command(name, "--batch-size", "48", "--num-steps", "10")
        assert launch_job("-n", "3", *command).wait()[0] == 0
    runs = [checkpoint.read_checkpoint(folder / name, 10) for name in ("three", "three-again")]
    assert all((runs[0].weights[name] == runs[1].weights[name]).all() for name in runs[0].weights)


@needs_horovod
@pytest.mark.workers
def test_horovodrun_matches_launcher(two, folder, pretrain_command):
    command = ["horovodrun", "-np", "2", *map(str, pretrain_command("horovodrun")[1:])]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=100,
    )
    assert done.returncode == 0, done.stdout
    assert_close(folder / "horovodrun", two, 0)


@needs_horovod
@pytest.mark.workers
def test_restarted_job_matches_undisturbed_job(two, folder, launch_job, pretrain_command):
    script, fault, run = folder / "disturbed.py", folder / "fault", folder / "disturbed"
    write_disturbed(script, fault=fault)
    fault.write_text("")
    command = pretrain_command("disturbed", "--resume", "auto", script=str(script))
    job = launch_job("-n", "2", "--max-restarts", "3", *command)

    job.disturb(run, 2, signal.SIGKILL, "worker", 1)
    # After step 7 the file `fault` makes worker 1 raise.
    job.disturb(run, 10, signal.SIGSTOP, "worker", 0)
    assert_restarted(job, run, two, 3, ())


@needs_horovod
@pytest.mark.workers
def test_sigterm_stops_all_workers_after_one_step(one_process, folder, launch_job, pretrain_command):
    """One process then resumes the run."""
    script, run = folder / "slow.py", folder / "stopped"
    write_disturbed(script)
    job = launch_job("-n", "2", *pretrain_command("stopped", script=str(script)))
    assert_stops_and_resumes(job, run, one_process)


@needs_horovod
@pytest.mark.workers
def test_workers_with_different_options_are_refused(folder, launch_job):
    flags = f"--output {folder}/different --corpus {folder}/text.txt --lr 0.00${{HOROVOD_RANK}}1"
    command = f"exec {sys.executable} tools/pretrain.py --preset d2l --kvstore horovod {flags}"
    status, printed = launch_job("-n", "2", "--max-restarts", "3", "--", "sh", "-c", command).wait()
    assert status == 2 and "restart" not in printed
    assert "--lr must be the same on all workers, and worker 1 has others than worker 0." in printed
    assert not (folder / "different").exists()


def test_missing_horovod_is_reported(no_horovod, monkeypatch, capsys, tmp_path):
    command = ["--kvstore", "horovod", "--output", str(tmp_path / "run")]
    words = ["-n", "2", "--kvstore", "horovod", "--", sys.executable, "tools/pretrain.py", *command]
    assert launch.main(words) == 2
    assert "kvstore horovod needs Horovod (" in capsys.readouterr().err
    monkeypatch.setenv("HOROVOD_RANK", "0")
    monkeypatch.setenv("HOROVOD_SIZE", "2")
    assert pretrain.main(command) == 2
    assert "kvstore horovod needs Horovod built for MXNet (" in capsys.readouterr().err


@needs_horovod
def test_loopback_host_name_is_refused(monkeypatch, capsys, tmp_path):
    for name, value in {"RANK": "0", "SIZE": "2", "CROSS_SIZE": "2"}.items():
        monkeypatch.setenv(f"HOROVOD_{name}", value)
    monkeypatch.setattr("socket.gethostname", lambda: "localhost")
    assert pretrain.main(["--kvstore", "horovod", "--output", str(tmp_path / "run")]) == 2
    assert "the host name localhost must resolve to an address that other" in capsys.readouterr().err


@pytest.mark.parametrize("variables", [{}, {"HOROVOD_RANK": "2", "HOROVOD_SIZE": "2"}, {"HOROVOD_RANK": "0"}])
def test_worker_without_rank_is_refused(monkeypatch, capsys, tmp_path, variables):
    for name in ("HOROVOD_RANK", "HOROVOD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert pretrain.main(["--kvstore", "horovod", "--output", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr().err
    assert "kvstore horovod needs a rank below the number of workers in the environment variables" in printed
    assert "HOROVOD_RANK and HOROVOD_SIZE" in printed
    assert not (tmp_path / "run").exists()
