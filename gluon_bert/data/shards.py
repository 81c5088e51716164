"""A prepared corpus on disk: its manifest, its vocabulary and its shards. Makes no ids.

    <fingerprint>/                  one folder per text and preparation
      manifest.json                 written last: without it the preparation is unfinished
      vocabulary.txt                one token per line, UTF-8
      counts.npy                    (2, V) int64, counts of tokens: training, validation
      shard-00000/                  some million tokens of whole documents, in the order of the text
        train.tokens.npy            (N,) uint16; int32 where the vocabulary has more than 65,536 tokens
        train.sentences.npy         (S + 1,) int64, where each sentence starts in the tokens, and the end
        train.documents.npy         (D + 1,) int64, the same for the documents in the sentences
        validation.tokens.npy         and so on: the same for the validation text
      words-00000.npz, ids.npz      of an unfinished preparation; removed at its end

The manifest has the format number, the settings, the fingerprint (a hash of them and of the text), the
statistics, and the size and CRC-32 of each file. The arrays are NumPy's own
files, which `numpy.load(path, mmap_mode="r")` maps into memory.
"""

from __future__ import annotations

import json
import os
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

import numpy as np

from ..errors import InputError
from ..fileio import atomic_folder, lock, write_json
from ..npz import mapped_array
from .document_arrays import Documents

# Part of every fingerprint. Increase it when the same text would give other ids or other files.
FORMAT = 6
MANIFEST, VOCABULARY, COUNTS = "manifest.json", "vocabulary.txt", "counts.npy"
SIDES = ("train", "validation")
ARRAYS = ("tokens", "sentences", "documents")


class Damaged(Exception):
    """A prepared corpus differs from its manifest; the message names the place."""


class DocumentShards:
    """The training or validation documents of a prepared corpus, in shards. Few are in memory at once.

    sizes: (K,) int64, tokens per shard. `tokens`, `sentences` and `documents` give all of it, as in
    Documents.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], side: str, counts: np.ndarray) -> None:
        self.folder = folder
        self._shards, self._side, self._counts = manifest["shards"], side, counts
        self._lengths = np.array(
            [[shard[side][name] for name in (*ARRAYS, "with_pairs")] for shard in self._shards],
            dtype=np.int64,
        )
        if (self._lengths < 0).any() or counts.dtype.kind not in "iu" or counts.ndim != 1:
            raise Damaged(f"{MANIFEST} or {COUNTS} has invalid numbers")
        self.sizes = self._lengths[:, 0]
        self._whole: Documents | None = None

    def __len__(self) -> int:
        return int(self._lengths[:, 2].sum())

    def with_pairs(self) -> int:
        """Return how many documents have two sentences or more."""
        return int(self._lengths[:, 3].sum())

    def counts(self, size: int) -> np.ndarray:
        """(size,) int64: how often each id occurs."""
        assert size == len(self._counts)
        return self._counts

    def part(self, shards: Sequence[int]) -> Documents:
        """Return the documents of these shards, copied into memory.

        Raise InputError if a file is damaged or foreign.
        """
        lengths = self._lengths[list(shards), :3]
        self._check_files(shards)
        num_tokens, num_sentences, num_documents = lengths.sum(axis=0)
        tokens = np.empty(num_tokens, id_type(len(self._counts)))
        sentences, documents = np.zeros(num_sentences + 1, np.int64), np.zeros(num_documents + 1, np.int64)
        for shard, (token, sentence, document) in zip(shards, np.cumsum(lengths, axis=0) - lengths):
            piece = Documents(*(self._array(shard, name) for name in ARRAYS))
            tokens[token : token + len(piece.tokens)] = piece.tokens
            sentences[sentence : sentence + len(piece.sentences)] = piece.sentences + token
            documents[document : document + len(piece.documents)] = piece.documents + sentence
        return Documents(tokens, sentences, documents)

    def _check_files(self, numbers: Sequence[int]) -> None:
        """Raise InputError if a file differs from the manifest, before memory is allocated."""
        try:
            for number in numbers:
                lengths = self._lengths[number] + [0, 1, 1, 0]
                for name, length in zip(ARRAYS, lengths.tolist()):
                    path = Path(shard_name(number), f"{self._side}.{name}.npy")
                    if _crc(self.folder / path) != self._shards[number]["files"][path.name][1]:
                        raise Damaged(f"{path} differs from its hash in {MANIFEST}")
                    array = self._array(number, name)
                    if array.shape != (length,) or array.dtype.kind not in "iu":
                        raise Damaged(f"{path} differs from its length in {MANIFEST}")
        except (OSError, ValueError, KeyError, TypeError, OverflowError, Damaged) as problem:
            raise InputError(
                f"{self.folder}: is damaged ({problem}). Delete it, and run again to prepare the text again."
            ) from problem

    def _array(self, shard: int, name: str) -> np.ndarray:
        return mapped_array(self.folder / shard_name(shard) / f"{self._side}.{name}.npy")

    @property
    def tokens(self) -> np.ndarray:
        """Return the ids of all tokens, as in Documents, (N,)."""
        return self._all().tokens

    @property
    def sentences(self) -> np.ndarray:
        """(S + 1,) int64, where each sentence starts, as in Documents."""
        return self._all().sentences

    @property
    def documents(self) -> np.ndarray:
        """(D + 1,) int64, where each document starts, as in Documents."""
        return self._all().documents

    def _all(self) -> Documents:
        if self._whole is None:
            self._whole = self.part(range(len(self.sizes)))
        return self._whole


def id_type(vocab_size: int) -> Any:
    """Return the type of the tokens' ids."""
    return np.uint16 if vocab_size <= 1 << 16 else np.int32


