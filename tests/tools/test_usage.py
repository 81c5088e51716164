"""Promises about the flags of all commands."""

import importlib

import pytest
from conftest import ROOT

COMMANDS = sorted(
    path.stem for path in (ROOT / "tools").glob("*.py") if "\ndef main(argv" in path.read_text("utf-8")
)


@pytest.mark.parametrize("name", COMMANDS)
def test_command_shows_usage_and_refuses_unknown_flags(name, capsys):
    main = importlib.import_module(name).main
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: python tools/{name}.py ")
    assert main(["--no-such-flag"]) == 2
    assert f"usage: python tools/{name}.py " in capsys.readouterr().err
