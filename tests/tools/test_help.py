"""--help of every command is fast: it imports neither MXNet nor another large library."""

import subprocess
import sys

import pytest
from conftest import ROOT

COMMANDS = [
    path.relative_to(ROOT / "tools").with_suffix("").as_posix().replace("/", ".")
    for path in [*sorted(ROOT.glob("tools/*.py")), *sorted(ROOT.glob("tools/dev/*.py"))]
    if "def main(" in path.read_text("utf-8") and path.stem != "serve"  # needs the exporter's names
]
BENCHMARKS = ["train", "encode", "prepare", "scale"]
CODE = """\
import importlib, sys
sys.path.insert(0, "tools")
for name in {commands}:
    module = importlib.import_module(name)
    for words in [[], *([each] for each in {benchmarks} if name == "benchmark")]:
        assert module.main([*words, "--help"]) == 0, name
    large = {{"mxnet", "torch", "matplotlib", "onnx"}} & set(sys.modules)
    assert not large, (name, large)
"""


def test_help_imports_no_large_library():
    assert {"pretrain", "launch", "benchmark", "dev.fuzz"} <= set(COMMANDS)
    code = CODE.format(commands=COMMANDS, benchmarks=BENCHMARKS)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_help_lists_own_flags(name, capsys):
    import benchmark

    assert benchmark.main([name, "--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: python tools/benchmark.py {name} ")
    assert ("--estimate" in printed) == (name == "scale")
