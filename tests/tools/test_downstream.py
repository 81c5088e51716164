"""tools/dev/downstream.py: its table, its continuation and its refusals."""

import json

import pretrain
import pytest
from conftest import small_text
from dev import downstream


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a pretrained run and the data of two tasks."""
    folder = tmp_path_factory.mktemp("downstream")
    (folder / "text.txt").write_text(small_text(), "utf-8")
    flags = "--preset d2l --units 16 --ffn-units 16 --num-layers 1 --max-seq-length 16 --batch-size 32 "
    flags += "--num-steps 2"
    where = ["--corpus", str(folder / "text.txt"), "--output", str(folder / "run")]
    assert pretrain.main([*flags.split(), *where]) == 0
    rows = [f"the {noun} {verb}\t{verb}" for noun in ("crane", "bird", "city") for verb in ("sees", "lifts")]
    pairs = [f'the "{noun}\tthe {noun} lifts\t{i}.5' for i, noun in enumerate(("crane", "bird", "city"))]
    for task, header, lines in (
        ("subj", "text\tlabel", rows),
        ("stsb", "sentence1\tsentence2\tscore", pairs),
    ):
        (folder / task).mkdir()
        for name in ("train.tsv", "dev.tsv"):
            (folder / task / name).write_text("\n".join([header, *lines]) + "\n", "utf-8")
    (folder / "blimp").mkdir()
    pairs = ["agreement\tthe crane sees\tthe crane see", "agreement\tthe bird lifts\tthe bird lift"]
    (folder / "blimp" / "verbs.tsv").write_text("\n".join(["phenomenon\tgood\tbad", *pairs]) + "\n", "utf-8")
    return folder


def test_downstream_prints_a_row_for_each_network(folder, tmp_path, capsys, monkeypatch):
    flags = [str(folder / "run"), "--data", str(folder), "--tasks", "subj,stsb,blimp", "--seeds", "2"]
    flags += ["--epochs", "1", "--examples", "4", "--output", str(tmp_path)]
    assert downstream.main(flags) == 0
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert lines[0] == "| network | SUBJ, accuracy | STS-B, Pearson's correlation | BLiMP, accuracy |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| from scratch", f"| {folder / 'run'}"]
    results = json.loads((tmp_path / "downstream.json").read_text())["results"]
    assert len(results) == 10
    assert (tmp_path / "downstream.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(downstream, "evaluated", None)  # all results are there
    assert downstream.main(flags) == 0
    assert capsys.readouterr().out.splitlines() == lines
    assert downstream.main([*flags, "--epochs", "2"]) == 2
    assert "--output must be a new folder" in capsys.readouterr().err


def test_downstream_refuses_bad_flags_at_once(folder, tmp_path, capsys):
    flags = ["--tasks", "cola,mnli,blimp", "--seeds", "0", "--lr", "nan"]
    assert downstream.main([str(folder / "run"), "--data", str(tmp_path), *flags]) == 2
    err = capsys.readouterr().err
    assert "--tasks must be some of sst2, cola, stsb, subj, blimp, got cola,mnli,blimp" in err
    assert "--data must have the folder blimp" in err
    assert "--data must have cola/train.tsv" in err
    assert "--seeds must be at least 1, got 0" in err and "--lr must be above 0, got nan" in err
