"""A resumed run equals the uninterrupted one: stopped anywhere, killed, on other contexts."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pretrain
import pytest
from conftest import ROOT, small_text
from support.processes import wait_for
from support.runs import SMALL_NETWORK

from gluon_bert import checkpoint, ops, run
from gluon_bert.npz import read_arrays
from gluon_bert.training.progress import ProgressLogger
from gluon_bert.training.trainer import Trainer, dropout_seed

SMALL = [*SMALL_NETWORK, "--num-steps", "12", "--log-every", "3", "--eval-every", "5", "--num-buckets", "2"]
SMALL += ["--dynamic-masking"]


def log_of(folder):
    """The log without what depends on the clock."""
    timed = ("seconds", "pairs_per_second")
    records = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in record.items() if k not in timed} for record in records]


def left(folder):
    """Return all that a run leaves by name: weights, optimizer's state, training state."""
    step = checkpoint.steps(folder)[-1]
    snapshot = checkpoint.read_checkpoint(folder, step)
    state = {k: v for k, v in snapshot.state.items() if k not in ("clock", "log_bytes")}
    return step, {**snapshot.weights, **snapshot.optimizer}, state


def assert_same_run(one, other, tolerance=None):
    step, arrays, state = left(one)
    other_step, other_arrays, other_state = left(other)
    assert step == other_step
    assert arrays.keys() == other_arrays.keys() and len(arrays) > 40
    for name, array in arrays.items():
        if tolerance is None:
            np.testing.assert_array_equal(array, other_arrays[name], err_msg=name)
        else:
            np.testing.assert_allclose(array, other_arrays[name], rtol=0, atol=tolerance, err_msg=name)
    if tolerance is None:
        assert state == other_state
        assert log_of(one) == log_of(other)


@pytest.fixture
def stopping(monkeypatch):
    """Sends the command a signal after each of these steps, once each."""

    def stop_after(*steps, number=signal.SIGINT):
        waiting = list(steps)
        stepped = ProgressLogger.on_step

        def interrupting(self, trainer, step):
            stepped(self, trainer, step)
            if waiting and step == waiting[0]:
                os.kill(os.getpid(), number)
                waiting.pop(0)

        monkeypatch.setattr(ProgressLogger, "on_step", interrupting)

    return stop_after


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--optimizer", "bertadam", "--schedule", "linear", "--warmup-ratio", "0.3", "--clip-norm", "0.1"],
        ["--optimizer", "lamb", "--tied-decoder", "--embedding-norm", "--cpus", "2"],
        ["--micro-batch", "24", "--recompute", "--tied-decoder"],
        ["--optimizer", "muon", "--weight-decay", "0.1", "--cpus", "2"],
        ["--dynamic-masking", "--mlm-probability", "0.6", "--final-mlm-probability", "0.1"],
    ],
    ids=["adam", "bertadam", "lamb", "in parts", "muon", "masks"],
)
def test_stop_after_each_step_resumes_bit_for_bit(command, stopping, capsys, flags):
    status, undisturbed = command(*flags, name="undisturbed")
    assert status == 0 and run.load_run(undisturbed).step == 12
    epochs = json.loads((undisturbed / "checkpoints/step-00000012/state.json").read_text())["position"]
    assert epochs["epoch"] >= 1  # so that stops before, at and after the end of an epoch were tried
    stopping(*range(1, 12))
    status, stopped = command(*flags, name="stopped")
    for step in range(1, 12):
        assert status == 130 and checkpoint.steps(stopped)[-1] == step
        random.seed(step)  # neither of these, nor any other state of a process, has a say
        np.random.seed(step)
        status = pretrain.main(["--resume", str(stopped)])
    assert status == 0
    assert_same_run(undisturbed, stopped)
    assert checkpoint.best_step(stopped) == checkpoint.best_step(undisturbed)
    assert f"stopped after step 11; --resume {stopped} continues" in capsys.readouterr().err


def test_run_inside_its_corpus_folder_resumes(tmp_path):
    (tmp_path / "text.txt").write_text(small_text(), "utf-8")
    folder = tmp_path / "runs" / "one"
    assert pretrain.main([*SMALL, "--corpus", str(tmp_path), "--output", str(folder)]) == 0
    assert pretrain.main(["--resume", str(folder), "--num-steps", "14"]) == 0
    assert run.load_run(folder).step == 14


