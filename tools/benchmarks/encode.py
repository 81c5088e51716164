"""Measures networks and servers that compute vectors of texts: `benchmark.py encode`."""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import numpy as np
from benchmarks.engines import CTranslate2Network, TransformersNetwork

from gluon_bert import runtime
from gluon_bert.data.tokenizer import EncodedText, pad
from gluon_bert.errors import InputError
from gluon_bert.fileio import write_json
from gluon_bert.inference.predictor import GluonNetwork, Predictor
from gluon_bert.model.bert import BERTModel
from gluon_bert.model.parameters import set_weights, weights_of
from gluon_bert.model.precision import check_precision
from gluon_bert.run import Run

# Rows per batch without sorting by length.
PLAIN_BATCH = 64

# Connections to the server, and therefore simultaneous requests.
CONNECTIONS = 8

Vectors = Callable[[Sequence[EncodedText]], np.ndarray]


class Setup(NamedTuple):
    """What a baseline is made of. stack: ends the processes that it starts."""

    run: Run
    texts: Sequence[EncodedText]
    folder: Path
    stack: ExitStack


def plain(setup: Setup) -> Vectors:
    """Use the hybridized network with batches in text order."""
    network = GluonNetwork(setup.run.net)

    def vectors(texts: Sequence[EncodedText]) -> np.ndarray:
        parts = (texts[i : i + PLAIN_BATCH] for i in range(0, len(texts), PLAIN_BATCH))
        return np.concatenate([_means(network, part, setup.run.config.data.max_seq_length) for part in parts])

    return vectors


def _means(network: Any, texts: Sequence[EncodedText], max_seq_length: int) -> np.ndarray:
    batch = pad(texts, max_seq_length)
    encoded = network(batch).encoded
    return np.stack([row[:length].mean(axis=0) for row, length in zip(encoded, batch.valid_length)])


def _vectors_by(predictor: Predictor) -> Vectors:
    return lambda texts: np.stack([answer.mean for answer in predictor.predict(texts)])


def by_length(setup: Setup) -> Vectors:
    """Batch texts of similar length, as tools/encode.py does."""
    return _vectors_by(Predictor.of(setup.run))


def by_length_bf16(setup: Setup) -> Vectors:
    """Return the same with matrix products in bfloat16, on a copy of the network."""
    run = setup.run
    check_precision("bf16", run.net.encoder.embeddings.tokens.weight.list_ctx())
    net = BERTModel(run.net.vocab_size, run.net.config)
    net.initialize(ctx=run.net.encoder.embeddings.tokens.weight.list_ctx())
    set_weights(net, weights_of(run.net), "the run")
    net.hybridize()
    net.set_matmul_precision("bf16")
    return _vectors_by(Predictor(GluonNetwork(net), run.reader))


def exported(setup: Setup) -> Vectors:
    """Export the symbol and load it with gluon.SymbolBlock."""
    from gluon_bert.export.exporter import export_mxnet, load_exported

    export_mxnet(setup.run, setup.folder / "mxnet")
    return _vectors_by(load_exported(setup.folder / "mxnet").predictor)


def served(setup: Setup) -> Vectors:
    """Send requests of one text each to multi-model-server."""
    import requests

    from gluon_bert.export.model_archive import export_archive
    from gluon_bert.serving.server import Settings, free_ports, serving

    port, management_port = free_ports()
    settings = Settings(port=port, management_port=management_port)
    server = setup.stack.enter_context(serving(export_archive(setup.run, setup.folder / "mar"), settings))
    session = setup.stack.enter_context(requests.Session())
    pool = setup.stack.enter_context(ThreadPoolExecutor(CONNECTIONS))

    def vector(text: EncodedText) -> Any:
        words = {"ids": text.ids[1:-1].tolist()}
        if text.is_pair:
            middle = int(np.argmax(text.token_types))
            words = {"ids": text.ids[1 : middle - 1].tolist(), "pair_ids": text.ids[middle:-1].tolist()}
        reply = session.post(server.address, json=words)
        reply.raise_for_status()
        return reply.json()["mean"]

    return lambda texts: np.array(list(pool.map(vector, texts)), dtype=np.float32)


