"""Feeds broken files to every reader of files."""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any, Callable, NamedTuple

from gluon_bert.cli import main_with_exit_status, parser_of, run
from gluon_bert.errors import InputError

EXAMPLES = """\
examples:
  python tools/dev/fuzz.py config --minutes 10       search until an error other than InputError
  python tools/dev/fuzz.py arrays --keep found/      continue with the inputs of an earlier search
  python tools/dev/fuzz.py state --input crash-0a1b  read one input

pip install -e '.[cpu,wordpiece,fuzz]' installs atheris, a fuzzer guided by code coverage.
An input that causes another error is written to crash-... in the current folder. The exit status is then not
0.
"""


class Target(NamedTuple):
    """A reader of files. valid: returns a valid file. read: reads any bytes, written to a folder."""

    valid: Callable[[], bytes]
    read: Callable[[Path, bytes], Any]


def _vocabulary_json() -> bytes:
    from gluon_bert.data.vocab import Vocabulary

    return _written("vocab.json", Vocabulary(["a", "crane"]).save)


def _read_vocabulary_json(folder: Path, content: bytes) -> None:
    from gluon_bert.data.vocab import Vocabulary

    Vocabulary.load(_file(folder, "vocab.json", content))


def _vocabulary_txt() -> bytes:
    from gluon_bert.data.wordpiece import SPECIAL_TOKENS

    return "\n".join([*SPECIAL_TOKENS, "crane", "##s"]).encode()


def _read_vocabulary_txt(folder: Path, content: bytes) -> None:
    from gluon_bert.data.wordpiece import WordPieceVocabulary

    WordPieceVocabulary.load(_file(folder, "vocab.txt", content)).pieces("cranes")


def _config() -> bytes:
    from gluon_bert.presets import preset
    from gluon_bert.run import write_config

    return _written("config.json", lambda path: write_config(path.parent, preset("bert-tiny"), {}))


def _read_config(folder: Path, content: bytes) -> None:
    from gluon_bert.run import read_config, read_environment

    path = _file(folder, "config.json", content)
    read_config(path).to_json()
    read_environment(path)


def _arrays() -> bytes:
    import numpy as np

    from gluon_bert.npz import write_arrays

    file = io.BytesIO()
    write_arrays(file, {"a.weight": np.ones((2, 3), np.float32), "a.weight/updates": np.zeros(1, np.int64)})
    return file.getvalue()


def _read_arrays(folder: Path, content: bytes) -> None:
    from gluon_bert.npz import read_arrays

    arrays = read_arrays(_file(folder, "weights.npz", content))
    assert sum(array.nbytes for array in arrays.values()) <= len(content)


def _checkpoint(folder: Path) -> Path:
    """Write a checkpoint to a run folder."""
    import numpy as np

    from gluon_bert.checkpoint import Snapshot, write_checkpoint

    return write_checkpoint(folder, Snapshot(1, {"w": np.ones(1, np.float32)}, {}, {"step": 1}))


def _manifest() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "checkpoints").mkdir()
        return (_checkpoint(Path(folder)) / "manifest.json").read_bytes()


def _read_manifest(folder: Path, content: bytes) -> None:
    from gluon_bert.checkpoint import read_checkpoint

    if not (folder / "checkpoints").exists():
        (folder / "checkpoints").mkdir()
        _checkpoint(folder)
    _file(folder / "checkpoints" / "step-00000001", "manifest.json", content)
    read_checkpoint(folder, 1)


def _state() -> bytes:
    from gluon_bert.training.state import BestEvaluation, TrainState

    state = TrainState(step=3, best=BestEvaluation(2, {"mlm_loss": 5.0, "nsp_loss": 0.7}))
    return json.dumps(state.to_json()).encode()


def _read_state(folder: Path, content: bytes) -> None:
    from gluon_bert.checkpoint import _object_in
    from gluon_bert.runtime import mx
    from gluon_bert.training.state import TrainState

    path = _file(folder, "state.json", content)
    TrainState.from_json(_object_in(path), [mx.cpu()], str(path)).to_json()


_LINE = {"step": 1, "mlm_loss": 5.0, "nsp_loss": None, "mlm_accuracy": 0.1, "nsp_accuracy": 0.5}


