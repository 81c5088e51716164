"""Damaged or forged files for every reader: it reads them, or refuses them in a sentence."""

import copy
import io
import json
import os
import zipfile

import numpy as np
import pretrain
import pytest
from dev import fuzz
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.runs import SMALL_SIZES

from gluon_bert.checkpoint import Snapshot, read_checkpoint, write_checkpoint
from gluon_bert.errors import InputError
from gluon_bert.npz import read_arrays, write_arrays

QUIET = settings(deadline=None, suppress_health_check=list(HealthCheck))
OF_JSON = [
    name for name in fuzz.TARGETS if name not in ("wordpiece", "arrays", "log", "shard", "text", "gzip")
]

numbers = st.integers() | st.floats() | st.sampled_from([-1, 0, 2**31, 2**63, 10**30, 1e308])
leaves = st.none() | st.booleans() | numbers | st.text(max_size=6) | st.just("../../etc/passwd")
values = st.recursive(leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v))


@pytest.fixture(scope="module", params=fuzz.TARGETS)
def target(request, tmp_path_factory):
    return request.param, fuzz.TARGETS[request.param].valid(), tmp_path_factory.mktemp("target")


def test_valid_files_are_read(target):
    name, valid, folder = target
    if name == "export":  # its vocabulary is not there
        assert not fuzz.read(name, folder, valid)
    else:
        assert fuzz.read(name, folder, valid)


@QUIET
@given(data=st.data())
def test_damaged_files_are_refused_or_read(target, data):
    name, valid, folder = target
    content = bytearray(valid)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        most = data.draw(st.sampled_from([1, 8, 9999]))
        stop = data.draw(st.integers(start, min(len(content), start + most)))
        content[start:stop] = data.draw(st.binary(max_size=8))
    fuzz.read(name, folder, bytes(content))


@QUIET
@given(content=st.binary(max_size=300))
@example(content=b"")
@example(content=b"[" * 100_000)
@example(content=b'{"a":' * 100_000)
@example(content=b"9" * 100_000)
@example(content=b"\xff\xfe\x00")
@example(content=b'{"format": 2}')
def test_random_bytes_are_refused_or_read(target, content):
    name, _, folder = target
    fuzz.read(name, folder, content)


@pytest.mark.parametrize("name", OF_JSON)
@QUIET
@given(data=st.data())
def test_made_up_json_is_refused_or_read(tmp_path_factory, name, data):
    """A valid object in which something is another value, missing, or new."""
    folder = tmp_path_factory.getbasetemp() / f"objects-{name}"
    folder.mkdir(exist_ok=True)
    content = json.loads(fuzz.TARGETS[name].valid())
    for _ in range(data.draw(st.integers(1, 3))):
        change(content, data)
    fuzz.read(name, folder, json.dumps(content).encode())


def change(content, data):
    """Change something in a JSON value, in place, at any depth."""
    inner = [content]
    for each in inner:
        children = each.values() if isinstance(each, dict) else each
        inner += [child for child in children if isinstance(child, (dict, list)) and child]
    place = data.draw(st.sampled_from(inner))
    key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
    how = data.draw(st.sampled_from(["another", "gone", "twice"]))
    if how == "another":
        place[key] = data.draw(values)
    elif how == "gone":
        del place[key]
    elif isinstance(place, dict):
        place[data.draw(st.text(max_size=5))] = copy.deepcopy(place[key])
    else:
        place.append(copy.deepcopy(place[key]))


# Arrays


arrays = st.dictionaries(
    st.text("abc./", min_size=1, max_size=8),
    st.tuples(st.sampled_from([np.float32, np.int32, np.int64]), st.lists(st.integers(0, 4), max_size=3)).map(
        lambda t: np.arange(np.prod(t[1], dtype=int)).astype(t[0]).reshape(t[1])
    ),
    max_size=4,
)


