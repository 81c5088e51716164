"""Import MXNet after checking the installation.

Every file of the project gets MXNet by `from gluon_bert.runtime import mx`, which imports it. The rest of
this file works without MXNet.
"""

from __future__ import annotations

import csv
import ctypes
import importlib
import importlib.util
import logging
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Mapping, NamedTuple, Sequence

import numpy

from . import __version__, numpy_compat
from .errors import InputError, join_words
from .system import usable_cores

if TYPE_CHECKING:
    pass

INSTALL_CPU = "pip install -e '.[cpu]'"
INSTALL_CUDA = "pip install -e '.[cu112]'"
CUDA_WHEEL = "mxnet-cu112"

NVRTC = "libnvrtc.so.11.2"
# Libraries that the CUDA wheel's libmxnet.so needs, and the packages that contain them. Each comes after its
# own dependencies, because the loader uses loaded libraries before it searches folders.
CUDA_LIBRARIES = {
    "libcudart.so.11.0": "nvidia-cuda-runtime-cu11",
    NVRTC: "nvidia-cuda-nvrtc-cu11",
    "libnvToolsExt.so.1": "nvidia-nvtx-cu11",
    "libcublasLt.so.11": "nvidia-cublas-cu11",
    "libcublas.so.11": "nvidia-cublas-cu11",
    "libcufft.so.10": "nvidia-cufft-cu11",
    "libcurand.so.10": "nvidia-curand-cu11",
    "libcusolver.so.11": "nvidia-cusolver-cu11",
    "libcudnn.so.8": "nvidia-cudnn-cu11",
    "libnccl.so.2": "nvidia-nccl-cu11",
}
DRIVER = "libcuda.so.1"


def __getattr__(name: str) -> Any:
    if name == "mx":
        return import_mxnet()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def import_mxnet() -> Any:
    """Import MXNet after checking the installation, and return the module.

    Raise InputError, with a remedy, if something is missing or does not fit.
    """
    if "mx" not in globals():
        wheels = installed_wheels()
        if wheels or not is_mxnet_importable():
            check_platform(platform.system(), platform.machine())
        wheel = the_only_wheel(wheels)
        check_distutils()
        # By default MXNet uses half the cores, because it assumes hyper-threads.
        os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))
        # Silences a message about the CPU library for every bound graph.
        os.environ.setdefault("MXNET_SUBGRAPH_VERBOSE", "0")
        if wheel is not None and wheel.name == CUDA_WHEEL:
            # Memory is shared among arrays of one size. By default a float16 array takes that of a larger
            # one.
            os.environ.setdefault("NNVM_EXEC_MATCH_RANGE", "1")
            driver = load_driver()
            load_cuda_libraries(cuda_folders(sys.path))
            disable_fusion_for_old_driver(driver, ctypes.CDLL(NVRTC))
        globals()["mx"] = numpy_compat.import_mxnet()
    return globals()["mx"]


class Wheel(NamedTuple):
    """An installed wheel with MXNet's native library, as its RECORD describes it."""

    name: str  # mxnet, mxnet-cu112, ...
    version: str
    library: Path  # where its libmxnet.so belongs
    size: int  # of the library that it brought, in bytes

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def installed_wheels(path: Sequence[str] | None = None) -> list[Wheel]:
    """Return the wheels of MXNet in the first folder of `path` (default: sys.path) that has any, by name.

    Two wheels in one folder overwrite each other; one in a later folder is only hidden, which is harmless.
    """
    for folder in sys.path if path is None else path:
        described = (describe_wheel(info) for info in sorted(Path(folder).glob("mxnet*.dist-info")))
        wheels = [wheel for wheel in described if wheel is not None]
        if wheels:
            return wheels
    return []


def describe_wheel(info: Path) -> Wheel | None:
    """Return the wheel of a .dist-info folder, or None without a libmxnet (as mxnet-model-server)."""
    wheel = metadata.PathDistribution(info)
    # Not wheel.files: from Python 3.12 on it leaves out missing files, which this check looks for.
    for name, _, size in csv.reader((wheel.read_text("RECORD") or "").splitlines()):
        if name.startswith("mxnet/libmxnet."):
            library = Path(str(wheel.locate_file(name)))
            return Wheel(wheel.metadata["Name"].lower().replace("_", "-"), wheel.version, library, int(size))
    return None


def the_only_wheel(wheels: Sequence[Wheel]) -> Wheel | None:
    """Return the installed wheel after checking it, None for an MXNet without a wheel.

    Raise InputError if MXNet is missing; if two wheels share the folder `mxnet/`, where the second
    overwrites the first; or if the library on disk is not from the wheel.
    """
    if len(wheels) > 1:
        both = join_words([str(wheel) for wheel in wheels])
        raise InputError(
            f"{both} overwrite each other in {wheels[0].library.parent}: "
            f"pip uninstall -y {' '.join(wheel.name for wheel in wheels)}, "
            f"then {INSTALL_CPU} or {INSTALL_CUDA}"
        )
    if not wheels:
        if not is_mxnet_importable():
            raise InputError(f"MXNet is not installed: {INSTALL_CPU}, or {INSTALL_CUDA} for NVIDIA GPUs")
        return None
    (wheel,) = wheels
    found = wheel.library.stat().st_size if wheel.library.exists() else None
    # The size tells the wheels apart (154 MB and 891 MB); a hash would take seconds.
    if found != wheel.size:
        what = "is gone" if found is None else f"has {found:,} bytes instead of {wheel.size:,}"
        install = INSTALL_CUDA if wheel.name == CUDA_WHEEL else INSTALL_CPU
        raise InputError(
            f"{wheel.library} of {wheel} {what}, as after the removal of a second wheel of MXNet: "
            f"pip uninstall -y {wheel.name}, then {install}"
        )
    return wheel


