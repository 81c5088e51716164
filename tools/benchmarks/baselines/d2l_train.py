"""The baseline d2l of `benchmark.py train`: d2l on MXNet. Argument: the folder of the corpus.

The loop follows the section "Pretraining BERT" of Dive into Deep Learning, with d2l's network, data and loss.
It does not draw the losses after each step.
"""

from __future__ import annotations

import sys
from typing import Any, Iterator

import numpy
from protocol import Step, serve

vars(numpy).setdefault("bool", bool)
from d2l import mxnet as d2l  # noqa: E402
from mxnet import autograd, gluon, init, npx  # noqa: E402

npx.set_np()


def prepare() -> tuple[Iterator[Step], dict[str, Any]]:
    """Return the steps and details to report."""
    d2l.download_extract = lambda *_: sys.argv[1]  # the folder of d2l's download
    # The section uses 4 processes, which only take turns on a small machine.
    d2l.get_dataloader_workers = lambda: 0
    train_iter, vocab = d2l.load_data_wiki(512, 64)
    net = d2l.BERTModel(
        len(vocab), num_hiddens=128, ffn_num_hiddens=256, num_heads=2, num_layers=2, dropout=0.2
    )
    devices = d2l.try_all_gpus()
    net.initialize(init.Xavier(), ctx=devices)
    import mxnet

    return steps(net, train_iter, vocab, devices), {"software": f"d2l 0.17.6, mxnet {mxnet.__version__}"}


def steps(net: Any, train_iter: Any, vocab: Any, devices: Any) -> Iterator[Step]:
    """Run the training loop of the section."""
    loss = gluon.loss.SoftmaxCELoss()
    trainer = gluon.Trainer(net.collect_params(), "adam", {"learning_rate": 1e-3})
    while True:
        for batch in train_iter:
            if batch[0].shape[0] < 512:
                continue
            shards = [gluon.utils.split_and_load(elem, devices, even_split=False) for elem in batch]
            with autograd.record():
                mlm_ls, nsp_ls, ls = d2l._get_batch_loss_bert(net, loss, len(vocab), *shards)
            for each in ls:
                each.backward()
            trainer.step(1)
            mlm = sum(float(each) for each in mlm_ls) / len(mlm_ls)
            nsp = sum(float(each) for each in nsp_ls) / len(nsp_ls)
            npx.waitall()
            yield batch[0].shape[0], mlm, nsp


if __name__ == "__main__":
    serve(prepare)
