"""Files of tagged tokens, in CoNLL or JSONL, and their sentences as the network reads them."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Sequence

import numpy as np

from ..data.tokenizer import Tokenizer
from ..errors import InputError
from ..fileio import SURROGATE
from ..inference.tagging import OUTSIDE, TaggedText, TextToTag, entities
from ..model.task import BIO_TAG, Task, are_bio_tags
from .dataset import Examples, TaskBatch, TaskFiles
from .metrics import entity_metrics, plain_tag_metrics, tag_metrics_by_type
from .tables import first_lines, text_lines

log = logging.getLogger(__name__)

CONLL_ENDINGS = (".conll", ".bio", ".iob2")
# Keys of the tags in JSONL files; the first one that an object has.
_TAG_KEYS = ("labels", "tags", "ner_tags")
# Tags of entities in BIO, BIOES and BILOU, and what BIO has for those that it lacks.
_ENTITY_TAG = re.compile(r"[BIESLU]-\S")
_OF_BIOES = {"S-": "B", "U-": "B", "E-": "I", "L-": "I"}
# The token between documents in CoNLL files.
_DOCUMENT = "-DOCSTART-"


class TaggedRow(NamedTuple):
    """The tokens of a sentence, their tags if the file has them, and the place of each token."""

    where: tuple[str, ...]
    tokens: tuple[str, ...]
    tags: tuple[str, ...] | None


def read_tagged(path: Path, role: str, labels_needed: bool = True) -> list[TaggedRow]:
    """Read sentences of tagged tokens.

    Raise InputError with the wrong lines, ten at most. A CoNLL file has one token per line, with its tag in
    the last column, and a blank line between sentences. A JSONL file has one object per line, with `tokens`
    and `labels`. If a tag begins with B- or I-, the tags are BIO: O, B-TYPE and I-TYPE. I-TYPE follows B-TYPE
    or I-TYPE. Otherwise they are plain labels. labels_needed: False also allows files without tags.
    """
    if path.suffix.lower() not in (*CONLL_ENDINGS, ".jsonl"):
        raise InputError(f"{role} {path}: must end in {', '.join(CONLL_ENDINGS)} or .jsonl for tagging")
    lines = text_lines(path, role)
    read = _json_rows if path.suffix.lower() == ".jsonl" else _conll_rows
    rows: list[TaggedRow] = []
    problems: list[str] = []
    for row in read(path, lines):
        if isinstance(row, str):
            problems.append(row)
        else:
            rows.append(row)
    is_bio = any(_ENTITY_TAG.match(tag) for row in rows for tag in row.tags or ())
    for row in rows:
        problems += _problems(row, labels_needed, is_bio)
    if problems:
        raise InputError("\n".join(first_lines(problems, str(path))))
    if not rows:
        raise InputError(f"{role} {path}: must have a line for each token, got none")
    without = next((row for row in rows if row.tags is None), None)
    if without and any(row.tags for row in rows):
        raise InputError(f"{without.where[0]}: must have tags, as the other sentences of the file have")
    return rows


def _conll_rows(path: Path, lines: Sequence[str]) -> Iterator[TaggedRow | str]:
    """Yield each sentence, or the problem of a line."""
    columns, first = 0, 0
    where: list[str] = []
    sentence: list[list[str]] = []
    for number, line in enumerate([*lines, ""], 1):
        fields = [field.strip() for field in (line.split("\t") if "\t" in line else line.split())]
        if not any(fields) or fields[0] == _DOCUMENT:
            if sentence:
                tokens, *others = zip(*sentence)
                yield TaggedRow(tuple(where), tokens, others[-1] if others else None)
            where, sentence = [], []
            continue
        if not columns:
            columns, first = len(fields), number
        if len(fields) != columns or not fields[0]:
            what = f"{columns} columns as line {first}, got {len(fields)}" if fields[0] else "a token first"
            yield f"{path}, line {number}: must have {what}. Write a token, a tab and its tag."
        else:
            where.append(f"{path}, line {number}")
            sentence.append(fields)


def _json_rows(path: Path, lines: Sequence[str]) -> Iterator[TaggedRow | str]:
    """Yield the sentence of each line, or its problem."""
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield f"{where}: is not JSON ({error})"
            continue
        tokens: Any = content.get("tokens") if isinstance(content, dict) else None
        key = next((key for key in _TAG_KEYS if isinstance(content, dict) and key in content), None)
        tags = content[key] if key else None
        if not _are_strings(tokens) or not (tags is None or _are_strings(tags)):
            example = '{"tokens": ["in", "Paris"], "labels": ["O", "B-place"]}'
            yield f"{where}: must be an object such as {example}"
            continue
        if tags is not None and len(tags) != len(tokens):
            yield f"{where}: must have a label per token, got {len(tokens)} tokens and {len(tags)} labels"
        elif not tokens:
            yield f"{where}: must have a token at least, got none"
        else:
            places = tuple(f"{where}, token {place}" for place in range(1, len(tokens) + 1))
            yield TaggedRow(places, tuple(tokens), None if tags is None else tuple(map(str.strip, tags)))


def _are_strings(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _problems(row: TaggedRow, labels_needed: bool, is_bio: bool) -> Iterator[str]:
    """Yield a message for every wrong token or tag of a row."""
    for where, token in zip(row.where, row.tokens):
        if not token.strip():
            yield f"{where}: the token must not be empty"
        elif SURROGATE.search(token):
            yield f"{where}: the token holds half a surrogate pair, which is not a character"
    if row.tags is None:
        if labels_needed:
            yield f"{row.where[0]}: must have a tag for each token, got none"
        return
    before = ""
    for where, tag in zip(row.where, row.tags):
        type_ = tag[2:]
        if not tag:
            yield f"{where}: the tag must not be empty"
        elif SURROGATE.search(tag):
            yield f"{where}: the tag holds half a surrogate pair, which is not a character"
        elif is_bio and not BIO_TAG.fullmatch(tag):
            other = _OF_BIOES.get(tag[:2])
            remedy = f". Write '{other}-{type_}'." if other else ""
            yield f"{where}: the tag must be O, B-TYPE or I-TYPE beside tags of entities, got {tag!r}{remedy}"
        elif is_bio and tag[0] == "I" and before not in (f"B-{type_}", tag):
            behind = f"got it behind {before!r}" if before else "got it first"
            yield f"{where}: {tag!r} must follow 'B-{type_}' or {tag!r}, {behind}. Write 'B-{type_}'."
        before = tag


@dataclass(frozen=True)
class TaggingBatch(TaskBatch):
    """A batch with tags as targets, (B, T) int32; -1 for tokens without a tag."""

    @property
    def num_labels(self) -> int:
        """Return the number of tokens with a tag."""
        return int((self.targets >= 0).sum())


class TaggedExamples(Examples):
    """Sentences with the numbers of their tags; the targets are (T,) int32, as `TextToTag.targets`."""

    batch_type = TaggingBatch

    def padded_targets(self, targets: Sequence[np.ndarray], length: int) -> np.ndarray:
        padded = np.full((len(targets), length), -1, dtype=np.int32)
        for row, target in zip(padded, targets):
            row[: len(target)] = target
        return padded

    def metrics(self, results: Sequence[TaggedText]) -> dict[str, float]:
        of_tags = entity_metrics if self.task.has_entities else plain_tag_metrics
        return of_tags([row.tags for row in self.rows], [result.tags for result in results])

    def details(self, results: Sequence[TaggedText]) -> list[str]:
        has_entities, name = self.task.has_entities, "entity" if self.task.has_entities else "tag"
        expected, predicted = [row.tags for row in self.rows], [result.tags for result in results]
        found = tag_metrics_by_type(expected, predicted, has_entities)
        width = max(map(len, [*found, name]))
        lines = [f"{name:{width}}  precision  recall      f1  number"]
        for type_, its in found.items():
            figures = f"{its['precision']:9.4f}  {its['recall']:6.4f}  {its['f1']:6.4f}"
            lines.append(f"{type_:{width}}  {figures}  {its['number']:6.0f}")
        return lines

    def records(self, results: Sequence[TaggedText]) -> Iterator[dict[str, Any]]:
        for row, result in zip(self.rows, results):
            given = {"tags": row.tags} if row.tags is not None else {}
            predicted = {name: value for name, value in result.to_json().items() if name != "words"}
            yield {"tokens": row.tokens, "given": given, "predicted": predicted}

    def described(self) -> str:
        return f"{len(self.rows):,} sentences"


class TaggingFormat:
    """Reads CoNLL and JSONL files of tagged tokens."""

    def read(self, files: TaskFiles) -> dict[str, list[TaggedRow]]:
        """Return the sentences of each file, by its role."""
        return {
            role: read_tagged(Path(path), role, labels_needed=role != "test")
            for role, path in files.by_role.items()
        }

    def infer_task(self, rows: Sequence[TaggedRow]) -> Task:
        """Return the task: the tags B-TYPE and I-TYPE of every type of entity, and O; or the plain tags."""
        tag_counts = Counter(tag for row in rows for tag in row.tags or ())
        if not are_bio_tags(tag_counts):
            return _plain_task(tag_counts)
        counts = Counter(entity.type for row in rows for entity in entities(row.tags or ()))
        log.info("entities: %s", ", ".join(f"{type_} {count:,}" for type_, count in counts.most_common()))
        tags = [f"{prefix}-{type_}" for type_ in sorted(counts) for prefix in "BI"]
        return Task("tagging", pairs=False, labels=(OUTSIDE, *tags))

    def examples(self, rows: Sequence[TaggedRow], task: Task, reader: Tokenizer, role: str) -> TaggedExamples:
        """Return the sentences as the network reads them, long ones in parts."""
        inputs = [TextToTag(reader, task, row.tokens) for row in rows]
        parted = sum(len(each.texts) > 1 for each in inputs)
        if parted:
            log.info(
                "%s: %d of %d sentences are longer than %d tokens and read in parts",
                role,
                parted,
                len(rows),
                reader.max_seq_length,
            )
        if rows[0].tags is None:
            return TaggedExamples(task, rows, inputs, None)
        numbers = {tag: number for number, tag in enumerate(task.labels)}
        unknown = [
            f"{where}: tag {tag!r} must occur in the training file, which has {_named(task)}"
            for row in rows
            for where, tag in zip(row.where, row.tags or ())
            if tag not in numbers
        ]
        if unknown:
            raise InputError("\n".join(first_lines(unknown, role)))
        targets = [
            target
            for each, row in zip(inputs, rows)
            for target in each.targets([numbers[tag] for tag in row.tags or ()])
        ]
        return TaggedExamples(task, rows, inputs, targets)


def _plain_task(counts: Counter[str]) -> Task:
    """Return the task of plain tags, from how often each occurs."""
    if len(counts) < 2:
        (only,) = counts
        raise InputError(f"train: all tags are {only}: there is nothing to learn")
    log.info("plain tags: %s", ", ".join(f"{tag} {count:,}" for tag, count in counts.most_common()))
    return Task("tagging", pairs=False, labels=tuple(sorted(counts)))


def _named(task: Task) -> str:
    """Return what a training file has, for a message."""
    if task.has_entities:
        return "the types " + ", ".join(tag[2:] for tag in task.labels if tag[0] == "B")
    return "the tags " + ", ".join(task.labels)
