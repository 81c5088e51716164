"""The command `python tools/pretrain.py`, through its main and in a process of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pretrain
import pytest
from conftest import ROOT

from gluon_bert.checkpoint import load_run
from gluon_bert.encoding import encode
from gluon_bert.runtime import mx

MXNetError = mx.MXNetError

SMALL = ["--units", "16", "--ffn-units", "32", "--max-len", "16", "--batch-size", "16"]
SMALL += ["--num-steps", "6", "--log-every", "2"]


@pytest.fixture
def command(text_file, tmp_path):
    """Runs the command on a small text with a small network; returns its status and the run's folder."""

    def run(*flags, name="run"):
        folder = tmp_path / name
        status = pretrain.main([*SMALL, "--corpus", str(text_file), "--output", str(folder), *flags])
        return status, folder

    return run


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def untimed(folder):
    return [{k: v for k, v in r.items() if k not in ("seconds", "pairs_per_second")} for r in log_of(folder)]


def weights_of(folder):
    params = load_run(folder).net._collect_params_with_prefix()
    return {name: parameter.data().asnumpy() for name, parameter in params.items()}


def test_a_run_leaves_all_that_it_promises(command, capsys):
    status, folder = command("--eval-every", "4")
    assert status == 0
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "vocab.json",
        "log.jsonl",
        "losses.png",
        "checkpoints",
    }
    steps = [(record["step"], "held_out" in record) for record in log_of(folder)]
    assert steps == [(2, False), (4, False), (4, True), (6, False), (6, True)]
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert re.fullmatch(r"MLM loss \d\.\d{3}, NSP loss \d\.\d{3} \(means of 6 steps\)", lines[0])
    assert re.fullmatch(r"\d+\.\d sentence pairs/sec on \[cpu\(0\)\]", lines[1])
    assert "ln V" in out and "held-out text" in out
    assert f"run folder: {folder}" in err
    content = json.loads((folder / "config.json").read_text())
    assert content["train"]["seed"] == 0
    assert content["facts"]["contexts"] == ["cpu(0)"]
    assert {"gluon_bert", "python", "numpy", "mxnet"} <= content["facts"]["versions"].keys()


def test_the_run_can_be_loaded_and_encodes(command):
    _, folder = command()
    run = load_run(folder)
    assert run.step == 6
    assert encode(run.net, run.vocab, ["the", "crane"]).shape == (1, 4, 16)


def test_a_seed_repeats_a_run_bit_for_bit_and_another_does_not(command):
    first, second, other = (command("--seed", s, name=n)[1] for s, n in (("3", "a"), ("3", "b"), ("4", "c")))
    assert untimed(first) == untimed(second) != untimed(other)
    ours, theirs = weights_of(first), weights_of(second)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_a_runs_own_configuration_repeats_it(command, tmp_path):
    _, first = command("--seed", "5", "--dropout", "0.3")
    flags = ["--config", str(first / "config.json"), "--output", str(tmp_path / "again")]
    assert pretrain.main(flags) == 0
    assert untimed(tmp_path / "again") == untimed(first)


def test_two_contexts_give_the_result_of_one(command):
    one, two = (command("--cpus", n, "--dropout", "0", name=n)[1] for n in ("1", "2"))
    for ours, theirs in zip(log_of(one), log_of(two)):
        for group in (ours, ours.get("held_out", {})):
            for name in ("mlm_loss", "nsp_loss"):
                if name in group:
                    other = theirs if group is ours else theirs["held_out"]
                    assert group[name] == pytest.approx(other[name], abs=1e-4)


def test_losses_fall(command):
    _, folder = command("--num-steps", "60", "--log-every", "10", "--lr", "0.003")
    losses = [record["mlm_loss"] for record in log_of(folder) if "mlm_loss" in record]
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--preset", "bert-huge"], "pretrain: --preset bert-huge: must be one of d2l,"),
        (["--corpus", "/no/where"], "pretrain: --corpus /no/where: no such file or folder"),
        (["--max-len", "2"], "pretrain: --max-len 2: must be at least 8"),
        (["--num-heads", "3"], "pretrain: --num-heads 3: must divide --units 16"),
        (["--batch-size", "0"], "pretrain: --batch-size 0: must be at least 1"),
        (["--num-steps", "0"], "pretrain: --num-steps 0: must be at least 1"),
        (["--gpus", "x"], "--gpus 'x'"),
        (["--gpus", "7"], "--gpus 7"),
        (["--cpus", "0"], "--cpus 0"),
        (["--gpus", "0", "--cpus", "1"], "--gpus and --cpus exclude each other"),
        (["--min-freq", "100000"], "--min-freq 100000: no word of --corpus"),
        (["--units", "many"], "argument --units: invalid int value: 'many'"),
        (["--tied-decoder", "maybe"], "argument --tied-decoder: maybe: must be yes or no"),
        (["--config", "/no/where.json"], "/no/where.json: cannot be read as a run's configuration"),
        (["--unitz", "4"], "unrecognized arguments: --unitz 4"),
        (["--output", "/proc/nowhere/run"], "--output /proc/nowhere/run: cannot be written"),
        (
            ["--output", "/dev/null/run"],
            "--output /dev/null/run: cannot be written, as /dev/null is no folder",
        ),
        (["--config", "x", "--preset", "d2l"], "--config and --preset exclude each other"),
    ],
)
def test_bad_input_ends_with_one_sentence_and_status_2(command, capsys, tmp_path, flags, told):
    status, folder = command(*flags)
    assert status == 2
    out, err = capsys.readouterr()
    assert told in err
    assert "Traceback" not in err and out == ""
    assert not folder.exists()


