"""`gluon-bert` of an install without -e: help, a short run, and vectors, outside the checkout."""

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, small_text
from support.runs import SMALL_NETWORK

BUILT_FROM = ("gluon_bert", "tools", "packaging", "setup.py", "README.md")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gluon_bert(tmp_path_factory):
    """Run the command of an installed copy of the checkout; returns what it printed."""
    for name in ("pip", "setuptools", "wheel"):
        if not importlib.util.find_spec(name):
            pytest.skip(f"building the package needs {name}, which is not installed")
    folder = tmp_path_factory.mktemp("install")
    source, site = folder / "source", folder / "site"
    source.mkdir()
    for name in BUILT_FROM:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, "--target", site, "."], cwd=source, check=True)
    environment = {**os.environ, "PYTHONPATH": str(site), "GLUON_BERT_OPERATORS": "mxnet"}

    def run(*words):
        command = [sys.executable, site / "bin" / "gluon-bert", *words]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr
        return done.stdout

    (folder / "text.txt").write_text(small_text(), "utf-8")
    return run


def test_installed_help_names_its_own_command(gluon_bert):
    printed = gluon_bert("pretrain", "--help")
    assert printed.startswith("usage: gluon-bert pretrain [flags]")
    assert "gluon-bert pretrain --resume" in printed and "tools/" not in printed


def test_installed_command_pretrains_and_encodes(gluon_bert):
    network = [*SMALL_NETWORK, "--num-steps", "2"]
    gluon_bert("pretrain", *network, "--corpus", "text.txt", "--output", "run")
    assert "probability" in gluon_bert("encode", "run", "--next", "the crane lifts", "it passes")
