"""The floors of the house: a file imports only from lower floors or its own folder."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "gluon_bert"
FLOORS = {
    "errors": 0,
    "fileio": 0,
    "npz": 0,
    "config": 0,
    "presets": 0,
    "system": 0,
    "runtime": 0,
    "numpy_compat": 0,
    "devices": 0,
    "ops": 0,
    "data": 1,
    "model": 1,
    "checkpoint": 2,
    "inference": 2,
    "run": 3,
    "conversion": 4,
    "warm_start": 4,
    "distributed": 4,
    "training": 5,
    "export": 5,
    "finetuning": 6,
    "serving": 6,
    "pretraining": 6,
    "cli": 7,
}
# Rooms that serve all others, and that may use each other.
SHARED_GROUND = {name for name, floor in FLOORS.items() if floor == 0}
RUN_FOLDER = {"checkpoint", "run"}
WITHOUT_MXNET = [
    "corpora.corpus",
    "corpora.text_file",
    "corpora.text_formats",
    "corpora.pydoc",
    "corpora.wikitext2",
    "process_pool",
    "document_arrays",
    "shards",
    "build_shards",
    "vocab",
    "sentence_pairs",
    "masking",
    "prepared",
    "tokenizer",
    "wordpiece",
    "batch",
]

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(path: Path):
    """The rooms of this package that a file imports from, wherever in the file it does."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            depth = len(path.relative_to(PACKAGE).parts)
            if node.level == depth or (node.level == 0 and (node.module or "").split(".")[0] == "gluon_bert"):
                parts = (node.module or "").replace("gluon_bert", "").strip(".").split(".")
                yield from [parts[0]] if parts[0] else [n.name for n in node.names if n.name != "__version__"]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("gluon_bert."):
                    yield alias.name.split(".")[1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_to_lower_floors_only(path):
    room = room_of(path)
    assert room in FLOORS, "a new room needs a floor"
    for other in imported_rooms(path):
        same_ground = {room, other} <= SHARED_GROUND or {room, other} <= RUN_FOLDER
        assert other == room or same_ground or FLOORS[other] < FLOORS[room], f"{room} imports {other}"


def test_imported_rooms_finds_imports():
    assert "data" in set(imported_rooms(PACKAGE / "training" / "trainer.py"))
    assert "runtime" in set(imported_rooms(PACKAGE / "model" / "bert.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_mxnet_and_argparse_have_one_importer(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    if room_of(path) not in ("runtime", "numpy_compat"):
        assert "mxnet" not in names
    if room_of(path) != "cli":
        assert "argparse" not in names
        assert "sys.exit" not in path.read_text("utf-8")


def test_data_imports_no_mxnet():
    code = """
import importlib, sys
for module in sys.argv[1:]:
    importlib.import_module(f"gluon_bert.data.{module}")
    if "mxnet" in sys.modules:
        sys.exit(f"gluon_bert.data.{module} imports MXNet")
"""
    command = [sys.executable, "-c", code, *WITHOUT_MXNET]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr


def imported_files(path: Path):
    """The files of this package that a file imports, also for types alone."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        yield from (folder / f"{alias.name}.py" for alias in node.names)
        yield folder.with_suffix(".py")


def test_files_import_each_other_in_no_circle():
    left = {path: set(imported_files(path)) & set(FILES) - {path} for path in FILES}
    while True:
        free = [path for path, needed in left.items() if not needed & left.keys()]
        if not free:
            break
        for path in free:
            del left[path]
    assert not [str(path.relative_to(PACKAGE)) for path in left]


def test_every_file_begins_with_a_docstring():
    for path in [*FILES, *ROOT.glob("tools/*.py"), *ROOT.glob("tests/*.py"), ROOT / "setup.py"]:
        if path.read_text("utf-8").strip():
            assert ast.get_docstring(ast.parse(path.read_text("utf-8"))), path


def test_no_file_is_named_utils():
    assert not [path for path in FILES if path.stem in ("utils", "util", "constants", "helpers", "common")]
