"""Where text comes from: a corpus as documents, lists of sentences whose words stand apart by spaces.

No ids here, and no MXNet: pieces of text are read in order and may be parsed in worker processes.
"""

from __future__ import annotations

import hashlib
import logging
from importlib import metadata
from pathlib import Path
from typing import Iterator, NamedTuple, Sequence

from ...config import DataConfig
from ...errors import InputError
from . import pydoc
from .text_formats import _PIECE_BYTES, TextChunk, _told_by_name, _without_gz, pieces
from .wikitext2 import wikitext2_folder

log = logging.getLogger(__name__)


ENDINGS = (".txt", ".text", ".md", ".tokens")
WIKITEXT_TRAIN, WIKITEXT_VALID, WIKITEXT_TEST = (f"wiki.{part}.tokens" for part in ("train", "valid", "test"))


class TextFile(NamedTuple):
    """A file of text and whether all of it is held out (None: by the share asked for)."""

    path: Path
    validation: bool | None


class Corpus:
    """The text of one or more sources, in pieces to be parsed.

    num_bytes: of all files, packed as they may be. `fingerprint` tells one content from another. Raises
    InputError where there is nothing to be read.
    """

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self._told: set[str] = set()
        self._files: list[TextFile] = []
        self._prose: list[pydoc.Source] = []
        problems = [] if config.corpus else ["--corpus: must name a corpus, a file or a folder"]
        for name in config.corpus:
            try:
                if name == "pydoc":
                    self._prose = pydoc.source_files()
                else:
                    self._files += text_files(wikitext2_folder() if name == "wikitext-2" else Path(name))
            except InputError as problem:
                problems.append(str(problem))
        if problems:
            raise InputError("\n".join(problems))
        self._files = _each_once(self._files)
        paths = [file.path for file in self._files] + [source.path for source in self._prose]
        self.num_bytes = sum(path.stat().st_size for path in paths)

    def pieces(self) -> Iterator[TextChunk]:
        """All of the text, always in the same pieces; the first file of each guessed format is told."""
        for source in self._prose:
            yield TextChunk("", "pydoc", num_bytes=source.path.stat().st_size, source=source)
        config = self._config
        for file in self._files:
            for piece in pieces(file.path, config.text_format, config.language):
                if config.text_format == "auto" and piece.text_format not in self._told:
                    self._told.add(piece.text_format)
                    log.info("%s: read as %s (--text-format changes that)", file.path, piece.text_format)
                yield piece._replace(validation=file.validation)

    def fingerprint(self) -> str:
        """A hash of what would be read: the files' content, or the versions behind the pydoc prose."""
        digest = hashlib.sha1(metadata.version("sentencex").encode())
        if self._prose:
            digest.update(pydoc.fingerprint().encode())
        for file in self._files:
            digest.update(f"{file.path.name} {file.validation} ".encode())
            with _told_by_name(file.path), file.path.open("rb") as stream:
                for block in iter(lambda: stream.read(_PIECE_BYTES), b""):
                    digest.update(block)
        return digest.hexdigest()


def text_files(path: Path) -> list[TextFile]:
    """The files of text at a path, in the order of their names; InputError where there is none.

    Beside WikiText's train file its valid file is held out whole, and whatever else is there left alone.
    """
    if not path.exists():
        raise InputError(
            f"--corpus {path}: no such file or folder; or name pydoc or wikitext-2, the corpora known by name"
        )
    if path.is_file():
        return _with_its_valid_file(path)
    if not path.is_dir():
        raise InputError(f"--corpus {path}: is no regular file; write the text to one first")
    if (path / WIKITEXT_TRAIN).is_file():
        return _with_its_valid_file(path / WIKITEXT_TRAIN)
    found = [file for file in sorted(path.rglob("*")) if file.is_file() and _is_text(file.relative_to(path))]
    if not found:
        raise InputError(
            f"--corpus {path}: the folder holds no file that ends in {', '.join(ENDINGS)} or these and .gz"
        )
    return [text for file in found for text in _with_its_valid_file(file)]


def _each_once(files: Sequence[TextFile]) -> list[TextFile]:
    """The files without repetitions, however they were named; what is held out whole stays held out.

    Whoever names all of WikiText's files means its training text: the test file is not part of it.
    """
    known: dict[Path, TextFile] = {}
    for file in files:
        path = file.path.resolve()
        if path not in known or known[path].validation is None:
            known[path] = file
    trained = {path.parent for path in known if path.name == WIKITEXT_TRAIN}
    return [file for path, file in known.items() if path.name != WIKITEXT_TEST or path.parent not in trained]


def _with_its_valid_file(path: Path) -> list[TextFile]:
    valid = path.with_name(WIKITEXT_VALID)
    if path.name == WIKITEXT_TRAIN and valid.is_file():
        return [TextFile(path, False), TextFile(valid, True)]
    return [TextFile(path, None)]


def _is_text(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and _without_gz(path).suffix.lower() in ENDINGS
