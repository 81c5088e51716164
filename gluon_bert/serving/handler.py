"""What multi-model-server calls: loads an archive once and answers batches. Imports nothing of the server."""

from __future__ import annotations

import functools
import json
import logging
from http import HTTPStatus
from pathlib import Path
from typing import Any, Mapping, Sequence

from ..encoding import Predictor
from ..export.formats import load_exported
from ..runtime import contexts
from .requests import answer, refused

# One body, under the name that the server gives what is neither a form nor in the address.
BODY = "body"

# curl -d without a header says that the body is a form, which the server takes apart.
_HOW = 'send the JSON object as the body, with the header "Content-Type: application/json"'


def handle(data: Sequence[Mapping[str, Any]] | None, context: Any) -> list[str]:
    """The answers to a batch, JSON each, their statuses set in the context; [] for None, which only loads.

    data: for each request what it holds by name: its body, or the fields of a form. Raises nothing for a
    request: the server cannot tell several that their batch failed.
    """
    properties = context.system_properties
    predictor = load(properties["model_dir"], properties.get("gpu_id"))
    replies = _replies(predictor, data or [])
    for i, (status, _) in enumerate(replies):
        context.set_response_status(status, HTTPStatus(status).phrase, i)
        context.set_response_content_type(i, "application/json")
    return [json.dumps(content, ensure_ascii=False, allow_nan=False) for _, content in replies]


@functools.lru_cache(maxsize=None)
def load(model_dir: str, gpu_id: int | None = None) -> Predictor:
    """The predictor of an unpacked archive, on a GPU if one is named; BadInput where it cannot be."""
    context = None if gpu_id is None or gpu_id < 0 else contexts(gpus=[gpu_id])[0]
    exported = load_exported(Path(model_dir), context)
    return Predictor(exported.network, exported.reader)


def _replies(predictor: Predictor, data: Sequence[Mapping[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """A status and an object for each request of a batch."""
    bodies = {i: item[BODY] for i, item in enumerate(data) if set(item) == {BODY}}
    try:
        answers = dict(zip(bodies, answer(predictor, list(bodies.values()))))
    except Exception:
        logging.exception("a batch of %d requests failed", len(bodies))
        failed = (500, {"error": "the network failed on this batch; the server's log says how"})
        answers = dict.fromkeys(bodies, failed)
    return [answers[i] if i in answers else refused(_HOW) for i in range(len(data))]
