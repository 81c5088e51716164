"""Choose contexts and check GPUs."""

from __future__ import annotations

import ctypes
import re
from typing import Any, Sequence

from . import runtime
from .errors import InputError, join_words


def parse_gpus(text: str) -> list[int]:
    """Return the GPU numbers in a text: "0,1" -> [0, 1]. Raise InputError for other texts."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise InputError(f"gpus must be numbers separated by commas, such as 0 or 0,1, got {text!r}.")
    numbers = [int(part) for part in parts]
    check_distinct_gpus(numbers)
    return numbers


def parse_contexts(names: Sequence[str]) -> tuple[list[int] | None, int | None]:
    """Return the arguments of `contexts` for the contexts that a run recorded. Raise InputError for others.

    >>> parse_contexts(["cpu(0)", "cpu(1)"]), parse_contexts(["gpu(3)"])
    ((None, 2), ([3], None))
    """
    found = [re.fullmatch(r"([cg]pu)\(([0-9]{1,4})\)", str(name)) for name in names]
    kinds = {match[1] for match in found if match}
    if not all(found) or len(kinds) != 1:
        raise InputError(
            f"the run was trained on unknown contexts, {names!r}. Choose devices with gpus=N or cpus=N."
        )
    return ([int(match[2]) for match in found if match], None) if kinds == {"gpu"} else (None, len(names))


def contexts(gpus: Sequence[int] | None = None, cpus: int | None = None) -> list[Any]:
    """Return the contexts to train on: the named GPUs, or `cpus` CPU contexts, or all GPUs, or one CPU.

    Named GPUs never fall back to the CPU. Raise InputError for a GPU that does not exist, is named twice, or
    cannot run this MXNet.
    """
    if gpus is not None and cpus is not None:
        raise InputError(f"gpus must be omitted with cpus={cpus}.")
    mx = runtime.import_mxnet()
    if cpus is not None:
        if cpus < 1:
            raise InputError(f"cpus must be at least 1, got {cpus}.")
        return [mx.cpu(number) for number in range(cpus)]
    # Counted first, because mx.gpu(0) fails only when it is used.
    count = gpu_count()
    capabilities = compute_capabilities(runtime.load_driver()) if runtime.has_cuda_wheel() else []
    check_driver(count, capabilities)
    if gpus is None:
        gpus = range(count)
    else:
        check_gpus_exist(gpus, count)
    if not gpus:
        return [mx.cpu(0)]
    check_gpu_architecture(gpus, capabilities)
    return [mx.gpu(number) for number in gpus]


def gpu_count() -> int:
    """Return the number of GPUs that MXNet sees. Raise InputError if CUDA fails."""
    mx = runtime.import_mxnet()
    try:
        return int(mx.context.num_gpus())
    except mx.MXNetError as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(
            f"CUDA cannot count the GPUs ({reason}). Check that nvidia-smi works, or use cpus=1."
        ) from error


def check_driver(count: int, capabilities: Sequence[tuple[int, int]]) -> None:
    """Raise InputError if the driver has GPUs but MXNet sees none.

    MXNet takes the error "driver too old" for "no GPU", and would silently train on the CPU.
    """
    if capabilities and not count:
        raise InputError(
            f"the NVIDIA driver lists {listed(range(len(capabilities)))} but is too old for CUDA 11. "
            "Install version 450.80.02 or later, or use cpus=1."
        )


def check_distinct_gpus(gpus: Sequence[int]) -> None:
    """Raise InputError if a GPU is named twice."""
    repeated = sorted({number for number in gpus if list(gpus).count(number) > 1})
    if repeated:
        raise InputError(f"gpus must be distinct, got {format_gpu_ids(gpus)}.")


def check_gpus_exist(gpus: Sequence[int], count: int) -> None:
    """Raise InputError, which lists the GPUs there are, unless `gpus` are numbers below `count`."""
    if not gpus:
        raise InputError("gpus must have at least one number, such as 0 or 0,1.")
    check_distinct_gpus(gpus)
    if count and not all(0 <= number < count for number in gpus):
        raise InputError(
            f"gpus must be among {listed(range(count))} of this machine, got {format_gpu_ids(gpus)}."
        )
    if not count and not built_with_cuda():
        wheel = runtime.the_only_wheel(runtime.installed_wheels())
        raise InputError(
            f"gpus={format_gpu_ids(gpus)} needs an MXNet with CUDA, got "
            f"{wheel or 'one that is not from a wheel'}. Run pip uninstall -y "
            f"{wheel.name if wheel else 'mxnet'}, then {runtime.INSTALL_CUDA}, or use cpus=1."
        )
    if not count:
        raise InputError(
            f"gpus={format_gpu_ids(gpus)} needs a GPU, and MXNet sees none. Check that nvidia-smi lists one "
            "and that CUDA_VISIBLE_DEVICES does not hide it, or use cpus=1."
        )


def built_with_cuda() -> bool:
    """Return whether this MXNet can use GPUs."""
    return bool(runtime.import_mxnet().runtime.Features().is_enabled("CUDA"))


def check_gpu_architecture(gpus: Sequence[int], capabilities: Sequence[tuple[int, int]]) -> None:
    """Raise InputError if one of `gpus` cannot run the kernels of the CUDA wheel.

    `capabilities[number]` is the compute capability of GPU `number`. The wheel holds machine code for 5.0,
    6.0, 7.0, 8.0 and 8.6 and no PTX that the driver could translate: each serves the later minor versions of
    its major version, and no other.
    """
    foreign = {
        number: f"{major}.{minor}"
        for number, (major, minor) in enumerate(capabilities)
        if number in gpus and not 5 <= major <= 8
    }
    if foreign:
        rest = [number for number in gpus if number not in foreign]
        raise InputError(
            f"{listed(list(foreign))} cannot run {runtime.CUDA_WHEEL} (compute capability "
            f"{join_words(list(foreign.values()))}; it is built for 5.0 to 8.9, Maxwell to Ada). "
            + (f"Use gpus={format_gpu_ids(rest)}." if rest else "Use another GPU, or cpus=1.")
        )


def compute_capabilities(driver: ctypes.CDLL) -> list[tuple[int, int]]:
    """Return the compute capability (major, minor) of each GPU in CUDA_VISIBLE_DEVICES, in its order.

    It comes from the driver: MXNet's get_cuda_compute_capability needs a libcuda.so, which many machines
    lack.
    """
    count, device, value = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()

    def ask(function: str, *arguments: Any) -> None:
        code = driver[function](*arguments)
        if code:
            raise InputError(
                f"{function} of the NVIDIA driver failed with error {code}. Check that nvidia-smi works, or "
                "use cpus=1."
            )

    def attribute(which: int) -> int:
        ask("cuDeviceGetAttribute", ctypes.byref(value), which, device)
        return value.value

    if driver.cuInit(0) == 100:  # CUDA_ERROR_NO_DEVICE
        return []
    ask("cuInit", 0)
    ask("cuDeviceGetCount", ctypes.byref(count))
    capabilities = []
    for number in range(count.value):
        ask("cuDeviceGet", ctypes.byref(device), number)
        # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR in cuda.h
        capabilities.append((attribute(75), attribute(76)))
    return capabilities


def format_gpu_ids(gpus: Sequence[int]) -> str:
    """Return GPU numbers as a text: [0, 1] -> "0,1"; the inverse of parse_gpus."""
    return ",".join(map(str, gpus))


def listed(gpus: Sequence[int]) -> str:
    """Return GPU numbers for a sentence: [0] -> "GPU 0", [0, 1, 2] -> "GPUs 0, 1 and 2"."""
    return f"GPU{'s' if len(gpus) > 1 else ''} {join_words([str(number) for number in gpus])}"