def test_resume_keeps_the_operators(command, stopping, capsys, monkeypatch):
    monkeypatch.setenv(ops.VARIABLE, "auto")  # and back to what it was
    _, undisturbed = command("--operators", "mxnet", name="undisturbed")
    stopping(5)
    status, stopped = command("--operators", "mxnet", name="stopped")
    assert status == 130
    monkeypatch.setenv(ops.VARIABLE, "auto")
    capsys.readouterr()
    assert pretrain.main(["--resume", str(stopped)]) == 0
    message = capsys.readouterr().err
    assert "operators: MXNet's own" in message and "operators is" not in message
    assert_same_run(undisturbed, stopped)

    assert pretrain.main(["--resume", str(stopped), "--operators", "auto"]) == 0
    changed = f"operators is {ops.describe()} and was MXNet's own (as chosen): dropout draws other numbers"
    assert (changed in capsys.readouterr().err) == (ops.parse_description(ops.describe()) is None)
    monkeypatch.undo()
    ops.select()


def test_stop_inside_an_evaluation_repeats_it(command, monkeypatch):
    _, undisturbed = command(name="undisturbed")
    evaluate, calls = Trainer.evaluate, itertools.count()

    def interrupted_at_first(self, batches):
        self.interrupted = next(calls) == 0
        return evaluate(self, batches)

    monkeypatch.setattr(Trainer, "evaluate", interrupted_at_first)
    status, stopped = command(name="stopped")
    assert status == 130 and checkpoint.best_step(stopped) is None
    assert log_of(stopped)[-1]["step"] == 5 and "validation" not in log_of(stopped)[-1]
    assert pretrain.main(["--resume", str(stopped)]) == 0
    assert_same_run(undisturbed, stopped)


def test_sigterm_saves_and_exits_with_143(command, stopping):
    _, undisturbed = command(name="undisturbed")
    stopping(7, number=signal.SIGTERM)
    status, stopped = command(name="stopped")
    assert (status, checkpoint.steps(stopped)[-1]) == (143, 7)
    assert (stopped / "losses.png").exists()
    assert pretrain.main(["--resume", str(stopped)]) == 0
    assert_same_run(undisturbed, stopped)


@pytest.mark.parametrize(("before", "after"), [("1", "3"), ("2", "1")])
def test_resume_on_other_contexts_matches_to_1e_5(command, stopping, before, after):
    flags = ["--dropout", "0", "--lr", "0.0001"]
    _, undisturbed = command(*flags, "--cpus", before, name="undisturbed")
    stopping(7)
    _, stopped = command(*flags, "--cpus", before, name="stopped")
    assert pretrain.main(["--resume", str(stopped), "--cpus", after]) == 0
    assert_same_run(undisturbed, stopped, 1e-5)
    for ours, theirs in zip(log_of(undisturbed), log_of(stopped)):
        assert ours.get("mlm_loss") == pytest.approx(theirs.get("mlm_loss"), abs=1e-4)
    facts = run.read_environment(stopped / "config.json")
    assert facts["contexts"] == [f"cpu({i})" for i in range(int(after))]


def test_resume_takes_more_steps(command, capsys):
    flags = ["--eval-every", "6", "--log-every", "6"]
    _, longer = command(*flags, "--num-steps", "18", name="longer")
    _, folder = command(*flags)
    capsys.readouterr()
    assert pretrain.main(["--resume", str(folder)]) == 0
    shown = capsys.readouterr().err
    assert "is finished, after step 12. Raise --num-steps or --max-minutes to continue." in shown
    assert pretrain.main(["--resume", str(folder), "--lr", "0.5"]) == 0
    assert run.read_config(folder / "config.json").train.lr != 0.5  # since nothing was trained with it
    assert pretrain.main(["--resume", str(folder), "--num-steps", "18"]) == 0
    assert_same_run(longer, folder)
    assert run.read_config(folder / "config.json").train.num_steps == 18
    assert "means of 18 steps" in capsys.readouterr().out


def test_resume_counts_earlier_minutes(command, stopping):
    stopping(3)
    _, folder = command("--num-steps", "100000")
    state = json.loads((folder / "checkpoints/step-00000003/state.json").read_text())
    assert state["clock"]["elapsed"] > 0
    state["clock"]["elapsed"] = 3600.0
    rewrite(folder / "checkpoints/step-00000003", "state.json", json.dumps(state).encode())
    assert pretrain.main(["--resume", str(folder), "--max-minutes", "50"]) == 0
    assert checkpoint.steps(folder)[-1] == 3


