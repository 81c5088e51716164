"""Compares two networks on the same texts: how far apart their results are, how fast each is."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any, Iterable, Iterator, Mapping, NamedTuple, Sequence

import numpy as np

from ..data.tokenizer import EncodedText, PaddedBatch, Tokenizer, bucket_by_length, pad
from ..data.vocab import Vocabulary
from ..errors import InputError
from ..inference.predictor import BATCH_MASKS, Backend, Outputs

# Share of the words that are masked for a comparison, as in training (Devlin et al. 2018, section 3.1).
MASK_RATE = 0.15

# Texts are compared in this many groups of like length.
NUM_GROUPS = 3

# Tokens per batch: enough for matrix products at full speed. A round takes few seconds.
BATCH_TOKENS = 1024

# Both networks take turns in each round, so that other work on the machine slows both down.
ROUNDS = 5


def random_texts(rng: np.random.Generator, batch_size: int, length: int, vocab: Vocabulary) -> PaddedBatch:
    """Return rows of random words in two segments, with lengths up to `length` and some masks."""
    valid_length = rng.integers(max(length // 2, 3), length + 1, batch_size).astype(np.int32)
    valid_length[0] = length
    position = np.arange(length)
    padding = position >= valid_length[:, None]
    middle = valid_length[:, None] // 2
    tokens = rng.choice(vocab.ordinary_ids, (batch_size, length)).astype(np.int32)
    tokens[(position == middle) | (position == valid_length[:, None] - 1)] = vocab.sep
    tokens[:, 0] = vocab.cls
    tokens[:, 1] = vocab.mask
    tokens[padding] = vocab.pad
    token_types = ((position > middle) & ~padding).astype(np.int32)
    return PaddedBatch(
        tokens, token_types, valid_length, np.stack(np.nonzero(tokens == vocab.mask)).astype(np.int32)
    )


def differences(reference: Backend, other: Backend, batches: Iterable[PaddedBatch]) -> dict[str, float]:
    """Return the largest difference of each output, in units of the reference's largest value.

    The unit is 1 where all values are smaller. The vectors of padding are left out, as they mean nothing.
    """
    largest: dict[str, float] = {}
    for texts in batches:
        expected, found = reference(texts)._asdict(), other(texts)._asdict()
        real = np.arange(texts.tokens.shape[1]) < texts.valid_length[:, None]
        for name, array in found.items():
            if array is None:
                continue
            a, b = (each[real] if each.ndim == 3 else each for each in (expected[name], array))
            difference = np.abs(a - b).max() / max(1.0, np.abs(a).max())
            # NaN becomes infinite: every comparison with NaN is false, so it would pass as no difference.
            largest[name] = max(largest.get(name, 0.0), float(np.nan_to_num(difference, nan=np.inf)))
    return largest


class MaskedText(NamedTuple):
    """A text with some of its words masked, and the ids of the masked words, (K,).

    An id is -1 where the text itself has a <mask>, as its word is unknown.
    """

    text: EncodedText
    masked_ids: np.ndarray


def question(text: EncodedText, vocab: Vocabulary, rng: np.random.Generator) -> MaskedText:
    """Return a text with 15 % of its known words masked, at least one if it has any."""
    words = np.flatnonzero(~vocab.special[text.ids])
    chosen = rng.permutation(words)[: max(1, int(MASK_RATE * len(words)))]
    ids, tokens = text.ids.copy(), list(text.tokens)
    ids[chosen] = vocab.mask
    for position in chosen:
        tokens[position] = vocab.tokens[vocab.mask]
    asked = dataclasses.replace(text, ids=ids, tokens=tokens)
    known = np.where(text.ids == vocab.mask, -1, text.ids)
    return MaskedText(asked, known[asked.masks])


def compare(
    reference: Backend, other: Backend, texts: Sequence[EncodedText], reader: Tokenizer, with_masks: bool
) -> list[dict[str, Any]]:
    """Return how far another network's results are from the reference's and how fast it is, by text length.

    The texts are split into a short, a middle and a long third. With `with_masks` some of their words are
    masked. Returned for each third, as plain values for a manifest:

    texts: their number. tokens: their shortest and longest length. errors: the mean and the largest distance
    between both networks' vectors, by output. There is one vector per token, text or mask. The unit is the
    length of the reference's vector, at least 1. cosine: of both networks' <cls> and of both means of all
    tokens, the mean over the texts and the smallest. same word: the share of masks where both rank the same
    word first. mlm loss: on the masked words, in nats, of either network. speed ratio: the other's texts per
    second over the reference's.
    """
    if len(texts) < NUM_GROUPS:
        raise InputError(f"text must have at least {NUM_GROUPS} texts to compare on, got {len(texts)}.")
    rng = np.random.default_rng(0)
    ordered = sorted(texts, key=len)
    bounds = np.linspace(0, len(ordered), NUM_GROUPS + 1).round().astype(int)
    groups = []
    for start, stop in zip(bounds[:-1], bounds[1:]):
        group = ordered[start:stop]
        asked = list(batches(group, reader, rng, with_masks))
        if with_masks and not any(each.texts.masked_positions.size for each in asked):
            raise InputError(
                f"text must have known words: no text of {len(group[0])} to {len(group[-1])} tokens has a "
                "word of the vocabulary."
            )
        tokens = [len(group[0]), len(group[-1])]
        groups.append({"texts": len(group), "tokens": tokens, **_compared(reference, other, asked)})
    return groups


def table(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what `compare` found as lines: a heading, then a line for each group of texts.

    The errors are the largest of all outputs. The cosine is between the means of all tokens.
    """
    lines = ["tokens    error: mean, largest   cosine   same word   MLM loss           speed"]
    for group in groups:
        errors = group["errors"].values()
        mean, largest = (max(error[kind] for error in errors) for kind in ("mean", "largest"))
        tokens = "{} to {}".format(*group["tokens"])
        same = f"{group['same word']:.1%}" if "same word" in group else "-"
        loss = "{reference:.3f} -> {export:.3f}".format(**group["mlm loss"]) if "mlm loss" in group else "-"
        lines.append(
            f"{tokens:10}{mean:11.1e}, {largest:.1e}   {group['cosine']['mean']['mean']:.4f}   "
            f"{same:9}   {loss:16}   {group['speed ratio']:.2f} x"
        )
    return lines


