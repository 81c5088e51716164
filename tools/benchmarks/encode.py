"""What `benchmark.py encode` measures side by side: networks and servers that make vectors of texts."""

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

from gluon_bert import runtime
from gluon_bert.conversion.converter import to_foreign_names
from gluon_bert.conversion.huggingface import bert_config
from gluon_bert.conversion.weight_names import HUGGINGFACE
from gluon_bert.data.tokenizer import EncodedText, PaddedBatch, pad
from gluon_bert.errors import InputError
from gluon_bert.fileio import write_json
from gluon_bert.inference.predictor import GluonNetwork, Outputs, Predictor
from gluon_bert.model.parameters import weights_of
from gluon_bert.run import Run

# Rows of a batch where nobody sorts by length.
PLAIN_BATCH = 64

# Connections to the server, and so requests that wait at once.
CONNECTIONS = 8

# What transformers' BertForPreTraining calls its BertModel.
OF_BERT = "bert."

Vectors = Callable[[Sequence[EncodedText]], np.ndarray]


def plain(run: Run, folder: Path, stack: ExitStack) -> Vectors:
    """The hybridized network as it comes: batches in the order of the texts."""
    network = GluonNetwork(run.net)

    def vectors(texts: Sequence[EncodedText]) -> np.ndarray:
        parts = (texts[i : i + PLAIN_BATCH] for i in range(0, len(texts), PLAIN_BATCH))
        return np.concatenate([_means(network, part, run.config.data.max_seq_length) for part in parts])

    return vectors


def _means(network: Any, texts: Sequence[EncodedText], max_seq_length: int) -> np.ndarray:
    batch = pad(texts, max_seq_length)
    encoded = network(batch).encoded
    return np.stack([row[:length].mean(axis=0) for row, length in zip(encoded, batch.valid_length)])


def _predicting(predictor: Predictor) -> Vectors:
    return lambda texts: np.stack([answer.mean for answer in predictor.ask(texts)])


def encode(run: Run, folder: Path, stack: ExitStack) -> Vectors:
    """What tools/encode.py does."""
    return _predicting(Predictor.of(run))


def exported(run: Run, folder: Path, stack: ExitStack) -> Vectors:
    """The exported symbol, read back by gluon.SymbolBlock."""
    from gluon_bert.export.exporter import export_mxnet, load_exported

    export_mxnet(run, folder / "mxnet")
    return _predicting(load_exported(folder / "mxnet").predictor)


def served(run: Run, folder: Path, stack: ExitStack) -> Vectors:
    """Requests to multi-model-server, a text each."""
    import requests

    from gluon_bert.export.model_archive import export_archive
    from gluon_bert.serving.server import Settings, free_ports, serving

    port, management_port = free_ports()
    settings = Settings(port=port, management_port=management_port)
    server = stack.enter_context(serving(export_archive(run, folder / "mar"), settings))
    session = stack.enter_context(requests.Session())
    pool = stack.enter_context(ThreadPoolExecutor(CONNECTIONS))

    def vector(text: EncodedText) -> Any:
        words = {"ids": text.ids[1:-1].tolist()}
        if text.is_pair:
            middle = int(np.argmax(text.token_types))
            words = {"ids": text.ids[1 : middle - 1].tolist(), "pair_ids": text.ids[middle:-1].tolist()}
        reply = session.post(server.address, json=words)
        reply.raise_for_status()
        return reply.json()["mean"]

    return lambda texts: np.array(list(pool.map(vector, texts)), dtype=np.float32)


def onnxruntime(run: Run, folder: Path, stack: ExitStack) -> Vectors:
    """The exported ONNX graph."""
    from gluon_bert.export.evaluation_texts import validation_texts
    from gluon_bert.export.exporter import export_onnx, load_exported

    export_onnx(run, folder / "onnx", "all", validation_texts(run))
    return _predicting(load_exported(folder / "onnx").predictor)


def transformers(run: Run, folder: Path, stack: ExitStack) -> Vectors:
    """PyTorch transformers' BertModel with the run's weights."""
    return _predicting(Predictor(TransformersNetwork(run.net), run.reader))


class TransformersNetwork:
    """transformers.BertModel with the weights of a BERTModel; a Network without masks and next sentences."""

    def __init__(self, net: Any) -> None:
        import torch
        from transformers import BertConfig, BertModel

        config = net.config
        if config.norm != "post":
            raise InputError("--against transformers: its BertModel has no LayerNorm before the sub-layers")
        self._torch = torch
        torch.set_num_threads(int(runtime.versions()["threads"]))
        self._model = BertModel(BertConfig(**bert_config(config, net.vocab_size))).eval()
        if not config.embedding_norm:
            self._model.embeddings.LayerNorm = torch.nn.Identity()
        arrays = to_foreign_names(weights_of(net), HUGGINGFACE)
        weights = {
            name[len(OF_BERT) :]: torch.from_numpy(array)
            for name, array in arrays.items()
            if name.startswith(OF_BERT)
        }
        self._model.load_state_dict(weights, strict=True)

    def __call__(self, texts: PaddedBatch) -> Outputs:
        """The outputs, as arrays."""
        torch = self._torch
        tokens, segments = (torch.from_numpy(array).long() for array in (texts.tokens, texts.token_types))
        real = torch.arange(tokens.shape[1]) < torch.from_numpy(texts.valid_length)[:, None]
        with torch.inference_mode():
            found = self._model(input_ids=tokens, token_type_ids=segments, attention_mask=real)
        return Outputs(found.last_hidden_state.numpy(), found.pooler_output.numpy())


