"""Workers whose gradients Horovod sums train what one would, and what MXNet's servers have them train."""

import importlib.util
import os
import signal
import subprocess
import sys

import launch
import pretrain
import pytest
from conftest import ROOT
from test_launch import (
    Launched,
    assert_close,
    log_of,
    path_with_ssh,
    train,
    write_disturbed,
)

from gluon_bert import checkpoint, run

needs_horovod = pytest.mark.skipif(
    not importlib.util.find_spec("horovod"), reason="the extra horovod is not installed: see docs/scale.md"
)


def by_horovod(folder, name, *flags, **options):
    return train(folder, name, *flags, kvstore="horovod", **options)


@pytest.fixture(scope="module")
def two(folder):
    """The undisturbed run of two workers."""
    status, told = Launched(folder, "-n", "2", *by_horovod(folder, "two")).wait()
    assert status == 0 and "of each of 2 workers" in told and "are not those of worker 0" not in told
    return folder / "two"


@needs_horovod
@pytest.mark.workers
def test_two_workers_train_what_one_does(alone, two):
    assert_close(two, alone, 1e-4)
    for ours, theirs in zip(log_of(two), log_of(alone)):
        of_losses = (record.get("validation", record) for record in (ours, theirs))
        our_losses, their_losses = ([each[n] for n in ("mlm_loss", "nsp_loss")] for each in of_losses)
        assert our_losses == pytest.approx(their_losses, abs=1e-3)
    assert run.read_environment(two / "config.json")["workers"] == 2


@needs_horovod
@pytest.mark.workers
def test_so_do_two_of_two_contexts_in_parts_over_ssh(alone, folder, tmp_path):
    (tmp_path / "hosts").write_text("localhost  # twice\n\nme@localhost\n")
    command = by_horovod(folder, "ssh", "--cpus", "2", "--micro-batch", "16")
    path = path_with_ssh(tmp_path, "")
    words = ["-n", "2", "--hostfile", tmp_path / "hosts", *command]
    status, told = Launched(folder, *words, PATH=path).wait()
    assert status == 0 and "on [cpu(0), cpu(1)] of each of 2 workers" in told
    assert_close(folder / "ssh", alone, 1e-4)


@needs_horovod
@pytest.mark.workers
def test_so_do_two_machines_with_a_network_between_them(two, folder, tmp_path, two_machines):
    (tmp_path / "hosts").write_text("\n".join(two_machines))
    # Each has a name of its own, which is its address.
    named = """unshare --uts sh -c 'hostname "$0" && exec "$@"' "$host" """
    path = path_with_ssh(tmp_path, f'ip netns exec "$host" {named}')
    words = ["-n", "2", "--hostfile", tmp_path / "hosts", *by_horovod(folder, "machines")]
    status, told = Launched(folder, *words, PATH=path).wait()
    assert status == 0 and "of each of 2 workers" in told
    assert_close(folder / "machines", two, 0)


@needs_horovod
@pytest.mark.workers
def test_so_do_three_the_same_to_the_bit_each_time(alone, folder):
    for name in ("three", "three-again"):
        command = by_horovod(folder, name, "--batch-size", "48", "--num-steps", "10")
        assert Launched(folder, "-n", "3", *command).wait()[0] == 0
    runs = [checkpoint.read_checkpoint(folder / name, 10) for name in ("three", "three-again")]
    assert all((runs[0].weights[name] == runs[1].weights[name]).all() for name in runs[0].weights)


