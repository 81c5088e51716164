"""Text -> words as BERT splits it, before words are cut into pieces. Knows no ids."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Pattern

from ..errors import InputError
from ..fileio import SURROGATE
from . import vocab
from .vocab import Normalization

UNK, MASK = "[UNK]", "[MASK]"

# Special tokens that a text may hold, one word each. The word vocabulary and WikiText spell them with <>.
MARKERS = {UNK: UNK, MASK: MASK, vocab.UNK: UNK, vocab.MASK: MASK}
_STRIP_ACCENTS = {"auto": None, "yes": True, "no": False}


def split_words(text: str, normalization: Normalization) -> list[str]:
    """Split running text into words and punctuation marks, as transformers' BertTokenizer does.

    <unk> and [UNK] become [UNK]; <mask> and [MASK] become [MASK]. Text never becomes another special token.

    >>> split_words("It's <unk> 3.5 km", Normalization(lowercase=True))
    ['it', "'", 's', '[UNK]', '3', '.', '5', 'km']
    >>> split_words("Schön [ENT]", Normalization(True, strip_accents="no", added_tokens=("[ENT]",)))
    ['schön', '[ENT]']
    """
    return _splitter(normalization).split(text)


def spaced_words(text: str, normalization: Normalization) -> str:
    """Return the words of `split_words` joined by single spaces; no added token may hold white space."""
    return _splitter(normalization).spaced(text)


class _Splitter:
    """Cuts added tokens out of a text, in two passes as transformers does, and splits the rest into words."""

    def __init__(self, normalization: Normalization) -> None:
        library = tokenizers_library()
        self._normalizer = library.normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=normalization.tokenize_chinese_chars,
            strip_accents=_STRIP_ACCENTS[normalization.strip_accents],
            lowercase=normalization.lowercase,
        )
        self._splitter = library.pre_tokenizers.BertPreTokenizer()
        self._raw = {**{token: token for token in normalization.additional_special_tokens}, **MARKERS}
        self._normalized: dict[str, str] = {}
        for token in normalization.added_tokens:
            self._normalized.setdefault(self._normalizer.normalize_str(token), token)
        self._raw_pattern, self._normalized_pattern = _longest_of(self._raw), _longest_of(self._normalized)
        # Cached, because most parts between spaces repeat. A part's words do not depend on its neighbours.
        self._spaced_part = lru_cache(maxsize=1 << 17)(lambda part: " ".join(self.split(part)))

    def spaced(self, text: str) -> str:
        """Return the words of a text, joined by single spaces."""
        return " ".join(filter(None, map(self._spaced_part, text.split(" "))))

    def split(self, text: str) -> list[str]:
        """Return the words of a text."""
        words: list[str] = []
        # Half a surrogate pair is not a character, and the package `tokenizers` cannot hold it.
        for i, piece in enumerate(self._raw_pattern.split(SURROGATE.sub("", text))):
            if i % 2:
                words.append(self._raw[piece])
            elif piece:
                words += self._split_normalized(self._normalizer.normalize_str(piece))
        return words

    def _split_normalized(self, text: str) -> list[str]:
        words: list[str] = []
        for i, piece in enumerate(self._normalized_pattern.split(text)):
            if i % 2:
                words.append(self._normalized[piece])
            elif piece:
                words += [word for word, _ in self._splitter.pre_tokenize_str(piece)]
        return words


_splitter = lru_cache(maxsize=None)(_Splitter)


def _longest_of(tokens: Any) -> Pattern[str]:
    """Return a pattern that matches the longest of these tokens; without tokens it never matches."""
    spelt = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, spelt))})" if spelt else r"((?!))")


def tokenizers_library() -> Any:
    """Import the package `tokenizers`. Raise InputError if it is not installed."""
    # Not at the top: a word vocabulary does not need it.
    try:
        import tokenizers
    except ImportError as error:
        raise InputError(
            f"a WordPiece vocabulary needs the package tokenizers ({error}): pip install -e '.[wordpiece]'"
        ) from error
    return tokenizers
