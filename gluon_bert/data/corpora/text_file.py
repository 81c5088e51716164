"""Text files, compressed or not, in chunks of whole documents. Splits no sentences."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import IO, Any, Callable, Iterator

from ...errors import InputError
from ...fileio import decode_utf8
from .text_formats import TextChunk, end_of_documents, guess_format

# Bytes read at once: large enough to keep worker processes busy, small in memory.
BLOCK_BYTES = 1 << 20
# A document is read and split as a whole, which takes tens of times its size in memory. The longest novels
# have 15 MB. A larger document is probably a corpus without separators.
_LARGEST_DOCUMENT = 1 << 25

INSTALL_ZSTD = "pip install -e '.[zstd]'"


def _zstd() -> Any:
    """Return the module for Zstandard, Python's own from 3.14 on; raise InputError if it is missing."""
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return import_module(name)
        except ImportError:
            continue
    raise InputError(f"a .zst file needs the package backports.zstd and Python 3.9. Run {INSTALL_ZSTD}.")


_DECOMPRESS: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": lambda file: _zstd().ZstdFile(file),
}


# Formats with separated tokens; D2L's vocabulary of WikiText-2 has a byte order mark.
_TOKENIZED = ("wikitext", "articles")


def read_chunks(path: Path, text_format: str, language: str = "en") -> Iterator[TextChunk]:
    """Read a file's text in chunks that end where a document does.

    InputError names a line that is not UTF-8, and a document that is too large.
    """
    if text_format == "auto":
        text_format = {".tokens": "wikitext", ".raw": "paragraphs"}.get(uncompressed_suffix(path), "auto")
    line_number = first_line = 1
    pending: list[str] = []
    num_bytes = 0
    for block, block_bytes in _blocks(path):
        num_bytes += block_bytes
        if len(block) > _LARGEST_DOCUMENT and not block.endswith(b"\n"):  # its last line is incomplete
            raise _too_large(path, line_number + block.count(b"\n"))
        text = decode_utf8(block, f"corpus {path}", line_number).replace("\r\n", "\n").replace("\r", "\n")
        if text_format not in _TOKENIZED:
            text = _clean(text)
        line_number += block.count(b"\n")
        if text_format == "auto":
            text_format = guess_format(text, language)
        end = end_of_documents(text, text_format)
        if end:
            whole = "".join([*pending, text[:end]])
            yield TextChunk(whole, text_format, num_bytes=num_bytes, path=path, first_line=first_line)
            pending, num_bytes, first_line = [], 0, line_number - text.count("\n", end)
        pending.append(text[end:])
        if sum(map(len, pending)) > _LARGEST_DOCUMENT:
            raise _too_large(path, first_line)
    if any(pending):
        yield TextChunk("".join(pending), text_format, num_bytes=num_bytes, path=path, first_line=first_line)


def uncompressed_suffix(path: Path) -> str:
    """Return the ending of a file's name in lower case, without that of its compression."""
    return Path(path.stem if path.suffix.lower() in _DECOMPRESS else path.name).suffix.lower()


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn errors while a file is read into InputError, which names the file."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise InputError(
            f"corpus {path}: the {path.suffix} file is damaged or cut short ({error})"
        ) from error
    except OSError as error:
        if str(error) == "Invalid data stream":  # what bz2 raises
            raise InputError(f"corpus {path}: the {path.suffix} file is damaged ({error})") from error
        raise InputError(f"corpus {path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:
        if type(error).__name__ != "ZstdError":  # a name of a module that may not be there
            raise
        raise InputError(f"corpus {path}: the {path.suffix} file is damaged ({error})") from error


def _too_large(path: Path, line: int) -> InputError:
    return InputError(
        f"corpus {path}, line {line}: a document of more than {_LARGEST_DOCUMENT / 2**20:g} MB begins here. "
        "Put blank lines between documents, or choose a text_format that separates them"
    )


def _blocks(path: Path) -> Iterator[tuple[bytes, int]]:
    """Yield a file's content in blocks of whole lines, each with the bytes of the file itself that it took.

    A line that is larger than a document may be is cut.
    """
    with read_errors(path), path.open("rb") as file:
        decompress = _DECOMPRESS.get(path.suffix.lower())
        stream: IO[bytes] = decompress(file) if decompress else file
        before = 0
        while True:
            block = stream.read(BLOCK_BYTES)
            if not block:
                return
            block += stream.readline(_LARGEST_DOCUMENT)
            yield block, file.tell() - before
            before = file.tell()


def _clean(text: str) -> str:
    """Return the text without NUL and byte order marks, which programs leave in files."""
    return text.replace("\0", "").replace("\ufeff", "")
