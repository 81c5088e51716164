"""Masked sentences with a network's guesses, to show what it has learned. Trains nothing."""

from __future__ import annotations

import re
from typing import Any, NamedTuple, Sequence

import numpy as np

from ..data.prepared import DocumentSource
from ..data.vocab import Vocabulary
from ..runtime import mx

# Mostly punctuation and function words, which word frequencies alone predict.
SKIPPED_WORDS = 30
SHORTEST, LONGEST = 5, 20


class MaskedSentence(NamedTuple):
    """A sentence with one masked word. ids: (T,) with <cls> and <sep>. position: of the mask.

    Answer: its id.
    """

    ids: np.ndarray
    position: int
    answer: int


def masked_sentences(
    documents: DocumentSource,
    vocab: Vocabulary,
    count: int = 6,
    seed: int = 0,
    max_seq_length: int = LONGEST + 2,
) -> list[MaskedSentence]:
    """Choose up to `count` sentences without unknown words and mask one content word of each.

    A content word is not among the most frequent words and not a continuation of a word. Only the first shard
    of the text is read. The same seed chooses the same sentences.
    """
    text = documents.part([0])
    lengths = np.diff(text.sentences)
    candidates = np.flatnonzero((lengths >= SHORTEST) & (lengths <= min(LONGEST, max_seq_length - 2)))
    rng = np.random.default_rng([seed, 0x5A])
    found: list[MaskedSentence] = []
    seen: set[int] = set()
    for number in rng.permutation(candidates):
        ids = text.tokens[text.sentences[number] : text.sentences[number + 1]].astype(np.int64)
        places = _content_words(ids, vocab)
        if len(found) == count or (ids == vocab.unk).any() or not len(places):
            continue
        place = int(rng.choice(places))
        answer = int(ids[place])
        if answer in seen:
            continue
        seen.add(answer)
        ids[place] = vocab.mask
        found.append(MaskedSentence(np.concatenate([[vocab.cls], ids, [vocab.sep]]), place + 1, answer))
    return found


def _content_words(ids: np.ndarray, vocab: Vocabulary) -> np.ndarray:
    """Return the places of whole words that are not among the most frequent ones."""
    frequent = vocab.ordinary_ids[:SKIPPED_WORDS]
    starts = ~vocab.is_continuation[ids]
    followed = np.append(vocab.is_continuation[ids[1:]], False)
    letters = np.array([any(c.isalpha() for c in vocab.tokens[i]) for i in ids])
    return np.flatnonzero(~np.isin(ids, frequent) & ~vocab.special[ids] & starts & ~followed & letters)


def best_words(
    net: Any, vocab: Vocabulary, sentences: Sequence[MaskedSentence], context: Any, top: int = 3
) -> list[list[int]]:
    """Return the ids of the `top` most probable words for each mask, the best first."""
    length = max(len(each.ids) for each in sentences)
    tokens = np.full((len(sentences), length), vocab.pad)
    for row, each in enumerate(sentences):
        tokens[row, : len(each.ids)] = each.ids
    valid_length = [len(each.ids) for each in sentences]
    positions = [list(range(len(sentences))), [each.position for each in sentences]]
    arrays = (tokens, np.zeros_like(tokens), valid_length, positions)
    tokens, token_types, valid_length, positions = (mx.nd.array(each, ctx=context) for each in arrays)
    encoded = net.encoder(tokens, token_types, valid_length)
    scores = net.mlm(encoded, positions).asnumpy()
    scores[:, vocab.special] = -np.inf
    return np.argsort(-scores, axis=1, kind="stable")[:, :top].tolist()


def format_samples(
    vocab: Vocabulary,
    sentences: Sequence[MaskedSentence],
    before: Sequence[Sequence[int]],
    after: Sequence[Sequence[int]],
) -> str:
    """Return a table of the sentences and the words before and after training.

    The right word is in brackets.
    """
    lines = ["masked words of the validation text, the three best guesses (the right word in brackets):"]
    for each, *guesses in zip(sentences, before, after):
        first, last = (
            " ".join(f"[{vocab.tokens[i]}]" if i == each.answer else vocab.tokens[i] for i in ids)
            for ids in guesses
        )
        lines.append(f"  {_with_gap(vocab, each)}")
        lines.append(f"      {vocab.tokens[each.answer]}: before {first}; after {last}")
    right = [sum(each.answer in ids for each, ids in zip(sentences, guesses)) for guesses in (before, after)]
    lines.append(
        f"the right word is among the three: before in {right[0]} of {len(sentences)}, after in {right[1]}"
    )
    return "\n".join(lines)


def markdown_samples(
    vocab: Vocabulary, sentences: Sequence[MaskedSentence], guesses: Sequence[Sequence[int]]
) -> str:
    """Return a Markdown table of the sentences, the right words and the guesses.

    Right guesses are in bold.
    """
    lines = ["| sentence | word | guesses |", "| --- | --- | --- |"]
    for each, ids in zip(sentences, guesses):
        words = (_escape(vocab.tokens[i]) for i in ids)
        shown = " ".join(f"**{word}**" if i == each.answer else word for i, word in zip(ids, words))
        lines.append(
            f"| {_escape(_with_gap(vocab, each))} | {_escape(vocab.tokens[each.answer])} | {shown} |"
        )
    return "\n".join(lines)


def _with_gap(vocab: Vocabulary, sentence: MaskedSentence) -> str:
    """Return the words of a sentence with a gap in place of the masked one."""
    words = [vocab.tokens[i] for i in sentence.ids[1:-1]]
    words[sentence.position - 1] = "____"
    return " ".join(words)


def _escape(text: str) -> str:
    """Return a text whose characters mean nothing in Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~-])", r"\\\1", text)
