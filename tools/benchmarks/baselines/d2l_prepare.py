"""The baseline d2l of `benchmark.py prepare`: d2l's way from a folder to a batch."""

from __future__ import annotations

import sys

import numpy
from protocol import report_preparation

vars(numpy).setdefault("bool", bool)
from d2l import mxnet as d2l  # noqa: E402
from mxnet import npx  # noqa: E402

npx.set_np()


def prepare() -> str:
    """Make the first batch, without d2l's extra processes, which only load batches."""
    d2l.download_extract = lambda *_: sys.argv[1]  # the folder of d2l's download
    d2l.get_dataloader_workers = lambda: 0
    train_iter, _ = d2l.load_data_wiki(512, 64)
    next(iter(train_iter))[0].wait_to_read()
    return "d2l"


if __name__ == "__main__":
    report_preparation(prepare)
