"""The TensorFlow checkpoints of google-research/bert, read by TensorFlow. Writes none."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, one_line
from ..fileio import read_json
from .converter import ConvertedModel, to_own_names, untrained_note
from .huggingface import model_config
from .vocabularies import looks_cased, read_vocabulary
from .weight_names import TENSORFLOW

# Variables that training saves beside the weights: the optimizer's means, under a weight's name and one of
# these endings, and its counters and loss scale.
_OPTIMIZER_ENDINGS = (
    *("/adam_m", "/adam_v", "/Adam", "/Adam_1", "/AdamWeightDecayOptimizer", "/AdamWeightDecayOptimizer_1"),
    *("/LAMBOptimizer", "/LAMBOptimizer_1", "/lamb_m", "/lamb_v", "/Momentum", "/ExponentialMovingAverage"),
)
_COUNTERS = re.compile(r"global_step|(\w+/)?beta[12]_power(_\d+)?|good_steps|bad_steps|.*[Ll]oss_?[Ss]cale.*")
_NAME, _INDEX = "bert_model.ckpt", ".index"
# Variables of TensorFlow 2's object-based checkpoints.
_OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"


def read_tensorflow(
    folder: Path, gelu: str = "gelu_tanh", lowercase: bool | None = None, step: int | None = None
) -> ConvertedModel:
    """Return the network in a folder with bert_config.json, vocab.txt and a checkpoint.

    gelu: the meaning of "gelu": `gelu_tanh`, as in google-research/bert's code today, or `gelu`, the exact
    form of its first version and of transformers. step: chooses the checkpoint after this step. Raise
    InputError as `to_own_names` does, and if TensorFlow is not installed.
    """
    folder = Path(folder)
    notes: list[str] = []
    path = folder / "bert_config.json"
    settings = read_json(path)
    if "vocab_size" not in settings:
        raise InputError(f"{path}: vocab_size must be there")
    model = model_config({**settings, "layer_norm_eps": 1e-12}, path, notes)
    if model.activation == "gelu":
        model = dataclasses.replace(model, activation=gelu)
        notes.append(f'"gelu" is read as {gelu} (gelu={"tanh" if gelu == "gelu" else "exact"} changes that)')
    vocab_size = settings["vocab_size"]
    checkpoint = checkpoint_in(folder, step)
    if checkpoint.name != _NAME:
        notes.append(f"checkpoint: {checkpoint.name}")
    weights, untrained = to_own_names(_read(checkpoint), TENSORFLOW, vocab_size, model, folder, notes)
    vocab = read_vocabulary(folder / "vocab.txt", vocab_size, notes)
    if lowercase is None:
        lowercase = not looks_cased(vocab)
        kind = "lower-cased" if lowercase else "cased"
        notes.append(f"the vocabulary looks {kind} (lowercase={not lowercase} changes that)")
    notes += untrained_note(untrained)
    return ConvertedModel(weights, model, vocab, {"lowercase": lowercase}, untrained=untrained, notes=notes)


def checkpoint_in(folder: Path, step: int | None = None) -> Path:
    """Return the checkpoint of a folder without its endings.

    It is the one after a step, or bert_model.ckpt. Otherwise it is the latest by the file `checkpoint`, or
    the only one.
    """
    names = sorted(path.name[: -len(_INDEX)] for path in folder.glob(f"*{_INDEX}"))
    if not names:
        raise InputError(f"{folder}: {_NAME}{_INDEX} must be there, or another checkpoint of TensorFlow")
    by_step = {int(m[1]): name for name in names for m in [re.search(r"-(\d+)$", name)] if m}
    if step is not None:
        if step not in by_step:
            found = ", ".join(map(str, sorted(by_step))) or "none"
            raise InputError(f"step must be one of {found} for {folder}, got {step}")
        return folder / by_step[step]
    for name in (_NAME, _latest(folder), names[0] if len(names) == 1 else ""):
        if name in names:
            return folder / name
    raise InputError(f"{folder}: holds several checkpoints, {', '.join(names)}. Choose one with step=N.")


def _latest(folder: Path) -> str:
    """Return the name in TensorFlow's own file `checkpoint`, "" without one."""
    path = folder / "checkpoint"
    text = path.read_text("utf-8", errors="replace") if path.is_file() else ""
    found = re.search(r'^model_checkpoint_path: "([^"]+)"', text, re.M)
    # It may hold the whole path of the machine that trained.
    return Path(found[1]).name if found else ""


def _read(checkpoint: Path) -> dict[str, np.ndarray]:
    tensorflow = _tensorflow()
    try:
        reader = tensorflow.train.load_checkpoint(str(checkpoint))
        names = list(reader.get_variable_to_shape_map())
        if _OBJECT_GRAPH in names:
            return _read_objects(reader, names, checkpoint)
        return {name: np.asarray(reader.get_tensor(name)) for name in names if not _is_of_optimizer(name)}
    except (tensorflow.errors.OpError, ValueError, RuntimeError, IndexError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{checkpoint}: cannot be read as a checkpoint ({one_line(error)})") from error


def _is_of_optimizer(name: str) -> bool:
    return name.endswith(_OPTIMIZER_ENDINGS) or bool(_COUNTERS.fullmatch(name))


def _read_objects(reader: Any, names: list[str], checkpoint: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an object-based checkpoint under the full names of their variables.

    The names in it follow the Python objects that were saved. The graph of the objects gives the names that
    the variables had. Raise InputError if these are not google-research/bert's.
    """
    graph = importlib.import_module("tensorflow.core.protobuf.trackable_object_graph_pb2")
    content = graph.TrackableObjectGraph()
    content.ParseFromString(reader.get_tensor(_OBJECT_GRAPH))
    keys = {each.full_name: each.checkpoint_key for node in content.nodes for each in node.attributes}
    found = {name: key for name, key in keys.items() if key in names and not _is_of_optimizer(name)}
    if not any(name.startswith("bert/") for name in found):
        shown = " ".join(sorted(found or names)[:3])
        raise InputError(
            f"{checkpoint}: is an object-based checkpoint of TensorFlow 2 with other names than "
            f"google-research/bert has, such as {shown}. Load it in the program that saved it and save it "
            "for transformers, then convert it from huggingface."
        )
    return {name.split(":")[0]: np.asarray(reader.get_tensor(key)) for name, key in found.items()}


def _tensorflow() -> Any:
    # Silences TensorFlow's messages about missing GPUs and oneDNN. Reading a checkpoint needs neither.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        return importlib.import_module("tensorflow")
    except ImportError as error:
        raise InputError(
            "a checkpoint of google-research/bert needs TensorFlow: pip install -e '.[convert-google]'"
        ) from error
