"""tools/dev/soak.py records a short run."""

import csv

import pytest
from dev import soak


@pytest.mark.slow
def test_soak_records_a_run(text_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(soak, "EVERY", 0.2)
    flags = ["--units", "16", "--ffn-units", "32", "--max-seq-length", "16", "--batch-size", "16"]
    folder = tmp_path / "soak"
    assert soak.main([str(folder), "--minutes", "0.05", "--", *flags, "--corpus", str(text_file)]) == 0
    with (folder / "samples.csv").open() as file:
        samples = list(csv.DictReader(file))
    assert float(samples[-1]["memory"]) > 50 and int(samples[-1]["files"]) > 2
    assert (folder / "soak.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    for name in ("memory", "open files", "threads", "throughput"):
        assert f"{name}: " in out


def test_soak_refuses_bad_arguments(tmp_path, capsys):
    assert soak.main([str(tmp_path)]) == 2
    assert soak.main([str(tmp_path / "new"), "--minutes", "0"]) == 2
    err = capsys.readouterr().err
    assert "FOLDER must be a new folder" in err and "--minutes must be above 0, got 0.0" in err


def test_halves_leave_out_the_warm_up():
    points = [(0, 9.0), (1, 1.0), (4, 1.0), (6, 3.0), (10, 3.0)]
    assert soak.halves(points) == "1.0 in the first half, 3.0 in the second"
    assert soak.halves(points[:1]) == "too few samples"