def rewrite(path, name, content):
    """Change a file of a checkpoint, and its manifest with it."""
    (path / name).write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = checkpoint._described(path / name)
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("weights.npz", "cut"),
        ("weights.npz", "linked"),
        ("optimizer.npz", "changed"),
        ("state.json", "gone"),
        ("state.json", "changed"),
        ("manifest.json", "cut"),
        ("manifest.json", "gone"),
    ],
)
def test_damaged_checkpoint_falls_back_to_the_previous(damaged_run, capsys, tmp_path, name, damage):
    undisturbed, folder = damaged_run
    path = folder / "checkpoints/step-00000012" / name
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "changed":
        path.write_bytes(content.replace(content[40:44], b"\0\1\2\3", 1))
    elif damage == "linked":
        (tmp_path / "elsewhere").write_bytes(content)
        path.symlink_to(tmp_path / "elsewhere")
    assert pretrain.main(["--resume", str(folder)]) == 0
    err = capsys.readouterr().err
    assert f"{path}: " in err and "the previous checkpoint is used" in err
    assert "resuming after step 10" in err
    assert_same_run(undisturbed, folder)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    from conftest import small_text

    folder = tmp_path_factory.mktemp("finished")
    (folder / "text.txt").write_text(small_text(), "utf-8")
    run = folder / "run"
    assert pretrain.main([*SMALL, "--corpus", str(folder / "text.txt"), "--output", str(run)]) == 0
    return run


@pytest.fixture
def damaged_run(finished_run, tmp_path):
    """A finished run, and a copy of it to be damaged."""
    return finished_run, shutil.copytree(finished_run, tmp_path / "copy")


def test_resume_removes_interrupted_writes(damaged_run):
    _, folder = damaged_run
    half = folder / "checkpoints/.step-00000013.abc.part"
    half.mkdir()
    (half / "weights.npz").write_bytes(b"half")
    (folder / ".config.json.abc.part").write_text("half")
    assert pretrain.main(["--resume", str(folder)]) == 0
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {
        "best.json",
        "step-00000010",
        "step-00000012",
    }
    assert not list(folder.glob(".*"))


def test_resume_without_a_valid_checkpoint_is_refused(damaged_run, capsys):
    _, folder = damaged_run
    for path in folder.glob("checkpoints/step-*/weights.npz"):
        path.write_bytes(b"")
    assert pretrain.main(["--resume", str(folder)]) == 2
    assert "must have a valid checkpoint to resume from" in capsys.readouterr().err


def test_resume_with_weights_alone_is_refused(damaged_run, capsys):
    _, folder = damaged_run
    checkpoint.save_checkpoint(folder, run.load_run(folder).net, 13)
    assert pretrain.main(["--resume", str(folder)]) == 0
    err = capsys.readouterr().err
    assert "step-00000013: has weights only" in err and "resuming after step 12" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--units", "32", "--seed", "4"], "{run} was started with --units 16, got --units 32"),
        (["--units", "32", "--seed", "4"], "{run} was started with --seed 0, got --seed 4"),
        (
            ["--units", "32"],
            "A resumed run may change --corpus, --vocab-file, --preprocessing-workers, --micro-batch, "
            "--recompute,",
        ),
        (["--preset", "d2l"], "--preset cannot be used with --resume"),
        (["--output", "x"], "--output cannot be used with --resume"),
    ],
)
def test_resume_names_options_that_may_not_change(damaged_run, capsys, flags, message):
    _, folder = damaged_run
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert pretrain.main(["--resume", str(folder), *flags]) == 2
    assert message.format(run=folder) in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_resume_with_another_text_is_refused(damaged_run, tmp_path, capsys):
    _, folder = damaged_run
    other = tmp_path / "other.txt"
    other.write_text(small_text(seed=1), "utf-8")
    assert pretrain.main(["--resume", str(folder), "--corpus", str(other)]) == 2
    message = f"--corpus must be the text that {folder} was started with"
    assert message in capsys.readouterr().err


