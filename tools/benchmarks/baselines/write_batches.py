"""Writes the first batches of a configuration for baselines without a loader.

Arguments: the configuration as JSON, the number of batches, the file.
"""

from __future__ import annotations

import json
import sys
from itertools import islice

import numpy as np

from gluon_bert.config import Config
from gluon_bert.data.loader import load_pretraining_data


def main(config_json: str, count: int, path: str) -> None:
    """Write the configuration, the size of the vocabulary and the first `count` batches to an .npz file."""
    config = Config.from_json(json.loads(config_json))
    data = load_pretraining_data(config.data, config.train.batch_size, config.train.seed)
    arrays = {"vocab_size": np.array(len(data.vocab)), "config": np.array(config_json)}
    for number, batch in enumerate(islice(data.train.batches(), count)):
        arrays.update({f"{name}-{number}": array for name, array in vars(batch).items()})
    np.savez(path, **arrays)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
