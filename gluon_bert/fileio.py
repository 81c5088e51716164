"""Atomic files and folders: written under a temporary name, synced, renamed.

Locks, hashes, UTF-8.
"""

from __future__ import annotations

import codecs
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Iterator, Mapping
from uuid import uuid4

from .errors import InputError

log = logging.getLogger(__name__)

# Half a surrogate pair, which JSON and names of files can hold and UTF-8 cannot.
SURROGATE = re.compile("[\ud800-\udfff]")


@contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file for writing, and rename it when the block ends without an error.

    Until then the bytes are in a hidden file beside it, the file's `name`. A reader of `path` sees the old
    content or the new, never a part. Text is UTF-8 with Unix line ends.

    >>> with atomic_write(Path("notes.txt")) as f:     # doctest: +SKIP
    ...     f.write("whole or not at all")
    """
    path = Path(path)
    text_options: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    aside = _temporary_path(path)
    try:
        with aside.open(mode.replace("w", "x"), **text_options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        sync(path.parent)
    except BaseException:
        with suppress(FileNotFoundError):  # not created yet, or it has its name already
            aside.unlink()
        raise


@contextmanager
def atomic_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """Create a temporary folder, and rename it when the block ends without an error.

    It replaces an empty folder of that name, or any folder if `replace` is set.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(path) as aside:
        yield aside
        for written in [*aside.rglob("*"), aside]:
            sync(written)
        if replace and path.exists():
            _exchange(path, aside)
        else:
            aside.replace(path)
        sync(path.parent)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Create a hidden folder beside a path, and remove it when the block ends."""
    folder = _temporary_path(path)
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _exchange(path: Path, new: Path) -> None:
    """Give a folder's name to a new folder and remove the old one; if that fails, the old one keeps it."""
    old = _temporary_path(path)
    try:
        # For a moment neither has the name: a folder cannot take that of one that is not empty.
        path.replace(old)
        new.replace(path)
    except BaseException:
        if not path.exists():
            old.replace(path)
        raise
    shutil.rmtree(old)


def _temporary_path(path: Path) -> Path:
    """Return a new name beside a path, as `remove_temporary_files` knows them.

    The caller knows the name before the file exists, so a signal at any moment leaves no file.
    """
    return path.parent / f".{path.name}.{uuid4().hex[:12]}.part"


def check_new_folder(folder: Path, option: str = "output") -> None:
    """Raise InputError, which names the option, if a folder is not empty or cannot be written."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{option} must be a new folder, got {folder}, which is not empty.")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(
            f"{option} must be a folder that can be written, got {folder}. Writing to {there} is not allowed."
        )


def check_utf8_path(path: Path) -> None:
    """Raise InputError unless UTF-8 can hold a path, as C libraries take no other ones."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{path} must be a path in UTF-8, as MXNet and onnxruntime read no other ones. Rename the folder."
        ) from error


def remove_temporary_files(folder: Path) -> None:
    """Remove what `atomic_write` and `atomic_folder` left in a folder when their process was killed."""
    for path in folder.glob(".*.part"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def sync(path: Path) -> None:
    """Sync the content of a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def exclusive_lock(folder: Path, option: str) -> Iterator[None]:
    """Lock a folder for this process. Raise InputError, which names the option, if another process has it.

    The lock ends with the process that holds it.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not lock(handle, folder, "train there", wait=False):
            raise InputError(
                f"{option} must be a folder where no other process trains, got {folder}. Wait for it or stop "
                "it."
            )
        yield
    finally:
        os.close(handle)


def lock(handle: int, folder: Path, purpose: str, wait: bool) -> bool:
    """Lock an open folder until it is closed; return False if another process has it, unless `wait`.

    Some network file systems cannot lock. A warning then says what only one process may do.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        log.warning("%s cannot be locked (%s): let one process at a time %s", folder, error.strerror, purpose)
    return True


def file_hash(path: Path, algorithm: str = "sha256") -> str:
    """Return the hash of a file in hexadecimal."""
    with path.open("rb") as file:
        return stream_hash(file, algorithm)


def stream_hash(file: IO[bytes], algorithm: str) -> str:
    """Return the hash of the rest of an open file in hexadecimal."""
    content = hashlib.new(algorithm)
    for block in iter(lambda: file.read(1 << 20), b""):
        content.update(block)
    return content.hexdigest()


# How files begin that are not text.
_BINARY_FORMATS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"PK\3\4": "a zip archive, which Excel's files are too",
    b"%PDF": "PDF",
}


def decode_utf8(content: bytes, where: str, first_line: int = 1) -> str:
    """Decode UTF-8. Raise InputError, which names the line of the first byte that is not UTF-8.

    where: names the file in the message. first_line: the number of the first line of this part. The first
    part may begin with a byte order mark.
    """
    if first_line == 1 and content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{where}: must be UTF-8, got UTF-16. Convert it: iconv -f UTF-16 -t UTF-8")
    try:
        return content.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        if first_line == 1:
            for beginning, name in _BINARY_FORMATS.items():
                if content.startswith(beginning):
                    raise InputError(
                        f"{where}: must be text in UTF-8, got {name}. Extract the text first."
                    ) from error
        line = first_line + content.count(b"\n", 0, error.start)
        raise InputError(
            f"{where}, line {line}: byte {content[error.start]:#04x} is not UTF-8. Convert the file, as in "
            "iconv -f WINDOWS-1252 -t UTF-8"
        ) from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    with atomic_write(path) as file:
        file.write(json_text(nan_to_null(content), indent=2, allow_nan=False) + "\n")


def json_text(content: Any, **options: Any) -> str:
    """Return JSON as UTF-8 can hold it: half a surrogate pair is escaped, so it is read back the same.

    options: of json.dumps.

    >>> json_text({"é": "\\ud83d"})
    '{"é": "\\\\ud83d"}'
    """
    text = json.dumps(content, ensure_ascii=False, **options)
    return SURROGATE.sub(lambda half: f"\\u{ord(half[0]):04x}", text)


def read_json(path: Path, kind: type = dict) -> Any:
    """Return the JSON object or list in a UTF-8 file; raise InputError for any other content."""
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, kind):
        wanted = "an object" if kind is dict else "a list"
        raise InputError(f"{path}: must hold {wanted} of JSON, got {type(content).__name__}")
    return content


def nan_to_null(content: Any) -> Any:
    """Return plain values with null for NaN and infinity."""
    if isinstance(content, Mapping):
        return {name: nan_to_null(value) for name, value in content.items()}
    return None if isinstance(content, float) and not math.isfinite(content) else content
