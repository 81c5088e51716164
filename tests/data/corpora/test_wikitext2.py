"""WikiText-2: found, downloaded, verified. All addresses are local."""

from __future__ import annotations

import hashlib
import io
import socket
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest

from gluon_bert.data.corpora import wikitext2 as wikitext
from gluon_bert.data.corpora.wikitext2 import data_folder, wikitext2_folder
from gluon_bert.errors import InputError

TRAIN, VALID = b" = A small corpus = \n" * 9000, b" = Held out = \n"
XML = b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>PermanentRedirect</Code>'.ljust(243)
REPOSITORY = Path(__file__).parents[3]


def sha1(content):
    return hashlib.sha1(content).hexdigest()


def zipped(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


ARCHIVE = zipped(
    {
        "../evil": b"outside",
        "wikitext-2/": b"",
        "wikitext-2/wiki.test.tokens": b"not asked for",
        "wikitext-2/wiki.train.tokens": TRAIN,
        "../../wiki.valid.tokens": VALID,
    }
)


OTHER_ARCHIVE = zipped({"wikitext-2/wiki.train.tokens": b"another"})
BODIES = {
    "/good.zip": ARCHIVE,
    "/xml.zip": XML,
    "/html.zip": b"<!DOCTYPE html><title>Sorry</title>",
    "/other.zip": OTHER_ARCHIVE,
    "/short.zip": ARCHIVE[:100],
    "/stalls.zip": ARCHIVE[:50],
    "/empty.zip": b"",
    "/plain/train.txt": TRAIN,
    "/plain/valid.txt": VALID,
    "/half/train.txt": TRAIN,
    "/half/valid.txt": VALID + b"one line more\n",
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append((self.path, self.headers["User-Agent"]))
        if self.path == "/hangs.zip":
            self.server.release.wait(10)
            return
        body = BODIES.get(self.path)
        self.send_response(404 if body is None else 200)
        # The truncated and the stalled body announce more than they send.
        longer = self.path in ("/short.zip", "/stalls.zip")
        self.send_header("Content-Length", str(len(ARCHIVE) if longer else len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")
        self.wfile.flush()
        if self.path == "/stalls.zip":
            self.server.release.wait(10)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests, server.release = [], threading.Event()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        server.address = f"http://127.0.0.1:{server.server_port}"
        yield server
        server.release.set()
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def small_corpus(monkeypatch):
    """The hashes of the corpus of these tests, and no proxy between them and this machine."""
    monkeypatch.setattr(wikitext, "ARCHIVE_SHA1", sha1(ARCHIVE))
    monkeypatch.setattr(
        wikitext, "FILES", {"wiki.train.tokens": sha1(TRAIN), "wiki.valid.tokens": sha1(VALID)}
    )
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def closed_port():
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def files_below(root):
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


CORPUS = ["datasets/wikitext-2/wiki.train.tokens", "datasets/wikitext-2/wiki.valid.tokens"]


@pytest.mark.parametrize("name", ["good.zip", "plain/{}.txt"])
def test_wikitext2_is_downloaded_once(server, tmp_path, name):
    root = tmp_path / "home"
    folder = wikitext2_folder([f"{server.address}/{name}"], root)
    assert folder == root / "datasets" / "wikitext-2"
    assert (folder / "wiki.train.tokens").read_bytes() == TRAIN
    assert (folder / "wiki.valid.tokens").read_bytes() == VALID
    # Nothing else, and nothing outside: the archive has a member ../evil.
    assert files_below(tmp_path) == [f"home/{file}" for file in CORPUS]
    assert all("gluon_bert" in agent for _, agent in server.requests)
    asked = len(server.requests)
    assert wikitext2_folder([f"{server.address}/{name}"], root) == folder
    assert len(server.requests) == asked


FAILURES = {
    "missing.zip": "HTTP status 404",
    "xml.zip": "wrong content, 243 bytes of XML",
    "html.zip": "bytes of HTML",
    "other.zip": "bytes of another zip archive",
    "empty.zip": "wrong content, 0 bytes of nothing",
    "short.zip": "cut off before its end",
    "hangs.zip": "timed out, nothing for 0.3 s",
    "stalls.zip": "timed out, nothing for 0.3 s",
    "half/{}.txt": "wrong content",
}


@pytest.mark.parametrize("name", FAILURES)
def test_download_failure_is_reported_and_leaves_nothing(server, tmp_path, name):
    address = f"{server.address}/{name}"
    with pytest.raises(InputError) as printed:
        wikitext2_folder([address], tmp_path, timeout=0.3)
    message = str(printed.value)
    assert f"({address}: " in message and FAILURES[name] in message
    assert "corpus=PATH" in message and "\n" not in message
    # Of two plain files the first was whole and right: it may stay. Nothing else may.
    assert files_below(tmp_path) == (CORPUS[:1] if name.startswith("half") else [])


def test_download_without_server_is_refused(tmp_path):
    with pytest.raises(InputError, match="could not connect"):
        wikitext2_folder([f"{closed_port()}/good.zip"], tmp_path)
    assert files_below(tmp_path) == []


def test_download_too_long_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.setattr(wikitext, "_MAX_BYTES", 100)
    with pytest.raises(InputError, match="more than 100 bytes"):
        wikitext2_folder([f"{server.address}/good.zip"], tmp_path)
    assert files_below(tmp_path) == []


def test_download_too_slow_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.setattr(wikitext, "_LONGEST", 0.0)
    with pytest.raises(InputError, match="timed out after 0 s"):
        wikitext2_folder([f"{server.address}/good.zip"], tmp_path)


def test_download_tries_next_address(server, tmp_path):
    addresses = [f"{closed_port()}/good.zip", *(f"{server.address}/{name}" for name in FAILURES)]
    start = time.monotonic()
    folder = wikitext2_folder([*addresses, f"{server.address}/good.zip"], tmp_path, timeout=0.3)
    assert time.monotonic() - start < 5
    assert (folder / "wiki.valid.tokens").read_bytes() == VALID
    assert files_below(tmp_path) == CORPUS


def test_download_reports_all_failures(server, tmp_path):
    addresses = [f"{server.address}/missing.zip", f"{server.address}/xml.zip"]
    with pytest.raises(InputError) as printed:
        wikitext2_folder(addresses, tmp_path)
    for address in addresses:
        assert f"{address}: " in str(printed.value)


@pytest.mark.parametrize("content", [b"", TRAIN[:-1], XML], ids=["empty", "cut off", "XML"])
def test_wrong_file_is_downloaded_again(server, tmp_path, content):
    folder = wikitext2_folder([f"{server.address}/good.zip"], tmp_path)
    (folder / "wiki.train.tokens").write_bytes(content)
    wikitext2_folder([f"{server.address}/good.zip"], tmp_path)
    assert (folder / "wiki.train.tokens").read_bytes() == TRAIN
    assert len(server.requests) == 2


def test_archive_without_file_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.setattr(wikitext, "ARCHIVE_SHA1", sha1(OTHER_ARCHIVE))
    monkeypatch.setattr(wikitext, "FILES", {"wiki.valid.tokens": sha1(VALID)})
    with pytest.raises(InputError, match=r"the archive holds no wiki\.valid\.tokens"):
        wikitext2_folder([f"{server.address}/other.zip"], tmp_path)
    assert files_below(tmp_path) == []


def test_folder_not_writable_is_refused(tmp_path):
    (tmp_path / "datasets").write_text("a file where a folder should be", "utf-8")
    with pytest.raises(InputError, match="MXNET_HOME"):
        wikitext2_folder([], tmp_path)


def test_default_root_is_mxnets(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MXNET_HOME", str(tmp_path))
    assert wikitext2_folder([f"{server.address}/good.zip"]) == tmp_path / "datasets" / "wikitext-2"


@pytest.mark.parametrize("home", [None, "/somewhere/else", "~/data", "relative"])
def test_data_folder_is_mxnets(monkeypatch, home):
    if find_spec("mxnet") is None:
        pytest.skip("MXNet is not installed")
    from gluon_bert.runtime import mx

    if home is None:
        monkeypatch.delenv("MXNET_HOME", raising=False)
    else:
        monkeypatch.setenv("MXNET_HOME", home)
    # MXNet does not expand a ~ in the variable.
    assert data_folder() == Path(mx.base.data_dir()).expanduser()


def test_no_mxnet_and_no_requests_until_needed():
    code = (
        "import sys, gluon_bert.data.corpora.wikitext2; "
        "assert not {'mxnet', 'requests', 'tqdm'} & set(sys.modules), set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


class TestTheRealCorpus:
    """What is true of the official hashes, not of the small corpus above."""

    @pytest.fixture(autouse=True)
    def official(self, monkeypatch):
        monkeypatch.undo()

    def test_hashes_are_gluonnlps(self):
        text = self.source_of_gluonnlp()
        for known in (wikitext.ARCHIVE_SHA1, *wikitext.FILES.values()):
            assert known in text

    @staticmethod
    def source_of_gluonnlp():
        spec = find_spec("gluonnlp")
        if spec is None or spec.origin is None:
            pytest.skip("gluonnlp is not installed")
        return Path(spec.origin).with_name("data").joinpath("corpora", "wikitext.py").read_text("utf-8")

    def test_hash_of_the_valid_file(self):
        path = REPOSITORY.parent / "shared" / "wikitext-2" / "wiki.valid.tokens"
        if not path.is_file():
            pytest.skip(f"no copy of the official file at {path}")
        assert sha1(path.read_bytes()) == wikitext.FILES[path.name]

    def test_no_dead_address(self):
        assert not any("metamind" in address or "apache-mxnet" in address for address in wikitext.ADDRESSES)
