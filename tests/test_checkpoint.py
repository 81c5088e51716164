"""A run's folder: written, read back, refused."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.token_vectors import encode

from gluon_bert import checkpoint
from gluon_bert.checkpoint import find_checkpoint, save_checkpoint, steps
from gluon_bert.data.vocab import Vocabulary
from gluon_bert.errors import InputError
from gluon_bert.model.bert import BERTModel
from gluon_bert.presets import preset
from gluon_bert.run import create_run, load_run
from gluon_bert.runtime import mx

CONFIG = preset("bert-tiny").replace(units=16, ffn_units=32, num_heads=2, max_positions=16, max_seq_length=16)
VOCAB = Vocabulary(["a", "crane", "is", "flying"])


@pytest.fixture
def net():
    net = BERTModel(len(VOCAB), CONFIG.model)
    net.initialize(ctx=[mx.cpu()], seed=1)
    net.hybridize()
    return net


@pytest.fixture
def run_folder(tmp_path, net):
    folder = tmp_path / "run"
    create_run(folder, CONFIG, VOCAB, {"versions": {}})
    save_checkpoint(folder, net, step=9)
    save_checkpoint(folder, net, step=100)
    return folder


def test_load_run_gives_back_the_saved_network(run_folder, net):
    run = load_run(run_folder)
    assert (run.config, run.vocab.tokens, run.step) == (CONFIG, VOCAB.tokens, 100)
    ours, theirs = encode(net, VOCAB, ["a", "crane"]), encode(run.net, run.vocab, ["a", "crane"])
    np.testing.assert_array_equal(ours.asnumpy(), theirs.asnumpy())


def test_latest_checkpoint_has_the_highest_step(run_folder):
    (run_folder / "checkpoints" / "step-99999999x").mkdir()
    (run_folder / "checkpoints" / ".step-00000999.part").mkdir()
    assert steps(run_folder) == [9, 100]
    assert find_checkpoint(run_folder) == 100


def test_failed_write_keeps_the_previous_checkpoint(run_folder, net, monkeypatch):
    def half(file, arrays):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "write_arrays", half)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(run_folder, net, step=100)
    assert sorted(p.name for p in (run_folder / "checkpoints").iterdir()) == [
        "step-00000009",
        "step-00000100",
    ]
    assert load_run(run_folder).step == 100


def test_create_run_in_a_run_is_refused(run_folder):
    with pytest.raises(InputError, match=r"must be a new folder, got .*, which has a run"):
        create_run(run_folder, CONFIG, VOCAB, {})


def test_create_run_without_permission_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"output must be a folder that can be written, got .*file/run"):
        create_run(tmp_path / "file" / "run", CONFIG, VOCAB, {})


def test_load_run_without_config_is_refused(tmp_path, run_folder):
    with pytest.raises(InputError, match=r"nowhere must be the folder of a run: it has no config\.json"):
        load_run(tmp_path / "nowhere")
    config = json.loads((run_folder / "config.json").read_text())
    for change, message in (
        ({"format": 99}, "format must be 2, got 99"),
        ({"model": {"unitz": 1}}, r"config\.json: unknown key model\.unitz"),
    ):
        (run_folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(InputError, match=message):
            load_run(run_folder)


@pytest.mark.parametrize("content", [b"", b"no parameters", None], ids=["empty", "foreign", "truncated"])
def test_load_run_damaged_weights_are_refused(run_folder, content):
    path = run_folder / "checkpoints" / "step-00000100" / "weights.npz"
    path.write_bytes(path.read_bytes()[:2000] if content is None else content)
    with pytest.raises(InputError, match=r"step-00000100/weights\.npz: is damaged"):
        load_run(run_folder)


def test_load_run_weights_of_other_shape_are_refused(run_folder):
    Vocabulary(["a"]).save(run_folder / "vocab.json")
    with pytest.raises(InputError, match="the weights do not fit this run"):
        load_run(run_folder)


def test_load_run_without_checkpoint_is_refused(tmp_path):
    create_run(tmp_path / "run", CONFIG, VOCAB, {})
    with pytest.raises(InputError, match="run must have a checkpoint"):
        load_run(tmp_path / "run")


# The latest and the best


def save(folder, net, step, **options):
    """Save weights that tell their step."""
    net.nsp.dense.bias.set_data(mx.nd.array([step, 0]))
    save_checkpoint(folder, net, step, **options)


def loaded(folder, which):
    """The step of a checkpoint, which its weights confirm."""
    run = load_run(folder, checkpoint=which)
    assert run.net.nsp.dense.bias.data().asnumpy().tolist() == [run.step, 0]
    return run.step


@pytest.fixture
def empty_run(tmp_path):
    create_run(tmp_path / "run", CONFIG, VOCAB, {})
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("keep", "left"),
    [(1, [[1], [2], [2, 3], [2, 4], [5], [5, 6]]), (2, [[1], [1, 2], [2, 3], [2, 3, 4], [4, 5], [5, 6]])],
)
def test_keep_leaves_the_latest_and_the_best(empty_run, net, keep, left):
    for step, expected in enumerate(left, 1):
        save(empty_run, net, step, best=step in (1, 2, 5), keep=keep)
        assert steps(empty_run) == expected
        best = max(each for each in (1, 2, 5) if each <= step)
        assert (loaded(empty_run, "latest"), loaded(empty_run, "best")) == (step, best)


def test_keep_0_leaves_all_and_finds_each_by_step(empty_run, net):
    for step in (1, 2, 30):
        save(empty_run, net, step, best=step == 2)
    assert [loaded(empty_run, str(step)) for step in (1, 2, 30)] == [1, 2, 30]
    assert loaded(empty_run, 2) == loaded(empty_run, "best") == 2


class Killed(BaseException):
    pass


def test_kill_at_any_write_leaves_latest_and_best(tmp_path, net, monkeypatch):
    """Every change of a file on the way from one best checkpoint to the next is the last one, in turn."""
    moments, room, after_the_last = [], [None], [False]

    def killable(change):
        def made(*args, **options):
            if room[0] is not None and room[0] <= 0:
                raise Killed  # also what would tidy up does not happen any more
            if room[0] is not None:
                room[0] -= 1
            moments.append(change.__name__)
            return change(*args, **options)

        return made

    changes = ((Path, "replace"), (Path, "unlink"), (checkpoint, "write_arrays"), (os, "rmdir"))
    for owner, name in (*changes, (os, "unlink"), (os, "fsync")):
        monkeypatch.setattr(owner, name, killable(getattr(owner, name)))
    for allowed in range(100):
        folder = tmp_path / str(allowed)
        room[0] = None
        create_run(folder, CONFIG, VOCAB, {})
        save(folder, net, 1, best=True, keep=1)
        save(folder, net, 2, keep=1)
        room[0], moments[:] = allowed, []
        try:
            save(folder, net, 3, best=True, keep=1)
            after_the_last[0] = True
        except Killed:
            pass
        latest, best = loaded(folder, "latest"), loaded(folder, "best")
        assert (latest, best) in ((2, 1), (3, 1), (3, 3))
        if after_the_last[0]:
            break
        # What was left behind does no harm to the next one.
        room[0] = None
        save(folder, net, 4, best=True, keep=1)
        assert (steps(folder), loaded(folder, "best")) == ([4], 4)
    # What gives way loses its name after the new checkpoint is on the disk under its own.
    names = [moment for moment in moments if moment != "fsync"]
    assert names[:4] == ["write_arrays", "write_arrays", "replace", "replace"]  # state and manifest, aside
    assert names[4:6] == ["replace", "replace"]  # the checkpoint, the note of the best
    assert names[6] == "replace" and moments[: moments.index("rmdir")].count("fsync") > 8


def test_find_checkpoint_unknown_name_lists_the_known(run_folder, net):
    with pytest.raises(InputError, match=r"checkpoint must be one of latest, 9, 100 in .*run, got best\.$"):
        load_run(run_folder, checkpoint="best")
    save(run_folder, net, 200, best=True)
    for name in ("best!", "10", "-9", "9.0", ""):
        with pytest.raises(
            InputError, match=rf"checkpoint must be one of latest, 9, 100, 200, best in .*, got {name}\.$"
        ):
            load_run(run_folder, checkpoint=name)


def test_find_checkpoint_removed_best_is_refused(run_folder, net):
    save(run_folder, net, 200, best=True)
    shutil.rmtree(run_folder / "checkpoints" / "step-00000200")
    with pytest.raises(InputError, match=r"checkpoint must be one of latest, 9, 100 in .*, got best\.$"):
        load_run(run_folder, checkpoint="best")
    assert load_run(run_folder).step == 100


@pytest.mark.parametrize("content", ["", "{}", "[]", "3", '{"step": null}', '{"step": "x"}'])
def test_best_step_damaged_file_is_refused(run_folder, content):
    (run_folder / "checkpoints" / "best.json").write_text(content)
    with pytest.raises(InputError, match=r"best\.json: cannot be read as the step of the best checkpoint"):
        load_run(run_folder, checkpoint="best")
    assert load_run(run_folder).step == 100
