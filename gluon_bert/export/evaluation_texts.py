"""Validation text of a run's own corpus, in all lengths that its network takes. Masks nothing."""

from __future__ import annotations

import numpy as np

from ..data.prepared import PreparedCorpus, prepare
from ..data.sentence_pairs import NUM_SPECIAL_IN_PAIR
from ..data.tokenizer import EncodedText
from ..errors import InputError
from ..run import Run

# Shares of max_seq_length: short, middle and full texts. A format may be right for one length and wrong for
# another: int8 calibrated on long texts alone was 22 % off on short ones.
LENGTH_SHARES = ((1 / 16, 1 / 4), (1 / 4, 3 / 4), (3 / 4, 1))

# A few thousand tokens: enough for a stable first digit of the mean errors. BERT-base takes a few minutes on
# two cores.
NUM_TEXTS = 96


def validation_texts(run: Run, count: int = NUM_TEXTS) -> list[EncodedText]:
    """Return pairs of consecutive validation words: a third short, a third middling, a third long.

    They are the same at every call, and each begins where a sentence begins. Raise InputError with the
    remedy where the corpus cannot be read or has changed.
    """
    prepared = _prepared(run)
    tokens, starts = prepared.validation.tokens, prepared.validation.sentences[:-1]
    if len(tokens) < 2:
        raise InputError(
            "the run's corpus has no validation text. Name a file of texts to compare on with text_file=FILE."
        )
    max_seq_length = run.config.data.max_seq_length
    rng = np.random.default_rng(0)
    texts = []
    for number in range(count):
        low, high = LENGTH_SHARES[number % len(LENGTH_SHARES)]
        room = min(round(max_seq_length * rng.uniform(low, high)), max_seq_length) - NUM_SPECIAL_IN_PAIR
        length = min(max(room, 2), len(tokens))
        start = rng.choice(starts[starts <= len(tokens) - length])
        words, middle = tokens[start : start + length], length // 2
        texts.append(run.reader.ids(words[:middle].tolist(), words[middle:].tolist()))
    return texts


def _prepared(run: Run) -> PreparedCorpus:
    remedy = "Name a file of similar texts to compare on with text_file=FILE."
    if not run.config.data.corpus:
        raise InputError(f"the run has no corpus. {remedy}")
    try:
        prepared = prepare(run.config.data)
    except InputError as error:
        raise InputError(f"the run's corpus cannot be read: {error}\n{remedy}") from error
    if prepared.vocab.tokens != run.vocab.tokens:
        names = " ".join(run.config.data.corpus)
        raise InputError(
            f"corpus must be the text that the run was trained on, and {names} has changed. {remedy}"
        )
    return prepared