# In the order in which they take their turns, with the packages that they need.
ENCODERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "plain": (plain, ()),
    "encode": (encode, ()),
    "exported": (exported, ()),
    "served": (served, ("mms", "model_archiver")),
    "onnxruntime": (onnxruntime, ("onnx", "onnxruntime")),
    "transformers": (transformers, ("torch", "transformers")),
}


def installed() -> list[str]:
    """The contestants whose packages are there."""
    return [name for name in ENCODERS if not missing(name)]


def missing(name: str) -> list[str]:
    """The packages that a contestant lacks."""
    return [package for package in ENCODERS[name][1] if importlib.util.find_spec(package) is None]


# Two ways to compute the same vectors in single precision are no further apart.
SAME = 1e-3


class Result(NamedTuple):
    """How fast a contestant was: units a second round by round, and their ratios to the first one's."""

    name: str
    rates: list[float]
    ratios: list[float]

    @property
    def rate(self) -> float:
        """The median rate."""
        return statistics.median(self.rates)

    @property
    def ratio(self) -> float:
        """The median ratio to the first contestant."""
        return statistics.median(self.ratios)


def encode(arguments: argparse.Namespace) -> int:
    """Vectors of texts by contestants in turns."""

    from gluon_bert.run import load_run

    names = chosen(arguments.against)
    run = load_run(arguments.run)
    texts = texts_of(run, arguments)
    with TemporaryDirectory(prefix="gluon_bert-benchmark-") as folder, ExitStack() as stack:
        works = {}
        for name in names:
            print(f"getting {name} ready", file=sys.stderr)
            works[name] = ENCODERS[name][0](run, Path(folder), stack)
        check_same_results({name: work(texts) for name, work in works.items()})
        results = in_rounds(
            {n: partial(work, texts) for n, work in works.items()}, arguments.rounds, len(texts)
        )
    lengths = [len(text) for text in texts]
    told = (
        f"{len(texts)} texts of {min(lengths)} to {max(lengths)} tokens, {arguments.rounds} rounds, "
        f"{runtime.versions()['threads']} threads"
    )
    print(table(told, results))
    if arguments.json:
        content = {"what": arguments.what, "work": told, "versions": runtime.versions()}
        figures = {each.name: each._asdict() for each in results}
        write_json(arguments.json, {**content, "texts a second": figures})
    return 0


def chosen(against: str | None) -> list[str]:
    """The contestants, in their order; InputError for one that is unknown or not installed."""

    if against is None:
        left_out = [f"{name} (needs {' and '.join(missing(name))})" for name in ENCODERS if missing(name)]
        if left_out:
            print(f"left out, as not installed: {', '.join(left_out)}", file=sys.stderr)
        return installed()
    names = against.split(",")
    unknown = [name for name in names if name not in ENCODERS]
    if unknown:
        raise InputError(f"--against {unknown[0]}: must be some of {', '.join(ENCODERS)}")
    absent = {name: missing(name) for name in names if missing(name)}
    if absent:
        raise InputError(
            "\n".join(f"--against {n}: needs {' and '.join(p)} installed" for n, p in absent.items())
        )
    return [name for name in ENCODERS if name in {"plain", "encode", *names}]


def texts_of(run: Any, arguments: argparse.Namespace) -> Sequence[Any]:
    """The texts to encode: of a file, over and over if they are fewer, or held out by the run."""
    if arguments.text is None:
        from gluon_bert.export.evaluation_texts import validation_texts

        return validation_texts(run, arguments.texts)
    from gluon_bert.inference.text_files import count_lines, read_lines

    count_lines(arguments.text, "--text")
    texts = [run.reader.text(*line.given, truncate=True) for line in read_lines(arguments.text, "--text")]
    return list(islice(cycle(texts), arguments.texts))


def check_same_results(found: Mapping[str, np.ndarray]) -> None:
    """Raise InputError unless all made the same: what computes something else is not faster."""
    (first, expected), *others = found.items()
    for name, vectors in others:
        difference = float(np.abs(vectors - expected).max())
        if not difference <= SAME:
            raise InputError(f"the vectors of {name} differ by {difference:.1e} from those of {first}")


def in_rounds(works: Mapping[str, Callable[[], Any]], rounds: int, units: int) -> list[Result]:
    """Let all do the same work in turns; `units` is how much work it is. All have done it once before."""
    rates: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            before = time.perf_counter()
            work()
            rates[name].append(units / (time.perf_counter() - before))
    first = next(iter(rates.values()))
    return [Result(name, own, [a / b for a, b in zip(own, first)]) for name, own in rates.items()]


def table(told: str, results: Sequence[Result]) -> str:
    """The results for people."""
    lines = [told, f"{'':14}{'texts/s':>10}{'ratio':>8}   from .. to"]
    for each in results:
        spread = f"{min(each.ratios):.2f} .. {max(each.ratios):.2f}"
        lines.append(f"{each.name:14}{each.rate:10.1f}{each.ratio:8.2f}   {spread}")
    return "\n".join(lines)
