"""Answers the JSON bodies of a batch of requests. Knows no server."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Iterable, Mapping, NamedTuple, Sequence

from ..data.tokenizer import EncodedText, Tokenizer
from ..errors import InputError, join_words
from ..inference.json_output import ASKS, as_json
from ..inference.predictor import Prediction, Predictor
from ..inference.scoring import check_scorable, score
from ..inference.task_inputs import TaskInput, TaskResult, task_input
from ..model.pooling import POOLINGS, Pooling
from ..model.task import Task

OK, BAD_REQUEST = 200, 400

# Fields for a network that was fine-tuned for question answering.
QUESTION_FIELDS = ("question", "context")
FIELDS = (
    *("text", "pair", "ids", "pair_ids", "truncate", *QUESTION_FIELDS),
    *("ask", "top", "token_vectors", "pooling", "normalize"),
)
# Requests that read two texts separately.
SIMILARITY = "similarity"

# Far above the length of any network here. Any such body is split into words in under half a second.
MAX_BODY = 1 << 20
MAX_TOP = 1000


class Request(NamedTuple):
    """A valid request: the text as ids and as given, and the requested results.

    pooling: for its embedding. apart: the two texts of a pair, if their similarity is requested.
    """

    text: EncodedText
    given: tuple[str, ...]
    ask: tuple[str, ...] = ("vectors",)
    top: int = 5
    token_vectors: bool = False
    pooling: Pooling | None = None
    apart: tuple[EncodedText, ...] = ()

    @property
    def texts(self) -> list[EncodedText]:
        """Return all texts that the network reads for this request."""
        return [self.text, *self.apart]


class TaskRequest(NamedTuple):
    """A text to tag, or a question with its context, possibly in several texts for the network."""

    input: TaskInput[TaskResult]
    given: Mapping[str, str]

    @property
    def texts(self) -> Sequence[EncodedText]:
        """Return all texts that the network reads for this request."""
        return self.input.texts


def answer(predictor: Predictor, bodies: Sequence[bytes]) -> list[tuple[int, dict[str, Any]]]:
    """Return a status and an object for each body: 200 and the answer, or 400 and {"error": why}.

    The network runs once for all valid requests. An invalid one changes nothing for the others. Exceptions
    that escape are faults of the network or of this package.

    >>> answer(predictor, [b'{"text": "a crane"}', b'{"txt": "a"}'])                    # doctest: +SKIP
    [(200, {'text': 'a crane', 'tokens': [...], ...}), (400, {'error': "'txt' is unknown: ..."})]
    """
    replies: dict[int, tuple[int, dict[str, Any]]] = {}
    questions: dict[int, Request | TaskRequest] = {}
    for i, body in enumerate(bodies):
        try:
            questions[i] = read(body, predictor.reader, predictor.task, predictor.pooling)
        except InputError as error:
            replies[i] = refused(error)
    answers = predictor.predict(text for question in questions.values() for text in question.texts)
    for i, question in questions.items():
        predictions = [next(answers) for _ in question.texts]
        try:
            if isinstance(question, TaskRequest):
                replies[i] = OK, {**question.given, **question.input.result(predictions).to_json()}
                continue
            found, *apart = predictions
            pooling = question.pooling or predictor.pooling
            found = dataclasses.replace(found, pooling=pooling)
            how = (question.ask, question.top, question.token_vectors, question.given)
            replies[i] = OK, as_json(found, predictor.reader.vocab, *how)
            if apart:
                replies[i][1]["similarity"] = _similarity(pooling or Pooling(), *apart)
            if "score" in question.ask:
                (scored,) = score(predictor, [question.text])
                replies[i][1].update(scored.to_json(question.top))
        except InputError as error:
            replies[i] = refused(error)
    return [replies[i] for i in range(len(bodies))]


def _similarity(pooling: Pooling, *answers: Prediction) -> float:
    one, other = (pooling(answer.vectors)[None] for answer in answers)
    return float(pooling.similarities(one, other)[0, 0])


def refused(why: object) -> tuple[int, dict[str, Any]]:
    """Return the reply to a bad request."""
    return BAD_REQUEST, {"error": str(why)}


def read(
    body: bytes, reader: Tokenizer, task: Task | None = None, own: Pooling | None = None
) -> Request | TaskRequest:
    """Return the question in a request's body. Raise InputError for invalid requests.

    task, own: the task and the pooling of the model, or None.

    >>> reader = Tokenizer(Vocabulary(["crane", "a"]), 8, Normalization(lowercase=True))     # doctest: +SKIP
    >>> read(b'{"text": "A <mask>", "ask": "masks", "top": 2}', reader).text.tokens    # doctest: +SKIP
    ['<cls>', 'a', '<mask>', '<sep>']
    """
    request = _object(body)
    unknown = [name for name in request if name not in FIELDS]
    if unknown:
        raise InputError(f"{_shown(unknown[0])} is unknown: a request has {join_words(FIELDS)}")
    ask = _ask(request.get("ask", "task" if task else "vectors"))
    if task and task.scores_tokens and "task" in ask:
        return _task_request(request, task, reader, ask)
    wrong = [name for name in QUESTION_FIELDS if name in request]
    if wrong:
        raise InputError(f'"{wrong[0]}" is for a network that was fine-tuned for question answering')
    if "top" in request and not {"masks", "score"} & set(ask):
        raise InputError('"top" is for "ask": "masks" and "score"')
    truncate = _flag(request, "truncate")
    text, given = _text(request, reader, truncate)
    if "score" in ask:
        check_scorable(text)
    top = _top(request.get("top", 5))
    apart: tuple[EncodedText, ...] = ()
    if SIMILARITY in ask:
        if len(given) != 2:
            raise InputError('"ask": "similarity" needs "text" and "pair"')
        apart = tuple(reader.text(each, truncate=truncate) for each in given)
    return Request(text, given, ask, top, _flag(request, "token_vectors"), _pooling(request, own), apart)


def _task_request(
    request: dict[str, Any], task: Task, reader: Tokenizer, ask: tuple[str, ...]
) -> TaskRequest:
    """Return a request for tags or for an answer."""
    names = QUESTION_FIELDS if task.kind == "question-answering" else ("text",)
    wrong = [name for name in request if name not in (*names, "ask")]
    if wrong or len(ask) > 1 or not all(name in request for name in names):
        fields = join_words([f'"{name}"' for name in names])
        raise InputError(
            f'a request for {task.kind} must have {fields}, and "ask" with "task" alone or not at all'
        )
    given = {name: _string(request, name) for name in names}
    first, second = [*given.values(), None][:2]
    assert first is not None
    return TaskRequest(task_input(task, reader, first, second), given)


def _flag(request: dict[str, Any], name: str) -> bool:
    value = request.get(name, False)
    if not isinstance(value, bool):
        raise InputError(f'"{name}" must be true or false')
    return value


def _pooling(request: dict[str, Any], own: Pooling | None) -> Pooling | None:
    """Return the pooling of a request, None without one."""
    if "pooling" not in request and "normalize" not in request:
        return None
    own = own or Pooling()
    mode = request.get("pooling", own.mode)
    if mode not in list(POOLINGS):
        choices = join_words([f'"{each}"' for each in POOLINGS])
        raise InputError(f'"pooling" must be one of {choices}')
    normalize = _flag(request, "normalize") if "normalize" in request else own.normalize
    return Pooling(mode, normalize, own.similarity)


def _object(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a body."""
    if len(body) > MAX_BODY:
        raise InputError(
            f"the request has {len(body):,} bytes, where {MAX_BODY:,} are allowed: send a shorter text"
        )
    if not body.strip():
        raise InputError('the request is empty: send a JSON object such as {"text": "..."}')
    try:
        content = json.loads(
            bytes(body).decode("utf-8"),
            object_pairs_hook=_without_repeats,
            parse_constant=_raise_for_constant,
        )
    except UnicodeDecodeError as error:
        raise InputError(f"the request is not UTF-8 (byte {error.start})") from error
    except RecursionError as error:
        raise InputError(
            "the request is not JSON that can be read: too many brackets in each other"
        ) from error
    except InputError:
        raise
    except json.JSONDecodeError as error:
        raise InputError(f"the request is not JSON: {error}") from error
    except ValueError as error:
        raise InputError("the request has a number of more digits than can be read") from error
    if not isinstance(content, dict):
        raise InputError('the request must be a JSON object such as {"text": "..."}')
    return content


