"""What the README says works."""

import re
import shlex

import pretrain
import pytest
from conftest import ROOT

from gluon_bert.config import PRESETS

README = (ROOT / "README.md").read_text("utf-8")
COMMANDS = [line.strip() for line in README.splitlines() if line.startswith("    python tools/pretrain.py")]


def test_the_walk_through_runs(text_file, tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    small = code.replace(
        'corpus=["wikitext-2"], num_steps=50', f'corpus=["{text_file}"], num_steps=2, batch_size=16'
    )
    assert small != code
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(small, names)
    assert (names["single"].shape, names["pair"].shape) == ((1, 6, 128), (1, 10, 128))
    assert abs(names["single"][0, 2] - names["pair"][0, 2]).max().asscalar() > 1e-3
    assert "(1, 6, 128) (1, 10, 128)" in capsys.readouterr().out
    assert (tmp_path / "my_run" / "losses.png").exists()
    assert names["gb"].load_run("my_run").step == 50


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_have_flags_that_exist(command, capsys):
    arguments = shlex.split(command)[2:]
    if "--help" in arguments:
        assert pretrain.main(arguments) == 0
    else:
        pretrain.config_from(pretrain.parser().parse_args(arguments), pretrain.preset("d2l"))


def test_the_commands_were_found():
    assert len(COMMANDS) >= 7


def test_presets_files_and_pictures_that_are_named_exist():
    for name in PRESETS:
        assert f"| `{name}` |" in README
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_of_presets_is_true(name):
    config = PRESETS[name]
    row = next(line for line in README.splitlines() if line.startswith(f"| `{name}` |"))
    figures = [cell.strip() for cell in row.split("|")[2:8]]
    assert figures == [
        str(config.model.num_layers),
        str(config.model.units),
        str(config.model.num_heads),
        str(config.data.max_len),
        str(config.train.batch_size),
        f"{config.train.lr:.4f}".rstrip("0"),
    ]
