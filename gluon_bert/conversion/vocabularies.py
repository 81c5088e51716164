"""The vocabulary that comes with another package's weights, made to fit them. Knows no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Sequence

from ..data.vocab import SPECIAL_TOKENS, Vocabulary
from ..data.wordpiece import WordPieceVocabulary
from ..errors import InputError


def read_vocabulary(path: Path, rows: int, notes: list[str]) -> Vocabulary:
    """A vocabulary for embeddings of so many rows, of a vocab.txt, a token a line, or of JSON.

    The JSON is that of gluonnlp.Vocab, or a tokenizer.json, in which transformers keep WordPiece today.

    Rows without a token, with which some pad the embeddings, get the names [unused...] that published
    vocabularies have for that; a note tells. Raises InputError where the vocabulary cannot be read or does not
    fit.
    """
    vocab = _read(path)
    if len(vocab) > rows:
        raise InputError(f"{path}: has {len(vocab)} tokens, where the weights have rows for {rows}")
    if len(vocab) == rows:
        return vocab
    if not isinstance(vocab, WordPieceVocabulary):
        raise InputError(
            f"{path}: has {len(vocab)} tokens, where the weights have rows for {rows}: it is another "
            "network's vocabulary"
        )
    names = _unused_names(vocab.tokens, rows - len(vocab))
    notes.append(
        f"{path.name} has {len(vocab)} tokens and the embeddings have {rows} rows: the others are named "
        f"{names[0]} to {names[-1]}"
    )
    return WordPieceVocabulary([*vocab.tokens, *names])


def _unused_names(tokens: Sequence[str], count: int) -> list[str]:
    names: list[str] = []
    taken, number = set(tokens), 0
    while len(names) < count:
        if f"[unused{number}]" not in taken:
            names.append(f"[unused{number}]")
        number += 1
    return names


def _read(path: Path) -> Vocabulary:
    if path.suffix != ".json":
        try:
            first = path.read_bytes()[:1000].decode("utf-8", "replace").split("\n")[: len(SPECIAL_TOKENS)]
        except OSError as error:
            raise InputError(f"{path}: cannot be read as a vocabulary ({error.strerror or error})") from error
        if tuple(first) != SPECIAL_TOKENS:
            return WordPieceVocabulary.load(path)
        tokens = path.read_text("utf-8").split("\n")
        return Vocabulary(tokens[len(SPECIAL_TOKENS) : len(tokens) - (not tokens[-1])])
    tokens = _tokens_in_json(path)
    if tuple(tokens[: len(SPECIAL_TOKENS)]) == SPECIAL_TOKENS:
        return Vocabulary(tokens[len(SPECIAL_TOKENS) :])
    try:
        return WordPieceVocabulary(tokens)
    except InputError as problem:
        raise InputError(
            f"{path}: {problem}; a vocabulary of words begins with {' '.join(SPECIAL_TOKENS)}"
        ) from problem


def _tokens_in_json(path: Path) -> list[str]:
    """The tokens in the JSON of a gluonnlp.Vocab, or of a WordPiece tokenizer of the package tokenizers."""
    try:
        content = json.loads(path.read_text("utf-8"))
        tokens = content["idx_to_token"] if "idx_to_token" in content else _tokens_of_tokenizer(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: cannot be read as a vocabulary ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise InputError(f"{path}: idx_to_token must be a list of strings")
    return tokens


def _tokens_of_tokenizer(content: Any) -> list[str]:
    model = content["model"]
    if model.get("type", "WordPiece") != "WordPiece":
        raise ValueError(f"its tokens are made by {model['type']}, not WordPiece")
    ids = {**model["vocab"], **{added["content"]: added["id"] for added in content.get("added_tokens", [])}}
    tokens = sorted(ids, key=ids.__getitem__)
    if [ids[token] for token in tokens] != list(range(len(tokens))):
        raise ValueError("its ids are not 0, 1, 2 and so on")
    return tokens
