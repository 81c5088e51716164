"""The command `python tools/dev/soak.py`: a short run is watched, whatever the figures are."""

import csv

import pytest
from dev import soak


@pytest.mark.slow
def test_a_run_is_watched(text_file, tmp_path, capsys, monkeypatch):
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


def test_what_cannot_be_watched_is_told(tmp_path, capsys):
    assert soak.main([str(tmp_path)]) == 2
    assert soak.main([str(tmp_path / "new"), "--minutes", "0"]) == 2
    err = capsys.readouterr().err
    assert "is there already" in err and "--minutes 0.0: must be above 0" in err


def test_halves_leave_out_the_beginning():
    points = [(0, 9.0), (1, 1.0), (4, 1.0), (6, 3.0), (10, 3.0)]
    assert soak.halves(points) == "1.0 in the first half, 3.0 in the second"
    assert soak.halves(points[:1]) == "too short a time to tell"
