"""Metrics of classes, scores, tags and answers. Needs NumPy only."""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import Callable, Sequence

import numpy as np

from ..inference.tagging import Entity, entities
from ..model.task import Task

# The metrics of each kind of task. By default the first one chooses the best checkpoint.
METRICS_BY_TASK = {
    "classification": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman", "mse"),
    "tagging": ("f1", "precision", "recall", "accuracy"),
    "question-answering": ("f1", "exact_match"),
}
# Metrics of plain tags, which have no entities.
_PLAIN_TAGS = ("accuracy", "f1")
# Metrics for which smaller is better.
SMALLER = ("mse",)


def metrics_of(task: Task) -> tuple[str, ...]:
    """Return the metrics of a task. The first one decides by default."""
    plain = task.kind == "tagging" and not task.has_entities
    return _PLAIN_TAGS if plain else METRICS_BY_TASK[task.kind]


def classification_metrics(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> dict[str, float]:
    """Return accuracy, F1 and Matthews' correlation of classes, (N,) and (N,) of numbers below num_classes.

    With two classes F1 is that of class 1, as in GLUE. Otherwise it is the mean over all classes that occur.
    Matthews' is Gorodkin's (2004) for any number of classes; 0 where it is 0 divided by 0.
    """
    table = np.zeros((num_classes, num_classes))
    np.add.at(table, (labels, predicted), 1)
    num_correct, true, said = table.diagonal(), table.sum(axis=1), table.sum(axis=0)
    occurs = true + said > 0
    scores = 2 * num_correct[occurs] / (true + said)[occurs]
    f1 = scores.mean()
    if num_classes == 2:
        f1 = 2 * num_correct[1] / (true + said)[1] if occurs[1] else 0.0
    count = len(labels)
    product = (count**2 - (said**2).sum()) * (count**2 - (true**2).sum())
    matthews = (count * num_correct.sum() - (true * said).sum()) / np.sqrt(product) if product else 0.0
    return {"accuracy": float(num_correct.sum() / count), "f1": float(f1), "matthews": float(matthews)}


def regression_metrics(expected: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Pearson's and Spearman's correlation and the mean squared error of predicted scores, (N,) and (N,).

    A correlation with scores that are all alike is NaN.
    """
    return {
        "pearson": _correlation(expected, predicted),
        "spearman": _correlation(_ranks(expected), _ranks(predicted)),
        "mse": float(np.mean((expected - predicted) ** 2)),
    }


def entity_metrics(expected: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return F1, precision and recall of the entities of BIO tags, and the accuracy of the tags.

    expected, predicted: tags of each sentence. An entity is right if its type and all its words are. These
    are seqeval's micro averages; 0 where it is 0 divided by 0.
    """
    by_type = _counted(expected, predicted, entities)
    found = _ratios(*np.sum(list(by_type.values()), axis=0)) if by_type else _ratios(0, 0, 0)
    accuracy = _accuracy(expected, predicted)
    return {**{name: found[name] for name in ("f1", "precision", "recall")}, "accuracy": accuracy}


def plain_tag_metrics(
    expected: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Return the accuracy of plain tags, and the mean of F1 over the tags that occur in either."""
    by_tag = tag_metrics_by_type(expected, predicted, has_entities=False)
    f1 = float(np.mean([its["f1"] for its in by_tag.values()]))
    return {"accuracy": _accuracy(expected, predicted), "f1": f1}


def _accuracy(expected: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> float:
    pairs = [pair for sentence in zip(expected, predicted) for pair in zip(*sentence)]
    return sum(one == other for one, other in pairs) / len(pairs)


def tag_metrics_by_type(
    expected: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], has_entities: bool = True
) -> dict[str, dict[str, float]]:
    """Return precision, recall and F1 of each type of entity or plain tag, and the number expected."""
    counted = _counted(expected, predicted, entities if has_entities else _words)
    return {type_: _ratios(*counts) for type_, counts in sorted(counted.items())}


def _words(tags: Sequence[str]) -> list[Entity]:
    return [Entity(tag, place, place + 1) for place, tag in enumerate(tags)]


def _counted(
    expected: Sequence[Sequence[str]],
    predicted: Sequence[Sequence[str]],
    found_in: Callable[[Sequence[str]], list[Entity]],
) -> dict[str, tuple[int, int, int]]:
    """Return for each type how many entities were right, predicted and expected.

    found_in: returns the entities of a sentence's tags.
    """
    right: Counter[str] = Counter()
    said: Counter[str] = Counter()
    true: Counter[str] = Counter()
    for tags, predicted_tags in zip(expected, predicted):
        ours, theirs = set(found_in(tags)), set(found_in(predicted_tags))
        right.update(entity.type for entity in ours & theirs)
        said.update(entity.type for entity in theirs)
        true.update(entity.type for entity in ours)
    return {type_: (right[type_], said[type_], true[type_]) for type_ in {*said, *true}}


def _ratios(right: int, said: int, true: int) -> dict[str, float]:
    return {
        "precision": right / said if said else 0.0,
        "recall": right / true if true else 0.0,
        "f1": 2 * right / (said + true) if said + true else 0.0,
        "number": float(true),
    }


def answer_metrics(
    given: Sequence[Sequence[str]], predicted: Sequence[str], no_answer: bool
) -> dict[str, float]:
    """Return the means of F1 and exact match of predicted answers, as SQuAD's official scripts define them.

    given: the right answers of each question; the best of them counts. no_answer: as evaluate-v2.0.py, where
    a question without answers has the right answer ""; else as evaluate-v1.1.py. Both are from 0 to 1.
    """
    f1, exact = [], []
    for answers, text in zip(given, predicted):
        if no_answer:
            answers = [answer for answer in answers if _words_of(answer)] or [""]
        f1.append(max((_answer_f1(answer, text, no_answer) for answer in answers), default=0.0))
        exact.append(max((_words_of(answer) == _words_of(text) for answer in answers), default=False))
    return {"f1": float(np.mean(f1)), "exact_match": float(np.mean(exact))}


def _answer_f1(answer: str, predicted: str, no_answer: bool) -> float:
    """Return F1 of the words of an answer; both empty are equal in version 2.0 alone."""
    true, said = _words_of(answer), _words_of(predicted)
    if no_answer and not (true and said):
        return float(true == said)
    right = sum((Counter(true) & Counter(said)).values())
    return 2 * right / (len(true) + len(said)) if right else 0.0


_ARTICLES = re.compile(r"\b(a|an|the)\b")


def _words_of(answer: str) -> list[str]:
    """Return an answer's words in lower case, without ASCII punctuation and articles."""
    letters = "".join(character for character in answer.lower() if character not in string.punctuation)
    return _ARTICLES.sub(" ", letters).split()


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    with np.errstate(invalid="ignore"):
        return float(np.float64((a * b).sum()) / np.sqrt((a * a).sum() * (b * b).sum()))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value. Equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
