"""Starts multi-model-server with one archive on loopback, waits for it, and stops all its processes."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Callable, Iterator

import requests

from ..errors import InputError
from ..export.model_archive import ARCHIVE, INSTALL_SERVE, MODEL, check_archive
from ..runtime import has_cuda_wheel
from ..system import usable_cores

HOST = "127.0.0.1"
# The server reads a port as a signed number of 16 bits.
HIGHEST_PORT = 32766

# The server itself answers larger requests with a bare 413. The handler explains errors of smaller ones.
MAX_REQUEST = 16 << 20
# Maximum size of an answer. The vectors decide its size, and the server ends a worker that exceeds it.
MAX_RESPONSE = 2**31 - 1
# Maximum number of waiting requests. The server answers 503 to further ones.
QUEUE = 1000

# A socket's name has 107 bytes, and the server's is /.mms.sock.9000 in this folder.
LONGEST_FOLDER = 92

# Seconds to unpack, hash and read the archive of a large network.
START_TIMEOUT = 300.0
STOP_TIMEOUT = 10.0

# Files in the server's folder: its log, and its and Java's output. It prints STARTED once it listens.
LOG, OUTPUT = "server.log", "output.log"
STARTED = b"Model server started."

# One log of bounded size, without a line for each request.
_LOG4J = """\
<Configuration>
  <Appenders>
    <RollingFile name="log" fileName="server.log" filePattern="server.%i.log">
      <PatternLayout pattern="%d{ISO8601} %-5p %c{1} - %m%n"/>
      <Policies><SizeBasedTriggeringPolicy size="10 MB"/></Policies>
      <DefaultRolloverStrategy max="1"/>
    </RollingFile>
  </Appenders>
  <Loggers>
    <Logger name="MODEL_METRICS" level="off"/>
    <Logger name="MMS_METRICS" level="off"/>
    <Logger name="ACCESS_LOG" level="off"/>
    <Logger name="com.amazonaws.ml.mms.wlm.WorkerThread" level="warn"/>
    <Root level="info"><AppenderRef ref="log"/></Root>
  </Loggers>
</Configuration>
"""


class ServerFailed(RuntimeError):
    """The server did not start, or ended by itself; the message ends with the end of its log."""


@dataclass(frozen=True)
class Settings:
    """How an archive is served.

    server_workers: processes that answer, each with a copy of the network. batch_size: maximum number of
    requests per batch. max_batch_delay: milliseconds that the first request waits for others. threads: of
    each server worker; None: the cores divided by the server workers.
    """

    port: int = 8080
    management_port: int = 8081
    server_workers: int = 1
    batch_size: int = 8
    max_batch_delay: int = 5
    threads: int | None = None

    def check(self) -> None:
        """Raise InputError, which names the field, for impossible values."""
        for name in ("server_workers", "batch_size", "max_batch_delay", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}.")
        if self.port == self.management_port:
            raise InputError(f"management_port must differ from port={self.port}.")
        for name, port in (("port", self.port), ("management_port", self.management_port)):
            _check_port(name, port)


class Server:
    """A running server: its addresses and its log."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, settings: Settings) -> None:
        self._process, self._folder = process, folder
        self.address = f"http://{HOST}:{settings.port}/predictions/{MODEL}"
        self.management = f"http://{HOST}:{settings.management_port}/models"
        self.log = folder / LOG

    def wait(self) -> None:
        """Wait until the server ends by itself, then raise ServerFailed."""
        self._process.wait()
        raise self.failed("the server ended by itself")

    def failed(self, what: str) -> ServerFailed:
        """Return the exception for what happened, with the end of the log."""
        lines = [line for name in (LOG, OUTPUT) for line in _last_lines(self._folder / name)]
        return ServerFailed("\n".join([f"{what}; the end of its log:", *lines]))

    def start(self, settings: Settings) -> None:
        """Register the archive and wait until the server workers have read it."""
        # Not whether the port answers: another server could have taken the port.
        self._until(lambda: STARTED in (self._folder / OUTPUT).read_bytes(), "the server did not start")
        how: dict[str, str | int] = {
            "url": ARCHIVE,
            "batch_size": settings.batch_size,
            "max_batch_delay": settings.max_batch_delay,
            "initial_workers": settings.server_workers,
            "synchronous": "true",
        }
        try:
            with requests.Session() as session:
                session.trust_env = False  # no proxy for a local address
                reply = session.post(self.management, params=how, timeout=START_TIMEOUT)
        except requests.RequestException as error:
            raise self.failed(f"the server did not take the archive ({error})") from error
        if reply.status_code != 200:
            raise self.failed(
                f"the server did not take the archive ({reply.status_code}: {reply.text.strip()})"
            )

    def _until(self, done: Callable[[], bool], otherwise: str) -> None:
        end = time.monotonic() + START_TIMEOUT
        while not done():
            if self._process.poll() is not None or time.monotonic() > end:
                raise self.failed(otherwise)
            time.sleep(0.1)


@contextmanager
def serving(archive: Path, settings: Settings = Settings()) -> Iterator[Server]:
    """Serve one archive until the block ends; then stop its processes and remove its files.

    Raise InputError for problems that the user can solve, ServerFailed if the server does not start.

    >>> with serving(Path("exported/bert.mar")) as server:                              # doctest: +SKIP
    ...     requests.post(server.address, json={"text": "a crane is flying"}).json()["mean"]
    """
    settings.check()
    check_server()
    check_archive(archive)
    with TemporaryDirectory(prefix="gluon_bert-serve-") as name:
        folder = Path(name).resolve()
        if len(str(folder)) > LONGEST_FOLDER:
            raise InputError(f"TMPDIR: {folder} is too long for a socket's name: set it to a shorter folder")
        with _processes(folder, archive, settings) as process:
            server = Server(process, folder, settings)
            server.start(settings)
            yield server


