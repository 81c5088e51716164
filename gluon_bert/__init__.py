"""gluon_bert pretrains BERT on Apache MXNet Gluon, on one device or many.

Public names are imported when they are used, so that the others do not need MXNet.
"""

from importlib import import_module
from typing import Any, List

__version__ = "0.1.0"

_PUBLIC = {
    "InputError": "errors",
    "AsyncCheckpointer": "training.checkpointer",
    "BERTModel": "model.bert",
    "Callback": "training.callbacks",
    "Config": "config",
    "DataConfig": "config",
    "ModelConfig": "config",
    "PRESETS": "presets",
    "Predictor": "inference.predictor",
    "TrainConfig": "config",
    "ProgressLogger": "training.progress",
    "TensorBoardLogger": "training.tensorboard",
    "Trainer": "training.trainer",
    "Vocabulary": "data.vocab",
    "contexts": "devices",
    "create_run": "run",
    "finetune": "finetuning.finetune",
    "resume_finetuning": "finetuning.finetune",
    "pretrain": "pretraining",
    "resume": "pretraining",
    "Run": "run",
    "pretraining_loss": "training.losses",
    "export_mxnet": "export.exporter",
    "load_pretraining_data": "data.loader",
    "load_exported": "export.exporter",
    "load_run": "run",
    "preset": "presets",
    "save_checkpoint": "checkpoint",
}

_MODULES = {"losses": "training.losses"}

__all__ = sorted([*_PUBLIC, *_MODULES])  # noqa: PLE0605 - a list of strings, which ruff cannot see


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{_MODULES[name]}")
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> List[str]:
    return sorted([*globals(), *_PUBLIC, *_MODULES])
