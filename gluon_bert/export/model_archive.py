"""Packs a run as a model archive, the .mar of multi-model-server."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory

from ..errors import InputError
from ..fileio import atomic_folder, check_new_folder, check_utf8_path
from ..run import Run
from .exporter import export_mxnet
from .manifest import MANIFEST, Manifest

MODEL, ARCHIVE = "bert", "bert.mar"
INSTALL_SERVE = "pip install -e '.[cpu,serve]'"

# The copy of this package in the archive, which the server puts on the path of its workers.
HANDLER = "gluon_bert.serving.handler:handle"
# Errors of forged archives: encryption, unknown compression, JSON of another shape.
_UNREADABLE = (ValueError, KeyError, TypeError, RuntimeError, NotImplementedError, RecursionError)
_PACKAGE = Path(__file__).resolve().parent.parent


def export_archive(run: Run, folder: Path, outputs: str = "all") -> Path:
    """Write a run as `bert.mar` into a new folder; return the file.

    It holds the files of `export_mxnet` and a copy of this package. Raise InputError and write nothing if the
    folder is not empty, the extra `serve` is missing, or the export differs from the run.
    """
    check_archiver()
    check_new_folder(folder)
    check_utf8_path(folder)
    with atomic_folder(folder) as aside, TemporaryDirectory(dir=aside) as content:
        export_mxnet(run, Path(content, "export"), outputs)
        pack(Path(content, "export"), aside)
    return folder / ARCHIVE


def pack(export: Path, folder: Path) -> Path:
    """Write the archive of an export of `export_mxnet` into an existing folder; return the file."""
    check_archiver()
    manifest = Manifest.load(export)
    if manifest.format != "mxnet":
        raise InputError(
            f"{export} must be an export with format=mar or format=mxnet, got {manifest.format}."
        )
    with TemporaryDirectory(dir=folder) as content:
        for name in (MANIFEST, *manifest.files):
            shutil.copy(export / name, content)
        shutil.copytree(
            _PACKAGE, Path(content, _PACKAGE.name), ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
        )
        _archive(Path(content), folder)
    return folder / ARCHIVE


def check_archive(path: Path) -> None:
    """Raise InputError unless a file is a whole archive of `pack` that can be served here."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            handler = json.loads(archive.read("MAR-INF/MANIFEST.json"))["model"]["handler"]
            tokenizer = json.loads(archive.read(MANIFEST))["tokenizer"]["kind"] if handler == HANDLER else ""
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, *_UNREADABLE) as error:
        raise InputError(
            f"{path}: cannot be read as a model archive ({type(error).__name__}: {error}); export the run "
            "again"
        ) from error
    if damaged:
        raise InputError(f"{path}: is damaged ({damaged}); export the run again")
    if handler != HANDLER:
        raise InputError(f"{path}: is not an archive of this package: its handler is {handler}")
    if tokenizer == "wordpiece" and importlib.util.find_spec("tokenizers") is None:
        raise InputError(
            f"{path}: its network reads word pieces, for which tokenizers is not installed: "
            "pip install -e '.[cpu,serve,wordpiece]'"
        )


def check_archiver() -> None:
    """Raise InputError if the extra `serve` is not installed."""
    if importlib.util.find_spec("model_archiver") is None:
        raise InputError(f"model-archiver is not installed: {INSTALL_SERVE}")


def _archive(content: Path, folder: Path) -> None:
    """Make bert.mar from a folder's content, by model-archiver's command."""
    command = [
        *(sys.executable, "-m", "model_archiver.model_packaging"),
        *("--model-name", MODEL, "--model-path", str(content), "--export-path", str(folder)),
        # The runtime "python" is the interpreter that the server was started with.
        *("--handler", HANDLER, "--runtime", "python"),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
    if done.returncode or not (folder / ARCHIVE).is_file():
        raise OSError(f"model-archiver failed: {done.stdout.strip()}")
