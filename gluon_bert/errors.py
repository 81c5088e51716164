"""The one exception that means "what you gave is wrong", and how others' errors fit into a sentence."""

from typing import Sequence


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, where, and what would be right.

    The commands print the message alone and leave with exit status 2; from Python it is a ValueError.
    """


def one_line(error: BaseException) -> str:
    """What an error says, in a line: MXNet's errors begin with a trace, and say what it was at its end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[0] if lines else repr(error))


def join_words(items: Sequence[str]) -> str:
    """A list in a sentence: ["a"] -> "a", ["a", "b", "c"] -> "a, b and c"."""
    *others, last = items
    return f"{', '.join(others)} and {last}" if others else last
