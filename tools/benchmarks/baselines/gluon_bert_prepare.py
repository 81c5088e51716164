"""The baselines workers-N and cached of `benchmark.py prepare`: this package, preset d2l."""

from __future__ import annotations

import sys
from hashlib import sha256

from protocol import report_preparation

from gluon_bert.data.loader import load_pretraining_data
from gluon_bert.presets import preset


def prepare() -> str:
    """Make the first batch and return its hash."""
    config = preset("d2l").replace(corpus=(sys.argv[1],), preprocessing_workers=int(sys.argv[2]))
    data = load_pretraining_data(config.data, config.train.batch_size, config.train.seed)
    batch = next(data.train.epoch(0))
    return sha256(b"".join(array.tobytes() for array in vars(batch).values())).hexdigest()


if __name__ == "__main__":
    report_preparation(prepare)
