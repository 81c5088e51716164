"""Folders of PyTorch transformers' BertForPreTraining, read and written without PyTorch or transformers."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, Mapping

import numpy as np

from ..config import ModelConfig, check_group
from ..data.vocab import Vocabulary
from ..data.wordpiece import WordPieceVocabulary
from ..errors import InputError
from ..fileio import atomic_folder, atomic_write, write_json
from ..model.parameters import weights_of
from ..run import Run
from .converter import ConvertedModel, to_foreign_names, to_own_names
from .torch_pickle import read_tensors
from .vocabularies import read_vocabulary
from .weight_names import HUGGINGFACE

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
WEIGHTS, SHARDS, PICKLED = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"

# transformers' names of activations -> ours. Its three forms of the tanh approximation differ in the last
# digits of their constants.
_ACTIVATIONS = {
    "gelu": "gelu",
    "relu": "relu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
# What its BertConfig has where config.json says nothing.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "tie_word_embeddings": True,
}
# What this network has no other way of, and what other values would mean.
_FIXED = {
    "model_type": ("bert", "another network"),
    "type_vocab_size": (2, "another number of segments"),
    "position_embedding_type": ("absolute", "other position embeddings"),
    "is_decoder": (False, "a decoder"),
    "add_cross_attention": (False, "attention to another network"),
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
# Constants that older versions saved with the weights.
_BUFFERS = ("bert.embeddings.position_ids", "bert.embeddings.token_type_ids")
_BIAS, _BIAS_COPY = "cls.predictions.bias", "cls.predictions.decoder.bias"
_DECODER, _EMBEDDING = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"


def read_huggingface(
    folder: Path, lowercase: bool | None = None, init_missing_heads: bool = False
) -> ConvertedModel:
    """The network in a folder with config.json, vocab.txt or tokenizer.json, and model.safetensors or
    pytorch_model.bin.

    lowercase: whether its text is lower-cased, where the tokenizer's files do not say it. init_missing_heads: heads
    that are missing as a whole are drawn anew. InputError says what cannot be used, all at once.
    """
    folder = Path(folder)
    notes: list[str] = []
    settings = read_json(folder / "config.json")
    model = model_config(settings, folder / "config.json", notes)
    vocab_size = settings.get("vocab_size", _DEFAULTS["vocab_size"])
    arrays = _renamed(_read_weights(folder, notes), model, notes)
    weights = to_own_names(arrays, HUGGINGFACE, vocab_size, model, folder, init_missing_heads)
    vocab = read_vocabulary(_vocabulary_file(folder), vocab_size, notes)
    return ConvertedModel(weights, model, vocab, _lowercase(folder, vocab, lowercase, notes), notes)


def write_huggingface(run: Run, folder: Path) -> list[str]:
    """Write a run for transformers, the inverse of `read_huggingface`; returns what a user should know.

    Raises InputError where its BertForPreTraining has no place for the network, or where the folder is taken.
    """
    safetensors = _safetensors()
    config = run.net.config
    _refuse_without_place(config)
    arrays = to_foreign_names(weights_of(run.net), HUGGINGFACE)
    if not config.tied_decoder:
        arrays[_BIAS_COPY] = arrays[_BIAS].copy()
    specials = {f"{name}_token": run.vocab.tokens[getattr(run.vocab, name)] for name in _SPECIALS}
    with atomic_folder(folder) as aside:
        write_json(aside / "config.json", bert_config(config, len(run.vocab), run.vocab.pad))
        tokenizer = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": run.config.data.lowercase,
            "model_max_length": run.config.data.max_seq_length,
            **specials,
        }
        write_json(aside / TOKENIZER_CONFIG, tokenizer)
        with atomic_write(aside / "vocab.txt") as file:
            file.writelines(token + "\n" for token in run.vocab.tokens)
        safetensors.numpy.save_file(arrays, str(aside / WEIGHTS), metadata={"format": "pt"})
    if isinstance(run.vocab, WordPieceVocabulary):
        return []
    return [
        "vocab.txt holds whole words, and BertTokenizer parts text at hyphens and apostrophes inside words, "
        "which is not done here: ids of gluon_bert.Vocabulary are safe"
    ]


_SPECIALS = ("unk", "pad", "mask", "cls", "sep")


def bert_config(config: ModelConfig, vocab_size: int, pad: int = 0) -> dict[str, Any]:
    """The arguments of transformers.BertConfig for a network, as they stand in config.json."""
    activations = {ours: theirs for theirs, ours in reversed(list(_ACTIVATIONS.items()))}
    return {
        "architectures": ["BertForPreTraining"],
        "model_type": "bert",
        "vocab_size": vocab_size,
        "hidden_size": config.units,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.ffn_units,
        "hidden_act": activations[config.activation],
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": 2,
        "layer_norm_eps": config.norm_epsilon,
        "pad_token_id": pad,
        "tie_word_embeddings": config.tied_decoder,
    }


def _refuse_without_place(config: ModelConfig) -> None:
    problems = []
    if config.norm != "post":
        problems.append("LayerNorm before the sub-layers (--norm pre)")
    if not config.embedding_norm:
        problems.append("embeddings without a LayerNorm (--embedding-norm no, as the preset d2l has)")
    if problems:
        raise InputError(
            "\n".join(f"--to huggingface: its BERT has no place for {each}" for each in problems)
        )


def model_config(settings: Mapping[str, Any], path: Path, notes: list[str]) -> ModelConfig:
    """The configuration in a config.json; InputError for everything that this network cannot be."""
    problems = [
        f"{name} {settings[name]!r}: is {meaning}, which this one cannot be; it must be {value!r}"
        for name, (value, meaning) in _FIXED.items()
        if name in settings and settings[name] != value
    ]
    s = {**_DEFAULTS, **settings}
    problems += [
        f"{name} {s[name]!r}: must be a whole number above 0"
        for name in _SIZES
        if type(s[name]) is not int or s[name] < 1
    ]
    problems += [
        f"{name} {s[name]!r}: must be a number"
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps")
        if type(s[name]) not in (int, float)
    ]
    if s["hidden_act"] not in _ACTIVATIONS:
        problems.append(f"hidden_act {s['hidden_act']!r}: must be one of {', '.join(_ACTIVATIONS)}")
    if problems:
        raise InputError("\n".join(f"{path}: {problem}" for problem in problems))
    if s["hidden_dropout_prob"] != s["attention_probs_dropout_prob"]:
        notes.append(
            f"dropout of attention is {s['attention_probs_dropout_prob']}, of the rest "
            f"{s['hidden_dropout_prob']}: here one rate serves all, and it is the latter"
        )
    config = ModelConfig(
        num_layers=s["num_hidden_layers"],
        units=s["hidden_size"],
        ffn_units=s["intermediate_size"],
        num_heads=s["num_attention_heads"],
        dropout=float(s["hidden_dropout_prob"]),
        max_positions=s["max_position_embeddings"],
        activation=_ACTIVATIONS[s["hidden_act"]],
        norm_epsilon=float(s["layer_norm_eps"]),
        embedding_norm=True,
        tied_decoder=bool(s["tie_word_embeddings"]),
        init="normal",
    )
    check_group(config)
    return config


def _read_weights(folder: Path, notes: list[str]) -> dict[str, np.ndarray]:
    if (folder / SHARDS).is_file():
        files = sorted(set(read_json(folder / SHARDS).get("weight_map", {}).values()))
        foreign = [name for name in files if Path(name).name != name]
        if foreign:
            raise InputError(f"{folder / SHARDS}: {foreign[0]!r} is no file of this folder")
        return {name: array for file in files for name, array in _read_safetensors(folder / file).items()}
    if (folder / WEIGHTS).is_file():
        return _read_safetensors(folder / WEIGHTS)
    if (folder / PICKLED).is_file():
        return read_tensors(folder / PICKLED)
    raise InputError(f"{folder}: has neither {WEIGHTS} nor {PICKLED}")


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    safetensors = _safetensors()
    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "BOOL": "?"}
    try:
        tensors = safetensors.deserialize(path.read_bytes())
        arrays = {}
        for name, tensor in tensors:
            array = np.frombuffer(tensor["data"], kinds[tensor["dtype"]]).reshape(tensor["shape"])
            if tensor["dtype"] == "BF16":  # which NumPy does not have: the upper half of a float32
                array = (array.astype(np.uint32) << 16).view(np.float32)
            arrays[name] = array
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as safetensors ({error})") from error
    return arrays


def _renamed(arrays: dict[str, np.ndarray], model: ModelConfig, notes: list[str]) -> dict[str, np.ndarray]:
    """The arrays under the names that BertForPreTraining has for them today, each once."""
    if not any(name.startswith("bert.") for name in arrays):  # saved by a BertModel
        arrays = {f"bert.{name}": array for name, array in arrays.items()}
    old = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    for before, now in old.items():
        arrays = {name.replace(before, now): array for name, array in arrays.items()}
    arrays = {name: array for name, array in arrays.items() if name not in _BUFFERS}
    halves = sorted({str(array.dtype) for array in arrays.values()} - {"float32"})
    if halves:
        notes.append(f"weights in {' and '.join(halves)} became float32")
    copy = arrays.pop(_BIAS_COPY, None)
    if copy is not None and not (model.tied_decoder and _BIAS in arrays):
        arrays[_BIAS] = copy
    if model.tied_decoder:
        decoder = arrays.pop(_DECODER, None)
        if decoder is not None and not np.array_equal(decoder, arrays.get(_EMBEDDING, decoder)):
            notes.append(
                "the decoder's own weights are left out, as config.json ties it to the embeddings, and as "
                "transformers does"
            )
    return arrays


def _vocabulary_file(folder: Path) -> Path:
    for name in ("vocab.txt", TOKENIZER):
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{folder}: has neither vocab.txt nor {TOKENIZER}")


def _said_of_case(folder: Path) -> bool | None:
    """Whether the tokenizer's files say that text is lower-cased; None where they say nothing."""
    for name in (TOKENIZER_CONFIG, TOKENIZER):
        content = read_json(folder / name) if (folder / name).is_file() else {}
        normalizer = content.get("normalizer")
        said = content.get("do_lower_case")
        said = normalizer.get("lowercase") if said is None and isinstance(normalizer, dict) else said
        if isinstance(said, bool):
            return said
    return None


def _lowercase(folder: Path, vocab: Vocabulary, asked: bool | None, notes: list[str]) -> bool:
    said = _said_of_case(folder)
    if asked is not None:
        if said is not None and said != asked:
            raise InputError(
                f"--lowercase {'yes' if asked else 'no'}: the tokenizer in {folder} says the contrary"
            )
        return asked
    if said is not None:
        return said
    found = not vocab.is_cased()
    told = "lower-cased" if found else "cased"
    notes.append(f"nothing says whether text is lower-cased: by its tokens the vocabulary is a {told} one")
    return found


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: is no JSON object")
    return content


def _safetensors() -> Any:
    try:
        importlib.import_module("safetensors.numpy")
        return importlib.import_module("safetensors")
    except ImportError as error:
        raise InputError(
            "model.safetensors needs the package safetensors: pip install -e '.[convert]'"
        ) from error
