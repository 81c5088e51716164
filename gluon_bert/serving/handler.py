"""The handler that multi-model-server calls: loads an archive once and answers batches."""

from __future__ import annotations

import functools
import logging
from http import HTTPStatus
from pathlib import Path
from typing import Any, Mapping, Sequence

from ..devices import contexts
from ..export.exporter import load_exported
from ..fileio import json_text
from ..inference.predictor import Predictor
from .request_json import answer, refused

# The server's key for a body that is not a form.
BODY = "body"

# curl -d without a header sends a form, which the server parses.
_HOW = 'send the JSON object as the body, with the header "Content-Type: application/json"'


CONTENT_TYPE = "application/json"

# The server's frontend reads the answers to a batch in pieces. If a piece ends just before a status, within
# it or within a header, the frontend ends the worker, and the batch fails. So answers have no headers. Pieces
# end at multiples of _PIECE bytes, because they are buffers of the frontend and of sockets. So each status
# begins _INSIDE bytes after such a multiple.
_PIECE, _INSIDE = 16, 4
# Bytes before the first answer: a code, the length of a message, and the message.
_PREFIX = 4 + 4 + len("Prediction success")


def handle(data: Sequence[Mapping[str, Any]] | None, context: Any) -> list[bytes]:
    """Return the answers to a batch as JSON, and set their statuses in the context; None only loads.

    data: for each request its body or the fields of a form, by name. A bad request raises nothing, because an
    exception would fail the whole batch.
    """
    properties = context.system_properties
    predictor = load(properties["model_dir"], properties.get("gpu_id"))
    replies = _replies(predictor, data or [])
    for i, (status, _) in enumerate(replies):
        context.set_response_status(status, HTTPStatus(status).phrase, i)
    # Not through set_response_content_type, which makes a header of it.
    context.get_response_content_type = lambda i: CONTENT_TYPE
    bodies = [json_text(content, allow_nan=False).encode() for _, content in replies]
    return aligned(bodies, [status for status, _ in replies], context.request_ids)


def aligned(bodies: Sequence[bytes], statuses: Sequence[int], ids: Mapping[int, str]) -> list[bytes]:
    """Return the bodies, padded with spaces so that no status is split between two pieces of the message.

    Before each body the message has: the request's id and the content type, each with its length in 4 bytes;
    the status in 4 bytes; its phrase with its length; the number of headers, 0, and the body's length in 4
    bytes each.
    """
    padded = []
    start = _PREFIX
    for i, (body, status) in enumerate(zip(bodies, statuses)):
        start += _before_status(ids[i]) + 4 + 4 + len(HTTPStatus(status).phrase) + 4 + 4
        if i + 1 < len(bodies):
            place = start + len(body) + _before_status(ids[i + 1])
            body += b" " * ((_INSIDE - place) % _PIECE)
        padded.append(body)
        start += len(body)
    return padded


def _before_status(request_id: str) -> int:
    return 4 + len(request_id) + 4 + len(CONTENT_TYPE)


@functools.lru_cache(maxsize=None)
def load(model_dir: str, gpu_id: int | None = None) -> Predictor:
    """Return the predictor of an unpacked archive, on a GPU if one is named."""
    context = None if gpu_id is None or gpu_id < 0 else contexts(gpus=[gpu_id])[0]
    return load_exported(Path(model_dir), context).predictor


def _replies(predictor: Predictor, data: Sequence[Mapping[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """Return a status and an object for each request of a batch."""
    bodies = {i: item[BODY] for i, item in enumerate(data) if set(item) == {BODY}}
    try:
        answers = dict(zip(bodies, answer(predictor, list(bodies.values()))))
    except Exception:
        logging.exception("a batch of %d requests failed", len(bodies))
        failed = (500, {"error": "the network failed on this batch; the server's log says how"})
        answers = dict.fromkeys(bodies, failed)
    return [answers[i] if i in answers else refused(_HOW) for i in range(len(data))]
