"""The content of the model archive; the model server's start, replies and end."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import requests
import serve
from conftest import ROOT, untrained_run
from support.processes import processes_under

from gluon_bert.data.vocab import Vocabulary
from gluon_bert.errors import InputError
from gluon_bert.export.exporter import export_mxnet
from gluon_bert.export.manifest import Manifest
from gluon_bert.export.model_archive import ARCHIVE, check_archive, export_archive, pack
from gluon_bert.inference.predictor import Predictor
from gluon_bert.model.bert import BERTModel
from gluon_bert.presets import preset
from gluon_bert.run import Run, load_run
from gluon_bert.runtime import mx
from gluon_bert.serving import handler
from gluon_bert.serving import server as module
from gluon_bert.serving.server import MAX_REQUEST, ServerFailed, Settings, check_server, free_ports, serving

WORDS = ["a", "crane", "is", "flying", "driver", "came", "he", "just", "left"]


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """A run of a small network with the weights that it began with."""
    pytest.importorskip("model_archiver", reason="needs the extra serve")
    folder = tmp_path_factory.mktemp("serving") / "run"
    config = preset("d2l").replace(max_seq_length=24, max_positions=24, units=16, ffn_units=16)
    return untrained_run(folder, config, Vocabulary(WORDS))


@pytest.fixture(scope="session")
def predictor(run_folder):
    return Predictor.of(load_run(run_folder))


@pytest.fixture(scope="session")
def archive(run_folder):
    return export_archive(load_run(run_folder), run_folder.parent / "archive")


@pytest.fixture
def settings():
    port, management_port = free_ports()
    return Settings(port=port, management_port=management_port)


@pytest.fixture
def short_tmp(tmp_path, monkeypatch):
    """A folder for all temporary files, whose names are short enough for sockets."""
    with module.TemporaryDirectory(prefix="t", dir="/tmp") as name:
        for variable in ("TMPDIR", "TEMP", "TMP"):
            monkeypatch.setenv(variable, name)
        monkeypatch.setattr("tempfile.tempdir", None)
        yield Path(name)
    monkeypatch.setattr("tempfile.tempdir", None)


class TestArchive:
    def test_archive_holds_the_export_and_the_package(self, archive):
        assert [path.name for path in archive.parent.iterdir()] == [ARCHIVE]
        check_archive(archive)
        with zipfile.ZipFile(archive) as file:
            names = set(file.namelist())
            manifest = json.loads(file.read("MAR-INF/MANIFEST.json"))
        files = [*(ROOT / "gluon_bert").rglob("*.py"), *(ROOT / "gluon_bert" / "ops" / "native").iterdir()]
        package = {str(path.relative_to(ROOT)) for path in files}
        exported = {"bert-symbol.json", "bert-0000.params", "vocab.json", "manifest.json"}
        assert names == package | exported | {"gluon_bert/py.typed", "MAR-INF/MANIFEST.json"}
        assert manifest["model"] == {"modelName": "bert", "handler": "gluon_bert.serving.handler:handle"}
        assert manifest["runtime"] == "python"

    def test_archive_answers_by_itself(self, archive, predictor, tmp_path):
        """With its own code, and no package but MXNet, NumPy and what these need (requests is MXNet's)."""
        with zipfile.ZipFile(archive) as file:
            file.extractall(tmp_path)
        code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("sentencex", "matplotlib", "tqdm", "onnx", "gluonnlp", "mms"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
sys.path.insert(0, sys.argv[1])
from gluon_bert.serving import handler
assert handler.__file__.startswith(sys.argv[1]), handler.__file__
class Context:
    system_properties = {"model_dir": sys.argv[1], "gpu_id": None}
    def set_response_status(self, code, phrase, idx): print(idx, code, phrase, file=sys.stderr)
    request_ids = {0: "first", 1: "second"}
assert handler.handle(None, Context()) == []
assert handler.handle([], Context()) == []
print(handler.handle([{"body": bytearray(b'{"text": "a crane"}')}, {"body": b"{"}], Context())[0].decode())
"""
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "0 200 OK" in done.stderr
        assert "1 400 Bad Request" in done.stderr
        (expected,) = predictor.predict([predictor.reader.text("a crane")])
        np.testing.assert_allclose(json.loads(done.stdout)["mean"], expected.mean, atol=1e-5)

    def test_aligned_status_is_never_split(self):
        """As multi-model-server itself writes it, whatever the answers: see the handler on its pieces."""
        handlers = pytest.importorskip("mms.protocol.otf_message_handler")
        rng = random.Random(0)
        for size in range(1, 9):
            ids = {i: str(uuid.UUID(int=i)) for i in range(size)}  # as the server's ids are
            statuses = [rng.choice([200, 400, 500]) for _ in ids]
            bodies = [b"{" + b"x" * rng.randint(0, 3000) + b"}" for _ in ids]
            printed = handler.aligned(bodies, statuses, ids)
            assert [each.rstrip(b" ") for each in printed] == bodies

            context = SimpleNamespace(
                get_response_content_type=lambda i: handler.CONTENT_TYPE,
                get_response_headers=lambda i: {},
                get_response_status=lambda i, printed=statuses: (printed[i], HTTPStatus(printed[i]).phrase),
            )
            message = handlers.create_predict_response(printed, ids, "Prediction success", 200, context)
            at = 0
            for status in statuses:
                at = message.index(b"application/json", at) + len("application/json")
                assert message[at : at + 4] == status.to_bytes(4, "big")
                assert 0 < at % 16 <= 12

    def test_archive_that_fails_leaves_nothing(self, run_folder, tmp_path, monkeypatch):
        run = load_run(run_folder)
        (tmp_path / "taken").mkdir()
        (tmp_path / "taken" / "file").touch()
        with pytest.raises(InputError, match="must be a new folder"):
            export_archive(run, tmp_path / "taken")
        monkeypatch.setattr("gluon_bert.export.model_archive.HANDLER", "--nonsense")
        with pytest.raises(OSError, match=r"(?s)model-archiver failed: .*expected one argument"):
            export_archive(run, tmp_path / "new")
        assert [path.name for path in tmp_path.iterdir()] == ["taken"]

    def test_pack_another_format_is_refused(self, run_folder, tmp_path):
        manifest = export_mxnet(load_run(run_folder), tmp_path / "export")
        other = json.loads((tmp_path / "export" / "manifest.json").read_text("utf-8"))
        (tmp_path / "export" / "manifest.json").write_text(json.dumps({**other, "format": "onnx"}), "utf-8")
        with pytest.raises(InputError, match="must be an export with format=mar or format=mxnet, got onnx"):
            pack(tmp_path / "export", tmp_path)
        manifest.save(tmp_path / "export")
        check_archive(pack(tmp_path / "export", tmp_path))

    def test_archive_without_the_extra_is_refused(self, monkeypatch, tmp_path):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(
            InputError, match=r"model-archiver is not installed: pip install -e '\.\[cpu,serve\]'"
        ):
            export_archive(None, tmp_path / "new")

    def test_archive_that_is_not_one_is_refused(self, archive, tmp_path):
        path = tmp_path / "bad.mar"
        with pytest.raises(InputError, match="cannot be read as a model archive"):
            check_archive(path)
        content = bytearray(archive.read_bytes())
        path.write_bytes(b"no archive at all")
        with pytest.raises(InputError, match="not a zip file"):
            check_archive(path)
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(InputError, match="not a zip file"):
            check_archive(path)
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"damaged|cannot be read"):
            check_archive(path)
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("something", "else")
        with pytest.raises(InputError, match="cannot be read as a model archive"):
            check_archive(path)
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("MAR-INF/MANIFEST.json", '{"model": {"handler": "service:handle"}}')
        with pytest.raises(InputError, match="its handler is service:handle"):
            check_archive(path)


class TestBadInput:
    """The command says in a line what is wrong and leaves with status 2, before any server starts."""

    @pytest.mark.parametrize(
        ("flags", "why"),
        [
            ("--port 0", "--port must be between 1 and 32766, got 0."),
            ("--port 8081", "--management-port must differ from --port 8081"),
            ("--management-port 70000", "--management-port must be between 1 and"),
            ("--server-workers 0", "--server-workers must be at least 1, got 0"),
            ("--batch-size -1", "--batch-size must be at least 1, got -1"),
            ("--max-batch-delay 0", "--max-batch-delay must be at least 1, got 0"),
            ("--threads 0", "--threads must be at least 1, got 0"),
        ],
    )
    def test_serve_wrong_flags_are_refused(self, flags, why, capsys):
        assert serve.main(["x.mar", *flags.split()]) == 2
        assert f"serve: {why}" in capsys.readouterr().err

    def test_serve_on_a_taken_port_is_refused(self, settings, capsys):
        with socket.socket() as other:
            other.bind(("127.0.0.1", settings.port))
            other.listen()
            assert serve.main(["x.mar", "--port", str(settings.port)]) == 2
        assert f"--port must be free, got {settings.port}" in capsys.readouterr().err

    def test_serve_without_java_is_refused(self, settings, monkeypatch, capsys, tmp_path):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
        monkeypatch.delenv("JAVA_HOME", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert serve.main(["x.mar", *port_flags(settings)]) == 2
        assert (
            "PATH: must have Java 8 or later, which the model server needs; install one"
            in capsys.readouterr().err
        )
        monkeypatch.setenv("JAVA_HOME", str(tmp_path))
        with pytest.raises(InputError, match="JAVA_HOME: must have Java 8"):
            check_server()

    @pytest.mark.parametrize(
        ("script", "why"),
        [
            ("""echo 'java version "1.7.0_80"' >&2""", "is Java 7, where the model server needs 8"),
            ("echo no runtime present >&2; exit 1", r"does not run as Java \(no runtime present\)"),
        ],
    )
    def test_serve_with_a_broken_java_is_refused(self, script, why, monkeypatch, tmp_path):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
        monkeypatch.setenv("JAVA_HOME", str(tmp_path))
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "java").write_text(f"#!/bin/sh\n{script}\n", "utf-8")
        (tmp_path / "bin" / "java").chmod(0o755)
        with pytest.raises(InputError, match=why):
            check_server()

    def test_serve_without_the_extra_is_refused(self, settings, monkeypatch, capsys):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert serve.main(["x.mar", *port_flags(settings)]) == 2
        assert "multi-model-server is not installed: pip install -e '.[cpu,serve]'" in capsys.readouterr().err

    def test_serve_with_a_long_tmpdir_is_refused(self, archive, settings, monkeypatch, tmp_path):
        monkeypatch.setattr(module, "check_server", lambda: None)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("x" * 80)))
        (tmp_path / ("x" * 80)).mkdir()
        with pytest.raises(InputError, match=r"TMPDIR: .* is too long"), serving(archive, settings):
            pass

    def test_serve_an_empty_folder_is_refused(self, settings, monkeypatch, capsys, tmp_path):
        monkeypatch.setattr("serve.check_server", lambda: None)
        assert serve.main([str(tmp_path), *port_flags(settings)]) == 2
        assert "must be an archive (bert.mar), an export or a run" in capsys.readouterr().err


def port_flags(settings):
    return ["--port", str(settings.port), "--management-port", str(settings.management_port)]


@pytest.fixture(scope="class")
def server(archive):
    port, management_port = free_ports()
    with serving(archive, Settings(port=port, management_port=management_port, max_batch_delay=50)) as server:
        yield server


@pytest.mark.java
class TestServer:
    """The real server, asked."""

    def ask(self, server, **request):
        reply = requests.post(server.address, json=request, timeout=60)
        assert reply.status_code == 200, reply.text
        assert reply.headers["content-type"] == "application/json"
        return reply.json()

    def test_handler_large_answers_fail_no_batch(self, tmp_path):
        """The frontend reads them in many pieces; a torn status would fail a whole batch."""
        config = preset("d2l").replace(max_seq_length=64, units=256, ffn_units=16, num_heads=2, num_layers=1)
        vocab = Vocabulary(WORDS)
        net = BERTModel(len(vocab), config.model)
        net.initialize(ctx=[mx.cpu()], seed=0)
        net.hybridize()
        mar = export_archive(Run(net, vocab, config, step=1), tmp_path / "mar", "encoder")
        port, management_port = free_ports()
        with serving(mar, Settings(port=port, management_port=management_port)) as server:

            def ask(length):
                body = {"text": "crane " * length, "token_vectors": True}
                reply = requests.post(server.address, json=body, timeout=60)
                return reply.status_code, len(reply.json()["token_vectors"])

            lengths = [random.Random(i).randint(40, 62) for i in range(160)]
            with ThreadPoolExecutor(8) as pool:
                assert list(pool.map(ask, lengths)) == [(200, length + 2) for length in lengths]

    def test_server_gives_the_networks_vectors(self, server, predictor):
        reader = predictor.reader
        cases = [
            ({"text": "A crane, flying"}, reader.text("A crane, flying")),
            ({"text": "a crane", "pair": "he left"}, reader.text("a crane", "he left")),
            ({"ids": [5, 6, 7]}, reader.ids([5, 6, 7])),
            ({"ids": [5, 6], "pair_ids": [11, 13, 0]}, reader.ids([5, 6], [11, 13, 0])),
        ]
        for (request, _), expected in zip(cases, predictor.predict(text for _, text in cases)):
            found = self.ask(server, **request, token_vectors=True)
            np.testing.assert_allclose(found["token_vectors"], expected.vectors, atol=1e-5)
            np.testing.assert_allclose(found["mean"], expected.mean, atol=1e-5)
            np.testing.assert_allclose(found["pooled"], expected.pooled, atol=1e-5)

    def test_server_fills_masks_and_scores_pairs(self, server, predictor):
        (expected,) = predictor.predict([predictor.reader.text("a <mask> came", "he left")])
        found = self.ask(server, text="a <mask> came", pair="he left", ask=["masks", "next"], top=14)
        words, probabilities = zip(
            *((word["token"], word["probability"]) for word in found["predictions"][0])
        )
        expected_words, expected_probabilities = zip(*expected.fill_masks(predictor.reader.vocab, 14)[0])
        assert sorted(words) == sorted(expected_words)
        np.testing.assert_allclose(probabilities, expected_probabilities, atol=1e-5)
        assert found["next_sentence_probability"] == pytest.approx(
            expected.next_sentence_probability, abs=1e-5
        )

    @pytest.mark.parametrize(
        ("body", "headers", "status", "why"),
        [
            (b"", {}, 400, "is empty"),
            (b"{", {"Content-Type": "application/json"}, 400, "not JSON"),
            (b'{"text": "\xff"}', {"Content-Type": "application/json; charset=utf-8"}, 400, "not UTF-8"),
            (b'{"text": "a"}', {"Content-Type": "application/x-www-form-urlencoded"}, 400, "Content-Type"),
            (b"[" * 500_000, {}, 400, "brackets"),
            (b"x" * (MAX_REQUEST - 1000), {}, 400, "bytes, where 1,048,576 are allowed"),
            (b"x" * (MAX_REQUEST + 1), {}, 413, "^$"),
        ],
    )
    def test_server_survives_a_bad_request(self, server, body, headers, status, why):
        worker = worker_of(server)
        reply = requests.post(server.address, data=body, headers=headers, timeout=60)
        assert reply.status_code == status
        assert re.search(why, reply.json()["error"] if status == 400 else reply.text)
        assert self.ask(server, text="a crane")["tokens"]
        assert worker_of(server) == worker

    def test_server_large_answer_arrives(self, server):
        text = "w" * 1_000_000
        assert self.ask(server, text=text)["unknown"] == [text]

    def test_server_under_load_answers_every_request(self, server, predictor):
        worker = worker_of(server)
        rng = random.Random(0)
        bad = [b"{", b'{"txt": "a"}', b'{"ids": [99]}', b'{"text": ""}', b'{"text": "' + b"a " * 90 + b'"}']
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 20))) for _ in range(400)]
        bodies = [bad[i % 5] if i % 10 == 3 else json.dumps({"text": texts[i]}).encode() for i in range(400)]
        replies = ask_all(server, bodies, connections=8)
        expected = list(predictor.predict(predictor.reader.text(text) for text in texts))
        for i, (status, content) in enumerate(replies):
            if i % 10 == 3:
                assert status == 400 and content["error"], content
            else:
                assert status == 200, content
                np.testing.assert_allclose(content["mean"], expected[i].mean, atol=1e-5)
        assert worker_of(server) == worker

    def test_server_batches_simultaneous_requests(self, server):
        """Eight at once fill a batch, and none waits as one alone does, for whom the delay runs out."""

        def seconds(count):
            start = time.perf_counter()
            ask_all(server, [b'{"text": "a crane"}'] * count, connections=count)
            return time.perf_counter() - start

        alone, together = min(seconds(1) for _ in range(5)), min(seconds(8) for _ in range(5))
        assert alone > 0.05
        assert together < 4 * alone

    def test_server_ports_are_on_loopback_only(self, server):
        listening = {
            connection.laddr
            for process in group_of(server)
            for connection in process.net_connections()
            if connection.status == "LISTEN"
        }
        assert len(listening) == 2
        assert {address.ip.replace("::ffff:", "") for address in listening} == {"127.0.0.1"}


def worker_of(server):
    """Return the process that answers. It changes if the server had to restart it."""
    return max(p.pid for p in group_of(server) if "model_service_worker.py" in " ".join(p.cmdline()))


def group_of(server):
    return processes_under(server._process.pid)


def ask_all(server, bodies, connections):
    """Return status and content for each body, over several connections at once."""
    host, path = re.fullmatch(r"http://([^/]+)(/.*)", server.address).groups()
    local = threading.local()

    def ask(body):
        local.connection = getattr(local, "connection", None) or HTTPConnection(host, timeout=60)
        local.connection.request("POST", path, body, {"Content-Type": "application/json"})
        reply = local.connection.getresponse()
        return reply.status, json.loads(reply.read())

    with ThreadPoolExecutor(connections) as pool:
        return list(pool.map(ask, bodies))


def processes_with(text):
    """Processes whose command line or environment holds a text."""
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            if text in " ".join(process.cmdline()) or text in " ".join(process.environ().values()):
                found.append(process)
        except psutil.Error:
            continue
    return [process for process in found if process.pid != os.getpid()]


@pytest.mark.java
class TestLife:
    """How the server starts, fails and stops; each test ends with nothing left of it."""

    @pytest.fixture(autouse=True)
    def nothing_is_left(self, settings, short_tmp):
        yield
        assert processes_with(str(short_tmp)) == []
        assert list(short_tmp.iterdir()) == []
        settings.check()  # the ports are free

    def start(self, what, settings):
        command = [sys.executable, str(ROOT / "tools" / "serve.py"), str(what), *port_flags(settings)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    @pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_serve_prints_a_working_request_and_stops(self, archive, settings, number, status):
        with self.start(archive.parent, settings) as process:
            assert "Try:" in process.stdout.readline()
            line = shlex.split(process.stdout.readline())
            reply = subprocess.run(line, capture_output=True, text=True)
            assert len(json.loads(reply.stdout)["mean"]) == 16, reply.stderr
            process.send_signal(number)
            process.send_signal(number)  # the impatient do
            _, errors = process.communicate(timeout=60)
        assert process.returncode == status
        assert "Traceback" not in errors

    def test_serve_signal_while_starting_leaves_nothing(self, archive, settings, short_tmp):
        with self.start(archive, settings) as process:
            while not list(short_tmp.glob("gluon_bert-serve-*/output.log")):
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.02)
            process.terminate()
            _, errors = process.communicate(timeout=60)
        assert process.returncode == 143
        assert "Traceback" not in errors

    def test_serve_reports_a_server_that_ends(self, run_folder, settings):
        with self.start(run_folder, settings) as process:
            assert "Try:" in process.stdout.readline()
            (java,) = [p for p in processes_under(process.pid) if p.name() == "java"]
            java.kill()
            _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "serve: the server ended by itself; the end of its log:" in errors
        assert "Traceback" not in errors

    def test_serving_an_unreadable_network_fails(self, archive, settings, tmp_path):
        path = tmp_path / "bad.mar"
        with zipfile.ZipFile(archive) as good, zipfile.ZipFile(path, "w") as bad:
            for name in good.namelist():
                bad.writestr(name, b"no parameters" if name.endswith(".params") else good.read(name))
        with pytest.raises(ServerFailed, match="differs from the exported file"), serving(path, settings):
            pass

    def test_server_runs_the_archives_own_code(self, archive, settings, tmp_path):
        path = tmp_path / "other.mar"
        with zipfile.ZipFile(archive) as good, zipfile.ZipFile(path, "w") as other:
            for name in good.namelist():
                other.writestr(name, good.read(name).replace(b"the request is empty", b"nothing was sent"))
        with serving(path, settings) as server:
            assert "nothing was sent" in requests.post(server.address, timeout=60).text

    def test_serve_an_export_answers(self, run_folder, settings, tmp_path):
        export_mxnet(load_run(run_folder), tmp_path / "export", "encoder")
        with self.start(tmp_path / "export", settings) as process:
            assert "Try:" in process.stdout.readline()
            address = f"http://127.0.0.1:{settings.port}/predictions/bert"
            reply = requests.post(address, json={"text": "a <mask>", "ask": "masks"}, timeout=60)
            assert (reply.status_code, "outputs for masked words" in reply.json()["error"]) == (
                400,
                True,
            )
            process.terminate()
            process.communicate(timeout=60)


def test_archive_manifest_is_that_of_its_export(archive, tmp_path):
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path)
    assert Manifest.load(tmp_path).outputs == "all"
