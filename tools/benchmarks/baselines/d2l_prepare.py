"""A contestant of `benchmark.py prepare`: the book's own package, d2l, from a folder to a batch."""

from __future__ import annotations

import sys

import numpy
from protocol import tell_preparation

vars(numpy).setdefault("bool", bool)
from d2l import mxnet as d2l  # noqa: E402
from mxnet import npx  # noqa: E402

npx.set_np()


def prepare() -> str:
    """The first batch of the section; of its processes, which only load batches, none."""
    d2l.download_extract = lambda *_: sys.argv[1]  # where the package would download to
    d2l.get_dataloader_workers = lambda: 0
    train_iter, _ = d2l.load_data_wiki(512, 64)
    next(iter(train_iter))[0].wait_to_read()
    return "the book's"


if __name__ == "__main__":
    tell_preparation(prepare)
