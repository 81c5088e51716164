"""The vocabulary that comes with another package's weights, made to fit them. Knows no network."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any, Mapping, Sequence

from ..data.vocab import SPECIAL_TOKENS, Vocabulary
from ..data.wordpiece import WordPieceVocabulary
from ..errors import InputError
from ..fileio import read_json
from .tokenizer_files import TOKENIZER
from .weight_files import check_downloaded

VOCAB = "vocab.txt"

# A vocabulary is cased if lower-casing would change more than this share of its tokens.
_CASED_SHARE = 0.1

# A row of the embeddings without a token of its own.
_NAMELESS = None


def read_vocabulary(
    path: Path, rows: int, notes: list[str], added: Mapping[str, int | None] | None = None
) -> Vocabulary:
    """Return a vocabulary for embeddings of this many rows, from a file with a token a line or from JSON.

    The JSON is gluonnlp.Vocab's, or a tokenizer.json. added: further tokens and their rows, None for the next
    free one. Rows without a token get the names [unused...] of published vocabularies; a note says so. Raise
    InputError if the vocabulary cannot be read or does not fit.
    """
    check_downloaded(path)
    tokens = _tokens_in_json(path) if path.suffix == ".json" else _lines(path)
    if tuple(tokens[: len(SPECIAL_TOKENS)]) == SPECIAL_TOKENS:
        return _word_vocabulary(path, tokens, rows)
    if tokens and isinstance(tokens[0], str) and tokens[0] in SPECIAL_TOKENS:
        raise InputError(f"{path}: a vocabulary of words must begin with {' '.join(SPECIAL_TOKENS)}")
    tokens = _with_added(path, tokens, added or {})
    if len(tokens) > rows:
        raise InputError(
            f"{path}: must have at most {rows} tokens, a row of the weights each, got {len(tokens)}"
        )
    return _piece_vocabulary(path, [*tokens, *[_NAMELESS] * (rows - len(tokens))], notes)


def looks_cased(vocab: Vocabulary) -> bool:
    """Return whether a vocabulary seems to come from text that was not lower-cased.

    Lower-casing also removes accents and decomposes Hangul. Few tokens of an uncased vocabulary would change.
    """
    tokens = [vocab.tokens[i] for i in vocab.ordinary_ids]
    if not isinstance(vocab, WordPieceVocabulary):
        return vocab.is_cased()
    changed = sum(token != _lowered(token) for token in tokens)
    return changed > _CASED_SHARE * len(tokens)


def _lowered(token: str) -> str:
    parts = unicodedata.normalize("NFD", token.lower())
    return "".join(c for c in parts if unicodedata.category(c) != "Mn")


def vocabulary_file(folder: Path) -> Path:
    """Return a folder's vocabulary file; raise InputError if it has none, or two that differ."""
    paths = [folder / name for name in (VOCAB, TOKENIZER) if (folder / name).is_file()]
    if not paths:
        raise InputError(f"{folder}: must hold {VOCAB} or {TOKENIZER}")
    if len(paths) == 2:
        for path in paths:
            check_downloaded(path)
        lines, tokens = _lines(paths[0]), _tokens_in_json(paths[1])
        for row, (one, other) in enumerate(zip(lines, tokens)):
            if _NAMELESS not in (one, other) and one != other:
                raise InputError(
                    f"{folder}: {VOCAB} and {TOKENIZER} must agree, got {one!r} and {other!r} in row {row}. "
                    "Remove the file that is wrong."
                )
    return paths[0]


def _word_vocabulary(path: Path, tokens: Sequence[Any], rows: int) -> Vocabulary:
    if len(tokens) != rows:
        raise InputError(
            f"{path}: must have {rows} tokens, a row of the weights each, got {len(tokens)}. "
            "Name this network's vocabulary."
        )
    return Vocabulary(tokens[len(SPECIAL_TOKENS) :])


def _piece_vocabulary(path: Path, tokens: list[Any], notes: list[str]) -> WordPieceVocabulary:
    """Return the vocabulary, once every row has a name."""
    nameless = [row for row, token in enumerate(tokens) if token is _NAMELESS]
    names = _unused_names(tokens, len(nameless))
    for row, name in zip(nameless, names):
        tokens[row] = name
    if names:
        ends = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        notes.append(
            f"{path.name} names {len(tokens) - len(names)} of {len(tokens)} rows; the others are {ends}"
        )
    try:
        return WordPieceVocabulary(tokens)
    except InputError as problem:
        raise InputError(f"{path}: {problem}") from problem


def _unused_names(tokens: Sequence[Any], count: int) -> list[str]:
    names: list[str] = []
    taken, number = set(tokens), 0
    while len(names) < count:
        if f"[unused{number}]" not in taken:
            names.append(f"[unused{number}]")
        number += 1
    return names


def _with_added(path: Path, tokens: list[Any], added: Mapping[str, int | None]) -> list[Any]:
    """Return the tokens with further ones in their rows."""
    tokens = list(tokens)
    for token, row in added.items():
        if row is None:
            row = tokens.index(token) if token in tokens else len(tokens)
        # A huge row number is an error; the rows before it are not created.
        tokens += [_NAMELESS] * max(0, min(row, 10_000_000) + 1 - len(tokens))
        if tokens[min(row, len(tokens) - 1)] not in (_NAMELESS, token):
            raise InputError(
                f"{path}: row {row} must be {token!r}, as an added token says, got {tokens[row]!r}"
            )
        tokens[min(row, len(tokens) - 1)] = token
    return tokens


def _lines(path: Path) -> list[Any]:
    """Return one token per line; nameless for blank lines and for tokens that a later line repeats.

    Spaces after a token are not part of it. transformers also takes the later of two equal tokens.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read as a vocabulary ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: must be UTF-8, a token a line") from error
    # Not splitlines: published vocabularies have tokens that splitlines would treat as line ends.
    tokens = [line.rstrip(" \t\r") for line in text.split("\n")]
    while tokens and not tokens[-1]:
        tokens.pop()
    last = {token: row for row, token in enumerate(tokens)}
    return [token if token and last[token] == row else _NAMELESS for row, token in enumerate(tokens)]


def _tokens_in_json(path: Path) -> list[Any]:
    """Return the tokens in the JSON of a gluonnlp.Vocab, or of a WordPiece tokenizer."""
    content = read_json(path)
    if "idx_to_token" in content:
        tokens = content["idx_to_token"]
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise InputError(f"{path}: idx_to_token must be a list of strings")
        return _encodable(path, tokens)
    model = content.get("model")
    ids = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(ids, dict) or not all(type(row) is int and row >= 0 for row in ids.values()):
        raise InputError(f"{path}: must hold the tokens of a gluonnlp.Vocab or of a WordPiece tokenizer")
    if model.get("type", "WordPiece") != "WordPiece":
        raise InputError(f"{path}: its tokens must be of type WordPiece, got {model['type']}")
    size = max(ids.values(), default=-1) + 1
    if len(set(ids.values())) != len(ids) or size > 2 * len(ids) + 1000:
        raise InputError(f"{path}: its ids must be 0, 1, 2 and so on, each once")
    tokens = [_NAMELESS] * size
    for token, row in ids.items():
        tokens[row] = token
    return _encodable(path, tokens)


def _encodable(path: Path, tokens: list[Any]) -> list[Any]:
    for row, token in enumerate(tokens):
        try:
            (token or "").encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"{path}: token {row}, {token!a}, must be valid Unicode. It holds half of a surrogate pair."
            ) from error
    return tokens
