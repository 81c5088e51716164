"""Text to shards on disk: content, statistics, interruptions, damage, memory."""

import json
import logging
import multiprocessing
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, small_text

from gluon_bert.config import DataConfig
from gluon_bert.data import build_shards as preparation
from gluon_bert.data.prepared import prepare
from gluon_bert.errors import InputError


@pytest.fixture
def many_shards(monkeypatch):
    """Shards of some hundred words, pieces of some hundred bytes."""
    monkeypatch.setattr("gluon_bert.data.corpora.text_file.BLOCK_BYTES", 500)
    monkeypatch.setattr(preparation, "_SHARD_WORDS", 700)


def config_of(path, **changes):
    return DataConfig(corpus=(str(path),), text_format="sentences", **changes)


def folder_in(cache: Path) -> Path:
    (folder,) = cache.iterdir()
    return folder


def assert_same(ours, theirs):
    assert ours.vocab.tokens == theirs.vocab.tokens
    assert ours.statistics == theirs.statistics
    for side in ("train", "validation"):
        for name in ("tokens", "sentences", "documents"):
            a, b = (getattr(getattr(p, side), name) for p in (ours, theirs))
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype


@pytest.mark.parametrize("tokenizer", ["words", "wordpiece"])
def test_shards_hold_what_one_shard_would(text_file, tmp_path, monkeypatch, tokenizer):
    config = config_of(text_file, tokenizer=tokenizer, validation_fraction=0.2)
    whole = prepare(config, tmp_path / "one")
    assert len(whole.train.sizes) == 1
    monkeypatch.setattr("gluon_bert.data.corpora.text_file.BLOCK_BYTES", 500)
    monkeypatch.setattr(preparation, "_SHARD_WORDS", 700)
    parted = prepare(config, tmp_path / "many")
    assert len(parted.train.sizes) > 5
    assert_same(parted, whole)
    for side in ("train", "validation"):
        ours, theirs = getattr(parted, side), getattr(whole, side)
        assert len(ours) == len(theirs.documents) - 1
        assert ours.with_pairs() == np.count_nonzero(np.diff(theirs.documents) >= 2)
        size = len(whole.vocab)
        np.testing.assert_array_equal(ours.counts(size), np.bincount(theirs.tokens, minlength=size))


def test_part_of_some_shards_is_their_documents(text_file, tmp_path, many_shards):
    train = prepare(config_of(text_file), tmp_path / "cache").train
    part = train.part([1, 4])
    assert len(part.tokens) == train.sizes[1] + train.sizes[4]
    before = train.sizes[:4].sum()
    np.testing.assert_array_equal(
        part.tokens[train.sizes[1] :], train.tokens[before : before + train.sizes[4]]
    )
    assert (part.sentences[0], part.sentences[-1]) == (0, len(part.tokens))
    assert (part.documents[0], part.documents[-1]) == (0, len(part.sentences) - 1)
    starts = {tuple(part.tokens[part.sentences[s] : part.sentences[s + 1]]) for s in part.documents[:-1]}
    firsts = {tuple(train.tokens[train.sentences[s] : train.sentences[s + 1]]) for s in train.documents[:-1]}
    assert starts <= firsts


def test_shard_files_match_their_description(text_file, tmp_path, many_shards):
    prepared = prepare(config_of(text_file), tmp_path / "cache")
    folder = folder_in(tmp_path / "cache")
    names = {path.name for path in folder.iterdir()}
    assert {"manifest.json", "vocabulary.txt", "counts.npy", "shard-00000"} <= names
    assert not [name for name in names if name.startswith(("words", "ids", "."))]
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    assert manifest["made_by"]["fingerprint"] == folder.name == prepared.fingerprint
    assert manifest["made_by"]["text_format"] == "sentences"
    tokens = np.load(folder / "shard-00000" / "train.tokens.npy", mmap_mode="r")
    assert (tokens.dtype, len(tokens)) == (np.uint16, manifest["shards"][0]["train"]["tokens"])
    assert (folder / "vocabulary.txt").read_text("utf-8").split("\n") == prepared.vocab.tokens


