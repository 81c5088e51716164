"""The words whose embeddings are nearest to that of a word. Runs no network."""

from __future__ import annotations

import numpy as np

from ..data.tokenizer import Tokenizer
from ..errors import InputError


def nearest_words(
    embeddings: np.ndarray, reader: Tokenizer, word: str, top: int = 10
) -> list[tuple[str, float]]:
    """Return the `top` tokens whose embeddings have the largest cosine with that of a word, and the cosines.

    embeddings: (V, C), of the vocabulary. word: one token, as the reader splits it.
    Special tokens and the word itself are left out.

    Raise InputError for a word that is not in the vocabulary or that has several tokens.
    """
    if top < 1:
        raise InputError(f"top must be at least 1, got {top}.")
    vocab = reader.vocab
    own = _id_of(reader, word)
    length = np.linalg.norm(embeddings, axis=1)
    cosines = embeddings @ embeddings[own] / np.maximum(length * length[own], np.finfo(np.float32).tiny)
    cosines[vocab.special] = -np.inf
    cosines[own] = -np.inf
    best = np.argsort(-cosines, kind="stable")[:top]
    best = best[np.isfinite(cosines[best])]
    return list(zip(vocab.to_tokens(best), cosines[best].tolist()))


def _id_of(reader: Tokenizer, word: str) -> int:
    if word in reader.vocab:
        return int(reader.vocab.to_indices([word])[0])
    text = reader.text(word, truncate=True)
    ids, tokens = text.ids[1:-1], text.tokens[1:-1]
    if len(ids) != 1:
        raise InputError(f"word must be one token, got {word!r}, which is read as {' '.join(tokens)}.")
    if ids[0] == reader.vocab.unk:
        raise InputError(f"word must be in the vocabulary, got {word!r}.")
    return int(ids[0])