def onnxruntime(setup: Setup) -> Vectors:
    """Export the ONNX graph and run it with onnxruntime."""
    from gluon_bert.export.evaluation_texts import NUM_TEXTS
    from gluon_bert.export.exporter import export_onnx, load_exported

    export_onnx(setup.run, setup.folder / "onnx", "all", setup.texts[:NUM_TEXTS])
    return _vectors_by(load_exported(setup.folder / "onnx").predictor)


def onnxruntime_int8(setup: Setup) -> Vectors:
    """Return the same with dense layers in int8, calibrated on the texts."""
    from gluon_bert.export.exporter import export_onnx_int8, load_exported

    export_onnx_int8(setup.run, setup.folder / "onnx-int8", "all", setup.texts)
    return _vectors_by(load_exported(setup.folder / "onnx-int8").predictor)


def transformers(setup: Setup) -> Vectors:
    """Use PyTorch transformers' BertModel with the run's weights."""
    return _vectors_by(Predictor(TransformersNetwork(setup.run.net), setup.run.reader))


def transformers_bf16(setup: Setup) -> Vectors:
    """Return the same with weights and activations in bfloat16."""
    return _vectors_by(Predictor(TransformersNetwork(setup.run.net, bf16=True), setup.run.reader))


def ctranslate2(setup: Setup) -> Vectors:
    """Convert the run for CTranslate2, by way of its files for transformers."""
    return _ctranslate2(setup, "float32")


def ctranslate2_int8(setup: Setup) -> Vectors:
    """Return the same with weights of dense layers in int8."""
    return _ctranslate2(setup, "int8")


def _ctranslate2(setup: Setup, compute_type: str) -> Vectors:
    folder = setup.folder / f"ctranslate2-{compute_type}"
    folder.mkdir()
    return _vectors_by(Predictor(CTranslate2Network(setup.run, folder, compute_type), setup.run.reader))


# Baselines in the order of their turns, with the packages that they need.
ENCODERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "plain": (plain, ()),
    "encode": (by_length, ()),
    "encode-bf16": (by_length_bf16, ()),
    "exported": (exported, ()),
    "served": (served, ("mms", "model_archiver")),
    "onnxruntime": (onnxruntime, ("onnx", "onnxruntime")),
    "onnxruntime-int8": (onnxruntime_int8, ("onnx", "onnxruntime")),
    "transformers": (transformers, ("torch", "transformers")),
    "transformers-bf16": (transformers_bf16, ("torch", "transformers")),
    "ctranslate2": (ctranslate2, ("torch", "transformers", "ctranslate2")),
    "ctranslate2-int8": (ctranslate2_int8, ("torch", "transformers", "ctranslate2")),
}


def installed() -> list[str]:
    """Return the baselines in float32 whose packages are installed."""
    return [name for name in ENCODERS if not missing(name) and precision_of(name) == "fp32"]


def missing(name: str) -> list[str]:
    """Return the missing packages of a baseline."""
    return [package for package in ENCODERS[name][1] if importlib.util.find_spec(package) is None]


def precision_of(name: str) -> str:
    """Return the precision of a baseline: fp32, bf16 or int8."""
    return next((each for each in TOLERANCES if name.endswith(f"-{each}")), "fp32")


# The largest difference between correct vectors, whose numbers are about 1. bfloat16 rounds factors to 2^-9
# of their size, int8 to 2^-8 of the largest one of a row.
TOLERANCES = {"fp32": 1e-3, "bf16": 0.1, "int8": 0.3}


class Result(NamedTuple):
    """The units per second of a baseline in each round, and their ratios to the first baseline."""

    name: str
    rates: list[float]
    ratios: list[float]

    @property
    def rate(self) -> float:
        """Return the median rate."""
        return statistics.median(self.rates)

    @property
    def ratio(self) -> float:
        """Return the median ratio to the first baseline."""
        return statistics.median(self.ratios)