def test_ids_above_16_bits_are_int32(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("\n\n".join(f"a{i} b{i}\nc{i} d{i}" for i in range(17_000)), "utf-8")
    prepared = prepare(config_of(path, min_freq=1, validation_fraction=0.0), tmp_path / "cache")
    assert len(prepared.vocab) == 5 + 4 * 17_000
    assert prepared.train.tokens.dtype == np.int32
    assert len(np.unique(prepared.train.tokens)) == 4 * 17_000


def test_any_number_of_processes_gives_same_shards(tmp_path, monkeypatch):
    path = tmp_path / "t.txt"
    path.write_text(small_text(24_000), "utf-8")
    assert path.stat().st_size > 2 << 20  # workers cannot use smaller pieces
    monkeypatch.setattr(preparation, "_SHARD_WORDS", 100_000)
    alone, spread = (prepare(config_of(path, preprocessing_workers=n), tmp_path / str(n)) for n in (0, 3))
    assert len(alone.train.sizes) > 2
    assert_same(spread, alone)
    crcs = [
        [shard["files"] for shard in json.loads((folder_in(cache) / "manifest.json").read_text())["shards"]]
        for cache in (tmp_path / "0", tmp_path / "3")
    ]
    assert crcs[0] == crcs[1]


# Statistics and warnings


def told_of(tmp_path, caplog, text, **changes):
    path = tmp_path / "t.txt"
    path.write_text(text, "utf-8")
    with caplog.at_level(logging.INFO):
        return prepare(config_of(path, min_freq=1, **changes), tmp_path / "cache").statistics


def different(count):
    """Documents of two sentences of two words, all different."""
    return [f"a{i} b\nc{i} d" for i in range(count)]


def test_statistics_equal_direct_counts(tmp_path, caplog):
    documents = [*different(18), "a1 b\nc1 d", "a1 b\nnew d", "alone with four words"]
    statistics = told_of(tmp_path, caplog, "\n\n".join(documents), validation_fraction=0.0)
    assert statistics["train"] == {"tokens": 80, "sentences": 40, "documents": 20}
    assert statistics["validation"] == {"tokens": 0, "sentences": 0, "documents": 0}
    assert statistics["repeated_documents"] == pytest.approx(1 / 20)
    assert statistics["repeated_sentences"] == pytest.approx(3 / 40)
    assert statistics["dropped_documents"] == 1
    assert statistics["dropped_words"] == pytest.approx(4 / 84)
    assert statistics["unknown"] == 0
    assert (
        "20 documents, 0 of them for validation; 40 sentences, 80 tokens, 0.0 % of them unknown"
        in caplog.text
    )
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("documents", "changes", "message"),
    [
        (different(10) * 2, {}, "50 % of the sentences and 50 % of the documents repeat earlier ones"),
        (
            [*different(5), *["x y z"] * 10],
            {},
            "60 % of the words are left out: they are in 10 documents of one",
        ),
        (["a b\na c"] + different(9), {"min_freq": 2}, "% of the tokens are unknown to the vocabulary"),
    ],
)
def test_statistics_give_warnings(tmp_path, caplog, documents, changes, message):
    path = tmp_path / "t.txt"
    path.write_text("\n\n".join(documents), "utf-8")
    config = config_of(path, **{"min_freq": 1, "validation_fraction": 0.0, **changes})
    prepare(config, tmp_path / "cache")
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert message in warnings[0]
    caplog.clear()
    prepare(config, tmp_path / "cache")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_repetitions_across_shards_are_found_or_estimated(tmp_path, monkeypatch):
    monkeypatch.setattr("gluon_bert.data.corpora.text_file.BLOCK_BYTES", 500)
    monkeypatch.setattr(preparation, "_SHARD_WORDS", 3000)
    path = tmp_path / "t.txt"
    path.write_text("\n\n".join(different(2000) * 2), "utf-8")
    config = config_of(path, min_freq=1, validation_fraction=0.0)
    exact = prepare(config, tmp_path / "exact").statistics
    assert exact["repeated_sentences"] == exact["repeated_documents"] == 0.5
    monkeypatch.setattr(preparation, "_COMPARED", 2000)
    about = prepare(config, tmp_path / "about").statistics
    assert about["repeated_sentences"] == pytest.approx(0.5, abs=0.05)
    assert about["repeated_sentences"] != 0.5


