"""Predictions as JSON objects, the same for the command and the server."""

from __future__ import annotations

from typing import Any, Collection, Sequence

import numpy as np

from ..data.vocab import Vocabulary
from ..errors import InputError
from .predictor import Prediction

# The possible values of `ask`.
ASKS = ("vectors", "masks", "next", "task", "score")


def as_json(
    answer: Prediction,
    vocab: Vocabulary,
    ask: Collection[str] = ("vectors",),
    top: int = 5,
    token_vectors: bool = False,
    given: Sequence[str] = (),
) -> dict[str, Any]:
    """Return a prediction as a JSON object. Numbers are not rounded.

    `text` and `pair`, if given; `tokens` (T) with <cls> and <sep>; `unknown`, the tokens outside the
    vocabulary; `truncated`, the number of tokens cut off; and, if requested,

    - vectors: `cls`, `mean` and, if exported, `pooled`, each of C numbers; `embedding`, if a pooling is set;
      `token_vectors` (T of C numbers)
    - masks: `predictions`, for each <mask> the `top` likeliest as {"token": ..., "probability": ...}
    - next: `next_sentence_probability`, the probability that the second text follows the first
    - task: `label` and `probabilities` by label, or `score`, of a fine-tuned network

    Raise InputError if this text or export does not support a request, and for non-finite results.
    """
    if not np.isfinite(answer.vectors).all():
        raise InputError("the network must return finite numbers. Its training may have diverged.")
    text = answer.text
    content: dict[str, Any] = dict(zip(("text", "pair"), given))
    content.update(tokens=list(text.tokens), unknown=list(text.unknown), truncated=text.truncated)
    if "vectors" in ask:
        content.update(cls=answer.cls.tolist(), mean=answer.mean.tolist())
        if answer.pooled is not None:
            content["pooled"] = answer.pooled.tolist()
        if answer.embedding is not None:
            content["embedding"] = answer.embedding.tolist()
    if token_vectors:
        content["token_vectors"] = answer.vectors.tolist()
    if "masks" in ask:
        content["predictions"] = [
            [{"token": token, "probability": probability} for token, probability in mask]
            for mask in answer.fill_masks(vocab, top)
        ]
    if "next" in ask:
        content["next_sentence_probability"] = answer.next_sentence_probability
    if "task" in ask:
        content.update(answer.task_prediction)
    return content
