"""Word vectors from the co-occurrences of words in a text. Trains nothing and needs no MXNet.

Levy and Goldberg 2014, "Neural Word Embedding as Implicit Matrix Factorization", show that word2vec
factorizes such counts. Here the factorization is explicit, so the vectors are there before the first training
step.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
from scipy import sparse

from ..errors import InputError
from ..fileio import atomic_write
from .document_arrays import Documents
from .prepared import DocumentSource
from .vocab import Vocabulary

log = logging.getLogger(__name__)

# Maximum number of tokens to count. More text changes the vectors of frequent words little.
MAX_TOKENS = 50_000_000
# Neighbours on either side; a neighbour at distance d counts 1 / d, as in GloVe (Pennington et al. 2014).
WINDOW = 5
# Exponent of the contexts' counts: Levy, Goldberg and Dagan 2015, section 3.1.
CONTEXT_POWER = 0.75
# Extra columns and power iterations of the randomized decomposition: Halko et al. 2011, section 1.6.
OVERSAMPLING, POWER_ITERATIONS = 16, 3


def word_vectors(documents: DocumentSource, vocab: Vocabulary, size: int, seed: int = 0) -> np.ndarray:
    """Return vectors of the words that occur in a text: (V, size) float32, NaN rows for all other tokens.

    Every column has mean 0 over the words; all values together have standard deviation 1. The same text, size
    and seed give the same vectors. Raise InputError if there are fewer words than columns.
    """
    counts = count_cooccurrences(documents, vocab)
    met = np.flatnonzero(np.diff(counts.indptr))
    if len(met) <= size:
        raise InputError(
            f"init_embeddings cooccurrence needs more words than units, got {len(met)} words and "
            f"{size} units. Reduce units, or use init_embeddings random."
        )
    vectors = _left_factor(positive_pmi(counts), size, seed)[met]
    vectors -= vectors.mean(axis=0)
    result = np.full((len(vocab), size), np.nan, np.float32)
    result[met] = vectors / vectors.std()
    return result


def cached_word_vectors(
    documents: DocumentSource, vocab: Vocabulary, size: int, seed: int, folder: Path | None
) -> np.ndarray:
    """Return `word_vectors`, computed once for each prepared text, size and seed.

    folder: of the prepared text; None for a text in memory.
    """
    path = folder / f"cooccurrence-{size}-{seed}.npy" if folder else None
    if path is not None:
        try:
            vectors = np.load(path, allow_pickle=False)
            if vectors.shape == (len(vocab), size) and vectors.dtype == np.float32:
                return vectors
        except (OSError, ValueError, EOFError):
            pass  # not there, or damaged: computed again
    started = time.perf_counter()
    vectors = word_vectors(documents, vocab, size, seed)
    log.info("word vectors from co-occurrences: %.1f s", time.perf_counter() - started)
    if path is not None:
        try:
            with atomic_write(path, "wb") as file:
                np.save(file, vectors)
        except OSError as error:
            log.warning("%s cannot be written (%s): the word vectors are not cached", path, error.strerror)
    return vectors


def count_cooccurrences(documents: DocumentSource, vocab: Vocabulary) -> sparse.csr_matrix:
    """Count neighbouring words within sentences: (V, V) float64, symmetric, without special tokens."""
    ordinary = ~vocab.special
    total = sparse.csr_matrix((len(vocab), len(vocab)))
    counted = 0
    for shard, num_tokens in enumerate(documents.sizes):
        if counted and counted + num_tokens > MAX_TOKENS:
            break
        counted += int(num_tokens)
        total = total + _count(documents.part([shard]), ordinary)
    return (total + total.T).tocsr()


def _count(documents: Documents, ordinary: np.ndarray) -> sparse.csr_matrix:
    """Count each word's following neighbours: (V, V)."""
    tokens = documents.tokens.astype(np.int32)
    sentence = np.repeat(np.arange(len(documents.sentences) - 1), np.diff(documents.sentences))
    is_word = ordinary[tokens]
    shape = (len(ordinary), len(ordinary))
    total = sparse.csr_matrix(shape)
    for distance in range(1, WINDOW + 1):
        first, second = slice(None, -distance), slice(distance, None)
        pair = (sentence[first] == sentence[second]) & is_word[first] & is_word[second]
        weights = np.full(int(pair.sum()), 1 / distance)
        total = (
            total + sparse.coo_matrix((weights, (tokens[first][pair], tokens[second][pair])), shape).tocsr()
        )
    return total


def positive_pmi(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """Return the positive pointwise mutual information of words and contexts: (V, V) float64."""
    words = np.asarray(counts.sum(axis=1)).ravel()
    contexts = np.asarray(counts.sum(axis=0)).ravel() ** CONTEXT_POWER
    rows = np.repeat(words, np.diff(counts.indptr))
    pmi = np.log(counts.data * contexts.sum() / (rows * contexts[counts.indices]))
    result = sparse.csr_matrix((np.maximum(pmi, 0), counts.indices, counts.indptr), counts.shape)
    result.eliminate_zeros()
    return result


def _left_factor(matrix: sparse.csr_matrix, size: int, seed: int) -> np.ndarray:
    """Return U sqrt(S) of a truncated singular value decomposition, by random projection: (V, size).

    The largest value of each column is positive, so that the sign does not depend on the library.
    """
    columns = min(size + OVERSAMPLING, matrix.shape[0])
    basis = np.random.default_rng([seed, 0xC0]).standard_normal((matrix.shape[1], columns))
    basis, _ = np.linalg.qr(matrix @ basis)
    for _ in range(POWER_ITERATIONS):
        basis, _ = np.linalg.qr(matrix.T @ basis)
        basis, _ = np.linalg.qr(matrix @ basis)
    left, values, _ = np.linalg.svd((matrix.T @ basis).T, full_matrices=False)
    factor = (basis @ left[:, :size]) * np.sqrt(values[:size])
    largest = np.abs(factor).argmax(axis=0)
    return factor * np.sign(factor[largest, np.arange(size)])
