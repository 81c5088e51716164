"""Text formats to documents: wikitext, articles, sentences, prose, paragraphs, jsonl, wikiextractor.

Opens no file.
"""

from __future__ import annotations

import html
import json
import re
import zlib
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, List, NamedTuple

import sentencex

from ...config import DataConfig
from ...errors import InputError
from .. import basic_tokenizer
from ..vocab import Normalization, split_words
from . import pydoc

Document = List[str]

_SAMPLED_LINES = 200
# Above this mean length, in characters, a line is a paragraph. Below it, it is wrapped text or a sentence.
_PARAGRAPH_LINE = 200
# If a larger share of the lines has several sentences or parts of sentences, a line is not a sentence.
_FEW = 0.1

# A long text is split into sentences in pieces of at most 5,000 characters. A piece ends where the text ends,
# after a full stop or after a space. sentencex 0.6, the last version for Python 3.8, takes quadratic time for
# quotation marks and brackets.
_PIECE = re.compile(r".{1,5000}\Z|.{1,4998}(?:[.!?…] |[。！？।])|.{1,4999} |.{1,5000}")

# WikiText's heading of an article, ` = Title = ` between blank lines; sections have two equals signs or more.
_ARTICLE = re.compile(r"^ ?\n = [^=\n].* = $(?=\n ?\n)", re.M)
_ENDS_A_SENTENCE = re.compile(r"[.!?…。！？।။។]['\"’”)\]」』]*\s*$")
_BLANK_LINES = re.compile(r"\n[^\S\n]*(?:\n[^\S\n]*)+")
# Scripts that separate sentences by spaces: Thai and Lao.
_SPACE_ENDS_A_SENTENCE = re.compile("[\u0e00-\u0eff]")
# An article of WikiExtractor's output.
_DOC = re.compile(r"^<doc [^>\n]*>\n(.*?)^</doc>$", re.M | re.S)


class TextChunk(NamedTuple):
    """Some whole documents that are not parsed yet: of a text file, or all that a source of pydoc has.

    validation: whether all of it is validation text (None: a share of it). num_bytes: of the file that it
    came from. path, first_line: where it begins.
    """

    text: str
    text_format: str
    validation: bool | None = None
    num_bytes: int = 0
    source: pydoc.Source | None = None
    path: Path | None = None
    first_line: int = 1


class ParsedChunk(NamedTuple):
    """The documents of a chunk, and which of them are validation text.

    dropped: the number of documents with one sentence, which are left out, and of their words.
    """

    documents: list[Document]
    validation: list[bool]
    dropped: tuple[int, int]


def guess_format(text: str, language: str) -> str:
    """Guess the format of a text from its first lines."""
    lines = [line for line in text.split("\n") if line.strip()][:_SAMPLED_LINES]
    if not lines:
        return "prose"
    if lines[0].startswith("<doc ") and lines[0].endswith(">"):
        return "wikiextractor"
    if lines[0].startswith("{") and isinstance(_json(lines[0]), dict):
        return "jsonl"
    counts = [len(split_sentences(line, language)) for line in lines]
    several = sum(count > 1 for count in counts)
    whole = sum(count == 1 and bool(_ENDS_A_SENTENCE.search(line)) for line, count in zip(lines, counts))
    if whole >= (1 - _FEW) * len(lines):
        return "sentences"
    if sum(map(len, lines)) > _PARAGRAPH_LINE * len(lines):
        return "paragraphs"
    # Sentences without full stops. Wrapped text has the end of a sentence within many a line.
    if several <= _FEW * len(lines) and _has_blocks_of_lines(text):
        return "sentences"
    return "prose"


def _has_blocks_of_lines(text: str) -> bool:
    """Return whether blank lines separate blocks that have two lines or more, in the mean."""
    blocks = [block for block in _BLANK_LINES.split(text.strip()) if block]
    return len(blocks) > 1 and sum(block.count("\n") + 1 for block in blocks) >= 2 * len(blocks)


def parse(chunk: TextChunk, config: DataConfig) -> ParsedChunk:
    """Parse a chunk into documents of at least two sentences; WikiText's may have one, as D2L's."""
    documents = [document for document in _documents(chunk, config) if document]
    kept = documents
    if config.tokenizer != "words" or chunk.text_format not in ("wikitext", "articles"):
        kept = [document for document in documents if len(document) >= 2]
    if chunk.validation is None:
        validation = [is_validation(document, config.validation_fraction) for document in kept]
    else:
        validation = [chunk.validation] * len(kept)
    single = [document[0] for document in documents if len(document) == 1] if kept is not documents else []
    return ParsedChunk(kept, validation, (len(single), sum(len(sentence.split()) for sentence in single)))


