"""Writes the first batches of the preset d2l for baselines without a loader."""

from __future__ import annotations

import sys
from itertools import islice

import numpy as np

from gluon_bert.data.loader import load_pretraining_data
from gluon_bert.presets import preset


def main(corpus: str, count: int, path: str) -> None:
    """Write the first `count` batches of the corpus to an .npz file."""
    config = preset("d2l").replace(corpus=(corpus,))
    data = load_pretraining_data(config.data, config.train.batch_size, config.train.seed)
    arrays = {"vocab_size": np.array(len(data.vocab))}
    for number, batch in enumerate(islice(data.train.batches(), count)):
        arrays.update({f"{name}-{number}": array for name, array in vars(batch).items()})
    np.savez(path, **arrays)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
