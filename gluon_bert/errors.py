"""The one exception that means "what you gave is wrong", and nothing about how it is shown."""


class BadInput(ValueError):
    """Something the user gave cannot be used; the message says what, where, and what would be right.

    The commands print the message alone and leave with exit status 2; from Python it is a ValueError.
    """
