"""Lines of text as inputs of a network, and a report on unknown words and truncated texts."""

from __future__ import annotations

from collections import Counter
from typing import Iterable, Iterator, Sequence

from ..data.tokenizer import EncodedText, Tokenizer
from ..errors import InputError
from ..model.task import Task
from .task_inputs import TaskInput, task_input
from .text_files import Line

# Different unknown words to count; enough to find the most frequent ones.
_MAX_UNKNOWN = 10_000


def encode_lines(reader: Tokenizer, lines: Iterable[Line], ask: str, truncate: bool) -> Iterator[EncodedText]:
    """Yield encoded texts. Raise InputError for a text without the mask or the pair that `ask` needs."""
    for line in lines:
        text = encode_line(reader, line, line.given, truncate)
        if ask == "masks" and not len(text.masks):
            cut = f" in its first {reader.max_seq_length} tokens" if text.truncated else ""
            raise InputError(f"{line.where}: must have a <mask>{cut}. Put one in place of a word.")
        if ask == "score" and len(text.masks):
            raise InputError(f"{line.where}: a text to score must not contain <mask>. Replace it by a word.")
        if ask == "next" and not text.is_pair:
            raise InputError(f'{line.where}: must be a pair, such as "a text || another", got a single text.')
        yield text


def encode_line(reader: Tokenizer, line: Line, texts: Sequence[str], truncate: bool) -> EncodedText:
    """Encode a text or a pair of a line. Raise InputError, which names the line."""
    try:
        first, second = texts if len(texts) == 2 else (texts[0], None)
        return reader.text(first, second, truncate=truncate)
    except InputError as problem:
        raise InputError(f"{line.where}: {problem}") from problem


def task_inputs(reader: Tokenizer, task: Task, lines: Iterable[Line]) -> Iterator[TaskInput]:
    """Yield lines as inputs of a task. Raise InputError, which names the line."""
    for line in lines:
        try:
            yield task_input(task, reader, line.first, line.second)
        except InputError as problem:
            raise InputError(f"{line.where}: {problem}") from problem


class InputReport:
    """Counts unknown words and truncated texts."""

    def __init__(self, unk: int) -> None:
        self._unk = unk
        self._texts = self._tokens = self._num_unknown = self._num_truncated = 0
        self._unknown: Counter[str] = Counter()
        self._truncated: list[str] = []

    def add(self, line: Line, text: EncodedText) -> None:
        """Count the text of a line."""
        self._texts += 1
        self._tokens += len(text)
        self._num_unknown += int((text.ids == self._unk).sum())
        if len(self._unknown) < _MAX_UNKNOWN:
            self._unknown.update(text.unknown)
        if text.truncated:
            self._num_truncated += 1
            self._truncated += [line.where] * (len(self._truncated) < 3)

    def lines(self, max_seq_length: int) -> Iterator[str]:
        """Yield a line about unknown words and one about truncated texts, if there are any."""
        if self._num_unknown:
            words = " ".join(word for word, _ in self._unknown.most_common(10))
            more = " ..." if len(self._unknown) > 10 else ""
            share = f"{self._num_unknown} of {self._tokens} tokens"
            yield f"not in the vocabulary, read as <unk> ({share}): {words}{more}\n"
        if self._num_truncated:
            more = " ..." if self._num_truncated > len(self._truncated) else ""
            where = "; ".join(self._truncated) + more
            share = f"{self._num_truncated} of {self._texts} texts"
            yield f"truncated to {max_seq_length} tokens ({share}): {where}\n"
