"""Builds the library of compiled operators, once for each machine and version, into the user's cache."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from ..runtime import mx

SOURCES = Path(__file__).with_name("native")
# No -ffast-math: it takes NaN for impossible, and linked with it the process rounds small numbers to zero.
FLAGS = (
    *("-shared", "-fPIC", "-std=c++17", "-O3", "-march=native", "-fopenmp"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"),
)
# Keeps the library's C++ symbols to itself: the loader would take those of a library that is there before, as
# Horovod's, which may have the same templates, compiled differently.
EXPORTS = SOURCES / "exports.map"
# A compiler that takes longer is taken for one that hangs.
MOST_SECONDS = 600

log = logging.getLogger(__name__)


class BuildError(Exception):
    """Why there can be no library here, in a phrase."""


def built_library() -> Path:
    """The library's file, built now if it is not in the cache; raises BuildError."""
    compiler = _compiler()
    header, source = _interface()
    folder = Path(mx.base.data_dir(), "gluon_bert", "operators").absolute()
    path = folder / f"{_key(compiler, header, source)}.so"
    if not path.is_file():
        log.info("compiling operators for this processor, once: half a minute")
        _build(compiler, header, source, path)
    return path


def _compiler() -> str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise BuildError(f"there is no C++ compiler ({' or '.join(names)})")
    return found


def _interface() -> tuple[Path, Path]:
    """The header and the source of MXNet's interface for operators from outside, which its wheel brings."""
    package = Path(mx.__file__).parent
    header, source = package / "include" / "mxnet" / "lib_api.h", package / "src" / "lib_api.cc"
    if not (header.is_file() and source.is_file()):
        raise BuildError(f"this MXNet has no {header.name} and {source.name}")
    return header, source


def _key(compiler: str, header: Path, source: Path) -> str:
    """What tells libraries apart: the sources, the compiler and its flags, MXNet, the processor."""
    content = hashlib.sha256()
    for path in sorted([*SOURCES.iterdir(), header, source]):
        content.update(path.read_bytes())
    for fact in (*FLAGS, _version(compiler), mx.__version__, _processor()):
        content.update(fact.encode())
    return content.hexdigest()[:20]


def _version(compiler: str) -> str:
    try:
        return subprocess.run([compiler, "--version"], stdout=subprocess.PIPE, timeout=60).stdout.decode()
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{compiler} does not run ({error})") from error


def _processor() -> str:
    """What -march=native depends on: the model and its instructions, whose order may change."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # no Linux
        return f"{platform.machine()} {platform.processor()}"
    lines = re.findall(r"^(?:model name|flags|Features|CPU part)\s*:(.*)$", text, re.M)
    return f"{platform.machine()} {sorted({word for line in lines for word in line.split()})}"


def _build(compiler: str, header: Path, source: Path, path: Path) -> None:
    """Compile into a folder beside the library, which takes its name when it is whole."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent, prefix=".") as folder:
            library = Path(folder, path.name)
            sources = [str(SOURCES / "register.cc"), str(source)]
            flags = [*FLAGS, f"-Wl,--version-script={EXPORTS}", f"-I{header.parent.parent}"]
            command = [compiler, *flags, "-o", str(library), *sources]
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=MOST_SECONDS
            )
            if done.returncode:
                raise BuildError(f"{compiler} fails: {_first_error(done.stdout.decode(errors='replace'))}")
            with library.open("rb") as file:
                os.fsync(file.fileno())  # a library that is cut short would be kept
            library.replace(path)
    except subprocess.TimeoutExpired:
        raise BuildError(f"{compiler} has not ended after {MOST_SECONDS} seconds") from None
    except OSError as error:
        raise BuildError(f"{path.parent} cannot be written ({error.strerror or error})") from error


def _first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "it says nothing")