def _log() -> bytes:
    on_non_finite = {"step": 2, "non_finite": {"what": "the gradient"}}
    return "\n".join(map(json.dumps, [_LINE, {"step": 1, "validation": _LINE}, on_non_finite, ""])).encode()


def _read_log(folder: Path, content: bytes) -> None:
    from gluon_bert.training.run_log import LogFile

    log = LogFile(_file(folder, "log.jsonl", content), len(content))
    log.append(_LINE)
    log.close()


def _shards(folder: Path) -> None:
    """Write a prepared corpus to a folder."""
    import numpy as np

    from gluon_bert.data import shards
    from gluon_bert.data.document_arrays import Documents

    documents = Documents(np.array([5, 6, 5, 6], np.uint16), np.array([0, 2, 4]), np.array([0, 2]))
    shards.write_shard(folder, 0, dict.fromkeys(shards.SIDES, documents))
    (folder / shards.VOCABULARY).write_text("<unk>\n<pad>\n<mask>\n<cls>\n<sep>\na\nb")
    np.save(folder / shards.COUNTS, np.zeros((2, 7), np.int64))
    content = shards.manifest(
        folder, {"fingerprint": folder.name}, [shards.describe_shard(folder, 0)], {"vocabulary": 7}
    )
    shards.write_manifest(folder, content)


def _shards_manifest() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus")
        corpus.mkdir()
        _shards(corpus)
        return (corpus / "manifest.json").read_bytes()


def _prepared(folder: Path) -> Path:
    corpus = folder / "corpus"
    if not corpus.exists():
        corpus.mkdir()
        _shards(corpus)
    return corpus


def _read_shards_manifest(folder: Path, content: bytes) -> None:
    from gluon_bert.config import DataConfig
    from gluon_bert.data import prepared as documents
    from gluon_bert.data import shards

    corpus = _prepared(folder)
    _file(corpus, shards.MANIFEST, content)
    try:
        prepared = documents._read(corpus, DataConfig())
    except shards.Damaged:
        return
    if prepared:
        assert prepared.train.part(range(len(prepared.train.sizes))).tokens is not None


def _shard() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return (_prepared(Path(folder)) / "shard-00000" / "train.sentences.npy").read_bytes()


def _read_shard(folder: Path, content: bytes) -> None:
    from gluon_bert.config import DataConfig
    from gluon_bert.data import prepared as documents
    from gluon_bert.data import shards

    corpus, name = _prepared(folder), "train.sentences.npy"
    _file(corpus / "shard-00000", name, content)
    manifest = json.loads((corpus / shards.MANIFEST).read_text())
    manifest["shards"][0]["files"][name] = [len(content), zlib.crc32(content)]
    (corpus / shards.MANIFEST).write_text(json.dumps(manifest))
    prepared = documents._read(corpus, DataConfig())
    assert prepared
    prepared.train.part([0])


def _export() -> bytes:
    from gluon_bert.data.vocab import Normalization
    from gluon_bert.export.manifest import Manifest

    words = {"kind": "words", **Normalization(lowercase=True)._asdict()}
    return _written(
        "manifest.json",
        lambda path: Manifest("mxnet", "all", 8, 5, words, 1, {"vocab.json": "0"}, {}).save(path.parent),
    )


def _read_export(folder: Path, content: bytes) -> None:
    from gluon_bert.export.manifest import Manifest

    _file(folder, "manifest.json", content)
    Manifest.load(folder).reader(folder)


def _request() -> bytes:
    return b'{"text": "a <mask>", "pair": "crane", "ask": ["masks", "next"], "top": 2, "token_vectors": true}'


def _read_request(folder: Path, content: bytes) -> None:
    from gluon_bert.data.tokenizer import Tokenizer
    from gluon_bert.data.vocab import Normalization, Vocabulary
    from gluon_bert.serving.request_json import read

    read(content, Tokenizer(Vocabulary(["a", "crane"]), 16, Normalization(lowercase=True)))


def _text() -> bytes:
    return b"It rained. She left.\n\n = Title = \n\n a crane . it lifts .\n"