def is_mxnet_importable() -> bool:
    """Return whether there is a module mxnet."""
    spec = importlib.util.find_spec("mxnet")
    # Without an origin it is only a folder of that name, as a removed MXNet can leave behind.
    return spec is not None and spec.origin is not None


def check_platform(system: str, machine: str) -> None:
    """Raise InputError if no wheel of MXNet 1.9.1 loads; an MXNet built from source is not checked."""
    arm = machine.lower() in ("aarch64", "arm64")
    if system == "Linux" and arm:
        remedy = "MXNet's wheel for Linux on ARM lacks libarmpl_lp64_mp.so; use an x86-64 machine"
    elif system == "Darwin" and arm:
        remedy = "MXNet has no wheel for macOS on ARM; use an x86-64 Python under Rosetta 2"
    elif system == "Windows":
        remedy = "MXNet has no wheel for Windows; use Linux, for instance WSL 2"
    elif system not in ("Linux", "Darwin") or machine.lower() not in ("x86_64", "amd64"):
        remedy = "MXNet has no wheel for this platform; build MXNet 1.9.1 from source"
    else:
        return
    raise InputError(f"the platform must be Linux or macOS on x86-64, got {system} on {machine}: {remedy}")


def check_distutils() -> None:
    """Raise InputError if `distutils`, which MXNet imports and Python 3.12 left to setuptools, is missing."""
    try:
        importlib.import_module("distutils.version")
    except ImportError as error:
        raise InputError(
            f"MXNet needs distutils, which on Python {platform.python_version()} comes with setuptools: "
            "pip install setuptools"
        ) from error


def load_driver(library: str = DRIVER) -> ctypes.CDLL:
    """Load the NVIDIA driver's library. Raise InputError if this machine has none."""
    try:
        return ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise InputError(
            f"{CUDA_WHEEL} needs an NVIDIA driver ({error}): install the driver, "
            f"or for the CPU pip uninstall -y {CUDA_WHEEL}, then {INSTALL_CPU}"
        ) from error


def cuda_folders(path: Sequence[str]) -> list[Path]:
    """Return the folders of the libraries in nvidia-* wheels: `nvidia/*/lib` under `path`."""
    return [lib for folder in path for lib in sorted(Path(folder).glob("nvidia/*/lib"))]


def load_cuda_libraries(folders: Sequence[Path], libraries: Mapping[str, str] = CUDA_LIBRARIES) -> None:
    """Loads the libraries (soname -> package), from `folders` or else from where the system finds them.

    After that libmxnet.so finds them by name, without LD_LIBRARY_PATH. Raise InputError that names all that
    are missing.
    """
    errors = {}
    for soname, package in libraries.items():
        file = next((str(folder / soname) for folder in folders if (folder / soname).exists()), soname)
        try:
            ctypes.CDLL(file, mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            errors[f"{soname} ({package})"] = error
    if errors:
        first = next(iter(errors.values()))
        raise InputError(
            f"{CUDA_WHEEL} needs {join_words(list(errors))}, and the loader says: {first}; {INSTALL_CUDA}"
        ) from first


def disable_fusion_for_old_driver(driver: ctypes.CDLL, nvrtc: ctypes.CDLL) -> None:
    """Set MXNET_USE_FUSION=0 where the driver is older than the compiler of fused kernels.

    MXNet compiles fused kernels to PTX with NVRTC. A driver loads PTX of its own CUDA version or older, also
    where it runs all other code of CUDA 11. An MXNET_USE_FUSION that is set already stays.
    """
    version, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) or nvrtc.nvrtcVersion(
        ctypes.byref(major), ctypes.byref(minor)
    ):
        return  # the first use of a GPU reports what is wrong
    needed = 1000 * major.value + 10 * minor.value
    if version.value >= needed or "MXNET_USE_FUSION" in os.environ:
        return
    os.environ["MXNET_USE_FUSION"] = "0"
    logging.getLogger(__name__).warning(
        "MXNet runs without fused kernels: they need a driver for CUDA %d.%d, and this one is for %d.%d",
        major.value,
        minor.value,
        version.value // 1000,
        version.value % 1000 // 10,
    )


def has_cuda_wheel() -> bool:
    """Return whether MXNet comes from the wheel of the cu112 extra."""
    return any(wheel.name == CUDA_WHEEL for wheel in installed_wheels())


def versions() -> dict[str, str]:
    """Return the versions of packages (mxnet with the wheel's name), the platform, MXNet's threads.

    The number of threads belongs to it since MXNet draws dropout thread by thread.
    """
    return {
        "gluon_bert": __version__,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "mxnet": " and ".join(map(str, installed_wheels())) or "not from a wheel",
        "platform": platform.platform(),
        "sentencex": metadata.version("sentencex"),
        "threads": os.environ.get("OMP_NUM_THREADS", "not set"),
    }
