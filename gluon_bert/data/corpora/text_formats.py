"""Text formats to documents: wikitext, articles, sentences, prose, paragraphs. Opens no file."""

from __future__ import annotations

import gzip
import re
import zlib
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Callable, Iterator, List, NamedTuple

import sentencex

from ...config import DataConfig
from ...errors import InputError
from .. import basic_tokenizer
from ..vocab import Normalization, split_words
from . import pydoc

Document = List[str]


# Bytes read at once: large enough to keep worker processes busy, small enough to stay out of sight in memory.
_PIECE_BYTES = 1 << 20


# A document is read, cut and numbered as a whole, which takes tens of times its size in memory. The longest
# novels have 15 MB: whatever is larger is a corpus whose documents are not told apart.
_LARGEST_DOCUMENT = 1 << 25


_SAMPLED_LINES = 200


# Above this mean length, in characters, a line is a paragraph and not a row of wrapped text.
_PARAGRAPH_LINE = 200


# WikiText's heading of an article, ` = Title = ` between blank lines; sections have two equals signs or more.
_ARTICLE = re.compile(r"^ ?\n = [^=\n].* = $(?=\n ?\n)", re.M)


_ENDS_A_SENTENCE = re.compile(r"[.!?…。！？]['\"’”)\]]*\s*$")


class TextChunk(NamedTuple):
    """Some whole documents, not parsed yet: of a text file, or all that a source of the pydoc prose has.

    validation: whether all of it is (None: by the share asked for). num_bytes: of the file that it came from.
    """

    text: str
    text_format: str
    validation: bool | None = None
    num_bytes: int = 0
    source: pydoc.Source | None = None


class ParsedChunk(NamedTuple):
    """The documents of a piece, and which of them are held out.

    dropped: how many others had one sentence only, and how many words these had together.
    """

    documents: list[Document]
    validation: list[bool]
    dropped: tuple[int, int]


def pieces(path: Path, text_format: str, language: str = "en") -> Iterator[TextChunk]:
    """A file's text in pieces that end where a document does.

    InputError names a line that is not UTF-8, and a document that is too large to be one.
    """
    if text_format == "auto" and _without_gz(path).suffix == ".tokens":
        text_format = "wikitext"
    line_number = pending_from = 1
    pending: list[str] = []
    num_bytes = 0
    for block, block_bytes in _blocks(path):
        num_bytes += block_bytes
        if len(block) > _LARGEST_DOCUMENT and not block.endswith(b"\n"):  # its last line goes on
            raise _too_large(path, line_number + block.count(b"\n"))
        text = _decoded(block, path, line_number)
        line_number += block.count(b"\n")
        if text_format == "auto":
            text_format = guess_format(text, language)
        end = _end_of_documents(text, text_format)
        if end:
            yield TextChunk("".join([*pending, text[:end]]), text_format, num_bytes=num_bytes)
            pending, num_bytes, pending_from = [], 0, line_number - text.count("\n", end)
        pending.append(text[end:])
        if sum(map(len, pending)) > _LARGEST_DOCUMENT:
            raise _too_large(path, pending_from)
    if any(pending):
        yield TextChunk("".join(pending), text_format, num_bytes=num_bytes)


def _too_large(path: Path, line: int) -> InputError:
    return InputError(
        f"--corpus {path}, line {line}: a document of more than {_LARGEST_DOCUMENT / 2**20:g} MB begins "
        "here; put blank lines between documents, or name what parts them with --text-format"
    )


def guess_format(text: str, language: str) -> str:
    """What a text looks like from its first lines: sentences, paragraphs or prose."""
    lines = [line for line in text.split("\n") if line.strip()][:_SAMPLED_LINES]
    if not lines:
        return "prose"
    single = [
        line for line in lines if _ENDS_A_SENTENCE.search(line) and len(split_sentences(line, language)) == 1
    ]
    if len(single) >= 0.9 * len(lines):
        return "sentences"
    return "paragraphs" if sum(map(len, lines)) > _PARAGRAPH_LINE * len(lines) else "prose"


def parse(piece: TextChunk, config: DataConfig) -> ParsedChunk:
    """The documents of a piece that have two sentences at least; WikiText's may have one, as the book's."""
    documents = [document for document in _documents(piece, config) if document]
    kept = documents
    if config.tokenizer != "words" or piece.text_format not in ("wikitext", "articles"):
        kept = [document for document in documents if len(document) >= 2]
    if piece.validation is None:
        validation = [is_validation(document, config.validation_fraction) for document in kept]
    else:
        validation = [piece.validation] * len(kept)
    single = [document[0] for document in documents if len(document) == 1] if kept is not documents else []
    return ParsedChunk(kept, validation, (len(single), sum(len(sentence.split()) for sentence in single)))