@QUIET
@given(content=arrays)
def test_arrays_survive_a_round_trip(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "arrays.npz"
    with path.open("wb") as file:
        write_arrays(file, content)
    read = read_arrays(path)
    assert read.keys() == content.keys()
    for name, array in content.items():
        assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(read[name], array)
    with np.load(path, allow_pickle=False) as of_numpy:
        assert set(of_numpy.files) == set(content)


class Exploit:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_read_arrays_executes_no_pickle(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("pickled.npz", a=np.array([Exploit()], dtype=object))
    with pytest.raises(InputError, match="it does not begin with an array header"):
        read_arrays(tmp_path / "pickled.npz")
    assert not (tmp_path / "executed").exists()


def test_read_arrays_takes_no_more_memory_than_bytes(tmp_path):
    file = io.BytesIO()
    np.lib.format.write_array(file, np.zeros((1 << 20,), np.float32), (1, 0))
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", file.getvalue())
    with pytest.raises(InputError, match="declares more bytes than it has"):
        read_arrays(tmp_path / "bomb.npz")
    header = file.getvalue().replace(b"1048576", b"9" * 7)[:128]
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        archive.writestr("a.npy", header)
    with pytest.raises(InputError, match="cannot be read as arrays"):
        read_arrays(tmp_path / "huge.npz")


# Names and links that lead out of a folder


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", ".", ""])
def test_manifest_reads_nothing_outside_its_folder(tmp_path, name):
    (tmp_path / "secret").write_text("secret")
    path = write_checkpoint(made(tmp_path / "run"), Snapshot(1, {}, {}, {"step": 1}))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"].pop("state.json")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="must describe the files"):
        read_checkpoint(tmp_path / "run", 1)
    export = made(tmp_path / "run")
    content = json.loads(fuzz.TARGETS["export"].valid())
    content["files"] = {name: "0"}
    assert not fuzz.read("export", export, json.dumps(content).encode())


def made(folder):
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.parametrize("name", ["weights.npz", "optimizer.npz", "state.json", "manifest.json"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_pipes_and_links_are_not_read(tmp_path, name, kind):
    path = write_checkpoint(made(tmp_path / "run"), Snapshot(1, {}, {}, {"step": 1}))
    (path / name).rename(tmp_path / name)
    if kind == "link":
        (path / name).symlink_to(tmp_path / name)
    elif kind == "pipe":
        os.mkfifo(path / name)  # reading it would wait for ever
    else:
        (path / name).mkdir()
    with pytest.raises(InputError, match=f"{name}: must be a regular file"):
        read_checkpoint(tmp_path / "run", 1)


# Texts and flags


small = [*SMALL_SIZES, "--num-layers", "1", "--batch-size", "8", "--num-steps", "1"]
lines = st.text(max_size=30) | st.binary(max_size=30) | st.just("the crane lifts . it leaves . it rains .")


@settings(QUIET, max_examples=10)
@given(corpus=st.lists(lines, max_size=12), repeated=st.sampled_from([1, 1, 40]))
@example(corpus=["x" * 3_000_000], repeated=1)
@example(corpus=[], repeated=1)
def test_random_corpus_is_trained_on_or_refused(tmp_path_factory, capsys, corpus, repeated):
    folder = tmp_path_factory.mktemp("corpus")
    encoded = [line if isinstance(line, bytes) else line.encode("utf-8", "ignore") for line in corpus]
    (folder / "text.txt").write_bytes(b"\n\n".join(encoded * repeated))
    status = pretrain.main([*small, "--corpus", str(folder), "--output", str(folder / "run")])
    err = capsys.readouterr().err
    assert status in (0, 2), err
    assert (folder / "run").exists() == (status == 0)
    if status:
        assert "pretrain: " in err


words = ["0", "-1", "1", "3", "64", "0.5", "1e9", "nan", "inf", "", "yes", "auto", "wordpiece"]
flags = [
    "--units",
    "--num-heads",
    "--dropout",
    "--max-seq-length",
    "--pairs",
    "--mlm-probability",
    "--num-buckets",
]
flags += [
    "--batch-size",
    "--num-steps",
    "--lr",
    "--warmup-ratio",
    "--keep-checkpoints",
    "--patience",
    "--on-nonfinite",
    "--cpus",
]
flags += [
    "--tokenizer",
    "--vocab-file",
    "--seed",
    "--checkpoint-every",
    "--on-checkpoint-error",
    "--preset",
]


@settings(QUIET, max_examples=30)
@given(pairs=st.lists(st.tuples(st.sampled_from(flags), st.sampled_from(words)), min_size=1, max_size=4))
def test_random_flags_are_refused_or_start_a_run(tmp_path_factory, capsys, pairs):
    folder = tmp_path_factory.mktemp("flags")
    given_flags = [part for pair in pairs for part in pair]
    nowhere = ["--corpus", str(folder / "nowhere"), "--output", str(folder / "run")]
    assert pretrain.main([*given_flags, *nowhere]) == 2
    err = capsys.readouterr().err
    assert "pretrain: " in err and "Traceback" not in err
    assert not (folder / "run").exists()