def shard_name(number: int) -> str:
    """Return the name of a shard's folder."""
    return f"shard-{number:05}"


def write_shard(folder: Path, number: int, sides: Mapping[str, Documents]) -> None:
    """Create a shard's folder atomically."""
    with atomic_folder(folder / shard_name(number)) as aside:
        for side, documents in sides.items():
            for name in ARRAYS:
                np.save(aside / f"{side}.{name}.npy", getattr(documents, name))


def describe_shard(folder: Path, number: int) -> dict[str, Any]:
    """Return a shard's entry in the manifest: array lengths, and the size and CRC-32 of each file."""
    shard = folder / shard_name(number)
    description: dict[str, Any] = {}
    for side in SIDES:
        read = Documents(*(np.load(shard / f"{side}.{name}.npy", mmap_mode="r") for name in ARRAYS))
        lengths = {"tokens": len(read.tokens), "sentences": len(read.sentences) - 1, "documents": len(read)}
        description[side] = {**lengths, "with_pairs": read.with_pairs()}
    files = (f"{side}.{name}.npy" for side in SIDES for name in ARRAYS)
    return {**description, "files": {name: _described(shard / name) for name in files}}


def manifest(
    folder: Path, made_by: Mapping[str, Any], described: Sequence[Any], statistics: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the manifest of a folder that has all other files."""
    own = {name: _described(folder / name) for name in (VOCABULARY, COUNTS)}
    return {
        "format": FORMAT,
        "made_by": made_by,
        "statistics": statistics,
        "files": own,
        "shards": list(described),
    }


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest, which finishes the prepared corpus. `read_manifest` is the inverse."""
    write_json(folder / MANIFEST, content)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a finished corpus, or None.

    Raise Damaged if a file is missing or of another size.
    The vocabulary and the counts are also compared by content, the shards when they are read.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{MANIFEST} cannot be read: {error}") from error
    try:
        if content["made_by"]["fingerprint"] != folder.name:
            raise Damaged(f"{MANIFEST} is that of {content['made_by']['fingerprint']}")
        for name, described in content["files"].items():
            if Path(name).name != name or _described(folder / name) != described:
                raise Damaged(f"{name} differs from its hash in {MANIFEST}")
        for number, shard in enumerate(content["shards"]):
            for name, (num_bytes, _) in shard["files"].items():
                if Path(name).name != name:
                    raise Damaged(f"{name!r} is not a file of a shard")
                found = (folder / shard_name(number) / name).stat().st_size
                if found != num_bytes:
                    raise Damaged(f"{shard_name(number)}/{name} has {found:,} bytes, not {num_bytes:,}")
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise Damaged(f"{type(error).__name__}: {error}") from error
    return content


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder, after waiting for other processes that prepare the same text.

    The lock ends with the process that holds it.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            lock(handle, folder, "prepare a text", wait=True)
            # The previous owner may have removed the folder; then this lock has no effect.
            if folder.exists() and os.path.samestat(os.fstat(handle), folder.stat()):
                yield
                return
        finally:
            os.close(handle)


def _described(path: Path) -> list[int]:
    return [path.stat().st_size, _crc(path)]


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            crc = zlib.crc32(block, crc)
    return crc