@needs_horovod
@pytest.mark.workers
def test_horovodrun_starts_them_as_well(two, folder):
    command = ["horovodrun", "-np", "2", *map(str, by_horovod(folder, "horovodrun")[1:])]
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
def test_whatever_fails_the_job_ends_as_the_undisturbed_one(two, folder):
    script, fault, run = folder / "disturbed.py", folder / "fault", folder / "disturbed"
    write_disturbed(script, fault=fault)
    fault.write_text("")
    command = by_horovod(folder, "disturbed", script=str(script))
    launched = Launched(folder, "-n", "2", "--max-restarts", "3", *command)

    launched.disturb(run, 2, signal.SIGKILL, "worker", 1)
    # An error in worker 1 after step 7, of which `disturbed` takes care, then:
    launched.disturb(run, 10, signal.SIGSTOP, "worker", 0)
    status, told = launched.wait()
    assert status == 0
    assert told.count("launch: restart") == 3
    for why in (
        "launch: worker 1 ended with signal 9",
        "[worker 1] RuntimeError: a worker's own error",
        "[worker 1] pretrain: --step-timeout 10: step ",
    ):
        assert why in told
    assert_close(run, two, 0)


@needs_horovod
@pytest.mark.workers
def test_sigterm_stops_all_workers_after_one_step_and_one_process_can_go_on(alone, folder):
    script, run = folder / "slow.py", folder / "stopped"
    write_disturbed(script)
    launched = Launched(folder, "-n", "2", *by_horovod(folder, "stopped", script=str(script)))
    launched.wait_for_step(run, 4)
    launched.process.terminate()
    status, told = launched.wait()
    step = checkpoint.steps(run)[-1]
    assert status == 143 and f"the weights after step {step} are kept in {run}" in told
    assert pretrain.main(["--resume", str(run)]) == 0
    assert_close(run, alone, 1e-4)


@needs_horovod
@pytest.mark.workers
def test_workers_that_differ_are_refused(folder):
    flags = f"--output {folder}/different --corpus {folder}/text.txt --lr 0.00${{HOROVOD_RANK}}1"
    command = f"exec {sys.executable} tools/pretrain.py --kvstore horovod {flags}"
    words = ["-n", "2", "--max-restarts", "3", "--", "sh", "-c", command, "--kvstore=horovod"]
    status, told = Launched(folder, *words, "--output=unused").wait()
    assert status == 2 and "restart" not in told
    assert "worker 1 differs from worker 0 in --lr: all workers of a run need the same" in told
    assert not (folder / "different").exists()


def test_where_there_is_no_horovod_that_is_told(no_horovod, monkeypatch, capsys, tmp_path):
    command = ["--kvstore", "horovod", "--output", str(tmp_path / "run")]
    assert launch.main(["-n", "2", "--", sys.executable, "tools/pretrain.py", *command]) == 2
    assert "launch: --kvstore horovod: needs Horovod (" in capsys.readouterr().err
    monkeypatch.setenv("HOROVOD_RANK", "0")
    monkeypatch.setenv("HOROVOD_SIZE", "2")
    assert pretrain.main(command) == 2
    assert "pretrain: --kvstore horovod: needs Horovod, built for MXNet (" in capsys.readouterr().err


@needs_horovod
def test_a_host_whose_name_is_of_the_loopback_is_told(monkeypatch, capsys, tmp_path):
    for name, value in {"RANK": "0", "SIZE": "2", "CROSS_SIZE": "2"}.items():
        monkeypatch.setenv(f"HOROVOD_{name}", value)
    monkeypatch.setattr("socket.gethostname", lambda: "localhost")
    assert pretrain.main(["--kvstore", "horovod", "--output", str(tmp_path / "run")]) == 2
    assert "this host's name, localhost, stands for 127.0.0.1, which other" in capsys.readouterr().err


@pytest.mark.parametrize("variables", [{}, {"HOROVOD_RANK": "2", "HOROVOD_SIZE": "2"}, {"HOROVOD_RANK": "0"}])
def test_a_worker_that_does_not_know_its_place_is_refused(monkeypatch, capsys, tmp_path, variables):
    for name in ("HOROVOD_RANK", "HOROVOD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert pretrain.main(["--kvstore", "horovod", "--output", str(tmp_path / "run")]) == 2
    told = "--kvstore horovod: HOROVOD_RANK and HOROVOD_SIZE in the environment do not say which of how many"
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
