"""Recipes train for the same time and are evaluated on the same examples."""

import json
import subprocess

import pytest
from dev import compare_recipes
from dev.compare_recipes import Recipe, RunResult, flags_of, table

SMALL = {"units": 16, "ffn_units": 16, "num_layers": 1, "num_heads": 1, "batch_size": 16, "log_every": 5}


@pytest.fixture
def recipes(monkeypatch):
    """Two recipes that need seconds: one learns, the other has a learning rate of nearly nothing."""
    learns = Recipe("one that learns", "d2l", {**SMALL, "lr": 0.01, "preparation": "bert"})
    both = {"learns": learns, "stays": learns.but("one that stays", lr=1e-9, dropout=0.0)}
    monkeypatch.setattr(compare_recipes, "RECIPES", both)
    # Steps instead of minutes, so that results do not depend on the machine.
    limited = ["--eval-every", "15", "--max-minutes", "0", "--num-steps", "30"]
    monkeypatch.setattr(compare_recipes, "flags_of", lambda *given: [*flags_of(*given), *limited])
    return both


def compare(*flags):
    return compare_recipes.main([str(each) for each in flags])


@pytest.mark.slow
def test_compare_evaluates_all_recipes_on_one_text(recipes, text_file, tmp_path, capsys, monkeypatch):
    flags = ["--corpus", text_file, "--minutes", 0.05, "--seeds", "0,1", "--output", tmp_path / "out"]
    assert compare(*flags) == 0
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert [(run["recipe"], run["seed"]) for run in results["runs"]] == [
        ("learns", 0),
        ("stays", 0),
        ("learns", 1),
        ("stays", 1),
    ]
    for run in results["runs"]:
        minutes, losses = zip(*run["curve"])
        assert len(minutes) == 2 and 0 < minutes[0] < minutes[1]
        assert (run["steps"], run["pairs"]) == (30, 16 * 30)
        fell = losses[0] - losses[1]
        assert fell > 0.02 if run["recipe"] == "learns" else abs(fell) < 1e-5
    assert "| one that learns | 2 |" in shown and "| one that stays | 2 |" in shown
    assert (tmp_path / "out" / "learning.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(subprocess, "call", lambda *_, **__: pytest.fail("trained again"))
    assert compare(*flags) == 0
    assert capsys.readouterr().out == shown


def test_flags_keep_every_evaluation(recipes):
    flags = flags_of(Recipe("x", "bert-tiny", {"lowercase": False, "lr": 0.5}), minutes=3.0, seed=7)
    expected = "--preset bert-tiny --no-lowercase --lr 0.5 --eval-every 20 --max-minutes 3.0 --seed 7"
    assert " ".join(flags) == f"{expected} --keep-checkpoints 0"


def test_table_has_mean_and_range_over_seeds(recipes):
    runs = [
        RunResult("learns", seed, [(1.0, loss)], 10, 160, 0.25, 0.5) for seed, loss in ((0, 5.0), (1, 6.0))
    ]
    row = "| one that learns | 2 | 10 | 160 | 5.500 (5.000 to 6.000) | 25.0 % | 50.0 % |"
    assert table(runs).splitlines()[-1] == row


def test_compare_refuses_bad_flags(recipes, text_file, tmp_path, capsys):
    assert compare("--minutes", 0, "--recipes", "learns,x", "--seeds", "0,a", "--output", tmp_path) == 2
    printed = capsys.readouterr().err
    assert "--minutes must be above 0, got 0.0" in printed
    assert "--recipes must be some of learns, stays, got x" in printed
    assert "--seeds must be numbers with commas, such as 0,1,2, got 0,a" in printed

    (tmp_path / "learns-0.part").mkdir()
    assert compare("--corpus", text_file, "--output", tmp_path) == 2
    assert "learns-0.part belongs to a comparison that is running or was stopped" in capsys.readouterr().err
    assert compare("--corpus", tmp_path / "none", "--output", tmp_path / "new") == 2
    assert "training failed with exit status 2" in capsys.readouterr().err


def test_compare_refuses_another_vocabulary(recipes, text_file, tmp_path, capsys):
    recipes["learns"] = recipes["learns"].but("with rarer words", min_freq=400)
    flags = ["--corpus", text_file, "--minutes", 0.02, "--recipes", "learns", "--output", tmp_path / "out"]
    assert compare(*flags) == 2
    assert "vocabulary differs from that of the common examples" in capsys.readouterr().err


def test_compare_refuses_a_run_without_checkpoints(recipes, text_file, tmp_path, capsys):
    (tmp_path / "learns-0").mkdir()
    flags = ["--corpus", text_file, "--recipes", "learns", "--output", tmp_path]
    assert compare(*flags) == 2
    assert f"{tmp_path / 'learns-0'} must have at least one checkpoint. Remove it" in capsys.readouterr().err
