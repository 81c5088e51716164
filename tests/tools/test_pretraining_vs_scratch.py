"""tools/dev/pretraining_vs_scratch.py: its task, samples and command."""

import json
import subprocess
import sys

import pretrain
import pytest
from conftest import ROOT
from dev import pretraining_vs_scratch
from dev.pretraining_vs_scratch import KINDS, sample, section_rows
from support.runs import SMALL_SIZES

from gluon_bert.errors import InputError

LONG = " ".join(["word"] * 20)


def article(*sections):
    """An article of these headings and their paragraphs."""
    parts = [f" = = {heading} = = \n\n {text} \n" for heading, text in sections]
    return "".join([f" = An article = \n\n{LONG} before any section .\n", *parts])


@pytest.fixture
def corpus(tmp_path):
    """A small WikiText in which the first words of a section tell its kind."""
    words = {"Plot": "she loves him", "Reception": "critics liked it", "History": "it was founded"}
    for name, number in (("train", 20), ("valid", 8)):
        sections = [
            (heading, f"{start} . {LONG} {i} .") for i in range(number) for heading, start in words.items()
        ]
        (tmp_path / f"wiki.{name}.tokens").write_text("\n" + article(*sections), "utf-8")
    return tmp_path


def test_section_rows_label_paragraphs_by_heading(tmp_path):
    path = tmp_path / "wiki.tokens"
    text = article(
        ("Early life", f"one {LONG}"), ("Life and career", f"two {LONG}"), ("Themes", f"three {LONG}")
    )
    text += f" = = Plot = = \n four {LONG}\n = = = Themes = = = \n five {LONG}\nshort\n"
    text += f" = Another = \n six {LONG}\n"
    path.write_text(text, "utf-8")
    assert [(row.texts[0].split()[0], row.label) for row in section_rows(path)] == [
        ("one", "life"),
        ("four", "plot"),
        ("five", "plot"),
    ]
    lines = text.split("\n")
    assert all(row.texts[0] == lines[int(row.where.split()[-1]) - 1].strip() for row in section_rows(path))


def test_section_rows_refuse_text_without_sections(tmp_path):
    (tmp_path / "x").write_text("nothing")
    for name in ("x", "gone"):
        with pytest.raises(InputError):
            section_rows(tmp_path / name)


def test_sample_contains_smaller_samples(corpus):
    rows = section_rows(corpus / "wiki.train.tokens")
    small, large, other = sample(rows, 10, 1), sample(rows, 40, 1), sample(rows, 10, 2)
    assert small == large[:10]
    assert small != other
    assert len(set(large)) == 40
    with pytest.raises(
        InputError, match="--sizes must be at most 60, the number of labelled paragraphs, got 61"
    ):
        sample(rows, 61, 1)


def test_wikitext_has_all_kinds_in_both_files(wikitext):
    for name in ("train", "valid"):
        rows = section_rows(wikitext / f"wiki.{name}.tokens")
        assert {row.label for row in rows} == set(KINDS)
        assert len(rows) > 500


@pytest.mark.slow
def test_study_prints_and_writes_its_results(corpus, tmp_path, capsys):
    small = [*SMALL_SIZES, "--batch-size", "16", "--num-steps", "2"]
    flags = ["--corpus", str(corpus / "wiki.train.tokens"), "--min-freq", "1"]
    assert pretrain.main([*small, *flags, "--output", str(tmp_path / "run")]) == 0
    command = [str(tmp_path / "run"), "--corpus", str(corpus), "--sizes", "16", "48", "--seeds", "2"]
    assert pretraining_vs_scratch.main([*command, "--lr", "0.003"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "most frequent class: 33.3%"
    content = json.loads((tmp_path / "run" / "study" / "pretraining-vs-scratch.json").read_text())
    assert (content["test_paragraphs"], len(content["results"])) == (24, 8)
    for pretrained in (True, False):
        found = pretraining_vs_scratch.metric(content["results"], "accuracy", 48, pretrained)
        assert len(found) == 2
        assert max(found) > 0.5  # the first words decide the class
    assert (tmp_path / "run" / "study" / "pretraining-vs-scratch.png").read_bytes()[1:4] == b"PNG"


def test_study_refuses_bad_flags(capsys):
    assert pretraining_vs_scratch.main(["nowhere", "--sizes", "3", "--seeds", "0", "--lr", "0"]) == 2
    printed = capsys.readouterr().err
    for sentence in (
        "--sizes must be at least 16, got 3",
        "--seeds must be at least 1",
        "--lr must be above 0",
    ):
        assert sentence in printed


def test_command_runs_as_a_script(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "tools" / "dev" / "pretraining_vs_scratch.py"),
        str(tmp_path / "none"),
    ]
    done = subprocess.run([*command, "--corpus", str(tmp_path)], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