def _documents(chunk: TextChunk, config: DataConfig) -> list[Document]:
    """Return all documents of a chunk, of any number of sentences; sentences without a word are left out."""
    text, language = chunk.text, config.language
    if chunk.text_format in ("wikitext", "articles"):
        text = text.lower() if config.lowercase and config.tokenizer == "words" else text
        articles = _ARTICLE.split(text) if chunk.text_format == "articles" else text.split("\n")
        documents = [_wikitext_sentences(article) for article in articles]
        if config.tokenizer == "words":  # which are separated already
            return documents
    elif chunk.source:
        documents = [split_sentences(paragraph, "en") for paragraph in pydoc.paragraphs(chunk.source)]
    elif chunk.text_format == "sentences":
        documents = [block.split("\n") for block in _BLANK_LINES.split(text.strip())]
    elif chunk.text_format == "jsonl":
        documents = [_sentences_of(_BLANK_LINES.split(each), language) for each in _json_texts(chunk)]
    elif chunk.text_format == "wikiextractor":
        documents = [_sentences_of(_article_lines(each), language) for each in _DOC.findall(text)]
    else:
        lines = text.split("\n") if chunk.text_format == "paragraphs" else _BLANK_LINES.split(text.strip())
        documents = [split_sentences(line, language) for line in lines]
    spaced_words = _word_splitter(config)
    spaced = [[spaced_words(sentence) for sentence in sentences] for sentences in documents]
    return [[sentence for sentence in sentences if sentence] for sentences in spaced]


def split_sentences(text: str, language: str) -> list[str]:
    """Split running text into sentences by the rules of a two-letter language code, or else English.

    Thai and Lao separate sentences by spaces.
    """
    if len(_SPACE_ENDS_A_SENTENCE.findall(text)) > len(text) / 2:
        return text.split()
    # White space other than single spaces makes some versions of sentencex fail.
    pieces = _PIECE.findall(" ".join(text.split()))
    return [sentence.strip() for piece in pieces for sentence in sentencex.segment(language, piece.strip())]


def is_validation(document: Document, share: float) -> bool:
    """Return whether a document belongs to the validation share. Depends on its text alone, not on its place.

    So equal documents are always on the same side, and the number of processes changes nothing.
    """
    return zlib.crc32("\n".join(document).encode("utf-8", "surrogatepass")) < share * 2**32


def end_of_documents(lines: str, text_format: str) -> int:
    """Return the end of the last whole document, in characters."""
    if text_format in ("wikitext", "paragraphs", "jsonl"):
        return lines.rfind("\n") + 1
    if text_format == "articles":
        return max((match.start() for match in _ARTICLE.finditer(lines)), default=0)
    if text_format == "wikiextractor":
        end = lines.rfind("\n</doc>\n")
        return end + len("\n</doc>\n") if end >= 0 else 0
    last = 0
    for match in re.finditer(r"^[^\S\n]*\n", lines, re.M):
        last = match.end()
    return last


def _wikitext_sentences(text: str) -> list[str]:
    """Return the sentences of the paragraphs with ` .

    ` in them, split as D2L splits them, without the dots.
    """
    return [s for line in text.split("\n") if " . " in line for s in line.strip().split(" . ")]


def _sentences_of(paragraphs: list[str], language: str) -> list[str]:
    return [sentence for paragraph in paragraphs for sentence in split_sentences(paragraph, language)]


def _article_lines(text: str) -> list[str]:
    """Return the paragraphs of a WikiExtractor article, without the title above them."""
    title, blank, body = text.partition("\n\n")
    return html.unescape(body if blank and "\n" not in title else text).split("\n")


def _json_texts(chunk: TextChunk) -> Iterator[str]:
    """Yield the field `text` of each line's object. Raise InputError, which names a line without one."""
    for number, line in enumerate(chunk.text.split("\n"), chunk.first_line):
        if not line.strip():
            continue
        content = _json(line)
        if not isinstance(content, dict) or not isinstance(content.get("text"), str):
            names = (
                f"the fields {', '.join(map(repr, content))}" if isinstance(content, dict) else "no object"
            )
            raise InputError(
                f"corpus {chunk.path}, line {number}: must be a JSON object with the text "
                f"in the field text, got {names}"
            )
        yield content["text"]


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _word_splitter(config: DataConfig) -> Callable[[str], str]:
    """Return a function that splits a sentence into words and joins them by single spaces."""
    if config.tokenizer == "wordpiece":
        return partial(basic_tokenizer.spaced_words, normalization=Normalization.from_config(config))
    return lambda text: " ".join(split_words(text.lower() if config.lowercase else text))
