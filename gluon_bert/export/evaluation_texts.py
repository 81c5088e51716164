"""Held-out text of a run's own corpus, in all lengths that its network takes. Masks nothing."""

from __future__ import annotations

import numpy as np

from ..data.prepared import Prepared, prepare
from ..data.sentence_pairs import NUM_SPECIAL_IN_PAIR
from ..data.tokenizer import Text
from ..errors import BadInput
from ..run import Run

# Shares of max_len: short texts, middle ones, and what fills the network. A format may be right on one
# and wrong on another: int8 calibrated on long texts alone was 22 % off on short ones.
LENGTH_SHARES = ((1 / 16, 1 / 4), (1 / 4, 3 / 4), (3 / 4, 1))

# Some thousand tokens: the first digit of their mean errors holds still, and comparing a network as large as
# BERT-base takes a few minutes on two cores.
NUM_TEXTS = 96


def held_out_texts(run: Run, count: int = NUM_TEXTS) -> list[Text]:
    """Pairs of consecutive held-out words, a third of them short, middling and long; always the same.

    Each begins where a sentence begins. BadInput, with the remedy, where the corpus cannot be read any more
    or is another text than the run's.
    """
    prepared = _prepared(run)
    tokens, starts = prepared.held_out.tokens, prepared.held_out.sentences[:-1]
    if len(tokens) < 2:
        raise BadInput("the run's corpus has no held-out text: name a text to compare with (--text FILE)")
    max_len = run.config.data.max_len
    rng = np.random.default_rng(0)
    texts = []
    for number in range(count):
        low, high = LENGTH_SHARES[number % len(LENGTH_SHARES)]
        room = min(round(max_len * rng.uniform(low, high)), max_len) - NUM_SPECIAL_IN_PAIR
        length = min(max(room, 2), len(tokens))
        start = rng.choice(starts[starts <= len(tokens) - length])
        words, middle = tokens[start : start + length], length // 2
        texts.append(run.reader.ids(words[:middle].tolist(), words[middle:].tolist()))
    return texts


def _prepared(run: Run) -> Prepared:
    remedy = "name a text of the same kind to compare with (--text FILE)"
    if not run.config.data.corpus:
        raise BadInput(f"the run has no corpus: {remedy}")
    try:
        prepared = prepare(run.config.data)
    except BadInput as error:
        raise BadInput(f"the run's corpus cannot be read: {error}; {remedy}") from error
    if prepared.vocab.tokens != run.vocab.tokens:
        names = " ".join(run.config.data.corpus)
        raise BadInput(f"--corpus {names}: is not the text that the run was trained on; {remedy}")
    return prepared
