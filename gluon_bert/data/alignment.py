"""Positions of words and pieces of words in their text. Splits nothing."""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from typing import NamedTuple, Sequence

from .basic_tokenizer import MARKERS


class Span(NamedTuple):
    """A part of a text in characters: `text[start:end]`."""

    start: int
    end: int


def spans(text: str, words: Sequence[str]) -> list[Span]:
    """Return the position of each word in its original text, in the words' order.

    The words may be lower-cased, without accents, composed or decomposed. The text may have characters that
    no word has, such as spaces and control characters. A word may also be a piece of a word, without its ##.

    >>> spans("Crème  BRÛLÉE!", ["creme", "bru", "lee", "!"])
    [Span(start=0, end=5), Span(start=7, end=10), Span(start=10, end=13), Span(start=13, end=14)]
    """
    keys = [_key(character) for character in text]
    whole = "".join(keys)
    owners = [i for i, key in enumerate(keys) for _ in key]
    found: list[Span] = []
    place = 0
    for word in words:
        places = [_find(whole, "".join(map(_key, spelling)), place) for spelling in _spellings(word)]
        first, end = min(filter(None, places), key=lambda each: each[1], default=(place, place))
        if first == end:  # the word has no visible character
            start = found[-1].end if found else 0
            found.append(Span(start, start))
        else:
            found.append(Span(owners[first], _with_marks(text, keys, owners[end - 1] + 1)))
        place = end
    return found


def _spellings(word: str) -> list[str]:
    """Return the spellings of a word in a text: [MASK] is also <mask>."""
    return [spelling for spelling, token in MARKERS.items() if token == word] or [word]


def _find(whole: str, wanted: str, start: int) -> tuple[int, int] | None:
    """Return the start and end of the wanted characters, even with others between them, or None."""
    if whole.startswith(wanted, start):
        return start, start + len(wanted)
    places = []
    for character in wanted:
        places.append(whole.find(character, start))
        if places[-1] < 0:
            return None
        start = places[-1] + 1
    return places[0], start


def _with_marks(text: str, keys: Sequence[str], end: int) -> int:
    """Return the end of a word with the accents that follow its last character."""
    while end < len(text) and not keys[end] and unicodedata.category(text[end])[0] == "M":
        end += 1
    return end


@lru_cache(maxsize=1 << 16)
def _key(character: str) -> str:
    """Return the form in which text and words are compared: without case and accents; may be ""."""
    letter = _visible(unicodedata.normalize("NFD", character))
    return _visible(unicodedata.normalize("NFD", letter.casefold()))


def _visible(characters: str) -> str:
    return "".join(
        c for c in characters if unicodedata.category(c)[0] not in "CZ" and unicodedata.category(c) != "Mn"
    )
