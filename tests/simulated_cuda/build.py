"""Builds the simulated CUDA libraries for one libmxnet.so. Runs no test.

The sources in cuda/ define most of what libmxnet.so needs. Every other symbol becomes a stub that reports its
name and fails.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).parent / "cuda"
COMPILE = ["gcc", "-std=gnu11", "-O1", "-fPIC", "-Wall", "-Wextra", f"-I{SOURCES}", "-c"]


class Library(NamedTuple):
    """One library: its source, options to compile it, a pattern of its symbols, and the error of a stub."""

    source: str | None
    options: tuple[str, ...]
    symbols: str
    stub_error: int


# cudart comes first, because the others link to it.
LIBRARIES = {
    "libcudart.so.11.0": Library("cudart.c", (), "(__)?cuda[A-Z]", 801),
    "libcuda.so.1": Library("driver.c", (), "cu[A-Z]", 801),
    "libnvrtc.so.11.2": Library("nvrtc.c", (), "nvrtc", 11),
    "libcublasLt.so.11": Library(None, (), "cublasLt", 15),
    "libcublas.so.11": Library("cublas.c", (), "cublas[A-Z]", 15),
    "libcufft.so.10": Library(None, (), "cufft", 16),
    "libcurand.so.10": Library("curand.c", (), "curand", 999),
    "libcusolver.so.11": Library("others.c", ("-DCUSOLVER",), "cusolver", 9),
    "libcudnn.so.8": Library("cudnn.c", (), "cudnn", 9),
    "libnccl.so.2": Library(None, (), "nccl", 3),
    "libnvToolsExt.so.1": Library("others.c", ("-DNVTX",), "nvtx", 0),
}


def build(libmxnet: Path, folder: Path) -> None:
    """Compile all libraries into the folder. It takes about 2 seconds."""
    folder.mkdir(parents=True)
    needed = _symbols("-D", "--undefined-only", libmxnet)
    for name, library in LIBRARIES.items():
        symbols = [symbol for symbol in needed if re.match(library.symbols, symbol)]
        _build_library(name, library, symbols, folder)


def _build_library(name: str, library: Library, needed: list[str], folder: Path) -> None:
    """Compile one library. `needed` are the symbols that it must have, some with a version behind an @."""
    objects, defined = [], set()
    if library.source:
        objects.append(folder / f"{name}.o")
        _run([*COMPILE, *library.options, SOURCES / library.source, "-o", objects[0]])
        defined = set(_symbols("--defined-only", objects[0]))
    missing = sorted({symbol.split("@")[0] for symbol in needed} - defined)
    stubs = folder / f"{name}.stubs.c"
    stubs.write_text(
        '#include "gpusim.h"\n'
        + "".join(
            f'int {symbol}(void) {{ return gpusim_missing("{symbol}", {library.stub_error}); }}\n'
            for symbol in missing
        )
    )
    objects.append(stubs.with_suffix(".o"))
    _run([*COMPILE, stubs, "-o", objects[-1]])
    link = [
        "gcc",
        "-shared",
        f"-Wl,-soname,{name}",
        *objects,
        "-o",
        folder / name,
        "-lpthread",
        "-ldl",
        "-lm",
    ]
    versions = {symbol.split("@")[-1] for symbol in needed if "@" in symbol}
    if versions:
        script = folder / f"{name}.map"
        script.write_text("".join(f"{version} {{ global: *; }};\n" for version in versions))
        link.append(f"-Wl,--version-script={script}")
    if name != "libcudart.so.11.0":
        link += ["-Wl,--no-as-needed", folder / "libcudart.so.11.0", "-Wl,-rpath,$ORIGIN"]
    _run(link)


def _symbols(*command: str | Path) -> list[str]:
    """The last column of what `nm` prints: names, with @ and a version where there is one."""
    return [line.split()[-1] for line in _run(["nm", *command]).splitlines()]


def _run(command: list[str | Path]) -> str:
    """What a command prints. Fails where the command fails."""
    return subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True).stdout
