"""Pieces of words <-> ids: BERT's WordPiece, with a trained or published vocabulary. Reads no corpus."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Iterable, Iterator, Mapping, Sequence

import numpy as np

from ..errors import InputError
from ..fileio import atomic_write, decode_utf8
from .basic_tokenizer import MARKERS, MASK, UNK, split_words, tokenizers_library
from .vocab import Normalization, Vocabulary, check_characters

PAD, CLS, SEP = "[PAD]", "[CLS]", "[SEP]"
SPECIAL_TOKENS = (PAD, UNK, CLS, SEP, MASK)

# Unused tokens in published vocabularies.
_UNUSED = re.compile(r"\[unused\d+\]")
_PREFIX = "##"
# A longer word is [UNK] as a whole, as in Devlin et al.'s tokenization.py.
_LONGEST_WORD = 100
# The most frequent characters get a token, as in `tokenizers`. All would fill the vocabulary.
_MOST_CHARACTERS = 1000
# Copies of a word per text for the trainer. This keeps the texts of frequent words short.
_REPEATED = 10_000


class WordPieceVocabulary(Vocabulary):
    """A vocabulary of words and pieces of words; `##` begins a piece that continues a word.

    Its special tokens are [PAD] [UNK] [CLS] [SEP] [MASK], at any id; `special` marks these and
    the [unused0] and so on of published vocabularies. Raise InputError if one is missing, a token occurs
    twice, or the package `tokenizers` is not installed.

    >>> vocab = WordPieceVocabulary([*SPECIAL_TOKENS, "crane", "##s", "fly"])
    >>> vocab.split("Cranes fly!", Normalization(lowercase=True)), vocab.pieces("cranes"), vocab.pieces("!")
    (['cranes', 'fly', '!'], ['crane', '##s'], ['!'])
    >>> vocab.to_indices(["crane", "##s", "!"]).tolist(), vocab.is_continuation.tolist()[5:]
    ([5, 6, 1], [False, True, False])
    """

    FILE = "vocab.txt"

    def __init__(self, tokens: Iterable[str]) -> None:
        self.tokens = list(tokens)
        check_characters(self.tokens, "a WordPiece vocabulary")
        ids = {token: i for i, token in enumerate(self.tokens)}
        problems = [f"has no {token}" for token in SPECIAL_TOKENS if token not in ids]
        if len(ids) != len(self.tokens):
            problems.append("must not hold a token twice")
        if problems:
            raise InputError(f"a WordPiece vocabulary: {', '.join(problems)}")
        self.pad, self.unk, self.cls, self.sep, self.mask = (ids[token] for token in SPECIAL_TOKENS)
        self._model = tokenizers_library().models.WordPiece(
            ids, unk_token=UNK, max_input_chars_per_word=_LONGEST_WORD, continuing_subword_prefix=_PREFIX
        )
        # Lookups of single tokens also accept <mask> and <unk>.
        self._ids = {**{marker: ids[token] for marker, token in MARKERS.items()}, **ids}
        self._sort_out(
            special=np.array([t in SPECIAL_TOKENS or bool(_UNUSED.fullmatch(t)) for t in self.tokens]),
            is_continuation=np.array([t.startswith(_PREFIX) and len(t) > len(_PREFIX) for t in self.tokens]),
        )

    @classmethod
    def from_counts(cls, counts: Mapping[str, int], min_freq: int, size: int = 30522) -> WordPieceVocabulary:
        """Build a vocabulary of at most `size` tokens from word counts.

        Pieces that occur side by side at least `min_freq` times are joined. The result depends on the counts
        only, not on their order or on the number of threads.
        """
        markers = set(MARKERS.values())
        alphabet = _alphabet({word: n for word, n in counts.items() if word not in markers})
        # A word with another character is [UNK] as a whole, so its pieces never occur.
        counts = {w: n for w, n in counts.items() if w not in markers and alphabet.issuperset(w)}
        alone = sorted({character for word in counts for character in word})
        inner = sorted({_PREFIX + character for word in counts for character in word[1:]})
        needed = [*SPECIAL_TOKENS, *alone, *inner]
        if len(needed) > size:
            raise InputError(
                f"vocab_size must be at least {len(needed)} for the special tokens and the characters of the "
                f"corpus, got {size}."
            )
        # All characters are passed as special tokens. Otherwise the trainer would number them in the order of
        # a hash table, which differs by process. It joins lower numbers first among equally frequent pairs.
        return cls(_joined(counts, needed, min_freq, size))

    def _is_new(self, word: str) -> bool:
        return word not in self and word not in MARKERS and len(word) <= _LONGEST_WORD

    def _with(self, new: Sequence[str]) -> WordPieceVocabulary:
        return type(self)([*self.tokens, *new])

    def split(self, text: str, normalization: Normalization) -> list[str]:
        """Split a text into words as BERT does; <mask> and <unk> become [MASK] and [UNK]."""
        return split_words(text, normalization)

    def pieces(self, word: str) -> list[str]:
        """Return the tokens of a word, longest match first from the left; the word itself if it has none."""
        tokens = [piece.value for piece in self._model.tokenize(word)]
        return [word] if tokens == [UNK] else tokens

    def save(self, path: Path) -> None:
        """Write vocab.txt with one token per line; `load` is the inverse."""
        with atomic_write(path) as file:
            file.writelines(token + "\n" for token in self.tokens)

    @classmethod
    def load(cls, path: Path) -> WordPieceVocabulary:
        """Read a vocabulary with one token per line. Raise InputError, which names all wrong lines."""
        path = Path(path)
        try:
            text = decode_utf8(path.read_bytes(), str(path))
        except OSError as error:
            raise InputError(f"{path}: cannot be read as a vocabulary ({error.strerror or error})") from error
        # Not splitlines: published vocabularies have tokens that splitlines would treat as line ends.
        lines = text.replace("\r\n", "\n").split("\n")
        if not lines[-1]:
            lines.pop()
        at: dict[str, int] = {}
        problems = []
        for number, token in enumerate(lines, 1):
            if not token.strip(" \t"):
                problems.append(f"{path}, line {number}: must have a token, got an empty line")
            elif token in at:
                problems.append(
                    f"{path}, line {number}: {token!r} must occur once, and is in line {at[token]}"
                )
            at.setdefault(token, number)
        missing = [token for token in SPECIAL_TOKENS if token not in at]
        if missing:
            problems.append(f"{path}: must have {' '.join(missing)}, as every WordPiece vocabulary")
        if problems:
            raise InputError("\n".join(problems))
        return cls(lines)

    def check_case(self, path: str, lowercase: bool) -> None:
        """Raise InputError if a published vocabulary is for text of the other case."""
        if lowercase and self.is_cased():
            raise InputError(f"lowercase must be off with the cased vocabulary {path}. Use lowercase=False.")
        if not lowercase and "a" in self and "A" not in self:
            raise InputError(f"lowercase must be on with the uncased vocabulary {path}. Use lowercase=True.")


def load_vocabulary(folder: Path) -> Vocabulary:
    """Read the vocabulary, of either kind, in the folder of a run or an export.

    Raise InputError without one.
    """
    path = Path(folder) / WordPieceVocabulary.FILE
    if path.exists():
        return WordPieceVocabulary.load(path)
    return Vocabulary.load(Path(folder) / Vocabulary.FILE)


def installed_version() -> str:
    """Return the version of the package `tokenizers`, on which the tokens may depend."""
    return str(tokenizers_library().__version__)


def _alphabet(counts: Mapping[str, int]) -> set[str]:
    """Return the characters that get tokens: the most frequent ones, ties in code point order."""
    times: dict[str, int] = {}
    for word, count in counts.items():
        for character in word:
            times[character] = times.get(character, 0) + count
    return set(sorted(times, key=lambda character: (-times[character], character))[:_MOST_CHARACTERS])


def _joined(counts: Mapping[str, int], needed: Sequence[str], min_freq: int, size: int) -> list[str]:
    """Return the needed tokens, followed by those that are joined from them."""
    library = tokenizers_library()
    trainer = library.trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=min_freq,
        special_tokens=list(needed),
        limit_alphabet=len(needed),
        show_progress=False,
    )
    tokenizer = library.Tokenizer(library.models.WordPiece(unk_token=UNK))
    tokenizer.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(_repeated(counts), trainer)
    ids = tokenizer.get_vocab()
    return sorted(ids, key=ids.__getitem__)


def _repeated(counts: Mapping[str, int]) -> Iterator[str]:
    """Yield text in which each word occurs as often as its count."""
    for word, count in counts.items():
        for start in range(0, count, _REPEATED):
            yield " ".join([word] * min(_REPEATED, count - start))
