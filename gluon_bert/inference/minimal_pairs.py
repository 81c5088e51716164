"""Read and judge minimal pairs such as BLiMP.

BLiMP: Warstadt et al. 2020, https://arxiv.org/abs/1912.00582.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from itertools import islice
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence

from ..data.tokenizer import EncodedText
from ..errors import InputError
from .predictor import Predictor
from .scoring import score

SUFFIXES = (".tsv", ".tsv.gz", ".jsonl", ".jsonl.gz")

# Columns of a .tsv file, and the keys with the same content in BLiMP's own .jsonl files.
COLUMNS = ("phenomenon", "good", "bad")
KEYS = ("linguistics_term", "sentence_good", "sentence_bad")


class MinimalPair(NamedTuple):
    """A grammatical and an ungrammatical sentence. paradigm: the name of their file."""

    paradigm: str
    phenomenon: str
    good: str
    bad: str
    where: str


class Judgement(NamedTuple):
    """A pair with the log-likelihoods of its sentences."""

    pair: MinimalPair
    good: float
    bad: float

    @property
    def correct(self) -> bool:
        """Return whether the grammatical sentence is more likely."""
        return self.good > self.bad


def pairs_in(path: Path, limit: int | None = None) -> Iterator[MinimalPair]:
    """Yield the pairs of a file, or of all files of a folder in order of their names.

    limit: the maximum number of pairs per file. Raise InputError with file and line for invalid content.
    """
    if not path.is_dir():
        yield from islice(_pairs_of_file(path), limit)
        return
    files = sorted(each for each in path.iterdir() if each.name.endswith(SUFFIXES))
    if not files:
        raise InputError(f"{path} must contain files that end in {', '.join(SUFFIXES)}")
    for each in files:
        yield from islice(_pairs_of_file(each), limit)


def judge(predictor: Predictor, pairs: Iterable[MinimalPair]) -> Iterator[Judgement]:
    """Yield each pair with the pseudo-log-likelihoods of both sentences."""
    given: list[MinimalPair] = []

    def sentences() -> Iterator[EncodedText]:
        for pair in pairs:
            given.append(pair)
            for sentence in (pair.good, pair.bad):
                try:
                    yield predictor.reader.text(sentence)
                except InputError as error:
                    raise InputError(f"{pair.where}: {error}") from error

    scores = score(predictor, sentences())
    for good, bad in zip(scores, scores):
        yield Judgement(given.pop(0), good.log_likelihood, bad.log_likelihood)


def accuracies(judgements: Sequence[Judgement], name: str) -> dict[str, dict[str, Any]]:
    """Return {"pairs", "accuracy"} by the pairs' field `name`: phenomenon or paradigm."""
    groups: dict[str, list[bool]] = {}
    for each in judgements:
        groups.setdefault(getattr(each.pair, name), []).append(each.correct)
    return {
        group: {"pairs": len(correct), "accuracy": sum(correct) / len(correct)}
        for group, correct in sorted(groups.items())
    }


def _pairs_of_file(path: Path) -> Iterator[MinimalPair]:
    suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)
    if suffix is None:
        raise InputError(f"{path} must end in {', '.join(SUFFIXES)}")
    fields: Callable[[str, Path], Iterator[tuple[int, Sequence[Any]]]]
    fields = _tsv_fields if ".tsv" in suffix else _jsonl_fields
    paradigm, found = path.name[: -len(suffix)], False
    for number, values in fields(_read(path), path):
        where = f"{path}, line {number}"
        if not all(isinstance(value, str) and value.strip() for value in values):
            raise InputError(f"{where}: {', '.join(COLUMNS)} must be three texts, got {values}")
        phenomenon, good, bad = values
        yield MinimalPair(paradigm, phenomenon, good, bad, where)
        found = True
    if not found:
        raise InputError(f"{path} must contain at least one pair")


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error})") from error


def _tsv_fields(content: str, path: Path) -> Iterator[tuple[int, Sequence[Any]]]:
    rows = csv.reader(io.StringIO(content), delimiter="\t", quoting=csv.QUOTE_NONE)
    header = next(rows, [])
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        raise InputError(f"{path}, line 1: the columns must include {', '.join(COLUMNS)}, got {header}")
    for row in rows:
        if len(row) != len(header):
            raise InputError(f"{path}, line {rows.line_num}: must have {len(header)} columns, got {len(row)}")
        yield rows.line_num, [row[header.index(name)] for name in COLUMNS]


def _jsonl_fields(content: str, path: Path) -> Iterator[tuple[int, Sequence[Any]]]:
    for number, line in enumerate(content.splitlines(), 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: must be a JSON object ({error})") from error
        if not isinstance(record, dict):
            raise InputError(f"{path}, line {number}: must be a JSON object, got {line[:40]!r}")
        yield number, [record.get(name) for name in KEYS]
