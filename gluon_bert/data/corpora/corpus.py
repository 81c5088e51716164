"""Sources of text: names, files and folders. Finds the files and reads them; parses nothing."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Iterator, NamedTuple, Sequence

from ...config import DataConfig
from ...errors import InputError
from . import pydoc
from .text_file import BLOCK_BYTES, read_chunks, read_errors, uncompressed_suffix
from .text_formats import TextChunk
from .wikitext2 import wikitext2_folder

log = logging.getLogger(__name__)


ENDINGS = (".txt", ".text", ".md", ".tokens", ".raw", ".jsonl")
WIKITEXT_TRAIN, WIKITEXT_VALID, WIKITEXT_TEST = (f"wiki.{part}.tokens" for part in ("train", "valid", "test"))
_TRAIN = re.compile(r"wiki\.train\.(tokens|raw)")
# The names of WikiExtractor's files.
_WIKIEXTRACTOR = re.compile(r"wiki_\d+(\.bz2)?")


class TextFile(NamedTuple):
    """A file of text and whether all of it is validation text (None: a share of it)."""

    path: Path
    validation: bool | None


class Corpus:
    """The text of one or more sources, in chunks to parse.

    num_bytes: of all files, compressed or not. guessed: the guessed formats, each with its first file. Raise
    InputError if there is no text.
    """

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self.guessed: dict[str, Path] = {}
        self._files: list[TextFile] = []
        self._prose: list[pydoc.Source] = []
        problems = [] if config.corpus else ["corpus must name a corpus, a file or a folder"]
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

    def chunks(self) -> Iterator[TextChunk]:
        """Read all of the text, always in the same chunks; log the first file of each guessed format."""
        for source in self._prose:
            yield TextChunk("", "pydoc", num_bytes=source.path.stat().st_size, source=source)
        config = self._config
        for file in self._files:
            for chunk in read_chunks(file.path, config.text_format, config.language):
                if config.text_format == "auto" and chunk.text_format not in self.guessed:
                    self.guessed[chunk.text_format] = file.path
                    log.info("%s is read as %s (text_format changes that)", file.path, chunk.text_format)
                yield chunk._replace(validation=file.validation)

    def fingerprint(self) -> str:
        """Return a hash of the text: of the files' content, or of the versions behind the pydoc prose."""
        digest = hashlib.sha1(metadata.version("sentencex").encode())
        if self._prose:
            digest.update(pydoc.fingerprint().encode())
        for file in self._files:
            digest.update(os.fsencode(file.path.name) + f" {file.validation} ".encode())
            with read_errors(file.path), file.path.open("rb") as stream:
                for block in iter(lambda: stream.read(BLOCK_BYTES), b""):
                    digest.update(block)
        return digest.hexdigest()


def text_files(path: Path) -> list[TextFile]:
    """Return the files of text at a path, in the order of their names.

    Raise InputError if there is none. WikiText's valid file is validation text for its train file. Its test
    file is not read. Runs of this package in the folder are no text. The log counts the other files.
    """
    if not path.exists():
        raise InputError(
            f"corpus must be a file, a folder, pydoc or wikitext-2, got {path}, which does not exist."
        )
    if path.is_file():
        return _with_its_valid_file(path)
    if not path.is_dir():
        raise InputError(f"corpus {path}: must be a regular file or a folder. Write the text to a file first")
    for name in (WIKITEXT_TRAIN, "wiki.train.raw"):
        if (path / name).is_file():
            return _with_its_valid_file(path / name)
    inside = sorted(path.rglob("*"))
    runs = {
        file.parent
        for file in inside
        if file.name == "config.json" and (file.parent / "checkpoints").is_dir()
    }
    everything = [
        file
        for file in inside
        if not file.is_dir() and not _is_hidden(file, path) and runs.isdisjoint(file.parents)
    ]
    found = [file for file in everything if file.is_file() and _is_text(file)]
    left_out = [file for file in everything if file not in set(found)]
    if not found:
        raise InputError(
            f"corpus {path}: must hold a file that ends in {', '.join(ENDINGS)}, which may be followed by "
            f".gz, .bz2, .xz or .zst; got {_endings(left_out) or 'an empty folder'}"
        )
    if left_out:
        log.info("%s: read %d files, left out %d (%s)", path, len(found), len(left_out), _endings(left_out))
    return [text for file in found for text in _with_its_valid_file(file)]


def _endings(files: Sequence[Path]) -> str:
    """Return the endings of files with their numbers: `.csv 2, link to nothing 1`."""
    counts = Counter(
        "link to nothing" if file.is_symlink() and not file.exists() else file.suffix.lower() or "no ending"
        for file in files
    )
    return ", ".join(f"{ending} {count}" for ending, count in sorted(counts.items()))


def _each_once(files: Sequence[TextFile]) -> list[TextFile]:
    """Return the files without repetitions, however they were named; validation text stays validation text.

    If all of WikiText's files are named, the test file is left out.
    """
    known: dict[Path, TextFile] = {}
    for file in files:
        path = file.path.resolve()
        if path not in known or known[path].validation is None:
            known[path] = file
    trained = {path.parent for path in known if path.name == WIKITEXT_TRAIN}
    return [file for path, file in known.items() if path.name != WIKITEXT_TEST or path.parent not in trained]


def _with_its_valid_file(path: Path) -> list[TextFile]:
    valid = path.with_name(path.name.replace("train", "valid"))
    if _TRAIN.fullmatch(path.name) and valid.is_file():
        return [TextFile(path, False), TextFile(valid, True)]
    return [TextFile(path, None)]


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _is_text(path: Path) -> bool:
    return uncompressed_suffix(path) in ENDINGS or bool(_WIKIEXTRACTOR.fullmatch(path.name))
