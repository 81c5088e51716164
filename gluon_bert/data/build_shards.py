"""Build shards on disk from a corpus, with several processes and little memory.

1. Workers split the text into words and number the words of each chunk. The main process joins the chunks to
   shards of words, `words-00000.npz` and so on.
2. The vocabulary is built from the counts, and the ids of each word are looked up once.
3. Workers replace the words by their ids.

An interrupted preparation continues after the last shard of words; the later steps are done again. The
result does not depend on the number of processes.
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
import zipfile
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence

import numpy as np

from ..config import DataConfig
from ..errors import InputError
from ..fileio import atomic_write
from . import shards
from .corpora.corpus import Corpus
from .corpora.text_formats import TextChunk, parse
from .document_arrays import DocumentBuilder, WordIndexedDocuments, index_words, numbering
from .process_pool import Map, processes
from .vocab import Normalization, Vocabulary
from .wordpiece import WordPieceVocabulary, installed_version

log = logging.getLogger(__name__)

VocabularyOf = Callable[[Mapping[str, int]], Vocabulary]

# Words per shard: about 50 MB in memory while it is built, 8 MB on disk, from 24 MB of text.
_SHARD_WORDS = 1 << 22
# Words whose ids are looked up at once: Python's lists of them are large.
_LOOKED_UP = 1 << 16
# Hashes that are compared, 32 MB. With more sentences or documents the share of repeated ones is estimated.
_COMPARED = 1 << 22
# Seconds between progress lines without a terminal.
_LOG_EVERY = 60.0
# A larger share of repetitions causes a warning: validation losses are then too low for new text.
_MANY_REPEATED = 0.1
# If more than this share of the words is in dropped documents, text_format may be wrong.
_MUCH_DROPPED = 1 / 3
_MANY_UNKNOWN = 0.1


def vocabulary_maker(config: DataConfig) -> VocabularyOf:
    """Return a function from word counts to a vocabulary. Raise InputError before any text is read."""
    vocab: Vocabulary
    if config.tokenizer == "wordpiece":
        installed_version()
        check_added_tokens(config)
        if not config.vocab_file:
            return partial(_make_wordpiece, config=config)
        vocab = WordPieceVocabulary.load(Path(config.vocab_file))
        vocab.check_case(config.vocab_file, config.lowercase)
    elif config.vocab_file:
        vocab = Vocabulary.load(Path(config.vocab_file))
    else:
        return lambda counts: Vocabulary.from_counts(counts, config.min_freq)
    vocab = vocab.with_tokens(Normalization.from_config(config).all_added)
    return lambda counts: vocab.extended(counts, config.extend_vocab, config.min_freq)


def _make_wordpiece(counts: Mapping[str, int], config: DataConfig) -> Vocabulary:
    """Return the vocabulary of a text; its added tokens are not cut into pieces."""
    added = Normalization.from_config(config).all_added
    counts = {word: n for word, n in counts.items() if word not in added}
    vocab = WordPieceVocabulary.from_counts(counts, config.min_freq, config.vocab_size - len(set(added)))
    return vocab.with_tokens(added)


def check_added_tokens(config: DataConfig) -> None:
    """Raise InputError if an added token cannot be one word of a text that is prepared."""
    for name in ("added_tokens", "additional_special_tokens"):
        for token in getattr(config, name):
            if not token or token.split() != [token]:
                raise InputError(f"{name} must not hold white space to prepare a corpus, got {token!r}")


class WordIds:
    """The ids of numbered words: word n has ids[starts[n]:starts[n + 1]].

    A special token in the text is an unknown word, unless it is an added token.
    """

    def __init__(self, words: Sequence[str], vocab: Vocabulary, added_tokens: Sequence[str] = ()) -> None:
        ids, sizes = [np.zeros(0, np.int32)], [0]
        for start in range(0, len(words), _LOOKED_UP):
            pieces = [vocab.pieces(word) for word in words[start : start + _LOOKED_UP]]
            ids.append(vocab.to_indices([piece for word in pieces for piece in word]))
            sizes += [len(word) for word in pieces]
        self.ids = np.concatenate(ids)
        self.ids[vocab.special_but(added_tokens)[self.ids]] = vocab.unk
        self.starts = np.cumsum(sizes, dtype=np.int64)
        self._vocab_size = len(vocab)

    def token_counts(self, word_counts: np.ndarray) -> np.ndarray:
        """Return the counts of tokens, (2, V) int64, for counts of words, (2, W)."""
        sizes = np.diff(self.starts)
        return np.stack(
            [
                # As weights the counts become float64, exact up to 2 ** 53.
                np.bincount(self.ids, np.repeat(counts, sizes), self._vocab_size).astype(np.int64)
                for counts in word_counts
            ]
        )


def prepare_shards(
    corpus: Corpus, config: DataConfig, folder: Path, made_by: Mapping[str, Any]
) -> dict[str, Any]:
    """Fill a folder with the shards of a corpus; return the manifest, which `finish` writes."""
    _clear(folder)
    with processes(config.preprocessing_workers) as map_all:
        num_shards = _read_text(corpus, config, folder, map_all, made_by["fingerprint"])
    # In a separate process: the words of a large text take much memory, which Python would keep.
    with processes(min(config.preprocessing_workers, 1)) as map_all:
        ((_, unk),) = map_all(partial(_number_all, folder=folder, config=config), [num_shards])
    with processes(min(config.preprocessing_workers, num_shards)) as map_all:
        described = [shard for _, shard in map_all(partial(_finish_shard, folder=folder), range(num_shards))]
    return shards.manifest(folder, made_by, described, _statistics(folder, described, unk))


def finish(folder: Path, manifest: Mapping[str, Any], config: DataConfig) -> None:
    """Write the manifest, remove the files of an unfinished preparation, and log the text's statistics."""
    shards.write_manifest(folder, manifest)
    for leftover in [*folder.glob("words-*"), folder / "ids.npz"]:
        leftover.unlink()
    _log_statistics(manifest["statistics"], config)