def free_ports(count: int = 2) -> list[int]:
    """Return free ports for a server."""

    def is_free(port: int) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((HOST, port)) != 0

    # Not ephemeral ports: they may be too high for the server, and any process may get them.
    candidates = random.Random().sample(range(10_000, HIGHEST_PORT), 1000)
    return list(islice(filter(is_free, candidates), count))


def check_server() -> None:
    """Raise InputError unless multi-model-server and a Java for it are installed."""
    if importlib.util.find_spec("mms") is None:
        raise InputError(f"multi-model-server is not installed: {INSTALL_SERVE}")
    home = os.environ.get("JAVA_HOME")
    java = str(Path(home, "bin", "java")) if home else shutil.which("java")
    where = "JAVA_HOME" if home else "PATH"
    install = "install one, such as the package openjdk-17-jre-headless"
    if java is None or not os.access(java, os.X_OK):
        raise InputError(f"{where}: must have Java 8 or later, which the model server needs; {install}")
    shown = subprocess.run(
        [java, "-version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"
    )
    version = re.search(r'version "(?:1\.)?(\d+)', shown.stdout)
    if shown.returncode or version is None:
        raise InputError(f"{java}: does not run as Java ({shown.stdout.strip()[:200]}): {install}")
    if int(version[1]) < 8:
        raise InputError(f"{java}: is Java {version[1]}, where the model server needs 8 or later: {install}")


@contextmanager
def _processes(folder: Path, archive: Path, settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    """Start the server in its own process group; end the group after the block."""
    (folder / "store").mkdir()
    (folder / "store" / ARCHIVE).symlink_to(archive.resolve())
    (folder / "config.properties").write_text(_config(settings), "utf-8")
    (folder / "log4j2.xml").write_text(_LOG4J, "utf-8")
    command = [
        *(sys.executable, "-m", "mms.model_server", "--start", "--foreground"),
        *("--mms-config", str(folder / "config.properties"), "--log-config", str(folder / "log4j2.xml")),
        *("--model-store", str(folder / "store")),
    ]
    with (folder / OUTPUT).open("wb") as output, ThreadPoolExecutor(1) as beside:
        # In another thread: a signal's exception in the main thread could lose the new process.
        starting = beside.submit(
            subprocess.Popen,
            command,
            cwd=folder,
            env=_environment(folder, settings),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            yield starting.result()
        finally:
            _stop(starting.result())


def _config(settings: Settings) -> str:
    content = {
        "inference_address": f"http://{HOST}:{settings.port}",
        "management_address": f"http://{HOST}:{settings.management_port}",
        # Otherwise the worker parses JSON itself, and ends on invalid JSON.
        "decode_input_request": "false",
        # Workers are forked. MXNet's threads do not survive a fork, so no model may be loaded before it.
        "preload_model": "false",
        "max_request_size": MAX_REQUEST,
        "max_response_size": MAX_RESPONSE,
        "job_queue_size": QUEUE,
        # Java's files for jps would stay in /tmp if it is killed.
        "vmargs": "-XX:-UsePerfData",
    }
    if not has_cuda_wheel():
        content["number_of_gpu"] = 0
    return "".join(f"{name}={value}\n" for name, value in content.items())


def _environment(folder: Path, settings: Settings) -> dict[str, str]:
    """Return the environment of the server and its workers."""
    # Each would override a part of the configuration. PYTHONPATH would hide the archive's own code.
    unwanted = ("MMS_", "PYTHONPATH", "MODEL_SERVER_HOME", "LOG_LOCATION", "METRICS_LOCATION")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    threads = settings.threads or max(1, usable_cores() // settings.server_workers)
    return {
        **environment,
        # The folder for files and sockets of the launcher and Java.
        **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder)),
        # By default a server worker would use 1 thread.
        "OMP_NUM_THREADS": str(threads),
    }


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Terminate a process group; kill it after STOP_TIMEOUT."""
    for number, patience in ((signal.SIGTERM, STOP_TIMEOUT), (signal.SIGKILL, STOP_TIMEOUT)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        end = time.monotonic() + patience
        while _is_alive(process) and time.monotonic() < end:
            time.sleep(0.05)


def _is_alive(process: subprocess.Popen[bytes]) -> bool:
    """Return whether any process of the group is left."""
    process.poll()
    # In a container's first process, orphans become its children.
    with suppress(ChildProcessError):
        while os.waitpid(-process.pid, os.WNOHANG)[0]:
            pass
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def _check_port(name: str, port: int) -> None:
    if not 1 <= port <= HIGHEST_PORT:
        raise InputError(f"{name} must be between 1 and {HIGHEST_PORT}, got {port}.")
    with socket.socket() as probe:
        # As the server does: a port may have old connections in TIME_WAIT.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise InputError(
                f"{name} must be free, got {port} ({error.strerror}). Choose another."
            ) from error


def _last_lines(path: Path, count: int = 15) -> list[str]:
    try:
        return path.read_text("utf-8", errors="replace").splitlines()[-count:]
    except FileNotFoundError:
        return []
