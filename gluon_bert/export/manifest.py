"""The manifest of an export: its files, inputs, outputs and errors. Runs nothing."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Iterable, Mapping, Sequence

from ..config import Config
from ..data.tokenizer import Tokenizer
from ..data.vocab import Normalization
from ..data.wordpiece import load_vocabulary
from ..errors import InputError
from ..fileio import file_hash, write_json
from ..model.head_names import checked_heads
from ..model.pooling import Pooling
from ..model.task import Task

MANIFEST = "manifest.json"

# Increased when older versions of gluon_bert cannot read the new format.
VERSION = 1

FORMATS = ("mxnet", "onnx", "onnx-int8", "int8", "bf16")
TOKENIZERS = ("words", "wordpiece")

# The outputs of an export: the encoder's vectors, or also the results of the heads.
OUTPUTS = {
    "encoder": ("encoded",),
    "all": ("encoded", "pooled", "mask_scores", "next_scores"),
    # All outputs of a fine-tuned network: its task scores texts, or tokens.
    "task": ("encoded", "pooled", "task_scores"),
    "token-task": ("encoded", "token_scores"),
}

# Axis letters as in the model: B batch, T positions, C units, V vocabulary; K masks a row.
_INPUTS = {
    "tokens": ("B T", "ids, as whole numbers, of <cls> a <sep>, or of <cls> a <sep> b <sep>, then <pad>"),
    "token_types": ("B T", "0 up to the first <sep> and on padding, 1 from there to the second <sep>"),
    "valid_length": ("B", "tokens of each row, padding not counted"),
    "masked_positions": (
        "B K",
        "where each row has its <mask> tokens; 0, to be ignored, where it has fewer than K",
    ),
}
_OUTPUTS = {
    "encoded": ("B T C", "a vector for each token; those of padding mean nothing"),
    "pooled": ("B C", "the vector of <cls> through the pooler"),
    "mask_scores": ("B K V", "for each masked position a score for each token of the vocabulary; softmax "
    "gives "
                             "probabilities of them"),
    "next_scores": ("B 2", "scores for: the second text does not follow the first, it does"),
    "task_scores": ("B K", "a score for each label of the task, softmax makes probabilities of them; "
                           "or K = 1, the score of a regression"),
    "token_scores": ("B T K", "for each token a score for each label of the task, or for the start and the "
    "end of "
                              "an answer; those of padding mean nothing"),
}  # fmt: skip


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    format: one of FORMATS. outputs: a key of OUTPUTS. max_seq_length: the largest T; a longer text is an
    error. tokenizer: its settings and the ids of special tokens. vocabulary_size, step: of the run.
    files: the SHA-256 of each file. versions: of the packages that wrote the export. comparison: the
    differences from the run's results, with the shapes or texts. task: what the network was fine-tuned for,
    from Task.to_json, or None. untrained: the heads that no training has changed; their outputs mean nothing.
    pooling: how a text gets one vector, from Pooling.to_json, or None.
    """

    format: str
    outputs: str
    max_seq_length: int
    vocabulary_size: int
    tokenizer: Mapping[str, Any]
    step: int
    files: Mapping[str, str]
    versions: Mapping[str, str]
    comparison: Mapping[str, Any] = field(default_factory=dict)
    task: Mapping[str, Any] | None = None
    untrained: Sequence[str] = field(default_factory=list)
    pooling: Mapping[str, Any] | None = None

    @property
    def input_names(self) -> list[str]:
        """Return the names of the graph's inputs, in order."""
        return input_names(self.outputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Return the names of the graph's outputs, in order."""
        return OUTPUTS[self.outputs]

    def save(self, folder: Path) -> None:
        """Write manifest.json; `load` is the inverse."""
        content = {
            "manifest": VERSION,
            "inputs": _described(self.input_names, _INPUTS),
            "results": _described(self.output_names, _OUTPUTS),
            **asdict(self),
        }
        write_json(folder / MANIFEST, content)

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Return the manifest of an export; raise InputError if a file is missing or damaged."""
        path = Path(folder) / MANIFEST
        try:
            content = json.loads(path.read_text("utf-8"))
            version = content["manifest"]
            manifest = cls(**{each.name: content[each.name] for each in fields(cls)})
        except FileNotFoundError as error:
            raise InputError(f"{folder}: must be an export, with {MANIFEST}") from error
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"{path}: cannot be read as an export's manifest ({type(error).__name__}: {error})"
            ) from error
        if version != VERSION:
            raise InputError(f"{path}: version must be {VERSION}, got {version}. Export the run again.")
        manifest._check(path)
        return manifest

    def reader(self, folder: Path) -> Tokenizer:
        """Return the network's tokenizer; raise InputError if the vocabulary does not fit."""
        vocab = load_vocabulary(Path(folder))
        if len(vocab) != self.vocabulary_size:
            raise InputError(
                f"{folder}: {vocab.FILE} must have {self.vocabulary_size} tokens, got {len(vocab)}"
            )
        return Tokenizer(vocab, self.max_seq_length, self._normalization(folder))

    def _normalization(self, path: Path) -> Normalization:
        fields = {name: self.tokenizer[name] for name in Normalization._fields}
        return Normalization.from_config(Config.from_json({"data": fields}, str(path)).data)

    def _check(self, path: Path) -> None:
        sizes = [self.max_seq_length, self.vocabulary_size]
        sound = [
            self.format in FORMATS,
            self.outputs in list(OUTPUTS),  # an unhashable value cannot be looked up in a dict
            all(type(size) is int and size > 0 for size in sizes),
            isinstance(self.tokenizer, Mapping) and self.tokenizer.get("kind") in TOKENIZERS,
            isinstance(self.tokenizer, Mapping) and set(Normalization._fields) <= set(self.tokenizer),
            isinstance(self.files, Mapping),
        ]
        if not all(sound):
            raise InputError(f"{path}: holds unknown values. Export the run again.")
        self._normalization(path)
        if self.task is not None:
            Task.from_json(self.task, path)
        if self.pooling is not None:
            Pooling.from_json(self.pooling, path)
        checked_heads(self.untrained, path)
        for name, expected in self.files.items():
            if Path(name).name != name:
                raise InputError(f"{path}: {name!r} must be a file of this folder")
            if not (path.parent / name).is_file():
                raise InputError(f"{path.parent}: {name} is missing. Export the run again.")
            if file_hash(path.parent / name) != expected:
                raise InputError(
                    f"{path.parent / name}: differs from the exported file. Export the run again."
                )


def input_names(outputs: str) -> list[str]:
    """Return the inputs that a graph with these outputs takes."""
    return [name for name in _INPUTS if name != "masked_positions" or "mask_scores" in OUTPUTS[outputs]]


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a folder, by name."""
    return {path.name: file_hash(path) for path in sorted(folder.iterdir())}


def _described(names: Iterable[str], meanings: Mapping[str, tuple[str, str]]) -> list[dict[str, Any]]:
    return [
        {"name": name, "dtype": "float32", "shape": meanings[name][0].split(), "meaning": meanings[name][1]}
        for name in names
    ]
