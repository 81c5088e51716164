"""The TensorFlow checkpoints of google-research/bert, read by TensorFlow. Writes none."""

from __future__ import annotations

import dataclasses
import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, one_line
from .converter import ConvertedModel, to_own_names
from .huggingface import model_config, read_json
from .vocabularies import read_vocabulary
from .weight_names import TENSORFLOW

# What its training saves beside the weights, which are under the same names without these endings.
_OPTIMIZERS = ("/adam_m", "/adam_v", "/Adam", "/Adam_1")
_STEP = "global_step"
_NAME = "bert_model.ckpt"


def read_tensorflow(
    folder: Path, gelu: str = "gelu_tanh", lowercase: bool | None = None, init_missing_heads: bool = False
) -> ConvertedModel:
    """The network in a folder as it is published: bert_config.json, vocab.txt, bert_model.ckpt.*.

    gelu: which one "gelu" stands for: that of its code today, or `gelu`, the exact one of its first version
    and of transformers. Raises InputError as `translate` does, and where TensorFlow is not installed.
    """
    folder = Path(folder)
    notes: list[str] = []
    path = folder / "bert_config.json"
    settings = read_json(path)
    if "vocab_size" not in settings:
        raise InputError(f"{path}: has no vocab_size")
    model = model_config({**settings, "layer_norm_eps": 1e-12}, path, notes)
    if model.activation == "gelu":
        model = dataclasses.replace(model, activation=gelu)
        notes.append(f'"gelu" is taken for {gelu} (--gelu)')
    vocab_size = settings["vocab_size"]
    arrays = _read(checkpoint_in(folder))
    weights = to_own_names(arrays, TENSORFLOW, vocab_size, model, folder, init_missing_heads)
    vocab = read_vocabulary(folder / "vocab.txt", vocab_size, notes)
    if lowercase is None:
        lowercase = not vocab.is_cased()
        notes.append(f"by its tokens the vocabulary is {'lower-cased' if lowercase else 'cased'}")
    return ConvertedModel(weights, model, vocab, lowercase, notes)


def checkpoint_in(folder: Path) -> Path:
    """The checkpoint of a folder without its endings: bert_model.ckpt, or else the only one."""
    names = sorted(path.name[: -len(".index")] for path in folder.glob("*.index"))
    if _NAME in names or len(names) == 1:
        return folder / (_NAME if _NAME in names else names[0])
    if names:
        raise InputError(f"{folder}: has several checkpoints, {' '.join(names)}, and none is named {_NAME}")
    raise InputError(f"{folder}: has no checkpoint of TensorFlow: {_NAME}.index is missing")


def _read(checkpoint: Path) -> dict[str, np.ndarray]:
    tensorflow = _tensorflow()
    try:
        reader = tensorflow.train.load_checkpoint(str(checkpoint))
        names = list(reader.get_variable_to_shape_map())
        return {
            name: np.asarray(reader.get_tensor(name))
            for name in names
            if name != _STEP and not name.endswith(_OPTIMIZERS)
        }
    except (tensorflow.errors.OpError, ValueError, RuntimeError, IndexError) as error:
        raise InputError(f"{checkpoint}: cannot be read as a checkpoint ({one_line(error)})") from error


def _tensorflow() -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # or it tells of the CPU and of GPUs that it misses
    try:
        return importlib.import_module("tensorflow")
    except ImportError as error:
        raise InputError(
            "a checkpoint of google-research/bert is read by TensorFlow: pip install -e '.[convert-google]'"
        ) from error