def run(arguments: argparse.Namespace) -> int:
    """Compute vectors of the same texts with all baselines in turns."""
    from gluon_bert.run import load_run

    names = chosen(arguments.against)
    pretrained = load_run(arguments.run)
    texts = texts_of(pretrained, arguments)
    with TemporaryDirectory(prefix="gluon_bert-benchmark-") as folder, ExitStack() as stack:
        setup, works = Setup(pretrained, texts, Path(folder), stack), {}
        for name in names:
            print(f"preparing {name}", file=sys.stderr)
            works[name] = ENCODERS[name][0](setup)
        check_same_results({name: work(texts) for name, work in works.items()})
        results = in_rounds(
            {n: partial(work, texts) for n, work in works.items()}, arguments.rounds, len(texts)
        )
    lengths = [len(text) for text in texts]
    summary = (
        f"{len(texts)} texts of {min(lengths)} to {max(lengths)} tokens, {arguments.rounds} rounds, "
        f"{runtime.versions()['threads']} threads"
    )
    print(table(summary, results))
    if arguments.json:
        content = {"benchmark": "encode", "work": summary, "versions": runtime.versions()}
        figures = {each.name: each._asdict() for each in results}
        write_json(arguments.json, {**content, "texts_per_second": figures})
    return 0


def chosen(against: str | None) -> list[str]:
    """Return the baselines in order; raise InputError for unknown or missing ones."""
    if against is None:
        left_out = [f"{name} (needs {' and '.join(missing(name))})" for name in ENCODERS if missing(name)]
        if left_out:
            print(f"not installed: {', '.join(left_out)}", file=sys.stderr)
        return installed()
    names = against.split(",")
    unknown = [name for name in names if name not in ENCODERS]
    if unknown:
        raise InputError(f"--against must be some of {', '.join(ENCODERS)}, got {unknown[0]}")
    absent = {name: missing(name) for name in names if missing(name)}
    if absent:
        raise InputError(
            "\n".join(f"--against {n} needs the packages {' and '.join(p)}" for n, p in absent.items())
        )
    return [name for name in ENCODERS if name in {"plain", "encode", *names}]


def texts_of(run: Any, arguments: argparse.Namespace) -> Sequence[Any]:
    """Return the texts of a file, repeated if too few, or the validation texts of the run."""
    if arguments.text_file is None:
        from gluon_bert.export.evaluation_texts import validation_texts

        return validation_texts(run, arguments.texts)
    from gluon_bert.inference.text_files import count_lines, read_lines

    count_lines(arguments.text_file, "--text-file")
    lines = read_lines(arguments.text_file, "--text-file")
    texts = [run.reader.text(*line.given, truncate=True) for line in lines]
    return list(islice(cycle(texts), arguments.texts))


def check_same_results(vectors_by_name: Mapping[str, np.ndarray]) -> None:
    """Raise InputError if a baseline computes other vectors than the first one."""
    (first, expected), *others = vectors_by_name.items()
    for name, vectors in others:
        difference = float(np.abs(vectors - expected).max())
        if not difference <= TOLERANCES[precision_of(name)]:
            raise InputError(f"the vectors of {name} differ by {difference:.1e} from those of {first}")


def in_rounds(works: Mapping[str, Callable[[], Any]], rounds: int, units: int) -> list[Result]:
    """Time the same work in turns. units: the amount of work. Every work has run once before."""
    rates: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            before = time.perf_counter()
            work()
            rates[name].append(units / (time.perf_counter() - before))
    first = next(iter(rates.values()))
    return [Result(name, own, [a / b for a, b in zip(own, first)]) for name, own in rates.items()]


def table(summary: str, results: Sequence[Result]) -> str:
    """Return the results as text."""
    lines = [summary, f"{'':18}{'texts/s':>10}{'ratio':>8}   from .. to"]
    for each in results:
        spread = f"{min(each.ratios):.2f} .. {max(each.ratios):.2f}"
        lines.append(f"{each.name:18}{each.rate:10.1f}{each.ratio:8.2f}   {spread}")
    return "\n".join(lines)