def _read_text(folder: Path, content: bytes) -> None:
    from gluon_bert.config import DataConfig
    from gluon_bert.data.corpora.text_file import read_chunks
    from gluon_bert.data.corpora.text_formats import parse

    path = _file(folder, "text.txt", content)
    for text_format in ("auto", "wikitext", "articles", "sentences"):
        for piece in read_chunks(path, text_format):
            parse(piece, DataConfig())


def _zipped() -> bytes:
    import gzip

    return gzip.compress(_text(), mtime=0)


def _read_zipped(folder: Path, content: bytes) -> None:
    from gluon_bert.data.corpora.text_file import read_chunks

    for _ in read_chunks(_file(folder, "text.txt.gz", content), "auto"):
        pass


TARGETS: dict[str, Target] = {
    "vocabulary": Target(_vocabulary_json, _read_vocabulary_json),
    "wordpiece": Target(_vocabulary_txt, _read_vocabulary_txt),
    "config": Target(_config, _read_config),
    "arrays": Target(_arrays, _read_arrays),
    "checkpoint": Target(_manifest, _read_manifest),
    "state": Target(_state, _read_state),
    "log": Target(_log, _read_log),
    "shards": Target(_shards_manifest, _read_shards_manifest),
    "shard": Target(_shard, _read_shard),
    "export": Target(_export, _read_export),
    "request": Target(_request, _read_request),
    "text": Target(_text, _read_text),
    "gzip": Target(_zipped, _read_zipped),
}


def read(name: str, folder: Path, content: bytes) -> bool:
    """Read a file of this content; return False after an InputError. Other errors are raised."""
    try:
        TARGETS[name].read(folder, content)
    except InputError:
        return False
    return True


def _file(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def _written(name: str, write: Callable[[Path], Any]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        write(path)
        return path.read_bytes()


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    p = parser_of("dev/fuzz", "TARGET [flags]", "Search for files that break their readers.", EXAMPLES)
    p.add_argument("target", metavar="TARGET", choices=TARGETS, help=", ".join(TARGETS))
    p.add_argument("--minutes", type=float, default=10.0, metavar="X", help="length of the search (10)")
    p.add_argument("--keep", type=Path, metavar="FOLDER", help="inputs that reach new code (a new folder)")
    p.add_argument("--input", type=Path, metavar="FILE", help="read this file instead of searching")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status. A search exits by itself."""
    return main_with_exit_status(parser(), argv, fuzz)


def fuzz(arguments: argparse.Namespace) -> int:
    """Search, or read one input."""
    folder = Path(tempfile.mkdtemp(prefix="gluon_bert.fuzz."))
    try:
        if arguments.input is not None:
            readable = read(arguments.target, folder, bytes_of(arguments.input))
            print("valid" if readable else "refused with an InputError")
            return 0
        return search(arguments.target, arguments.minutes, arguments.keep or folder / "kept", folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def bytes_of(path: Path) -> bytes:
    """Return the content of a file; raise InputError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"--input must be a file that can be read, got {path} ({error.strerror})."
        ) from error


def search(name: str, minutes: float, kept: Path, folder: Path) -> int:
    """Search with atheris, which exits with status 0 if it finds nothing."""
    try:
        import atheris
    except ImportError as error:
        install = "Run pip install -e '.[cpu,wordpiece,fuzz]'."
        raise InputError(f"atheris is not installed ({error}). {install}") from error
    from gluon_bert.runtime import mx

    assert mx  # must not be instrumented below
    kept.mkdir(parents=True, exist_ok=True)
    (kept / "valid").write_bytes(TARGETS[name].valid())
    # Import this package again, so that atheris counts its branches, but not those of NumPy and MXNet.
    for module in [module for module in sys.modules if module.startswith("gluon_bert.")]:
        if module not in ("gluon_bert.runtime", "gluon_bert.errors"):
            del sys.modules[module]
    with atheris.instrument_imports(include=["gluon_bert", "zipfile", "json"]):
        read(name, folder, TARGETS[name].valid())
    flags = [
        f"-max_total_time={round(60 * minutes)}",
        "-timeout=20",
        "-rss_limit_mb=4096",
        "-max_len=4096",
    ]
    atheris.Setup([sys.argv[0], *flags, str(kept)], lambda content: read(name, folder, content))
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    run(main)
