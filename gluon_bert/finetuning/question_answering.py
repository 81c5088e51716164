"""SQuAD files of questions, contexts and answers, and the questions as the network reads them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Sequence

from ..data.tokenizer import Tokenizer
from ..errors import InputError
from ..fileio import SURROGATE, read_json
from ..inference.question_answering import Answer, Question
from ..model.task import Task
from .dataset import Examples, TaskFiles
from .metrics import answer_metrics
from .tables import first_lines

log = logging.getLogger(__name__)

ENDINGS = (".json",)


class GivenAnswer(NamedTuple):
    """An answer of a file, which begins at a character of the context."""

    text: str
    start: int


class QuestionRow(NamedTuple):
    """A question, its context, and the answers that a file gives; none if it cannot be answered.

    is_impossible: whether the file says that the context has no answer.
    """

    where: str
    id: str
    question: str
    context: str
    answers: tuple[GivenAnswer, ...]
    is_impossible: bool

    @property
    def is_labelled(self) -> bool:
        """Return whether the file has an answer or is_impossible."""
        return bool(self.answers) or self.is_impossible


def read_squad(path: Path, role: str, labels_needed: bool = True) -> list[QuestionRow]:
    """Read the questions of a SQuAD file, version 1.1 or 2.0.

    Raise InputError, which names the ids that are wrong.
    Every answer must be in the context at its `answer_start`. labels_needed: every question must have an
    answer or `is_impossible`.
    """
    if path.suffix.lower() not in ENDINGS:
        raise InputError(f"{role} {path}: must end in {' or '.join(ENDINGS)} for question answering")
    rows = list(_rows(path))
    if not rows:
        raise InputError(f"{role} {path}: must have a question, got none")
    problems = [f"{row.where}: {problem}" for row in rows for problem in _problems(row)]
    places: dict[str, str] = {}
    for row in rows:
        if row.id in places:
            problems.append(f"{row.where}: must have a unique id; another question has the same")
        places[row.id] = row.where
        if labels_needed and not row.is_labelled:
            problems.append(f"{row.where}: must have an answer, or is_impossible true")
    if problems:
        raise InputError("\n".join(first_lines(problems, str(path))))
    return rows


def _rows(path: Path) -> Iterator[QuestionRow]:
    for i, article in enumerate(_field(read_json(path), "data", list, str(path))):
        for j, paragraph in enumerate(_field(article, "paragraphs", list, f"{path}, data[{i}]")):
            where = f"{path}, data[{i}].paragraphs[{j}]"
            context = _field(paragraph, "context", str, where)
            if not context.strip():
                raise InputError(f"{where}: the context must not be empty")
            for k, question in enumerate(_field(paragraph, "qas", list, where)):
                yield _row(path, f"{where}.qas[{k}]", context, question)


def _row(path: Path, where: str, context: str, question: Any) -> QuestionRow:
    id_ = _field(question, "id", str, where)
    where = f"{path}, question {id_}"
    answers = tuple(
        GivenAnswer(_field(each, "text", str, where), _field(each, "answer_start", int, where))
        for each in _field({"answers": [], **question}, "answers", list, where)
    )
    is_impossible = _field({"is_impossible": False, **question}, "is_impossible", bool, where)
    return QuestionRow(where, id_, _field(question, "question", str, where), context, answers, is_impossible)


def _field(content: Any, name: str, kind: type, where: str) -> Any:
    """Return a field of a JSON object; raise InputError if it is missing or of another type."""
    names = {list: "a list", str: "a string", int: "a whole number", bool: "true or false"}
    value = content.get(name) if isinstance(content, dict) else None
    if type(value) is not kind:
        raise InputError(f"{where}: must have {name!r}, {names[kind]}, as a SQuAD file has")
    return value


def _problems(row: QuestionRow) -> Iterator[str]:
    """Yield a sentence for everything that is wrong with a question."""
    if not row.question.strip():
        yield "the question must not be empty"
    if SURROGATE.search(row.question) or SURROGATE.search(row.context):
        yield "the text must be valid Unicode. It has half of a surrogate pair"
    if row.is_impossible and row.answers:
        yield "must have no answers, as is_impossible is true"
    for text, start in row.answers:
        if not text.strip():
            yield "an answer must not be empty"
        elif start < 0 or row.context[start : start + len(text)] != text:
            remedy = _remedy(row.context, text, start)
            yield f"the answer {text!r:.60} must be at its answer_start {start}; {remedy}"


def _remedy(context: str, text: str, start: int) -> str:
    """Return where an answer is that is not at its `answer_start`."""
    places = [place for place in range(len(context)) if context.startswith(text, place)]
    if not places:
        return "the context does not contain it"
    nearest = min(places, key=lambda place: abs(place - start))
    return f"it is at {nearest}"


class QuestionExamples(Examples):
    """Questions with the places of their first answers; the targets are (2,), as `Question.targets`."""

    def metrics(self, results: Sequence[Answer]) -> dict[str, float]:
        return self._metrics(self.rows, results)

    def _metrics(self, rows: Sequence[QuestionRow], results: Sequence[Answer]) -> dict[str, float]:
        given = [[answer.text for answer in row.answers] for row in rows]
        return answer_metrics(given, [result.text for result in results], self.task.no_answer)

    def details(self, results: Sequence[Answer]) -> list[str]:
        if not self.task.no_answer:
            return []
        lines = ["questions       number      f1  exact_match"]
        for name, impossible in (("with answer", False), ("without answer", True)):
            pairs = [pair for pair in zip(self.rows, results) if pair[0].is_impossible == impossible]
            if pairs:
                rows, its = zip(*pairs)
                found = self._metrics(rows, its)
                lines.append(f"{name:14}  {len(rows):6}  {found['f1']:6.4f}  {found['exact_match']:11.4f}")
        return lines

    def records(self, results: Sequence[Answer]) -> Iterator[dict[str, Any]]:
        for row, result in zip(self.rows, results):
            given = {"answers": [answer.text for answer in row.answers]} if row.is_labelled else {}
            yield {"id": row.id, "question": row.question, "given": given, "predicted": result.to_json()}

    def described(self) -> str:
        return f"{len(self.rows):,} questions"


class QuestionFormat:
    """Reads SQuAD files."""

    def read(self, files: TaskFiles) -> dict[str, list[QuestionRow]]:
        """Return the questions of each file, by its role."""
        return {
            role: read_squad(Path(path), role, labels_needed=role != "test")
            for role, path in files.by_role.items()
        }

    def infer_task(self, rows: Sequence[QuestionRow]) -> Task:
        """Return the task: whether a question may have no answer."""
        impossible = sum(row.is_impossible for row in rows)
        if impossible:
            log.info("%d of %d questions have no answer", impossible, len(rows))
        return Task("question-answering", pairs=True, no_answer=impossible > 0)

    def examples(
        self, rows: Sequence[QuestionRow], task: Task, reader: Tokenizer, role: str
    ) -> QuestionExamples:
        """Return the questions as the network reads them, long contexts in windows."""
        without = next((row for row in rows if row.is_impossible), None)
        if without and not task.no_answer:
            raise InputError(
                f"{without.where}: must have an answer, as all questions of the training file have"
            )
        inputs = [_question(row, task, reader) for row in rows]
        windows = sum(len(each.texts) for each in inputs)
        if windows > len(rows):
            log.info(
                "%s: %d questions are read in %d windows of up to %d tokens",
                role,
                len(rows),
                windows,
                reader.max_seq_length,
            )
        if not all(row.is_labelled for row in rows):
            return QuestionExamples(task, rows, inputs, None)
        targets = [
            target
            for row, each in zip(rows, inputs)
            for target in each.targets(*_place(row.answers[0] if row.answers else None))
        ]
        return QuestionExamples(task, rows, inputs, targets)


def _place(answer: GivenAnswer | None) -> tuple[int, int]:
    return (answer.start, answer.start + len(answer.text)) if answer else (0, 0)


def _question(row: QuestionRow, task: Task, reader: Tokenizer) -> Question:
    try:
        return Question(reader, task, row.question, row.context)
    except InputError as problem:
        raise InputError(f"{row.where}: {problem}") from problem
