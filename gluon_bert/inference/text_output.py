"""Predictions as lines of text for a terminal. Computes nothing."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

import numpy as np

from ..data.vocab import Vocabulary
from .predictor import Prediction
from .scoring import TextScore
from .text_files import SEPARATOR

# Numbers of a vector to show.
_SHOWN = 5


def format_vectors(prediction: Prediction, token_vectors: bool = False) -> list[str]:
    """Return the first numbers of the vectors of a text, and of each token if `token_vectors` is set."""
    named = {"cls": prediction.cls, "mean": prediction.mean}
    if prediction.pooled is not None:
        named["pooled"] = prediction.pooled
    if prediction.embedding is not None:
        named = {"embedding": prediction.embedding, **named}
    tokens = prediction.text.tokens
    lines = [f"  tokens    {' '.join(tokens)}"]
    lines += [f"  {name:<9} {_format_vector(vector)}" for name, vector in named.items()]
    if token_vectors:
        lines += [f"  {token:<15} {_format_vector(v)}" for token, v in zip(tokens, prediction.vectors)]
    return lines


def format_masks(prediction: Prediction, vocab: Vocabulary, top: int) -> list[str]:
    """Return the likeliest words of each <mask>."""
    lines = []
    filled = prediction.fill_masks(vocab, top)
    for number, words in enumerate(filled, 1):
        lines += [f"  <mask> {number} of {len(filled)}"] if len(filled) > 1 else []
        lines += [f"  {probability:8.4f}  {word}" for word, probability in words]
    return lines


def format_next_sentence(prediction: Prediction) -> list[str]:
    """Return the probability that the second text follows the first."""
    probability = prediction.next_sentence_probability
    return [f"  {probability:.4f}  is the probability that the second follows the first"]


def format_score(score: TextScore, top: int) -> list[str]:
    """Return the pseudo-log-likelihood of a text and its least likely tokens."""
    lines = [f"  {score.log_likelihood:8.2f}  log-likelihood, perplexity {score.perplexity:.1f}"]
    lines += [
        f"  {value:8.2f}  {token} (token {position})" for position, token, value in score.least_likely(top)
    ]
    return lines


def format_task_prediction(prediction: Mapping[str, Any], top: int) -> list[str]:
    """Return the prediction of a fine-tuned network, the likeliest label first."""
    if "score" in prediction:
        return [f"  {prediction['score']:8.4f}  is the score"]
    likeliest = sorted(prediction["probabilities"].items(), key=lambda each: -each[1])[:top]
    return [f"  {probability:8.4f}  {label}" for label, probability in likeliest]


def format_token_results(content: Mapping[str, Any], given: Sequence[str]) -> list[str]:
    """Return the JSON values of tags, entities or an answer as lines."""
    lines = []
    if "answer" in content:
        place = f"({content['start']} to {content['end']})" if content["answer"] else ""
        lines.append(f"  {content['score']:8.4f}  {content['answer'] or 'no answer'} {place}")
    if "tags" in content and "entities" not in content:
        names = ("probabilities", "tags", "starts", "ends")
        for probability, tag, start, end in zip(*(content[name] for name in names)):
            lines.append(f"  {probability:8.4f}  {tag}  {given[0][start:end]}")
    for entity in content.get("entities", []):
        place = f"({entity['start']} to {entity['end']})"
        lines.append(f"  {entity['probability']:8.4f}  {entity['type']}  {entity['text']} {place}")
    return lines


def format_similar(content: Mapping[str, Any]) -> str:
    """Return the JSON values of `similarity.similar_pairs` or `similar_texts` as text."""
    if "similarity" in content:
        return with_texts([content["text"], content["pair"]], [f"  {content['similarity']:7.4f}"])
    lines = [f"  {each['similarity']:7.4f}  {each['text']}" for each in content["similar"]]
    return with_texts([content["text"]], lines)


def with_texts(given: Sequence[str], lines: Sequence[str]) -> str:
    """Return the texts as a heading, and the lines about them."""
    return "\n".join(map(printable, [f" {SEPARATOR} ".join(given), *lines]))


def printable(text: str) -> str:
    """Return a text with control characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _format_vector(vector: np.ndarray) -> str:
    return f"{' '.join(f'{number:8.4f}' for number in vector[:_SHOWN])} ... ({len(vector)} numbers)"
