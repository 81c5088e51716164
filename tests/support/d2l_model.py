"""D2L's own BERTModel for MXNet, in its own process, because it needs MXNet's NumPy arrays everywhere.

python d2l_model.py JOB: JOB is an .npz with a batch, the sizes and, if it is to load them, parameters.
Beside it are left given.npz, with what the model gives and its gradients, and theirs.params.
"""

import sys
from pathlib import Path

import numpy

from gluon_bert.runtime import mx  # first, as it makes MXNet and NumPy fit

mx.npx.set_np()
from d2l import mxnet as d2l  # noqa: E402 - after the line above


def model(job):
    """A BERTModel of the job's sizes, with random weights or those of a file."""
    sizes = [int(job[name]) for name in ("vocab_size", "units", "ffn_units", "num_heads", "num_layers")]
    net = d2l.BERTModel(*sizes, 0.0, max_len=int(job["max_positions"]))
    net.initialize(mx.init.Normal(0.3))
    if str(job["load"]):
        net.load_parameters(str(job["load"]))
    return net


def run(path):
    """Do the job."""
    job = numpy.load(path)
    rows, positions = job["masked_positions"]
    column = numpy.arange(len(rows)) - numpy.searchsorted(rows, rows)
    places = numpy.zeros((len(job["valid_length"]), column.max() + 1), numpy.float32)
    places[rows, column] = positions
    net = model(job)
    inputs = [mx.np.array(each) for each in (job["tokens"], job["token_types"], job["valid_length"], places)]
    net(*inputs)
    if not str(job["load"]):
        rng = numpy.random.default_rng(6)
        for parameter in net.collect_params().values():
            noise = rng.normal(0, 0.2, parameter.shape).astype(numpy.float32)
            parameter.set_data(parameter.data() + mx.np.array(noise))
    cross_entropy = mx.gluon.loss.SoftmaxCrossEntropyLoss()
    with mx.autograd.record():
        encoded, mlm, nsp = net(*inputs)
        mlm = mlm[mx.np.array(rows), mx.np.array(column)]
        loss = cross_entropy(mlm, mx.np.array(job["masked_ids"])).mean()
        loss = loss + cross_entropy(nsp, mx.np.array(job["next_sentence_labels"])).mean()
    loss.backward()
    gradients = {f"grad {n}": p.grad().asnumpy() for n, p in net._collect_params_with_prefix().items()}
    given = {"encoded": encoded.asnumpy(), "mlm": mlm.asnumpy(), "nsp": nsp.asnumpy()}
    numpy.savez(path.parent / "given.npz", **given, **gradients)
    net.save_parameters(str(path.parent / "theirs.params"))


if __name__ == "__main__":
    run(Path(sys.argv[1]))
