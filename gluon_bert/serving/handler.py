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

# One body, under the name that the server gives what is neither a form nor in the address.
BODY = "body"

# curl -d without a header says that the body is a form, which the server takes apart.
_HOW = 'send the JSON object as the body, with the header "Content-Type: application/json"'


CONTENT_TYPE = "application/json"

# The server's frontend reads the answers to a batch in pieces. Where one ends just before a status, within it
# or within a header, the frontend takes it for damage and ends the worker, and the batch fails. So there are
# no headers, and a status stands _INSIDE a stretch of _PIECE bytes, since the pieces end at multiples of that
# (they are buffers of the frontend and of the system's sockets).
_PIECE, _INSIDE = 16, 4
# Before the first answer: a code, the length of a message, and the message.
_PREFIX = 4 + 4 + len("Prediction success")


def handle(data: Sequence[Mapping[str, Any]] | None, context: Any) -> list[bytes]:
    """Return the answers to a batch as JSON, and set their statuses in the context; None only loads.

    data: for each request its body or the fields of a form, by name. Raise nothing for a request, as the
    server cannot report to several requests that their batch failed.
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
    """Return the bodies with blanks behind them, so that in the message of all no status is torn apart.

    Before a body stand, each with its length in 4 bytes, the request's id and the content type, then the
    status in 4 bytes, its phrase with its length, and 4 bytes each for no headers and the body's length.
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