def test_progress_without_terminal_is_logged(text_file, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(preparation, "_LOG_EVERY", 0.0)
    monkeypatch.setattr("gluon_bert.data.corpora.text_file.BLOCK_BYTES", 500)
    with caplog.at_level(logging.INFO):
        prepare(config_of(text_file), tmp_path / "cache")
    assert caplog.text.count("MB of text") > 5


# Interruptions


class Stopped(Exception):
    pass


def stop_after(monkeypatch, function, calls):
    """Let a function of the preparation be called so often, and then stop the preparation."""
    original, left = getattr(preparation, function), [calls]

    def counted(*arguments, **named):
        if not left[0]:
            raise Stopped
        left[0] -= 1
        return original(*arguments, **named)

    monkeypatch.setattr(preparation, function, counted)


@pytest.mark.parametrize(
    ("function", "calls"),
    [("_write_words", 3), ("_index_chunk", 20), ("_number_all", 0), ("_finish_shard", 2), ("finish", 0)],
)
def test_interrupted_preparation_continues(text_file, tmp_path, monkeypatch, many_shards, function, calls):
    config = config_of(text_file)
    whole = prepare(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        if function == "finish":
            patch.setattr("gluon_bert.data.prepared.finish", None)
        else:
            stop_after(patch, function, calls)
        with pytest.raises((Stopped, TypeError)):
            prepare(config, tmp_path / "cache")
    folder = folder_in(tmp_path / "cache")
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("words-*.npz")}
    assert len(kept) >= 2
    (folder / ".words-00099.npz.x.part").write_text("what a killed process leaves")
    parsed = []
    original = preparation._index_chunk
    with monkeypatch.context() as patch:
        patch.setattr(
            preparation, "_index_chunk", lambda *a, **named: parsed.append(1) or original(*a, **named)
        )
        patch.setattr(preparation, "finish", lambda *_: None)
        assert_same(prepare(config, tmp_path / "cache"), whole)
    pieces = len(list(preparation.Corpus(config).chunks()))
    assert len(parsed) < pieces * (0.8 if calls else 0.01)
    assert not [path.name for path in folder.iterdir() if path.name.startswith((".", "words", "ids"))]


def test_foreign_or_damaged_word_shards_are_rebuilt(text_file, tmp_path, monkeypatch, many_shards, caplog):
    config, other = config_of(text_file), config_of(text_file, lowercase=False)
    whole = prepare(config, tmp_path / "whole")
    for cache, each in (("cache", config), ("other", other)):
        with monkeypatch.context() as patch:
            stop_after(patch, "_number_all", 0)
            with pytest.raises(Stopped):
                prepare(each, tmp_path / cache)
    folder, foreign = folder_in(tmp_path / "cache"), folder_in(tmp_path / "other")
    shutil.copy(foreign / "words-00002.npz", folder)
    (folder / "words-00004.npz").write_bytes((folder / "words-00004.npz").read_bytes()[:-10])
    shutil.copy(folder / "words-00001.npz", folder / "words-00777.npz")
    assert_same(prepare(config, tmp_path / "cache"), whole)
    assert "words-00002.npz: cannot be used (it is of another preparation); it is built again" in caplog.text


KILLED = """if __name__ == "__main__":
    import pathlib, sys
    from gluon_bert.config import DataConfig
    from gluon_bert.data import build_shards
    from gluon_bert.data.prepared import prepare
    build_shards._SHARD_WORDS = 10_000
    config = DataConfig(corpus=(sys.argv[1],), text_format="prose", preprocessing_workers=2)
    prepare(config, pathlib.Path(sys.argv[2]))
"""


def test_killed_preparation_continues_leaving_no_process(tmp_path, monkeypatch):
    path, script, cache = tmp_path / "t.txt", tmp_path / "killed.py", tmp_path / "cache"
    path.write_text(small_text(40_000), "utf-8")
    script.write_text(KILLED, "utf-8")
    process = subprocess.Popen([sys.executable, script, path, cache], cwd=ROOT)
    deadline = time.monotonic() + 120
    while not list(cache.glob("*/words-00000.npz")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    workers = children(process.pid)
    process.kill()
    process.wait()
    assert len(workers) >= 2
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not list(cache.glob("*/manifest.json"))
    parsed = []
    original = preparation._index_chunk
    monkeypatch.setattr(
        preparation, "_index_chunk", lambda *a, **named: parsed.append(1) or original(*a, **named)
    )
    config = DataConfig(corpus=(str(path),), text_format="prose")
    again = prepare(config, cache)
    num_again = len(parsed)
    assert_same(again, prepare(config, tmp_path / "whole"))
    assert num_again < len(parsed) - num_again


def prepare_in_process(path, cache):
    prepare(config_of(path), cache)


def test_two_processes_prepare_same_text_once(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text(small_text(5000), "utf-8")
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=prepare_in_process, args=(path, tmp_path / "cache")) for _ in range(3)]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert_same(prepare(config_of(path), tmp_path / "cache"), prepare(config_of(path), tmp_path / "alone"))


# Damage


FILES = [
    "manifest.json",
    "vocabulary.txt",
    "counts.npy",
    "shard-00001/train.tokens.npy",
    "shard-00000/validation.documents.npy",
]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "longer"])
def test_damaged_cache_is_rebuilt(text_file, tmp_path, caplog, many_shards, file, damage):
    first = prepare(config_of(text_file), tmp_path / "cache")
    assert_same(first, first)  # reads all of it
    path = folder_in(tmp_path / "cache") / file
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "cut": content[:-10], "longer": content + b"more"}[damage])
    with caplog.at_level(logging.WARNING):
        again = prepare(config_of(text_file), tmp_path / "cache")
    # Without the manifest the preparation is an unfinished one.
    assert ("it is built again" in caplog.text) == ((file, damage) != ("manifest.json", "missing"))
    assert_same(again, first)


