"""The command `python tools/pretrain.py`, through its main and in its own process."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pretrain
import pytest
from conftest import ROOT
from support.runs import SMALL_SIZES, log_of
from support.token_vectors import encode

from gluon_bert import checkpoint, ops
from gluon_bert.presets import preset
from gluon_bert.run import load_run
from gluon_bert.runtime import mx
from gluon_bert.training import checkpointer as saving
from gluon_bert.training import state
from gluon_bert.training.progress import ProgressLogger

MXNetError = mx.MXNetError

SMALL = [*SMALL_SIZES, "--batch-size", "16"]
SMALL += ["--num-steps", "6", "--log-every", "2"]


def untimed(folder):
    return [{k: v for k, v in r.items() if k not in ("seconds", "pairs_per_second")} for r in log_of(folder)]


def weights_of(folder):
    params = load_run(folder).net._collect_params_with_prefix()
    return {name: parameter.data().asnumpy() for name, parameter in params.items()}


def test_run_folder_has_all_files(command, capsys):
    status, folder = command("--eval-every", "4")
    assert status == 0
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "vocab.json",
        "log.jsonl",
        "losses.png",
        "checkpoints",
    }
    steps = [(record["step"], "validation" in record) for record in log_of(folder)]
    assert steps == [(2, False), (4, False), (4, True), (6, False), (6, True)]
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert re.fullmatch(r"MLM loss \d\.\d{3}, NSP loss \d\.\d{3} \(means of 6 steps\)", lines[0])
    assert re.fullmatch(r"\d+\.\d sentence pairs/sec on \[cpu\(0\)\]", lines[1])
    assert "(ln V)" in out and "on validation)" in out
    assert f"run folder: {folder}" in err
    content = json.loads((folder / "config.json").read_text())
    assert content["train"]["seed"] == 0
    assert content["environment"]["contexts"] == ["cpu(0)"]
    assert {"gluon_bert", "python", "numpy", "mxnet"} <= content["environment"]["versions"].keys()


@pytest.mark.parametrize("name, message", [("mxnet", "MXNet's own (as chosen)"), ("auto", None)])
def test_run_logs_its_operators(command, capsys, monkeypatch, name, message):
    monkeypatch.setenv(ops.VARIABLE, "auto")  # and back to what it was
    status, folder = command("--operators", name)
    assert status == 0
    message = message or ops.describe()
    assert f"\noperators: {message}, precision fp32\n" in capsys.readouterr().err
    assert json.loads((folder / "config.json").read_text())["environment"]["operators"] == message
    monkeypatch.undo()
    ops.select()


def test_profile_lists_operators(command, tmp_path, capsys):
    status, _ = command("--profile", str(tmp_path / "trace.json"), "--cpus", "2")
    assert status == 0
    table = capsys.readouterr().out
    assert re.search(r"^(_adamw_update|gluon_bert_adam) +\d{2,} ", table, re.M)
    shares = re.search(r"^load of the contexts: on average (.*) % of the tokens and (.*) % of", table, re.M)
    assert all(50 < float(share) <= 100 for share in shares.groups())
    each = re.search(
        r"^at work: cpu/0 (.*) s, cpu/1 (.*) s; any of them (.*) s, all at once (.*) s", table, re.M
    )
    first, second, either, both = map(float, each.groups())
    assert first > 0 < second and max(first, second) <= either + 0.01
    assert both <= min(first, second) + 0.01 and either + both == pytest.approx(first + second, abs=0.03)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert any(event["name"] in ("_adamw_update", "gluon_bert_adam") for event in events)
    assert command("--profile", "/no/folder/trace.json", name="other")[0] == 2
    assert (
        "--profile must be a file that can be written, got /no/folder/trace.json" in capsys.readouterr().err
    )


def test_run_is_loaded_and_encodes(command):
    _, folder = command()
    run = load_run(folder)
    assert run.step == 6
    assert encode(run.net, run.vocab, ["the", "crane"]).shape == (1, 4, 16)


def test_seed_repeats_a_run_bit_for_bit(command):
    first, second, other = (command("--seed", s, name=n)[1] for s, n in (("3", "a"), ("3", "b"), ("4", "c")))
    assert untimed(first) == untimed(second) != untimed(other)
    ours, theirs = weights_of(first), weights_of(second)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_config_flag_repeats_a_run(command, tmp_path):
    _, first = command("--seed", "5", "--dropout", "0.3")
    flags = ["--config", str(first / "config.json"), "--output", str(tmp_path / "again")]
    assert pretrain.main(flags) == 0
    assert untimed(tmp_path / "again") == untimed(first)


def test_two_contexts_match_one(command):
    one, two = (command("--cpus", n, "--dropout", "0", name=n)[1] for n in ("1", "2"))
    for ours, theirs in zip(log_of(one), log_of(two)):
        for group in (ours, ours.get("validation", {})):
            for name in ("mlm_loss", "nsp_loss"):
                if name in group:
                    other = theirs if group is ours else theirs["validation"]
                    assert group[name] == pytest.approx(other[name], abs=1e-4)


def test_losses_fall(command):
    _, folder = command("--num-steps", "60", "--log-every", "10", "--lr", "0.003")
    losses = [record["mlm_loss"] for record in log_of(folder) if "mlm_loss" in record]
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "bert-huge"], "pretrain: --preset must be one of demo, d2l,"),
        (
            ["--corpus", "/no/where"],
            "--corpus must be a file, a folder, pydoc or wikitext-2, got /no/where",
        ),
        (["--max-seq-length", "2"], "pretrain: --max-seq-length must be at least 8, got 2"),
        (["--num-heads", "3"], "pretrain: --num-heads must divide --units 16, got 3"),
        (["--batch-size", "0"], "pretrain: --batch-size must be at least 1, got 0"),
        (["--num-steps", "0"], "--num-steps must be at least 1 without --max-minutes, got 0"),
        (["--max-minutes", "-1"], "pretrain: --max-minutes must be at least 0.0, got -1.0"),
        (["--max-minutes", "nan"], "pretrain: --max-minutes must be at least 0.0, got nan"),
        (["--patience", "2"], "--patience must be 0 without --eval-every, got 2"),
        (
            ["--patience", "2", "--eval-every", "1", "--validation-fraction", "0"],
            "pretrain: --patience must be 0 without enough validation text, got 2",
        ),
        (
            ["--warmup-ratio", "1", "--schedule", "linear"],
            "pretrain: --warmup-ratio must be below 1 with --schedule linear, got 1.0",
        ),
        (["--keep-checkpoints", "-1"], "pretrain: --keep-checkpoints must be at least 0, got -1"),
        (["--gpus", "x"], "--gpus must be numbers separated by commas, such as 0 or 0,1, got 'x'"),
        (["--gpus", "7"], "--gpus 7 needs "),
        (["--cpus", "0"], "--cpus must be at least 1, got 0"),
        (["--gpus", "0", "--cpus", "1"], "--gpus must be omitted with --cpus 1"),
        (["--min-freq", "100000"], "--min-freq must be smaller for"),
        (["--units", "many"], "pretrain: --units must be a whole number, got many."),
        (["--lr", "fast"], "pretrain: --lr must be a number, got fast."),
        (["--units", ""], "pretrain: --units must be a whole number, got ''."),
        (["--units", "it's"], "pretrain: --units must be a whole number, got it's."),
        (["--recompute=true"], "pretrain: --recompute must have no value, got true."),
        (["--units"], "pretrain: --units must have a value, got none."),
        (["--tied-decoder", "yes"], "pretrain: flags must be those of this command, got yes."),
        (["--unitz", "4"], "got --unitz 4. --help-all lists them."),
        (
            ["--output", "/proc/nowhere/run"],
            "--output must be a folder that can be written, got /proc/nowhere/run",
        ),
        (
            ["--output", "/dev/null/run"],
            "--output must be a folder that can be written, got /dev/null/run. Writing to /dev/null",
        ),
        (["--config", "x", "--preset", "d2l"], "--config cannot be used with --preset"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(command, capsys, tmp_path, flags, message):
    status, folder = command(*flags)
    assert status == 2
    out, err = capsys.readouterr()
    assert message in err
    assert "Traceback" not in err and out == ""
    assert not folder.exists()


def test_missing_config_is_refused(tmp_path, capsys):
    assert pretrain.main(["--config", "/no/where.json", "--output", str(tmp_path / "run")]) == 2
    assert "/no/where.json: cannot be read (No such file or directory)" in capsys.readouterr().err


def test_all_problems_are_reported_at_once(command, capsys):
    status, _ = command("--max-seq-length", "2", "--batch-size", "0", "--num-heads", "3")
    assert status == 2
    assert (
        len([line for line in capsys.readouterr().err.splitlines() if line.startswith("pretrain: --")]) == 3
    )


def test_output_with_a_run_is_refused_before_reading(command, capsys):
    _, folder = command()
    before = (folder / "log.jsonl").read_text()
    capsys.readouterr()
    status, _ = command("--corpus", "/no/where")
    assert status == 2
    assert "which has a run" in capsys.readouterr().err
    assert (folder / "log.jsonl").read_text() == before


def test_output_with_other_files_is_refused(command, capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.doc").write_text("")
    assert command()[0] == 2
    assert "must be a new folder" in capsys.readouterr().err


def test_run_without_validation_says_so_in_valid_json(command, capsys):
    status, folder = command("--validation-fraction", "0")
    assert status == 0
    assert "the validation text is too short" in capsys.readouterr().err
    (folder / "config.json").read_text().index('"validation_unigram": null')


def test_keep_0_writes_each_evaluation_once(command, monkeypatch):
    written = []

    def noting(folder, snapshot, **options):
        written.append(snapshot.step)
        return checkpoint.write_checkpoint(folder, snapshot, **options)

    monkeypatch.setattr(saving, "write_checkpoint", noting)
    _, folder = command("--eval-every", "2", "--keep-checkpoints", "0")
    assert checkpoint.steps(folder) == written == [2, 4, 6]


@pytest.fixture
def held_out_losses(monkeypatch):
    """Sets what the evaluations of the next run give."""

    def script(*mlm_losses):
        left = [{"mlm_loss": loss, "nsp_loss": 0.7} for loss in mlm_losses]
        monkeypatch.setattr("gluon_bert.training.trainer.Trainer.evaluate", lambda *_: left.pop(0))

    return script


def test_latest_and_best_weights_stay(command, held_out_losses, capsys):
    held_out_losses(4.0, 3.0, 5.0, 3.5)
    status, folder = command("--num-steps", "7", "--eval-every", "2", "--keep-checkpoints", "1")
    assert status == 0
    assert checkpoint.steps(folder) == [4, 7]
    assert (load_run(folder, checkpoint="best").step, load_run(folder).step) == (4, 7)
    assert "best of 4 evaluations, after step 4: MLM loss 3.000" in capsys.readouterr().out


def test_patience_ends_the_run_and_logs_the_last_step(command, held_out_losses, capsys):
    held_out_losses(4.0, 3.0, 5.0, 3.5)
    status, folder = command(
        "--num-steps", "1000", "--eval-every", "3", "--patience", "2", "--keep-checkpoints", "1"
    )
    assert status == 0
    assert "The run ended after step 12: 2 evaluations in a row did not improve" in capsys.readouterr().out
    steps = [(record["step"], "validation" in record) for record in log_of(folder)]
    assert steps[-2:] == [(12, False), (12, True)]
    assert checkpoint.steps(folder) == [6, 12]


def test_ctrl_c_after_evaluation_keeps_best_and_latest(command, monkeypatch, capsys):
    stepped = ProgressLogger.on_step

    def interrupting(self, trainer, step):
        stepped(self, trainer, step)
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ProgressLogger, "on_step", interrupting)
    status, folder = command("--eval-every", "4")
    assert status == 130
    assert f"stopped after step 5; --resume {folder} continues" in capsys.readouterr().err
    assert (load_run(folder, checkpoint="best").step, load_run(folder).step) == (4, 5)


@pytest.fixture
def ticking(monkeypatch):
    """A clock that advances by a quarter of a second at each call."""
    seconds = itertools.count(0, 0.25)
    monkeypatch.setattr(state, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))


def test_max_minutes_ends_a_run_that_steps_repeat(text_file, tmp_path, ticking, capsys):
    first, again = tmp_path / "first", tmp_path / "again"
    small = [*SMALL[: SMALL.index("--num-steps")], "--corpus", str(text_file), "--max-minutes", "0.5"]
    assert pretrain.main([*small, "--output", str(first)]) == 0
    _, err = capsys.readouterr()
    made = log_of(first)[-1]["step"]
    assert made > 50  # the preset's number of steps does not limit the run
    assert f"step {made}/~{made}" in err and "step 10/~" in err
    content = json.loads((first / "config.json").read_text())
    assert (content["train"]["num_steps"], content["train"]["max_minutes"]) == (0, 0.5)
    repeat = ["--config", str(first / "config.json"), "--max-minutes", "0", "--num-steps", str(made)]
    assert pretrain.main([*repeat, "--output", str(again)]) == 0
    ours, theirs = weights_of(first), weights_of(again)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_max_minutes_decays_the_learning_rate_to_0(command, ticking):
    flags = ["--max-minutes", "0.5", "--num-steps", "0", "--schedule", "linear", "--warmup-ratio", "0.2"]
    _, folder = command(*flags, "--log-every", "1")
    rates = [record["lr"] for record in log_of(folder) if "lr" in record]
    assert max(rates) == pytest.approx(1e-3, rel=0.1)
    assert 0 < rates[-1] < 1e-4
    peak = rates.index(max(rates))
    assert len(rates) / 10 < peak < len(rates) / 3


def test_num_steps_limits_a_run_with_max_minutes(command, ticking):
    _, folder = command("--max-minutes", "1000")
    assert load_run(folder).step == 6


def test_max_minutes_replaces_preset_steps_only():
    d2l = preset("d2l")
    assert d2l.replace(max_minutes=30).train.num_steps == 0
    assert d2l.replace(max_minutes=30, num_steps=70).train.num_steps == 70
    assert d2l.replace(max_minutes=0).train.num_steps == 50


def test_steps_replace_minutes_that_are_not_given():
    half_hour = preset("d2l").replace(max_minutes=30)
    assert half_hour.replace(num_steps=70).train.max_minutes == 0
    assert half_hour.replace(num_steps=0).train.max_minutes == 30


def test_run_without_flags_is_demo_with_steps_alone():
    config = pretrain.init_run(pretrain.parser().parse_args([]))
    assert config == preset("demo") and config.train.max_minutes == 0


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), MXNetError("C++\nMXNetError: bad")]
)
def test_machine_failure_is_one_line_and_status_1(command, capsys, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("gluon_bert.training.trainer.Trainer.fit", fail)
    assert command()[0] == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("pretrain: ") and ("No space left" in message or "MXNetError: bad" in message)


def test_failed_plot_loses_no_weights(command, monkeypatch, capsys):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gluon_bert.training.progress.draw_losses", fail)
    status, folder = command()
    assert (status, load_run(folder).step) == (0, 6)
    assert "losses.png cannot be written (No space left on device)" in capsys.readouterr().err


def test_runs_without_output_get_new_folders(text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert pretrain.main([*SMALL, "--corpus", str(text_file)]) == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["d2l-1", "d2l-2"]


def test_help_explains_every_field(capsys):
    import dataclasses

    from gluon_bert.config import GROUPS, flag_name
    from gluon_bert.presets import PRESETS

    assert pretrain.main(["--help-all"]) == 0
    text = capsys.readouterr().out
    for group in GROUPS.values():
        for field in dataclasses.fields(group):
            assert flag_name(field.name) in text
    joined = " ".join(text.split())
    assert "peak learning rate (demo and quick: 0.003, d2l: 0.001, thorough: 0.002, bert-*: 0.0001)" in joined
    assert "encoder layers (demo and d2l: 2, quick and thorough: 4, bert-*: by size)" in joined
    assert "rarer words become <unk> (5)" in joined
    for name in [*PRESETS, "--gpus", "--cpus", "--output", "--preset"]:
        assert name in "".join(text.split())  # lines end behind the hyphens of names, too


def in_a_process(*flags, **options):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "pretrain.py"), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_command_runs_from_any_folder(text_file, tmp_path):
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
    assert "--num-heads must divide --units 7, got 2" in err


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
    assert f"stopped after step {load_run(folder).step}; --resume {folder} continues" in err
    assert "interrupted" in err
    assert log_of(folder)
    assert (folder / "losses.png").exists()


def test_decoder_bias_unigram_starts_at_word_frequencies(command):
    flags = [
        "--preset",
        "bert-tiny",
        "--decoder-bias",
        "unigram",
        "--lr",
        "1e-9",
        "--validation-fraction",
        "0.5",
    ]
    status, folder = command(*flags)
    assert status == 0
    compared = json.loads((folder / "config.json").read_text())["environment"]["reference_losses"]
    reached = log_of(folder)[-1]["validation"]["mlm_loss"]
    assert reached == pytest.approx(compared["validation_unigram"], abs=0.2)
    assert reached < compared["uniform"] - 0.4
