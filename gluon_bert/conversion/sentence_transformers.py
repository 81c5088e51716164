"""The folder of a sentence-transformers model: where its BERT is, and how it pools. Knows no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping, NamedTuple

from ..errors import InputError
from ..fileio import read_json
from ..model.pooling import SIMILARITIES, Pooling
from .weight_files import check_downloaded

MODULES, SENTENCE_CONFIG = "modules.json", "sentence_bert_config.json"
MODEL_CONFIG = "config_sentence_transformers.json"

# The names of its pooling modes, as switches in older files and as values in newer ones.
_SWITCHES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


# The way on where sentence vectors cannot be had.
_BERT_ALONE = f"Remove {MODULES} to convert the BERT alone, without its sentence vectors."


class SentenceFolder(NamedTuple):
    """The settings of a folder: the place of its BERT, the pooling, and the longest text.

    pooling: None for a BERT alone. lowercase: whether texts are lower-cased before the
    tokenizer sees them. prompts: texts that sentence-transformers can put before a text.
    """

    bert: Path
    pooling: Pooling | None = None
    max_seq_length: int | None = None
    lowercase: bool = False
    prompts: tuple[str, ...] = ()


def read_sentence_folder(folder: Path) -> SentenceFolder:
    """Return the settings of a sentence-transformers folder; raise InputError for unsupported ones."""
    if not (folder / MODULES).is_file():
        return SentenceFolder(folder)
    modules = _modules(folder / MODULES)
    unknown = [name for name, _ in modules if name not in ("Transformer", "Pooling", "Normalize")]
    if unknown:
        raise InputError(
            f"{folder / MODULES}: the modules must be Transformer, Pooling and Normalize, "
            f"got {' and '.join(unknown)} too. {_BERT_ALONE}"
        )
    names = [name for name, _ in modules]
    if not names or names != ["Transformer", "Pooling", "Normalize"][: len(names)]:
        raise InputError(
            f"{folder / MODULES}: the modules must be Transformer, Pooling and Normalize, or the first ones, "
            f"got {', '.join(names) or 'none'}. {_BERT_ALONE}"
        )
    places = [folder / path for _, path in modules]
    settings = _optional(places[0] / SENTENCE_CONFIG)
    whole = _optional(folder / MODEL_CONFIG)
    default_prompt = whole.get("default_prompt_name")
    if default_prompt is not None:
        raise InputError(
            f"{folder / MODEL_CONFIG}: default_prompt_name must be null, got {default_prompt!r}. "
            "Put the prompt before your texts yourself and set it to null."
        )
    prompts = whole.get("prompts")
    pooling = None
    if "Pooling" in names:
        similarity = whole.get("similarity_fn_name")
        pooling = _pooling(places[1] / "config.json", "Normalize" in names, similarity)
    return SentenceFolder(
        places[0],
        pooling,
        _length(settings.get("max_seq_length"), places[0] / SENTENCE_CONFIG),
        settings.get("do_lower_case") is True,
        tuple(filter(None, prompts.values())) if isinstance(prompts, Mapping) else (),
    )


def _optional(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    check_downloaded(path)
    return read_json(path)


def _modules(path: Path) -> list[tuple[str, str]]:
    """Return the last part of each module's type, and the module's folder."""
    check_downloaded(path)
    # A list, where every other file holds an object.
    content = read_json(path, list)
    try:
        modules = [(str(each["type"]).rsplit(".", 1)[-1], str(each["path"])) for each in content]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: each module must have a 'type' and a 'path'") from error
    outside = [name for _, name in modules if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise InputError(f"{path}: {outside[0]!r} must be a folder in this one")
    return modules


def _pooling(path: Path, normalize: bool, similarity: Any) -> Pooling:
    check_downloaded(path)
    content = read_json(path)
    mode = content.get("pooling_mode")
    modes = (
        mode
        if isinstance(mode, list)
        else [mode]
        if mode
        else [name for switch, name in _SWITCHES.items() if content.get(switch)]
    )
    if modes not in (["mean"], ["cls"], ["max"]):
        shown = " and ".join(map(str, modes)) or "none"
        raise InputError(f"{path}: the pooling mode must be mean, cls or max, got {shown}. {_BERT_ALONE}")
    if similarity not in (None, *SIMILARITIES):
        raise InputError(
            f"{path.parent.parent / MODEL_CONFIG}: similarity_fn_name must be {' or '.join(SIMILARITIES)}, "
            f"got {similarity!r}"
        )
    return Pooling(modes[0], normalize, similarity or "cosine")


def _length(value: Any, path: Path) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise InputError(f"{path}: max_seq_length must be a whole number above 0, got {value!r}")
    return value


def pooling_files(pooling: Pooling, units: int, max_seq_length: int) -> dict[str, Any]:
    """Return the JSON files that make a folder with a BERT a model of sentence-transformers, by path."""
    # The spelling of version 2. All later versions read it.
    library = "sentence_transformers.models"
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    modules += [("2_Normalize", "Normalize")] if pooling.normalize else []
    switches = {switch: name == pooling.mode for switch, name in list(_SWITCHES.items())[:4]}
    return {
        MODULES: [
            {"idx": i, "name": str(i), "path": path, "type": f"{library}.{name}"}
            for i, (path, name) in enumerate(modules)
        ],
        SENTENCE_CONFIG: {"max_seq_length": max_seq_length, "do_lower_case": False},
        "1_Pooling/config.json": {"word_embedding_dimension": units, **switches},
        MODEL_CONFIG: {"similarity_fn_name": pooling.similarity},
    }
