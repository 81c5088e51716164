"""Downloads WikiText-2 once and verifies it. Does not parse its text.

Only files with the right SHA-1 are kept. The address in older tutorials now returns 243 bytes of XML, which
some programs saved as the corpus.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import sys
import tempfile
import time
import zipfile
from pathlib import Path, PurePosixPath
from typing import IO, Sequence

from ...errors import InputError
from ...fileio import atomic_write, file_hash, stream_hash

log = logging.getLogger(__name__)

# SHA-1 of the official archive and of its files, as gluonnlp.data.WikiText2 has them too.
ARCHIVE_SHA1 = "3c914d17d80b1459be871a5039ac23e752a53cbe"
FILES = {
    "wiki.train.tokens": "863f29c46ef9d167fff4940ec821195882fe29d1",
    "wiki.valid.tokens": "0418625c8b4da6e4b5c7a0b9e78d4ae8f7ee5422",
}

# Archives, or single files in which {} is train or valid. Dead, and so not here: the publisher's
# s3.amazonaws.com/research.metamind.io (d2l-en #2588) and gluonnlp's apache-mxnet bucket (tvm #16546).
ADDRESSES = (
    # The author's own site: alive in 2026 (Quartet #11, AiDotNet #1284); it refuses urllib's User-Agent.
    "https://wikitext.smerity.com/wikitext-2-v1.zip",
    # Put there by the author (pytorch/examples #265).
    "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2/{}.txt",
    # Attached to an answer of 2024 (Uni-Core #47).
    "https://github.com/dptech-corp/Uni-Core/files/15258412/wikitext-2-v1.zip",
)

USER_AGENT = "gluon_bert (fetches WikiText-2 once, then keeps it)"
TIMEOUT = 30.0
_LONGEST = 900.0  # seconds for one file, however steadily its bytes drip
_MAX_BYTES = 1 << 25  # three times the largest of the files
_BLOCK = 1 << 16


def data_folder() -> Path:
    """MXNet's own folder for data, `mx.base.data_dir()`, without importing MXNet: $MXNET_HOME or ~/.mxnet."""
    if platform.system() == "Windows":
        default = os.path.join(os.environ.get("APPDATA", "~"), "mxnet")  # noqa: PTH118 - may be unexpanded
    else:
        default = "~/.mxnet"
    return Path(os.environ.get("MXNET_HOME", default)).expanduser()


def wikitext2_folder(
    addresses: Sequence[str] = ADDRESSES, root: Path | None = None, timeout: float = TIMEOUT
) -> Path:
    """Return the folder datasets/wikitext-2 with the verified files wiki.train.tokens and wiki.valid.tokens.

    root: where that folder is, `data_folder()` unless given. timeout: seconds without an answer or a
    further byte. No network is used when the files are there. Otherwise the addresses are tried in turn;
    InputError says what each of them answered when all fail.
    """
    folder = (data_folder() if root is None else root) / "datasets" / "wikitext-2"
    if not _missing(folder):
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder}: {error.strerror}; set MXNET_HOME to a folder that can be written"
        ) from error
    failures = []
    for address in addresses:
        try:
            _download(address, folder, timeout)
            return folder
        except _Failed as failure:
            log.info("%s: %s", address, failure)
            failures.append(f"{address}: {failure}")
    raise InputError(
        f"WikiText-2 could not be downloaded ({'; '.join(failures)}): fetch wikitext-2-v1.zip by other "
        "means, unpack it and pass the folder as corpus=PATH"
    )


class _Failed(Exception):
    """The reason why a download failed."""


def _missing(folder: Path) -> list[str]:
    return [
        name
        for name, sha1 in FILES.items()
        if not ((folder / name).is_file() and file_hash(folder / name, "sha1") == sha1)
    ]


def _download(address: str, folder: Path, timeout: float) -> None:
    """Brings what is missing in the folder; a file that is kept has been verified."""
    log.info("WikiText-2: fetching %s", address)
    if "{}" in address:
        for name in _missing(folder):
            with _fetched(address.format(name.split(".")[1]), FILES[name], folder, timeout) as file:
                _keep(file, folder / name)
        return
    with _fetched(address, ARCHIVE_SHA1, folder, timeout) as file, zipfile.ZipFile(file) as archive:
        # Members are looked for by their last name and written under ours, so no path of the archive counts.
        members = {PurePosixPath(name).name: name for name in archive.namelist()}
        for name in _missing(folder):
            if name not in members:
                raise _Failed(f"the archive holds no {name}")
            with archive.open(members[name]) as member:
                _keep(member, folder / name)


def _keep(source: IO[bytes], path: Path) -> None:
    with atomic_write(path, "wb") as file:
        shutil.copyfileobj(source, file)


def _fetched(address: str, sha1: str, folder: Path, timeout: float) -> IO[bytes]:
    """Download an address to a temporary file. Raise _Failed unless its hash is `sha1`."""
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - the caller closes it
    try:
        _receive(address, file, timeout)
        size = file.tell()
        file.seek(0)
        start = file.read(64)
        file.seek(0)
        found = stream_hash(file, "sha1")
        if found != sha1:
            raise _Failed(
                f"wrong content, {size:,} bytes of {_kind(start)} (SHA-1 {found[:12]}, not {sha1[:12]})"
            )
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def _receive(address: str, file: IO[bytes], timeout: float) -> None:
    # Imported here: they take 0.2 s, and most runs do not download.
    import requests
    from tqdm import tqdm

    headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity"}
    deadline = time.monotonic() + _LONGEST
    try:
        with requests.get(address, headers=headers, stream=True, timeout=timeout) as response:
            if response.status_code != 200:
                raise _Failed(f"HTTP status {response.status_code}")
            total = int(response.headers.get("Content-Length") or 0)
            # Only on a terminal: in a log file it would be noise.
            with tqdm(total=total or None, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
                for block in response.iter_content(_BLOCK):
                    file.write(block)
                    bar.update(len(block))
                    if file.tell() > _MAX_BYTES:
                        raise _Failed(f"wrong content, more than {_MAX_BYTES:,} bytes")
                    if time.monotonic() > deadline:
                        raise _Failed(f"timed out after {_LONGEST:g} s, {file.tell():,} bytes received")
    except requests.exceptions.ChunkedEncodingError as error:
        raise _Failed("cut off before its end") from error
    except requests.RequestException as error:
        # A timeout within the body is a ConnectionError, recognizable only by its text.
        if isinstance(error, requests.Timeout) or "timed out" in str(error):
            raise _Failed(f"timed out, nothing for {timeout:g} s") from error
        if isinstance(error, requests.ConnectionError):
            raise _Failed("could not connect") from error
        raise _Failed(type(error).__name__) from error
    # urllib3 before 2.0 does not miss the bytes that were announced and did not come.
    if file.tell() < total:
        raise _Failed("cut off before its end")


def _kind(start: bytes) -> str:
    """Describe content for a message: an error page or another corpus."""
    head = start.lstrip().lower()
    if head.startswith(b"<?xml"):
        return "XML"
    if head.startswith((b"<!doctype", b"<html")):
        return "HTML"
    if head.startswith(b"pk\x03\x04"):
        return "another zip archive"
    return f"something that starts with {start[:16]!r}" if start else "nothing"
