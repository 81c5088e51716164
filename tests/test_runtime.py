"""Importing MXNet: refused installations, messages, and contexts on the CPU."""

import os
import platform
import shutil
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path
from typing import Any, List, Optional, Tuple

import numpy
import pytest
from support.stub_libcuda import build_stub

from gluon_bert import __version__, devices, runtime, system
from gluon_bert.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
CPU_WHEEL = runtime.Wheel("mxnet", "1.9.1", Path("mxnet/libmxnet.so"), 5)


def run(code: str) -> "subprocess.CompletedProcess[str]":
    """Runs Python code in a fresh interpreter, where nothing has imported MXNet yet."""
    return subprocess.run([sys.executable, "-c", code], cwd=str(ROOT), capture_output=True, text=True)


def install(site: Path, name: str, version: str = "1.9.1", library: Optional[bytes] = b"12345") -> Path:
    """Lays down what pip would: a .dist-info, and mxnet/libmxnet.so (none for library=None)."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    rows = ["mxnet/__init__.py,sha256=x,0", f"{info.name}/RECORD,,"]
    if library is not None:
        (site / "mxnet").mkdir(exist_ok=True)
        (site / "mxnet" / "libmxnet.so").write_bytes(library)
        rows.insert(1, f"mxnet/libmxnet.so,sha256=x,{len(library)}")
    (info / "RECORD").write_text("\n".join(rows) + "\n")
    return site / "mxnet" / "libmxnet.so"


def one_sentence(refused: "pytest.ExceptionInfo[InputError]") -> str:
    text = str(refused.value)
    assert "\n" not in text
    return text


# The import


def test_import_of_runtime_imports_no_mxnet() -> None:
    code = "import sys, gluon_bert.runtime as r; print(bool(r.versions()), 'mxnet' in sys.modules)"
    assert run(code).stdout.strip() == "True False"


def test_mx_works_with_the_installed_numpy() -> None:
    done = run("from gluon_bert.runtime import mx; print(mx.nd.ones(3).sum().asscalar())")
    assert done.stdout.strip() == "3.0", done.stderr


def test_mx_is_imported_once() -> None:
    assert runtime.mx is runtime.mx is runtime.import_mxnet()


def test_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'mxx'"):
        runtime.mxx  # noqa: B018


def test_failed_check_is_raised_on_import_of_mx() -> None:
    done = run("import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p] + ['none']\n"
               "sys.modules['numpy'] = type(sys)('numpy'); sys.modules['numpy'].__version__ = '1.26.4'\n"
               "from gluon_bert.runtime import mx")  # fmt: skip
    assert "InputError: MXNet is not installed" in done.stderr


# The platform


@pytest.mark.parametrize(
    "system, machine, remedy",
    [
        ("Linux", "aarch64", "lacks libarmpl_lp64_mp.so"),
        ("Darwin", "arm64", "Rosetta 2"),
        ("Windows", "AMD64", "WSL 2"),
        ("Windows", "ARM64", "WSL 2"),
        ("Linux", "riscv64", "from source"),
        ("FreeBSD", "amd64", "from source"),
    ],
)
@pytest.mark.parametrize("installed", [True, False])
def test_platform_without_a_wheel_is_refused(
    system: str, machine: str, remedy: str, installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(runtime, "installed_wheels", lambda: [CPU_WHEEL] if installed else [])
    monkeypatch.setattr(runtime, "is_mxnet_importable", lambda: installed)
    monkeypatch.delitem(vars(runtime), "mx", raising=False)
    with pytest.raises(InputError, match=f"got {system} on {machine}: .*{remedy}") as refused:
        runtime.import_mxnet()
    one_sentence(refused)


@pytest.mark.parametrize("system, machine", [("Linux", "x86_64"), ("Darwin", "x86_64")])
def test_platform_with_a_wheel_is_accepted(system: str, machine: str) -> None:
    runtime.check_platform(system, machine)


def test_mxnet_from_source_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(runtime, "installed_wheels", list)
    monkeypatch.delitem(vars(runtime), "mx", raising=False)
    monkeypatch.setattr(runtime.numpy_compat, "import_mxnet", lambda: "an mxnet of one's own")
    assert runtime.import_mxnet() == "an mxnet of one's own"


# The wheels


def test_wheel_is_found_with_library_and_size(tmp_path: Path) -> None:
    library = install(tmp_path, "mxnet-cu112", "1.9.1", b"123")
    wheels = runtime.installed_wheels(["nowhere", str(tmp_path)])
    assert wheels == [runtime.Wheel("mxnet-cu112", "1.9.1", library, 3)]
    assert runtime.the_only_wheel(wheels) == wheels[0]
    assert str(wheels[0]) == "mxnet-cu112 1.9.1"


def test_package_with_a_similar_name_is_not_a_wheel(tmp_path: Path) -> None:
    install(tmp_path, "mxnet-model-server", "1.0", library=None)
    assert runtime.installed_wheels([str(tmp_path)]) == []


def test_wheel_in_a_later_folder_is_ignored(tmp_path: Path) -> None:
    for folder, name in ("first", "mxnet"), ("second", "mxnet-cu112"):
        install(tmp_path / folder, name)
    wheels = runtime.installed_wheels([str(tmp_path / "first"), str(tmp_path / "second")])
    assert [wheel.name for wheel in wheels] == ["mxnet"]


@pytest.mark.parametrize("other", ["mxnet-cu112", "mxnet_cu110", "mxnet-native"])
def test_two_wheels_in_one_folder_are_refused(tmp_path: Path, other: str) -> None:
    install(tmp_path, "mxnet")
    install(tmp_path, other, library=b"longer than the other")
    with pytest.raises(InputError, match="overwrite each other") as refused:
        runtime.the_only_wheel(runtime.installed_wheels([str(tmp_path)]))
    text = one_sentence(refused)
    other = other.replace("_", "-")
    assert text.startswith(f"mxnet 1.9.1 and {other} 1.9.1 ")
    assert f"pip uninstall -y mxnet {other}, then {runtime.INSTALL_CPU}" in text


@pytest.mark.parametrize(
    ("name", "remedy"), [("mxnet", runtime.INSTALL_CPU), ("mxnet-cu112", runtime.INSTALL_CUDA)]
)
def test_library_overwritten_by_a_wheel_is_refused(tmp_path: Path, name: str, remedy: str) -> None:
    install(tmp_path, name).write_bytes(b"of the other")
    with pytest.raises(InputError, match="has 12 bytes instead of 5") as refused:
        runtime.the_only_wheel(runtime.installed_wheels([str(tmp_path)]))
    assert one_sentence(refused).endswith(f"pip uninstall -y {name}, then {remedy}")


def test_library_removed_with_a_wheel_is_refused(tmp_path: Path) -> None:
    install(tmp_path, "mxnet-cu112")
    shutil.rmtree(str(tmp_path / "mxnet"))
    with pytest.raises(InputError, match=r"of mxnet-cu112 1\.9\.1 is gone") as refused:
        runtime.the_only_wheel(runtime.installed_wheels([str(tmp_path)]))
    assert "pip uninstall -y mxnet-cu112" in one_sentence(refused)


def test_missing_mxnet_names_both_installs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="not installed") as refused:
        runtime.the_only_wheel([])
    assert runtime.INSTALL_CPU in one_sentence(refused)
    assert runtime.INSTALL_CUDA in one_sentence(refused)


def test_empty_folder_mxnet_is_not_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mxnet").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "mxnet", raising=False)
    with pytest.raises(InputError, match="not installed"):
        runtime.the_only_wheel([])


def test_mxnet_without_a_wheel_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mxnet").mkdir()
    (tmp_path / "mxnet" / "__init__.py").write_text("")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "mxnet", raising=False)
    assert runtime.the_only_wheel([]) is None


# Distutils


def test_missing_distutils_names_setuptools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distutils", None)
    monkeypatch.delitem(sys.modules, "distutils.version", raising=False)
    with pytest.raises(InputError, match="pip install setuptools") as refused:
        runtime.check_distutils()
    assert platform.python_version() in one_sentence(refused)


# The CUDA wheel's libraries


def test_missing_driver_names_both_remedies() -> None:
    with pytest.raises(InputError, match="needs an NVIDIA driver") as refused:
        runtime.load_driver("libcuda-of-no-machine.so.1")
    text = one_sentence(refused)
    assert "libcuda-of-no-machine.so.1" in text
    assert "install the driver" in text
    assert runtime.INSTALL_CPU in text


def test_missing_cuda_libraries_name_their_packages(tmp_path: Path) -> None:
    libraries = {"libnone1.so.8": "nvidia-one-cu11", "libnone2.so.2": "nvidia-two-cu11"}
    with pytest.raises(InputError, match="needs") as refused:
        runtime.load_cuda_libraries([tmp_path], libraries)
    text = one_sentence(refused)
    assert "libnone1.so.8 (nvidia-one-cu11) and libnone2.so.2 (nvidia-two-cu11)" in text
    assert text.endswith(runtime.INSTALL_CUDA)


def test_damaged_cuda_library_shows_the_loader_error(tmp_path: Path) -> None:
    (tmp_path / "libdamaged.so.1").write_bytes(b"not a library")
    with pytest.raises(InputError, match="libdamaged") as refused:
        runtime.load_cuda_libraries([tmp_path], {"libdamaged.so.1": "nvidia-damaged-cu11"})
    assert "the loader says: " + str(tmp_path) in one_sentence(refused)


def test_cuda_libraries_come_from_wheel_folders(tmp_path: Path) -> None:
    folder = tmp_path / "nvidia" / "stub" / "lib"
    folder.mkdir(parents=True)
    library = build_stub(folder).rename(folder / "libstub-of-a-wheel.so.1")
    folders = runtime.cuda_folders(["nowhere", str(tmp_path)])
    assert folders == [folder]
    runtime.load_cuda_libraries(folders, {library.name: "nvidia-stub-cu11"})
    assert str(library) in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="names glibc's own library")
def test_cuda_libraries_of_the_system_need_no_wheel() -> None:
    runtime.load_cuda_libraries([], {"libc.so.6": "nvidia-libc-cu11"})


def test_cuda_libraries_follow_their_dependencies() -> None:
    order = list(runtime.CUDA_LIBRARIES)
    for first, later in [
        ("libcudart.so.11.0", "libcublas.so.11"),
        ("libcublasLt.so.11", "libcublas.so.11"),
        ("libcublas.so.11", "libcusolver.so.11"),
        ("libcublas.so.11", "libcudnn.so.8"),
    ]:
        assert order.index(first) < order.index(later)


# --gpus


@pytest.mark.parametrize(("text", "numbers"), [("0", [0]), ("0,1", [0, 1]), ("3, 1", [3, 1]), ("10", [10])])
def test_parse_gpus_keeps_the_order(text: str, numbers: List[int]) -> None:
    assert devices.parse_gpus(text) == numbers
    assert devices.parse_gpus(devices.format_gpu_ids(numbers)) == numbers


@pytest.mark.parametrize("text", ["", "x", "-1", "0,", ",", "0;1", "1.0", "0 1", "²"])
def test_parse_gpus_other_text_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^gpus must be ") as refused:
        devices.parse_gpus(text)
    assert repr(text) in one_sentence(refused)


def test_parse_gpus_repeated_gpu_is_refused() -> None:
    with pytest.raises(InputError, match=r"^gpus must be distinct, got 1,0,1\.$"):
        devices.parse_gpus("1,0,1")


@pytest.mark.parametrize(
    ("numbers", "words"), [([0], "GPU 0"), ([0, 1], "GPUs 0 and 1"), ([0, 1, 2], "GPUs 0, 1 and 2")]
)
def test_listed_joins_gpu_numbers(numbers: List[int], words: str) -> None:
    assert devices.listed(numbers) == words


# Contexts


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """machine(capabilities...): as if MXNet were the CUDA wheel, on a machine with such GPUs."""

    def pretend(*capabilities: Tuple[int, int], count: Optional[int] = None) -> None:
        cuda = CPU_WHEEL._replace(name="mxnet-cu112")
        monkeypatch.setattr(devices, "gpu_count", lambda: len(capabilities) if count is None else count)
        monkeypatch.setattr(devices, "built_with_cuda", lambda: True)
        monkeypatch.setattr(runtime, "installed_wheels", lambda: [cuda])
        monkeypatch.setattr(runtime, "load_driver", lambda: None)
        monkeypatch.setattr(devices, "compute_capabilities", lambda driver: list(capabilities))

    runtime.import_mxnet()
    return pretend


def names(*arguments: Any, **named: Any) -> List[str]:
    return [str(context) for context in devices.contexts(*arguments, **named)]


def test_contexts_default_without_gpu_is_one_cpu(machine: Any) -> None:
    machine()
    assert names() == ["cpu(0)"]


def test_contexts_default_is_every_gpu(machine: Any) -> None:
    machine((7, 5), (8, 6), (8, 9))
    assert names() == ["gpu(0)", "gpu(1)", "gpu(2)"]


def test_contexts_keep_the_order_of_gpus(machine: Any) -> None:
    machine((7, 0), (7, 0), (7, 0))
    assert names(gpus=[2, 0]) == ["gpu(2)", "gpu(0)"]


def test_contexts_cpus_count_from_zero(machine: Any) -> None:
    machine((7, 0))
    assert names(cpus=3) == ["cpu(0)", "cpu(1)", "cpu(2)"]


@pytest.mark.parametrize("count", [0, -1])
def test_contexts_zero_cpus_is_refused(machine: Any, count: int) -> None:
    with pytest.raises(InputError, match=f"^cpus must be at least 1, got {count}"):
        devices.contexts(cpus=count)


def test_contexts_gpus_with_cpus_is_refused() -> None:
    with pytest.raises(InputError, match="gpus must be omitted with cpus="):
        devices.contexts(gpus=[0], cpus=1)


@pytest.mark.parametrize(
    ("gpus", "count", "message"),
    [
        ([7], 2, "gpus must be among GPUs 0 and 1 of this machine, got 7."),
        ([0, 1], 1, "gpus must be among GPU 0 of this machine, got 0,1."),
        ([-1], 1, "gpus must be among GPU 0 of this machine, got -1."),
        ([0, 0], 1, "gpus must be distinct, got 0,0."),
        ([], 1, "gpus must have at least one number, such as 0 or 0,1."),
    ],
)
def test_contexts_missing_gpu_lists_the_present(
    machine: Any, gpus: List[int], count: int, message: str
) -> None:
    machine(*[(7, 0)] * count)
    with pytest.raises(InputError) as refused:
        devices.contexts(gpus=gpus)
    assert one_sentence(refused) == message


def test_contexts_gpu_never_falls_back_to_cpu(machine: Any) -> None:
    machine()
    with pytest.raises(InputError, match=r"^gpus=0 needs a GPU, and MXNet sees none") as refused:
        devices.contexts(gpus=[0])
    assert "CUDA_VISIBLE_DEVICES" in one_sentence(refused)


def test_contexts_gpu_with_cpu_wheel_names_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.import_mxnet()
    monkeypatch.setattr(devices, "gpu_count", lambda: 0)
    monkeypatch.setattr(devices, "built_with_cuda", lambda: False)
    monkeypatch.setattr(runtime, "installed_wheels", lambda: [CPU_WHEEL])
    monkeypatch.setattr(runtime, "the_only_wheel", lambda wheels: wheels[0])
    with pytest.raises(
        InputError, match=r"^gpus=0 needs an MXNet with CUDA, got mxnet 1\.9\.1\. Run"
    ) as refused:
        devices.contexts(gpus=[0])
    assert f"Run pip uninstall -y mxnet, then {runtime.INSTALL_CUDA}" in one_sentence(refused)


def test_old_driver_is_refused_not_cpu(machine: Any) -> None:
    machine((8, 6), (8, 6), count=0)
    for gpus in None, [0]:
        with pytest.raises(InputError, match="lists GPUs 0 and 1 but is too old for CUDA 11") as refused:
            devices.contexts(gpus=gpus)
        one_sentence(refused)
    assert names(cpus=1) == ["cpu(0)"]


def test_gpu_count_cuda_error_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failure(RuntimeError):
        pass

    def fail() -> int:
        raise Failure("Traceback\n  stack\nCUDA: unknown error")

    fake = types.SimpleNamespace(MXNetError=Failure, context=types.SimpleNamespace(num_gpus=fail))
    monkeypatch.setattr(runtime, "import_mxnet", lambda: fake)
    with pytest.raises(InputError, match=r"cannot count the GPUs \(CUDA: unknown error\)") as refused:
        devices.gpu_count()
    one_sentence(refused)


# Compute capabilities


@pytest.mark.parametrize("capability", [(5, 0), (5, 2), (6, 1), (7, 5), (8, 0), (8, 6), (8, 9)])
def test_architecture_maxwell_to_ada_is_accepted(capability: Tuple[int, int]) -> None:
    devices.check_gpu_architecture([0], [capability])


@pytest.mark.parametrize("capability", [(3, 7), (9, 0), (10, 0), (12, 0)])
def test_architecture_others_are_refused(machine: Any, capability: Tuple[int, int]) -> None:
    machine(capability)
    for gpus in None, [0]:
        with pytest.raises(InputError, match=r"^GPU 0 cannot run mxnet-cu112") as refused:
            devices.contexts(gpus=gpus)
        assert "compute capability {}.{};".format(*capability) in one_sentence(refused)
        assert "cpus=1" in one_sentence(refused)


def test_architecture_checks_named_gpus_proposes_others(machine: Any) -> None:
    machine((8, 6), (9, 0))
    assert names(gpus=[0]) == ["gpu(0)"]
    for gpus in None, [0, 1]:
        with pytest.raises(InputError, match=r"^GPU 1 cannot run .* 9.0; .*\. Use gpus=0\.$"):
            devices.contexts(gpus=gpus)


@pytest.mark.parametrize(
    ("option", "capabilities"),
    [("-DCAPABILITIES={8,6},{9,0},", [(8, 6), (9, 0)]), ("-DCAPABILITIES={12,0},", [(12, 0)]), ("-O0", [])],
)
def test_compute_capabilities_come_from_the_driver(
    tmp_path: Path, option: str, capabilities: List[Tuple[int, int]]
) -> None:
    driver = runtime.load_driver(str(build_stub(tmp_path, option)))
    assert devices.compute_capabilities(driver) == capabilities


def test_compute_capabilities_driver_error_is_one_sentence(tmp_path: Path) -> None:
    driver = runtime.load_driver(str(build_stub(tmp_path, "-DCAPABILITIES={8,6},", "-DINIT=999")))
    with pytest.raises(InputError, match="cuInit of the NVIDIA driver failed with error 999") as refused:
        devices.compute_capabilities(driver)
    one_sentence(refused)


# Threads and versions


def test_mxnet_gets_a_thread_per_core_by_default() -> None:
    code = "import os; from gluon_bert.runtime import mx, usable_cores; print(os.environ['OMP_NUM_THREADS'])"
    assert int(run(code).stdout) == system.usable_cores() >= 1
    assert int(run("import os; os.environ['OMP_NUM_THREADS'] = '3'; " + code).stdout) == 3


def test_usable_cores_ignores_hyper_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    siblings = {0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5"}
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(siblings))
    monkeypatch.setattr(Path, "read_text", lambda path: siblings[int(path.parts[5][3:])])
    assert system.usable_cores() == 2


def test_versions_name_python_mxnet_and_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "installed_wheels", lambda: [CPU_WHEEL])
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert runtime.versions() == {
        "gluon_bert": __version__,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "mxnet": "mxnet 1.9.1",
        "platform": platform.platform(),
        "sentencex": metadata.version("sentencex"),
        "threads": "3",
    }