def _documents(piece: TextChunk, config: DataConfig) -> list[Document]:
    """All documents of a piece, of however many sentences, none of which is empty."""
    text, tokenizer = piece.text, config.tokenizer
    if piece.text_format in ("wikitext", "articles"):
        text = text.lower() if config.lowercase and tokenizer == "words" else text
        articles = _ARTICLE.split(text) if piece.text_format == "articles" else text.split("\n")
        documents = [_wikitext_sentences(article) for article in articles]
        if tokenizer == "words":  # which stand apart already
            return documents
    elif piece.source:
        documents = [split_sentences(paragraph, "en") for paragraph in pydoc.paragraphs(piece.source)]
    elif piece.text_format == "sentences":
        documents = [block.split("\n") for block in _between_blank_lines(text)]
    else:
        lines = text.split("\n") if piece.text_format == "paragraphs" else _between_blank_lines(text)
        documents = [split_sentences(line, config.language) for line in lines]
    spaced_words = _word_splitter(config)
    spaced = [[spaced_words(sentence) for sentence in sentences] for sentences in documents]
    return [[s for s in sentences if s] for sentences in spaced]


def split_sentences(text: str, language: str) -> list[str]:
    """Running text to sentences, by the rules of a two-letter language code (English where it has none)."""
    # Its capitals matter; white space other than single spaces makes some versions of sentencex fail.
    return [sentence.strip() for sentence in sentencex.segment(language, " ".join(text.split()))]


def is_validation(document: Document, share: float) -> bool:
    """Whether a document belongs to the validation share: a matter of its text alone, not of its place.

    So equal documents are always on the same side, and the number of processes changes nothing.
    """
    return zlib.crc32("\n".join(document).encode("utf-8", "surrogatepass")) < share * 2**32


def _wikitext_sentences(text: str) -> list[str]:
    """The sentences of the paragraphs with ` . ` in them, as the book parts them: without the dots."""
    return [s for line in text.split("\n") if " . " in line for s in line.strip().split(" . ")]


def _word_splitter(config: DataConfig) -> Callable[[str], str]:
    """What splits a sentence into words and joins them by single spaces."""
    if config.tokenizer == "wordpiece":
        return partial(basic_tokenizer.spaced_words, normalization=Normalization.from_config(config))
    return lambda text: " ".join(split_words(text.lower() if config.lowercase else text))


def _between_blank_lines(text: str) -> list[str]:
    return re.split(r"\n[^\S\n]*(?:\n[^\S\n]*)+", text.strip())


def _end_of_documents(lines: str, text_format: str) -> int:
    """Where the last whole document of some whole lines ends: behind the last line, or the last blank one."""
    if text_format in ("wikitext", "paragraphs"):
        return lines.rfind("\n") + 1
    if text_format == "articles":
        return max((match.start() for match in _ARTICLE.finditer(lines)), default=0)
    last = 0
    for match in re.finditer(r"^[^\S\n]*\n", lines, re.M):
        last = match.end()
    return last


def _blocks(path: Path) -> Iterator[tuple[bytes, int]]:
    """A file's content in blocks of whole lines, and how many bytes of the file itself each of them took.

    A line that is larger than a document may be is cut.
    """
    with _told_by_name(path), path.open("rb") as file:
        stream: IO[bytes] = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file  # type: ignore[assignment]
        before = 0
        while True:
            block = stream.read(_PIECE_BYTES)
            if not block:
                return
            block += stream.readline(_LARGEST_DOCUMENT)
            yield block, file.tell() - before
            before = file.tell()


@contextmanager
def _told_by_name(path: Path) -> Iterator[None]:
    """What goes wrong with the file, as InputError."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"--corpus {path}: the .gz file is damaged or cut short ({error})") from error
    except OSError as error:
        raise InputError(f"--corpus {path}: cannot be read ({error.strerror or error})") from error


def _decoded(block: bytes, path: Path, first_line: int) -> str:
    try:
        text = block.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + block.count(b"\n", 0, error.start)
        raise InputError(
            f"--corpus {path}, line {line}: byte {block[error.start]:#04x} is not UTF-8; convert it first"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _without_gz(path: Path) -> Path:
    return path.with_suffix("") if path.suffix == ".gz" else path