def _without_repeats(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise InputError(f"{_shown(name)} is given twice")
        content[name] = value
    return content


def _raise_for_constant(name: str) -> Any:
    raise InputError(f"the request is not JSON: {name} must be a finite number")


def _text(request: dict[str, Any], reader: Tokenizer, truncate: bool) -> tuple[EncodedText, tuple[str, ...]]:
    """Return the text of a request as ids, and as given if it was a text."""
    kinds = [kind for kind in ("text", "ids") if kind in request]
    if len(kinds) != 1:
        raise InputError('a request has either "text" or "ids"')
    if ("pair" in request and "ids" in request) or ("pair_ids" in request and "text" in request):
        raise InputError('"pair" goes with "text", and "pair_ids" with "ids"')
    if kinds == ["text"]:
        text, pair = _string(request, "text"), _string(request, "pair") if "pair" in request else None
        return reader.text(text, pair, truncate), (text,) if pair is None else (text, pair)
    second = _ids(request, "pair_ids") if "pair_ids" in request else None
    return reader.ids(_ids(request, "ids"), second, truncate), ()


def _string(request: dict[str, Any], name: str) -> str:
    value = request[name]
    if not isinstance(value, str):
        raise InputError(f'"{name}" must be a string')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f'"{name}" has half of a surrogate pair at character {error.start}') from error
    return value


def _ids(request: dict[str, Any], name: str) -> list[int]:
    value = request[name]
    if not isinstance(value, list) or not all(type(each) is int for each in value):
        raise InputError(f'"{name}" must be a list of whole numbers')
    return value


def _ask(value: Any) -> tuple[str, ...]:
    asks = value if isinstance(value, list) else [value]
    known = (*ASKS, SIMILARITY)
    if not asks or not all(isinstance(ask, str) and ask in known for ask in asks):
        choices = join_words([f'"{ask}"' for ask in known])
        raise InputError(f'"ask" must be one of {choices}, or a list of them')
    return tuple(asks)


def _top(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_TOP:
        raise InputError(f'"top" must be a whole number from 1 to {MAX_TOP}')
    return value


def _shown(name: str) -> str:
    """Return a field's name for a message, in ASCII and shortened."""
    return ascii(name if len(name) <= 40 else f"{name[:40]}...")
