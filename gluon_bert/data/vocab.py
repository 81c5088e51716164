"""Tokens <-> ids at word level, and text -> words. Counts nothing: the counts are given."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path
from typing import Iterable, Mapping, Sequence

import numpy as np

from ..config import write_json
from ..errors import BadInput

# The book's special tokens in the book's order, so that its ids are these: <unk> is 0, words start at 5.
UNK, PAD, MASK, CLS, SEP = SPECIAL_TOKENS = ("<unk>", "<pad>", "<mask>", "<cls>", "<sep>")

# Vowel signs and accents that are characters of their own, and the joiners between letters: parts of words.
_MARKS = "".join(chr(c) for c in range(0x300, 0x10000) if unicodedata.category(chr(c))[0] == "M")
_LETTER = rf"[\w\u200c\u200d{_MARKS}]"
# A word with its inner apostrophes and hyphens, or one other visible character; <unk> and <mask> stay whole.
_WORD = re.compile(rf"<unk>|<mask>|{_LETTER}+(?:['’-]{_LETTER}+)*|[^\s]")


def split_words(text: str) -> list[str]:
    """Running text to words and punctuation marks, with accented letters in their composed form.

    >>> split_words("It's 3.5 km, <unk> said.")
    ["It's", '3', '.', '5', 'km', ',', '<unk>', 'said', '.']
    """
    return _WORD.findall(unicodedata.normalize("NFC", text))


class Vocabulary:
    """A word vocabulary: the special tokens, then the words by falling frequency.

    >>> vocab = Vocabulary(["crane", "is"])
    >>> vocab.ids(["the", "crane", "is"]).tolist(), vocab.words([3, 5])
    ([0, 5, 6], ['<cls>', 'crane'])
    """

    unk, pad, mask, cls, sep = range(len(SPECIAL_TOKENS))
    num_special = len(SPECIAL_TOKENS)

    def __init__(self, words: Iterable[str]) -> None:
        self.tokens = [*SPECIAL_TOKENS, *words]
        self._ids: dict[str, int] = {token: i for i, token in enumerate(self.tokens)}
        if len(self._ids) != len(self.tokens):
            raise BadInput("a vocabulary must not hold a token twice")

    @classmethod
    def from_counts(cls, counts: Mapping[str, int], min_freq: int) -> Vocabulary:
        """The words that occur `min_freq` times at least; equally frequent ones stand in their own order."""
        words = [w for w, n in counts.items() if n >= min_freq and w not in SPECIAL_TOKENS]
        return cls(sorted(words, key=lambda word: (-counts[word], word)))

    def __len__(self) -> int:
        return len(self.tokens)

    def __contains__(self, token: str) -> bool:
        return token in self._ids

    def ids(self, words: Sequence[str]) -> np.ndarray:
        """The words' ids, int32; a word outside the vocabulary is <unk>. The inverse of `words`."""
        return np.array([self._ids.get(word, self.unk) for word in words], dtype=np.int32)

    def words(self, ids: Iterable[int]) -> list[str]:
        """The tokens of these ids, the inverse of `ids`."""
        return [self.tokens[i] for i in ids]

    def save(self, path: Path) -> None:
        """Write the JSON that `gluonnlp.Vocab.from_json` reads; `load` is the inverse."""
        write_json(
            path,
            {
                "idx_to_token": self.tokens,
                "token_to_idx": self._ids,
                "reserved_tokens": [PAD, MASK, CLS, SEP],
                "unknown_token": UNK,
                "identifiers_to_tokens": {
                    "padding_token": PAD,
                    "mask_token": MASK,
                    "cls_token": CLS,
                    "sep_token": SEP,
                    "bos_token": None,
                    "eos_token": None,
                },
            },
        )

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """The vocabulary that `save` wrote; BadInput names the file where it is none."""
        try:
            tokens = json.loads(Path(path).read_text("utf-8"))["idx_to_token"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f"{path}: cannot be read as a vocabulary ({type(error).__name__}: {error})"
            ) from error
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise BadInput(f"{path}: idx_to_token must be a list of strings")
        if tuple(tokens[: len(SPECIAL_TOKENS)]) != SPECIAL_TOKENS:
            raise BadInput(f"{path}: a vocabulary must begin with {' '.join(SPECIAL_TOKENS)}")
        return cls(tokens[len(SPECIAL_TOKENS) :])