def _clear(folder: Path) -> None:
    """Remove everything but the shards of words, from which a preparation can continue."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.suffix != ".npz" or not path.name.startswith("words-"):
            path.unlink()


# Text to shards of words


def _read_text(corpus: Corpus, config: DataConfig, folder: Path, map_all: Map, fingerprint: str) -> int:
    """Write the missing shards of words; return the number of all shards."""
    number = chunks_before = 0
    while (chunks := _chunks_in(_words_path(folder, number), fingerprint)) is not None:
        number, chunks_before = number + 1, chunks_before + chunks
    if number:
        log.info("continuing after the first %d shards", number)
    with _progress(corpus.num_bytes) as advance:
        everything = corpus.chunks()
        for chunk in islice(everything, chunks_before):
            advance(chunk.num_bytes)
        gathered, num_chunks = DocumentBuilder(), 0
        seen: set[int] = set()
        for chunk, numbered in map_all(partial(_index_chunk, config=config), everything):
            # Many files have the same docstrings. The user's own text is not deduplicated.
            gathered.add(_unseen(numbered, seen) if chunk.source else numbered)
            num_chunks += 1
            advance(chunk.num_bytes)
            # All pydoc prose is in one shard: a resumed preparation does not know the earlier documents.
            if gathered.num_words >= _SHARD_WORDS and not chunk.source:
                _write_words(_words_path(folder, number), gathered.numbered(), num_chunks, fingerprint)
                number, gathered, num_chunks = number + 1, DocumentBuilder(), 0
    if num_chunks or not number:
        _write_words(_words_path(folder, number), gathered.numbered(), num_chunks, fingerprint)
        number += 1
    return number


def _index_chunk(chunk: TextChunk, config: DataConfig) -> WordIndexedDocuments:
    parsed = parse(chunk, config)
    return index_words(zip(parsed.documents, parsed.validation), parsed.dropped)


def _unseen(numbered: WordIndexedDocuments, seen: set[int]) -> WordIndexedDocuments:
    """Return the documents that did not occur before."""
    keep = np.zeros(len(numbered.documents), dtype=bool)
    for i, content in enumerate(numbered.document_hashes.tolist()):
        keep[i] = content not in seen
        seen.add(content)
    return numbered.select(keep)


def _words_path(folder: Path, number: int) -> Path:
    return folder / f"words-{number:05}.npz"


def _numbers_path(folder: Path, number: int) -> Path:
    return folder / f"words-{number:05}.npy"


def _write_words(path: Path, numbered: WordIndexedDocuments, num_chunks: int, fingerprint: str) -> None:
    content = "\n".join(numbered.words).encode("utf-8", "surrogatepass")
    arrays = {
        **numbered._asdict(),
        "words": np.frombuffer(content, dtype=np.uint8),
        "distinct_sentences": np.unique(numbered.sentence_hashes),
        "distinct_documents": np.unique(numbered.document_hashes),
        "word_counts": numbered.word_counts(),
        "num_chunks": np.array(num_chunks),
        "fingerprint": np.array(fingerprint),
    }
    with atomic_write(path, "wb") as file:
        np.savez(file, **arrays)


def _chunks_in(path: Path, fingerprint: str) -> int | None:
    """Return the number of chunks in a shard of words; None without a valid shard."""
    try:
        with np.load(path) as arrays:
            if str(arrays["fingerprint"]) == fingerprint:
                return int(arrays["num_chunks"])
            problem = "it is of another preparation"
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        problem = str(error)
    log.warning("%s: cannot be used (%s); it is built again", path, problem)
    return None


def _words_in(arrays: Mapping[str, np.ndarray]) -> list[str]:
    content = arrays["words"].tobytes().decode("utf-8", "surrogatepass")
    return content.split("\n") if content else []


# Words to ids


def _number_all(num_shards: int, folder: Path, config: DataConfig) -> int:
    """Number the words of all shards together, and write the vocabulary and the ids of each word.

    Return the id of the unknown token.
    """
    order = numbering()
    word_counts = np.zeros((2, 0), dtype=np.int64)
    for number in range(num_shards):
        with np.load(_words_path(folder, number)) as arrays:
            words = _words_in(arrays)
            numbers = np.fromiter(map(order.__getitem__, words), np.int32, len(words))
            missing = len(order) - word_counts.shape[1]
            word_counts = np.pad(word_counts, ((0, 0), (0, missing)))
            word_counts[:, numbers] += arrays["word_counts"]
        np.save(_numbers_path(folder, number), numbers)
    words, counts = list(order), order  # one dict for both: it takes a hundred MB for a large text
    counts.default_factory = None
    for word, count in zip(words, word_counts[0].tolist()):
        counts[word] = count
        if not count:  # a word of the validation text only
            del counts[word]
    vocab = vocabulary_maker(config)(counts)
    of_words = WordIds(words, vocab, Normalization.from_config(config).all_added)
    ids = of_words.ids.astype(shards.id_type(len(vocab)))
    np.savez(folder / "ids.npz", ids=ids, starts=of_words.starts)
    with atomic_write(folder / shards.VOCABULARY, "wb") as file:
        file.write("\n".join(vocab.tokens).encode("utf-8", "surrogatepass"))
    with atomic_write(folder / shards.COUNTS, "wb") as file:
        np.save(file, of_words.token_counts(word_counts))
    return vocab.unk


def _finish_shard(number: int, folder: Path) -> dict[str, Any]:
    """Convert a shard of words to a shard of ids. Return its entry in the manifest."""
    with np.load(folder / "ids.npz") as table, np.load(_words_path(folder, number)) as arrays:
        ids, starts = table["ids"], table["starts"]
        numbered = WordIndexedDocuments([], *(arrays[name] for name in WordIndexedDocuments._fields[1:]))
    numbered = numbered._replace(tokens=np.load(_numbers_path(folder, number))[numbered.tokens])
    sides = {
        side: numbered.select(numbered.validation == validation).to_token_ids(ids, starts)
        for side, validation in zip(shards.SIDES, (False, True))
    }
    shards.write_shard(folder, number, sides)
    return shards.describe_shard(folder, number)


# Statistics


def _statistics(folder: Path, described: Sequence[Mapping[str, Any]], unk: int) -> dict[str, Any]:
    """Return the statistics of the text, as plain values for the manifest."""
    counts = np.load(folder / shards.COUNTS)
    result: dict[str, Any] = {
        side: {name: sum(shard[side][name] for shard in described) for name in shards.ARRAYS}
        for side in shards.SIDES
    }
    paths = [_words_path(folder, number) for number in range(len(described))]
    dropped = np.sum([_array_in(path, "dropped") for path in paths], axis=0)
    num_words = sum(int(_array_in(path, "word_counts").sum()) for path in paths)
    for name in ("sentences", "documents"):
        total = sum(result[side][name] for side in shards.SIDES)
        distinct = _distinct(paths, f"distinct_{name}")
        result[f"repeated_{name}"] = _share(total - distinct, total)
    return {
        **result,
        "vocabulary": counts.shape[1],
        "unknown": _share(int(counts[:, unk].sum()), int(counts.sum())),
        "dropped_documents": int(dropped[0]),
        "dropped_words": _share(int(dropped[1]), num_words + int(dropped[1])),
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _distinct(paths: Sequence[Path], name: str) -> int:
    """Return the number of different hashes in these files of sorted hashes.

    Memory is bounded: only the smallest hashes are compared, and the rest is assumed to be similar.
    """
    total = sum(len(_array_in(path, name)) for path in paths)
    share = min(1.0, _COMPARED / max(total, 1))
    compared = [np.zeros(0, np.uint64)]
    for path in paths:
        hashes = _array_in(path, name)
        compared.append(hashes[: np.searchsorted(hashes, np.uint64(share * (2**64 - 2048)), side="right")])
    return round(len(np.unique(np.concatenate(compared))) / share)


def _array_in(path: Path, name: str) -> np.ndarray:
    with np.load(path) as arrays:
        return arrays[name]


def _log_statistics(statistics: Mapping[str, Any], config: DataConfig) -> None:
    """Log the statistics in one line, and a warning for each that may show a problem of the text."""
    train, validation = (statistics[side] for side in shards.SIDES)
    log.info(
        "%s documents, %s of them for validation; %s sentences, %s tokens, %.1f %% of them unknown",
        f"{train['documents'] + validation['documents']:,}",
        f"{validation['documents']:,}",
        f"{train['sentences'] + validation['sentences']:,}",
        f"{train['tokens'] + validation['tokens']:,}",
        100 * statistics["unknown"],
    )
    dropped, repeated = statistics["dropped_words"], statistics["repeated_sentences"]
    if dropped > _MUCH_DROPPED:
        log.warning(
            "%.0f %% of the words are left out: they are in %s documents of one sentence, which give no "
            "pair. text_format defines what separates documents",
            100 * dropped,
            f"{statistics['dropped_documents']:,}",
        )
    if repeated > _MANY_REPEATED:
        log.warning(
            "%.0f %% of the sentences and %.0f %% of the documents repeat earlier ones, so validation losses "
            "are too low. Remove repetitions from the text",
            100 * repeated,
            100 * statistics["repeated_documents"],
        )
    if statistics["unknown"] > _MANY_UNKNOWN:
        log.warning(
            "%.0f %% of the tokens are unknown to the vocabulary: %s",
            100 * statistics["unknown"],
            """tokenizer="wordpiece" or a smaller min_freq gives fewer"""
            if config.tokenizer == "words"
            else "a vocabulary built from this text, without vocab_file, gives fewer",
        )


@contextmanager
def _progress(num_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show the progress of reading: a bar on a terminal, otherwise a line per minute."""
    if sys.stderr.isatty():
        from tqdm import tqdm  # here, as it takes a while to import

        with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="preparing", leave=False, delay=1) as bar:
            yield bar.update
        return
    done, logged = 0, time.monotonic()

    def advance(more: int) -> None:
        nonlocal done, logged
        done += more
        if time.monotonic() - logged > _LOG_EVERY:
            logged = time.monotonic()
            log.info("read %d of %d MB of text", done // 10**6, num_bytes // 10**6)

    yield advance