def test_shards_of_another_config_are_refused(text_file, tmp_path, caplog, many_shards):
    config = config_of(text_file)
    first = prepare(config, tmp_path / "cache")
    prepare(config_of(text_file, validation_fraction=0.3), tmp_path / "other")
    ours, theirs = folder_in(tmp_path / "cache"), folder_in(tmp_path / "other")
    shutil.rmtree(ours / "shard-00001")
    shutil.copytree(theirs / "shard-00001", ours / "shard-00001")
    assert_same(prepare(config, tmp_path / "cache"), first)
    assert "shard-00001/train.tokens.npy has" in caplog.text
    caplog.clear()
    shutil.rmtree(ours)
    shutil.copytree(theirs, ours)
    assert_same(prepare(config, tmp_path / "cache"), first)
    assert f"manifest.json is that of {theirs.name}" in caplog.text


def test_shard_with_wrong_content_is_refused(text_file, tmp_path, many_shards):
    prepare(config_of(text_file), tmp_path / "cache")
    path = folder_in(tmp_path / "cache") / "shard-00002" / "train.tokens.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    train = prepare(config_of(text_file), tmp_path / "cache").train
    assert len(train.part([0, 1]))
    with pytest.raises(
        InputError, match=r"is damaged \(shard-00002/train\.tokens\.npy differs from .* Delete it, and"
    ):
        train.part([1, 2])
    path.unlink()
    with pytest.raises(InputError, match=r"shard-00002/train\.tokens\.npy"):
        train.part([1, 2])


# Memory


def peak_memory(code):
    """The most memory, in MB, that a Python program and its processes take together."""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    most = 0
    while process.poll() is None:
        most = max(most, sum(map(proportional_size, [process.pid, *children(process.pid)])))
        time.sleep(0.1)
    assert process.returncode == 0
    return most >> 10


def children(pid):
    """The processes that a process has started, and those that these have."""
    try:
        tasks = [(task / "children").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:  # it has ended meanwhile
        return []
    own = [int(child) for task in tasks for child in task.split()]
    return own + [grandchild for child in own for grandchild in children(child)]


def proportional_size(pid):
    """Memory of a process in kB, where shared pages are divided among those who share them."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended meanwhile
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


PREPARING = """
import pathlib, sys
from gluon_bert.config import DataConfig
from gluon_bert.data import build_shards
from gluon_bert.data.prepared import prepare
build_shards._SHARD_WORDS = 1 << 20  # so that a small text has many
config = DataConfig(corpus=({path!r},), text_format="wikitext", preprocessing_workers=2)
prepare(config, pathlib.Path({cache!r}))
"""


@pytest.mark.slow
def test_memory_is_constant_in_text_size(wikitext, tmp_path):
    # 43 and 260 MB of real paragraphs in another order each time. The whole way, up to the ids.
    lines = (wikitext / "wiki.train.tokens").read_text("utf-8").split("\n")
    rng = random.Random(0)
    peaks = []
    for times in (4, 24):
        path = tmp_path / f"{times}.tokens"
        with path.open("w", encoding="utf-8") as file:
            for _ in range(times):
                rng.shuffle(lines)
                file.write("\n".join(lines) + "\n")
        assert path.stat().st_size > times * 10_000_000
        peaks.append(peak_memory(PREPARING.format(path=str(path), cache=str(tmp_path / f"cache{times}"))))
    # As numbers alone the larger text would be 160 MB more, as Python's words 10 GB.
    assert peaks[1] < peaks[0] + 80
    assert peaks[1] < 450
