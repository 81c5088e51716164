"""The names of the pretraining heads, and checks whether they were trained. Computes nothing."""

from __future__ import annotations

from typing import Any, Sequence

from ..errors import InputError

# The heads by the first part of their parameters' names, with their names in sentences.
HEADS = {"pooler": "the pooler", "mlm": "the masked-language-model head", "nsp": "the next-sentence head"}


def checked_heads(names: Any, where: object) -> tuple[str, ...]:
    """Return names of heads as a tuple; raise InputError for other values."""
    if not isinstance(names, (list, tuple)) or not all(name in list(HEADS) for name in names):
        raise InputError(f"{where}: 'untrained' must be a list of {', '.join(HEADS)}, got {names!r}")
    return tuple(names)


def check_trained(untrained: Sequence[str], *heads: str) -> None:
    """Raise InputError if one of these heads is among the untrained ones."""
    for head in heads:
        if head in untrained:
            raise InputError(
                f"{HEADS[head]} must be trained first: this run has it untrained. "
                "Pretrain with init=RUN, or fine-tune."
            )