class Asked(NamedTuple):
    """A batch of texts, and labels (M,) with one for each mask."""

    texts: PaddedBatch
    masked_ids: np.ndarray


def batches(
    texts: Sequence[EncodedText], reader: Tokenizer, rng: np.random.Generator, with_masks: bool
) -> Iterator[Asked]:
    """Yield texts in batches of similar length, with or without masked words."""
    masked_ids = [np.zeros(0, dtype=np.int32)] * len(texts)
    if with_masks:
        texts, masked_ids = zip(*(question(text, reader.vocab, rng) for text in texts))
    for members in bucket_by_length(texts, BATCH_TOKENS, BATCH_MASKS):
        batch = pad([texts[i] for i in members], reader.max_seq_length)
        if not with_masks:
            # The other network has no mask scores, so the reference must not spend time on them.
            batch = batch._replace(masked_positions=batch.masked_positions[:, :0])
        yield Asked(batch, np.concatenate([masked_ids[i] for i in members]))


def _compared(reference: Backend, other: Backend, asked: Sequence[Asked]) -> dict[str, Any]:
    measured = [_measured(reference(each.texts), other(each.texts), each) for each in asked]
    # The last batch has masks if any has.
    numbers = {name: np.concatenate([m[name] for m in measured if name in m]) for name in measured[-1]}
    errors = [name for name in Outputs._fields if name in numbers]
    result: dict[str, Any] = {
        "errors": {name: _summary(numbers[name], "largest", np.max) for name in errors},
        "cosine": {name: _summary(numbers[f"cosine {name}"], "smallest", np.min) for name in ("cls", "mean")},
    }
    if "same word" in numbers:
        result["same word"] = float(numbers["same word"].mean())
        if len(numbers["loss reference"]):
            networks = ("reference", "export")
            result["mlm loss"] = {name: float(numbers[f"loss {name}"].mean()) for name in networks}
    # The longest batch. Both networks have computed its shape before.
    result["speed ratio"] = speed_ratio(reference, other, asked[-1].texts)
    return result


def relative_distances(expected: Outputs, found: Outputs, texts: PaddedBatch) -> dict[str, np.ndarray]:
    """Return the distance of each vector from the expected one, by output, in units of that one's length.

    The unit is 1 where it is shorter. There is a vector for each token, text or mask.
    """
    real = _real(texts)
    distances = {}
    for name, array in found._asdict().items():
        if array is not None:
            a, b = (each[real] if each.ndim == 3 else each for each in (getattr(expected, name), array))
            distance = np.linalg.norm(a - b, axis=-1) / np.maximum(1.0, np.linalg.norm(a, axis=-1))
            # NaN becomes infinite: every comparison with NaN is false, so it would pass as no difference.
            distances[name] = np.nan_to_num(distance, nan=np.inf)
    return distances


def _real(texts: PaddedBatch) -> np.ndarray:
    """Return which positions are not padding, (B, T)."""
    return np.arange(texts.tokens.shape[1]) < texts.valid_length[:, None]


def _measured(expected: Outputs, found: Outputs, asked: Asked) -> dict[str, np.ndarray]:
    """Return a number for each vector, text or mask, by the name of the measure."""
    valid_length, real = asked.texts.valid_length, _real(asked.texts)
    numbers = relative_distances(expected, found, asked.texts)
    both = [each.encoded for each in (expected, found)]
    numbers["cosine cls"] = _cosine(*(encoded[:, 0] for encoded in both))
    numbers["cosine mean"] = _cosine(
        *((encoded * real[:, :, None]).sum(axis=1) / valid_length[:, None] for encoded in both)
    )
    if expected.mask_scores is not None and found.mask_scores is not None:
        numbers["same word"] = expected.mask_scores.argmax(axis=1) == found.mask_scores.argmax(axis=1)
        numbers["loss reference"] = _losses(expected.mask_scores, asked.masked_ids)
        numbers["loss export"] = _losses(found.mask_scores, asked.masked_ids)
    return numbers


def _losses(scores: np.ndarray, masked_ids: np.ndarray) -> np.ndarray:
    """Return the negative log-likelihood of each known label, from scores (M, V)."""
    scores, masked_ids = scores[masked_ids >= 0], masked_ids[masked_ids >= 0]
    above = scores - scores.max(axis=1, keepdims=True)
    return np.log(np.exp(above).sum(axis=1)) - above[np.arange(len(masked_ids)), masked_ids]


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def _summary(numbers: np.ndarray, extreme: str, function: Any) -> dict[str, float]:
    return {"mean": float(numbers.mean()), extreme: float(function(numbers))}


def speed_ratio(reference: Backend, other: Backend, texts: PaddedBatch) -> float:
    """Return the other's texts a second over the reference's: the median of alternating rounds."""
    ratios = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        reference(texts)
        middle = time.perf_counter()
        other(texts)
        ratios.append((middle - start) / (time.perf_counter() - middle))
    return statistics.median(ratios)
