"""Shared by the tests that start jobs: a text, the run of one process, jobs that end with their test."""

import subprocess
import sys

import pretrain
import pytest
from conftest import small_text
from support.jobs import SMALL, LaunchedJob


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a small text."""
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "text.txt").write_text(small_text(), "utf-8")
    return folder


@pytest.fixture(scope="module")
def one_process(folder):
    """The run of one process."""
    flags = ["--corpus", str(folder / "text.txt"), "--output", str(folder / "alone")]
    assert pretrain.main([*SMALL, *flags]) == 0
    return folder / "alone"


@pytest.fixture(scope="module")
def launch_job(request, folder):
    """Launch a job with the kvstore of the module; every job ends with its module, at the latest."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs /proc")
    jobs = []

    def launched(*words, **environment):
        jobs.append(LaunchedJob(folder, "--kvstore", request.module.KVSTORE, *words, **environment))
        return jobs[-1]

    yield launched
    for job in jobs:
        job.process.kill()


@pytest.fixture(scope="module")
def pretrain_command(request, folder):
    """The command of a worker, with the kvstore of the module."""

    def command(name, *flags, script="tools/pretrain.py"):
        where = ["--corpus", folder / "text.txt", "--output", folder / name, "--step-timeout", "10"]
        kvstore = ["--kvstore", request.module.KVSTORE]
        return ["--", sys.executable, script, *SMALL, *where, *kvstore, *flags]

    return command


@pytest.fixture
def two_machines():
    """The addresses of two connected network namespaces. Each namespace is named after its address."""
    addresses = ["10.77.0.1", "10.77.0.2"]

    def ip(*words):
        return subprocess.run(["ip", *words], stderr=subprocess.PIPE, encoding="utf-8", check=True)

    try:
        ip("netns", "add", addresses[0])
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces can be made here ({error})")
    try:
        ip("netns", "add", addresses[1])
        ends = ["name", "cable", "netns", addresses[0]], ["name", "cable", "netns", addresses[1]]
        ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for address in addresses:
            ip("-n", address, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", address, "link", "set", "cable", "up")
            ip("-n", address, "link", "set", "lo", "up")
        yield addresses
    finally:
        for address in addresses:
            subprocess.run(["ip", "netns", "delete", address], stderr=subprocess.DEVNULL)