def test_all_problems_are_told_at_once(command, capsys):
    status, _ = command("--max-len", "2", "--batch-size", "0", "--num-heads", "3")
    assert status == 2
    assert (
        len([line for line in capsys.readouterr().err.splitlines() if line.startswith("pretrain: --")]) == 3
    )


def test_a_folder_with_a_run_is_refused_before_any_text_is_read(command, capsys):
    _, folder = command()
    before = (folder / "log.jsonl").read_text()
    capsys.readouterr()
    status, _ = command("--corpus", "/no/where")
    assert status == 2
    assert "holds a run already" in capsys.readouterr().err
    assert (folder / "log.jsonl").read_text() == before


def test_a_folder_with_something_else_is_refused(command, capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.doc").write_text("")
    assert command()[0] == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_run_without_held_out_text_says_so_and_writes_valid_json(command, capsys):
    status, folder = command("--held-out", "0")
    assert status == 0
    assert "too little text is held out" in capsys.readouterr().err
    (folder / "config.json").read_text().index('"held_out_unigram": null')


def test_evaluated_weights_are_kept(command):
    _, folder = command("--eval-every", "4")
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step-00000004.params", "step-00000006.params"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), MXNetError("C++\nMXNetError: bad")]
)
def test_a_failure_of_the_machine_is_told_in_a_line_with_status_1(command, capsys, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("gluon_bert.training.trainer.Trainer.fit", fail)
    assert command()[0] == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("pretrain: ") and ("No space left" in told or "MXNetError: bad" in told)


def test_a_picture_that_cannot_be_drawn_loses_no_weights(command, monkeypatch, capsys):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gluon_bert.training.report.draw_losses", fail)
    status, folder = command()
    assert (status, load_run(folder).step) == (0, 6)
    assert "no picture of the losses (No space left on device)" in capsys.readouterr().err


def test_without_output_every_run_gets_a_new_folder(text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert pretrain.main([*SMALL, "--corpus", str(text_file)]) == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["d2l-1", "d2l-2"]


def test_help_explains_every_field(capsys):
    import dataclasses

    from gluon_bert.config import GROUPS, PRESETS, flag

    assert pretrain.main(["--help"]) == 0
    text = capsys.readouterr().out
    for group in GROUPS.values():
        for field in dataclasses.fields(group):
            assert flag(field.name) in text
    joined = " ".join(text.split())
    assert "the learning rate at its peak (d2l: 0.001, bert-*: 0.0001)" in joined
    assert "encoder layers (d2l: 2, bert-*: by size)" in joined
    assert "rarer words become <unk> (5)" in joined
    for name in [*PRESETS, "--gpus", "--cpus", "--output", "--preset"]:
        assert name in text


def in_a_process(*flags, **options):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "pretrain.py"), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_the_command_runs_in_a_process_from_any_folder(text_file, tmp_path):
    process = in_a_process(
        *SMALL, "--corpus", str(text_file), "--output", str(tmp_path / "run"), cwd=tmp_path
    )
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "MLM loss" in out
    assert (tmp_path / "run" / "losses.png").exists()


def test_bad_input_in_a_process_is_status_2(tmp_path):
    process = in_a_process("--corpus", "/no/where", "--units", "7", cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (2, "")
    assert "--num-heads 2: must divide --units 7" in err


def test_ctrl_c_leaves_a_usable_run_and_status_130(text_file, tmp_path):
    folder = tmp_path / "run"
    flags = [*SMALL, "--num-steps", "1000000", "--corpus", str(text_file), "--output", str(folder)]
    process = in_a_process(*flags, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    deadline = time.monotonic() + 240
    while not (folder / "log.jsonl").exists() or not (folder / "log.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert f"the weights after step {load_run(folder).step} are kept in {folder}" in err
    assert "interrupted" in err
    assert log_of(folder)
    assert (folder / "losses.png").exists()