def test_resume_without_a_run_is_refused(tmp_path, capsys):
    assert pretrain.main(["--resume", str(tmp_path)]) == 2
    assert (
        f"--resume must be the folder of a run, got {tmp_path}, which has no config.json"
        in capsys.readouterr().err
    )
    assert pretrain.main(["--resume", str(tmp_path / "no")]) == 2
    assert f"got {tmp_path / 'no'}, which does not exist." in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(meter=[]),
        lambda state: state.pop("clock"),
        lambda state: state.update(step=-1),
        lambda state: state.update(step=True),
        lambda state: state["meter"].update(counts=[1, 2]),
        lambda state: state["best"].update(validation={}),
        lambda state: state["position"].update(epoch="0"),
        lambda state: state.update(log_bytes="many"),
        lambda state: state["position"].pop("batch"),
    ],
)
def test_resume_invalid_state_is_refused(damaged_run, capsys, change):
    _, folder = damaged_run
    path = folder / "checkpoints/step-00000012"
    state = json.loads((path / "state.json").read_text())
    change(state)
    rewrite(path, "state.json", json.dumps(state).encode())
    assert pretrain.main(["--resume", str(folder)]) == 2
    assert "cannot be resumed" in capsys.readouterr().err


def test_second_process_in_a_folder_is_refused(command, text_file, capsys):
    # A signal is what starts the second one, in the middle of the first one's steps.
    statuses, stepped = [], ProgressLogger.on_step

    def starting_another(self, trainer, step):
        stepped(self, trainer, step)
        if step == 2:
            statuses.append(
                subprocess.run(
                    [sys.executable, str(ROOT / "tools/pretrain.py"), "--resume", str(self.folder)],
                    stderr=subprocess.PIPE,
                    timeout=120,
                )
            )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgressLogger, "on_step", starting_another)
        status, _ = command()
    assert status == 0 and statuses[0].returncode == 2
    assert b"must be a folder where no other process trains" in statuses[0].stderr


def test_dropout_seed_differs_by_step():
    seeds = {dropout_seed(seed, step) for seed in range(30) for step in range(1000)}
    assert len(seeds) > 29_990
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_checkpoints_hold_no_pickle(finished_run):
    for path in finished_run.glob("checkpoints/*/*.npz"):
        assert b"pickle" not in path.read_bytes()
        assert {array.dtype.kind for array in read_arrays(path).values()} <= {"f", "i"}


# Killed


def in_a_process(*flags):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "pretrain.py"), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_second_signal_ends_at_once(command, text_file, tmp_path):
    folder = tmp_path / "run"
    flags = [*SMALL, "--num-steps", "1000000", "--eval-every", "0", "--corpus", str(text_file)]
    process = in_a_process(*flags, "--output", str(folder))
    wait_for(lambda: (folder / "log.jsonl").exists() and (folder / "log.jsonl").read_bytes(), process)
    # Stopped by the first in a state where it cannot finish its step, it must yet end by the second.
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) in (-signal.SIGTERM, 143)


@pytest.mark.slow
def test_kills_at_random_moments_resume_bit_for_bit(text_file, tmp_path, kills):
    """SIGKILL, --kills times, anywhere after the first step, also in the middle of a checkpoint."""
    rng = random.Random(0)
    folder, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    flags = [*SMALL, "--num-steps", str(20 * kills), "--eval-every", "50", "--corpus", str(text_file)]
    out, _ = (process := in_a_process(*flags, "--output", str(undisturbed))).communicate(timeout=3600)
    assert process.returncode == 0, out
    process = in_a_process(*flags, "--checkpoint-every", "2", "--output", str(folder))
    wait_for(lambda: folder.exists() and checkpoint.steps(folder), process)
    killed = leftovers = 0
    while process.poll() is None and killed < kills:
        time.sleep(rng.uniform(0.0, 0.4))
        process.kill()
        process.communicate(timeout=60)
        killed += process.returncode == -signal.SIGKILL
        leftovers += len(list(folder.glob("checkpoints/.*.part")))
        last = checkpoint.steps(folder)[-1]
        every = "2" if killed < kills else "500"
        process = in_a_process("--resume", str(folder), "--checkpoint-every", every)
        if killed < kills:
            wait_for(lambda last=last: checkpoint.steps(folder)[-1] > last, process)
    out, _ = process.communicate(timeout=3600)
    assert process.returncode == 0, out
    print(f"killed {killed} times, {leftovers} of them in the middle of a checkpoint")
    assert killed == kills
    assert_same_run(undisturbed, folder)
    windows = [record["step"] for record in log_of(folder) if "validation" not in record]
    assert len(windows) == len(set(windows)) and windows == sorted(windows)
