"""Compiles the library of operators into the user's cache, once for each machine and version."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from ..fileio import temporary_folder
from ..runtime import mx

SOURCES = Path(__file__).with_name("native")
# Without -ffast-math: it assumes that NaN cannot occur, and it makes the whole process flush small numbers to
# zero.
FLAGS = (
    *("-shared", "-fPIC", "-std=c++17", "-O3", "-march=native", "-fopenmp"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"),
)
# Hides the library's C++ symbols. Otherwise the loader could bind them to those of an earlier library, such
# as Horovod's, which may have the same templates, compiled differently.
EXPORTS = SOURCES / "exports.map"
# A compiler that takes longer is considered to hang.
TIMEOUT_SECONDS = 600

log = logging.getLogger(__name__)


class BuildError(Exception):
    """The reason why the library cannot be built, in a phrase."""


def built_library() -> Path:
    """Return the library's file; build it if the cache lacks it. Raise BuildError if that fails."""
    compiler = find_compiler()
    header, source = _interface()
    folder = Path(mx.base.data_dir(), "gluon_bert", "operators").absolute()
    path = folder / f"{_key(compiler, header, source)}.so"
    if not path.is_file():
        log.info("compiling the operators for this processor (once, about half a minute)")
        _build(compiler, header, source, path)
    return path


def find_compiler() -> str:
    """Return the path of a C++ compiler. Raise BuildError if there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise BuildError(f"no C++ compiler was found ({' or '.join(names)})")
    return found


def _interface() -> tuple[Path, Path]:
    """Return the header and the source of MXNet's interface for external operators, from its wheel."""
    package = Path(mx.__file__).parent
    header, source = package / "include" / "mxnet" / "lib_api.h", package / "src" / "lib_api.cc"
    if not (header.is_file() and source.is_file()):
        raise BuildError(f"this MXNet lacks {header.name} or {source.name}")
    return header, source


def _key(compiler: str, header: Path, source: Path) -> str:
    """Return a hash of all that the library depends on: sources, compiler and flags, MXNet, processor."""
    content = hashlib.sha256()
    for path in sorted([*SOURCES.iterdir(), header, source]):
        content.update(path.read_bytes())
    for item in (*FLAGS, _version(compiler), mx.__version__, _processor()):
        content.update(item.encode())
    return content.hexdigest()[:20]


def _version(compiler: str) -> str:
    try:
        return subprocess.run([compiler, "--version"], stdout=subprocess.PIPE, timeout=60).stdout.decode()
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{compiler} cannot be run ({error})") from error


def _processor() -> str:
    """Return what -march=native depends on: the processor's model and its instructions, sorted."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return f"{platform.machine()} {platform.processor()}"
    lines = re.findall(r"^(?:model name|flags|Features|CPU part)\s*:(.*)$", text, re.M)
    return f"{platform.machine()} {sorted({word for line in lines for word in line.split()})}"


def _build(compiler: str, header: Path, source: Path, path: Path) -> None:
    """Compile in a temporary folder beside the library's place, and move the finished library there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(path) as folder:
            library = folder / path.name
            sources = [str(SOURCES / "register.cc"), str(source)]
            flags = [*FLAGS, f"-Wl,--version-script={EXPORTS}", f"-I{header.parent.parent}"]
            command = [compiler, *flags, "-o", str(library), *sources]
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=TIMEOUT_SECONDS
            )
            if done.returncode:
                raise BuildError(f"{compiler} fails: {_first_error(done.stdout.decode(errors='replace'))}")
            with library.open("rb") as file:
                os.fsync(file.fileno())  # otherwise a power failure could leave a truncated library
            library.replace(path)
    except subprocess.TimeoutExpired:
        raise BuildError(f"{compiler} did not finish within {TIMEOUT_SECONDS} seconds") from None
    except OSError as error:
        raise BuildError(f"{path.parent} is not writable ({error.strerror or error})") from error


def _first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no output")
