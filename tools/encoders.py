"""What `benchmark.py encode` measures side by side: networks and servers that make vectors of texts."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Callable, Sequence

import numpy as np

from gluon_bert import runtime
from gluon_bert.checkpoint import Run, weights_of
from gluon_bert.conversion.huggingface import bert_config
from gluon_bert.conversion.layout import HUGGINGFACE
from gluon_bert.conversion.weights import foreign_arrays
from gluon_bert.data.texts import Padded, Text, padded
from gluon_bert.encoding import GluonNetwork, Outputs, Predictor
from gluon_bert.errors import BadInput

# Rows of a batch where nobody sorts by length.
PLAIN_BATCH = 64

# Connections to the server, and so requests that wait at once.
CONNECTIONS = 8

# What transformers' BertForPreTraining calls its BertModel.
OF_BERT = "bert."

Vectors = Callable[[Sequence[Text]], np.ndarray]


def plain(run: Run, folder: Path, stack: ExitStack) -> Vectors:
    """The hybridized network as it comes: batches in the order of the texts."""
    network = GluonNetwork(run.net)

    def vectors(texts: Sequence[Text]) -> np.ndarray:
        parts = (texts[i : i + PLAIN_BATCH] for i in range(0, len(texts), PLAIN_BATCH))
        return np.concatenate([_means(network, part, run.config.data.max_len) for part in parts])

    return vectors


def _means(network: Any, texts: Sequence[Text], max_len: int) -> np.ndarray:
    batch = padded(texts, max_len)
    encoded = network(batch).encoded
    return np.stack([row[:length].mean(axis=0) for row, length in zip(encoded, batch.lengths)])


def _predicting(predictor: Predictor) -> Vectors:
    return lambda texts: np.stack([answer.mean for answer in predictor.ask(texts)])


def encode(run: Run, folder: Path, stack: ExitStack) -> Vectors:
    """What tools/encode.py does."""
    return _predicting(Predictor.of(run))


def exported(run: Run, folder: Path, stack: ExitStack) -> Vectors:
    """The exported symbol, read back by gluon.SymbolBlock."""
    from gluon_bert.export.formats import export_mxnet, load_exported

    export_mxnet(run, folder / "mxnet")
    return _predicting(load_exported(folder / "mxnet").predictor)


def served(run: Run, folder: Path, stack: ExitStack) -> Vectors:
    """Requests to multi-model-server, a text each."""
    import requests

    from gluon_bert.export.archive import export_archive
    from gluon_bert.serving.server import Settings, free_ports, serving

    port, management_port = free_ports()
    settings = Settings(port=port, management_port=management_port)
    server = stack.enter_context(serving(export_archive(run, folder / "mar"), settings))
    session = stack.enter_context(requests.Session())
    pool = stack.enter_context(ThreadPoolExecutor(CONNECTIONS))

    def vector(text: Text) -> Any:
        words = {"ids": text.ids[1:-1].tolist()}
        if text.is_pair:
            middle = int(np.argmax(text.segments))
            words = {"ids": text.ids[1 : middle - 1].tolist(), "pair_ids": text.ids[middle:-1].tolist()}
        reply = session.post(server.address, json=words)
        reply.raise_for_status()
        return reply.json()["mean"]

    return lambda texts: np.array(list(pool.map(vector, texts)), dtype=np.float32)


def onnxruntime(run: Run, folder: Path, stack: ExitStack) -> Vectors:
    """The exported ONNX graph."""
    from gluon_bert.export.formats import export_onnx, load_exported
    from gluon_bert.export.held_out import held_out_texts

    export_onnx(run, folder / "onnx", "all", held_out_texts(run))
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
            raise BadInput("--against transformers: its BertModel has no LayerNorm before the sub-layers")
        self._torch = torch
        torch.set_num_threads(int(runtime.versions()["threads"]))
        self._model = BertModel(BertConfig(**bert_config(config, net.vocab_size))).eval()
        if not config.embedding_norm:
            self._model.embeddings.LayerNorm = torch.nn.Identity()
        arrays = foreign_arrays(weights_of(net), HUGGINGFACE)
        weights = {
            name[len(OF_BERT) :]: torch.from_numpy(array)
            for name, array in arrays.items()
            if name.startswith(OF_BERT)
        }
        self._model.load_state_dict(weights, strict=True)

    def __call__(self, texts: Padded) -> Outputs:
        """The outputs, as arrays."""
        torch = self._torch
        tokens, segments = (torch.from_numpy(array).long() for array in (texts.tokens, texts.segments))
        real = torch.arange(tokens.shape[1]) < torch.from_numpy(texts.lengths)[:, None]
        with torch.inference_mode():
            found = self._model(input_ids=tokens, token_type_ids=segments, attention_mask=real)
        return Outputs(found.last_hidden_state.numpy(), found.pooler_output.numpy())


# In the order in which they take their turns, with the packages that they need.
CONTESTANTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "plain": (plain, ()),
    "encode": (encode, ()),
    "exported": (exported, ()),
    "served": (served, ("mms", "model_archiver")),
    "onnxruntime": (onnxruntime, ("onnx", "onnxruntime")),
    "transformers": (transformers, ("torch", "transformers")),
}


def installed() -> list[str]:
    """The contestants whose packages are there."""
    return [name for name in CONTESTANTS if not missing(name)]


def missing(name: str) -> list[str]:
    """The packages that a contestant lacks."""
    return [package for package in CONTESTANTS[name][1] if importlib.util.find_spec(package) is None]
