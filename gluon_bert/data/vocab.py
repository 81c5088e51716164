"""Tokens <-> ids at word level, and text -> words. Callers give the counts."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path
from typing import Iterable, Mapping, NamedTuple, Sequence

import numpy as np

from ..config import DataConfig
from ..errors import InputError
from ..fileio import SURROGATE, write_json

# D2L's special tokens in its order: <unk> is 0, words start at 5.
UNK, PAD, MASK, CLS, SEP = SPECIAL_TOKENS = ("<unk>", "<pad>", "<mask>", "<cls>", "<sep>")

# Vowel signs and accents that are characters of their own, and the joiners between letters: parts of words.
_MARKS = "".join(chr(c) for c in range(0x300, 0x10000) if unicodedata.category(chr(c))[0] == "M")
_JOINERS = "\u200c\u200d"
_LETTER = rf"[\w{_JOINERS}{_MARKS}]"
# A word with its inner apostrophes and hyphens, or one other visible character; <unk> and <mask> stay whole.
_WORD = re.compile(rf"<unk>|<mask>|{_LETTER}+(?:['’-]{_LETTER}+)*|[^\s]")
_STRAY_JOINER = re.compile(rf"(?<![\w{_MARKS}])[{_JOINERS}]+|[{_JOINERS}]+(?![\w{_MARKS}])")
# Chinese characters, as in BERT's tokenization.py. Each is a word, since no spaces separate words.
_CHINESE = re.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]"
)
# Characters that cannot be seen, such as zero-width spaces, and halves of surrogate pairs. BERT's normalizer
# removes them, too. What Python takes for white space stays.
_INVISIBLE = re.compile(
    "["
    + "".join(
        re.escape(character)
        for character in map(chr, range(0x10000))
        if unicodedata.category(character) in ("Cc", "Cf", "Cs")
        and not character.isspace()
        and character not in _JOINERS
    )
    + "\ufffd]"
)

# A vocabulary is cased if more than this share of its tokens has capitals. Uncased ones have a few, too.
_CASED_SHARE = 0.1


class Normalization(NamedTuple):
    """The options of splitting text into words; DataConfig describes them.

    The word vocabulary uses `lowercase` alone.
    """

    lowercase: bool
    strip_accents: str = "auto"
    tokenize_chinese_chars: bool = True
    added_tokens: tuple[str, ...] = ()
    additional_special_tokens: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: DataConfig) -> Normalization:
        """Take the fields from a configuration."""
        return cls(**{name: getattr(config, name) for name in cls._fields})

    @property
    def all_added(self) -> tuple[str, ...]:
        """Return all tokens that are cut out of the text."""
        return self.added_tokens + self.additional_special_tokens


def split_words(text: str) -> list[str]:
    """Split running text into words and punctuation marks, with accented letters in their composed form.

    A Chinese character is a word. Characters that cannot be seen are left out.

    >>> split_words("It's 3.5 km, <unk> said.")
    ["It's", '3', '.', '5', 'km', ',', '<unk>', 'said', '.']
    """
    if not text.isprintable():
        text = _INVISIBLE.sub("", text)
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
        if "\u200c" in text or "\u200d" in text:
            text = _STRAY_JOINER.sub("", text)
        text = _CHINESE.sub(r" \g<0> ", text)
    return _WORD.findall(text)


def check_characters(tokens: Iterable[str], where: str) -> None:
    """Raise InputError if a token holds half a surrogate pair, which no file of UTF-8 can hold."""
    broken = next((token for token in tokens if not token.isascii() and SURROGATE.search(token)), None)
    if broken is not None:
        raise InputError(f"{where}: token {broken!r} holds half a surrogate pair, which is not a character")


class Vocabulary:
    """A word vocabulary: the special tokens, then the words by falling frequency.

    unk, pad, mask, cls, sep: their ids. special: (V,) bool, tokens that are not text, with <unk>. ordinary:
    the ids of the others, ascending. continues: (V,) bool, tokens that continue the word of the previous
    token; all False here.

    >>> vocab = Vocabulary(["crane", "is"])
    >>> vocab.to_indices(["the", "crane", "is"]).tolist(), vocab.to_tokens([3, 5])
    ([0, 5, 6], ['<cls>', 'crane'])
    """

    FILE = "vocab.json"  # in the folder of a run or an export

    unk, pad, mask, cls, sep = range(len(SPECIAL_TOKENS))

    def __init__(self, words: Iterable[str]) -> None:
        self.tokens = [*SPECIAL_TOKENS, *words]
        self._ids: dict[str, int] = {token: i for i, token in enumerate(self.tokens)}
        if len(self._ids) != len(self.tokens):
            raise InputError("a vocabulary must not hold a token twice")
        self._sort_out(
            special=np.arange(len(self.tokens)) < len(SPECIAL_TOKENS),
            is_continuation=np.zeros(len(self.tokens), dtype=bool),
        )

    def _sort_out(self, special: np.ndarray, is_continuation: np.ndarray) -> None:
        self.special, self.is_continuation = special, is_continuation
        self.ordinary_ids = np.flatnonzero(~special)

    @classmethod
    def from_counts(cls, counts: Mapping[str, int], min_freq: int) -> Vocabulary:
        """Build a vocabulary of the words with `min_freq`; ties are in code point order."""
        words = [w for w, n in counts.items() if n >= min_freq and w not in SPECIAL_TOKENS]
        return cls(sorted(words, key=lambda word: (-counts[word], word)))

    def extended(self, counts: Mapping[str, int], number: int, min_freq: int) -> Vocabulary:
        """Return a vocabulary with up to `number` new words after this one's tokens, the most frequent first.

        >>> Vocabulary(["crane"]).extended({"crane": 9, "is": 7, "a": 8, "rare": 1}, 5, 2).tokens[5:]
        ['crane', 'a', 'is']
        """
        new = [word for word, n in counts.items() if n >= min_freq and self._is_new(word)]
        new = sorted(new, key=lambda word: (-counts[word], word))[:number]
        return self._with(new) if new else self

    def _is_new(self, word: str) -> bool:
        return word not in self

    def _with(self, new: Sequence[str]) -> Vocabulary:
        return type(self)([*self.tokens[len(SPECIAL_TOKENS) :], *new])

    def __len__(self) -> int:
        return len(self.tokens)

    def __contains__(self, token: str) -> bool:
        return token in self._ids

    def to_indices(self, words: Sequence[str]) -> np.ndarray:
        """Return the words' ids, int32; a word outside the vocabulary is <unk>.

        The inverse of `to_tokens`.
        """
        return np.array([self._ids.get(word, self.unk) for word in words], dtype=np.int32)

    def to_tokens(self, ids: Iterable[int]) -> list[str]:
        """Return the tokens of these ids, the inverse of `to_indices`."""
        return [self.tokens[i] for i in ids]

    def split(self, text: str, normalization: Normalization) -> list[str]:
        """Split a text into words: known words between spaces, others by `split_words`.

        So tokenized text, such as WikiText's `@-@`, is read as in training.
        """
        text = text.lower() if normalization.lowercase else text
        return [
            word for part in text.split() for word in ([part] if self._known(part) else split_words(part))
        ]

    def is_cased(self) -> bool:
        """Return whether the vocabulary has words with capitals."""
        capitals = sum(self.tokens[i] != self.tokens[i].lower() for i in self.ordinary_ids)
        return capitals > _CASED_SHARE * len(self.ordinary_ids)

    def special_but(self, tokens: Sequence[str]) -> np.ndarray:
        """(V,) bool: `special` without these tokens, which a text may hold."""
        special = self.special.copy()
        special[self.to_indices([token for token in tokens if token in self])] = False
        return special

    def with_tokens(self, tokens: Sequence[str]) -> Vocabulary:
        """Return this vocabulary, followed by the given tokens that it lacks."""
        new = [token for token in dict.fromkeys(tokens) if token not in self]
        return self._with(new) if new else self

    def _known(self, part: str) -> bool:
        return part in self and (part == MASK or part not in SPECIAL_TOKENS)

    def pieces(self, word: str) -> list[str]:
        """Return the tokens of a word: the word itself, known or not."""
        return [word]

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
        """Read the vocabulary that `save` wrote. Raise InputError, which names the file, if it is invalid."""
        try:
            tokens = json.loads(Path(path).read_text("utf-8"))["idx_to_token"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"{path}: cannot be read as a vocabulary ({type(error).__name__}: {error})"
            ) from error
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise InputError(f"{path}: idx_to_token must be a list of strings")
        check_characters(tokens, str(path))
        if tuple(tokens[: len(SPECIAL_TOKENS)]) != SPECIAL_TOKENS:
            raise InputError(f"{path}: a vocabulary must begin with {' '.join(SPECIAL_TOKENS)}")
        return cls(tokens[len(SPECIAL_TOKENS) :])
