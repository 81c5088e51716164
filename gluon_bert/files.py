"""Files and folders that are whole or not there at all: written aside, synced and renamed; their hashes."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Iterator


@contextmanager
def written_aside(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file open for writing that takes its name only when the block ends without an error.

    Until then the bytes are in a hidden neighbour, the file's `name`, so a reader of `path` sees the old
    content or the new, never a part. Text is UTF-8 with Unix line ends.

    >>> with written_aside(Path("notes.txt")) as f:     # doctest: +SKIP
    ...     f.write("whole or not at all")
    """
    path = Path(path)
    text_options: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    try:
        with Path(name).open(mode, **text_options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private; a result is as readable as any file the user creates.
        Path(name).chmod(0o666 & ~_umask())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink()
        raise


@contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """A new folder to fill, which takes its name only when the block ends without an error.

    Until then it is a hidden neighbour. An empty folder of that name gives way.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    try:
        yield aside
        aside.chmod(0o777 & ~_umask())
        aside.replace(path)
    except BaseException:
        shutil.rmtree(aside)
        raise


def digest(path: Path, algorithm: str = "sha256") -> str:
    """A file's hash in hexadecimal."""
    with path.open("rb") as file:
        return stream_digest(file, algorithm)


def stream_digest(file: IO[bytes], algorithm: str) -> str:
    """The hash, in hexadecimal, of what is still to be read of a file; read piece by piece."""
    content = hashlib.new(algorithm)
    for block in iter(lambda: file.read(1 << 20), b""):
        content.update(block)
    return content.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
