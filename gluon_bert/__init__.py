"""gluon_bert pretrains BERT on Apache MXNet Gluon, on one device or many.

The names of the package are looked up when they are used, so that what needs no MXNet does without it.
"""

from importlib import import_module
from typing import Any, List

__version__ = "0.1.0"

_PUBLIC = {
    "BadInput": "errors",
    "BERTModel": "model.bert",
    "Config": "config",
    "DataConfig": "config",
    "ModelConfig": "config",
    "PRESETS": "config",
    "Predictor": "encoding",
    "TrainConfig": "config",
    "Report": "training.report",
    "Trainer": "training.trainer",
    "Vocabulary": "data.vocab",
    "contexts": "runtime",
    "create_run": "checkpoint",
    "encode": "encoding",
    "export_mxnet": "export.formats",
    "load_data": "data.loader",
    "load_exported": "export.formats",
    "load_run": "checkpoint",
    "preset": "config",
    "save_checkpoint": "checkpoint",
}

__all__ = sorted(_PUBLIC)  # noqa: PLE0605 - a list of strings, which ruff cannot see


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> List[str]:
    return sorted([*globals(), *_PUBLIC])
