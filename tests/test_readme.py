"""The commands and programs of README and docs work."""

import json
import re
import shlex
import signal
import subprocess
import sys

import benchmark
import convert
import encode
import export
import finetune
import launch
import numpy as np
import pretrain
import pytest
import requests
import serve
from conftest import ROOT, small_text
from dev import (
    blimp,
    compare_recipes,
    downstream,
    finetune_transformers,
    fuzz,
    pretraining_vs_scratch,
    soak,
)

from gluon_bert.config import changeable
from gluon_bert.presets import PRESETS
from gluon_bert.serving.server import free_ports

README = (ROOT / "README.md").read_text("utf-8")
PAGES = {
    path: path.read_text("utf-8") for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
TEXT = "\n".join(PAGES.values())
COMMANDS = re.findall(r"^ {4}(?:.* && )?python tools/(?:dev/)?(\w+)\.py(.*)$", TEXT, re.M)
TOOLS = {
    "pretrain": pretrain,
    "convert": convert,
    "encode": encode,
    "export": export,
    "finetune": finetune,
    "launch": launch,
    "serve": serve,
    "benchmark": benchmark,
    "pretraining_vs_scratch": pretraining_vs_scratch,
    "compare_recipes": compare_recipes,
    "downstream": downstream,
    "finetune_transformers": finetune_transformers,
    "soak": soak,
    "blimp": blimp,
    "fuzz": fuzz,
}
PROGRAMS = {path.name: re.findall(r"```python\n(.*?)```", text, re.S) for path, text in PAGES.items()}
(EXPORTED,) = PROGRAMS["export-and-serving.md"]
PRETRAINED, LOADED, TRAINED, SAVED = PROGRAMS["python-api.md"]
(SCORED,) = PROGRAMS["scoring.md"]


def test_python_programs_run(text_file, tmp_path, monkeypatch, capsys):
    # The text has fewer words than the vectors from co-occurrences need.
    small = f'corpus="{text_file}", num_steps=2, batch_size=16, log_every=1, init_embeddings="random"'
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(PRETRAINED.replace('corpus="wikitext-2", max_minutes=30', small), names)
    assert (tmp_path / "my_run" / "losses.png").exists()
    exec(LOADED.replace('nearest("flying"', 'nearest("city"'), names)  # a word of the small text
    assert names["run"].step == 2 and names["vectors"].shape == (2, 128)
    capsys.readouterr()
    exec(TRAINED.replace('corpus="wikitext-2"', small), names)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["1", "2"]
    exec(SAVED, names)
    assert names["snapshot"] is None and names["run"].step == 2
    exec(SAVED.partition("\n")[2], names)  # again, without create_run
    assert names["trainer"].state.step == 2 == names["run"].step


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the run that the README's first command leaves, of fewer and smaller steps."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "text.txt").write_text(small_text(), "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert (
            pretrain.main(
                ["--preset", "d2l", "--corpus", "text.txt", "--num-steps", "2", "--batch-size", "16"]
            )
            == 0
        )
        (folder / "runs" / "base").symlink_to(folder / "runs" / "d2l-1")
        yield folder


def commands(tool, flag="", of="runs/d2l-1"):
    """The README's commands of a tool that have a flag and use what is of a run."""
    used = [arguments for name, arguments in COMMANDS if name == tool and flag in arguments]
    return [shlex.split(arguments) for arguments in used if re.search(rf"{of}[ /]", arguments)]


def test_commands_use_the_pretrained_run(runs, capfd):
    (runs / "sentences.txt").write_text("a crane\nthe bird || sees it\n", "utf-8")
    for arguments in commands("encode"):
        assert encode.main(arguments) == 0
    assert np.load(runs / "vectors.npz")["mean"].shape == (2, 128)
    exec(SCORED, {})
    (symbol,) = commands("export", "--format mxnet")
    assert export.main(symbol) == 0
    capfd.readouterr()
    command = [sys.executable, "-W", "ignore", "-c", EXPORTED]
    assert subprocess.run(command, cwd=runs, capture_output=True, text=True).stdout == "(1, 4, 128)\n"


def test_commands_finetune_and_export_the_run(runs, capsys):
    rows = [f"the {noun} {verb}\t{verb}" for noun in ("crane", "bird", "city") for verb in ("sees", "lifts")]
    for name in ("train.tsv", "dev.tsv"):
        (runs / name).write_text("\n".join(["text\tlabel", *rows]) + "\n", "utf-8")
    (tuning,) = commands("finetune", "train.tsv", of="runs/base")
    assert finetune.main(tuning) == 0
    (asking,) = commands("encode", of="runs/base-finetuned-1")
    capsys.readouterr()
    assert encode.main(asking) == 0
    assert set(capsys.readouterr().out.split()) >= {"sees", "lifts"}
    pytest.importorskip("model_archiver", reason="needs the extra serve")
    (packing,) = commands("export", of="runs/base-finetuned-1")
    assert export.main(packing) == 0
    (serving,) = commands("serve", of="runs/base-finetuned-1")
    assert (runs / serving[0]).is_file()


def test_commands_tag_words(runs, capsys):
    lines = ["the\tO", "crane\tB-bird", "lifts\tO", "", "it\tO", "", "the\tB-bird", "bird\tI-bird", ""]
    for name in ("train.conll", "dev.conll"):
        (runs / name).write_text("\n".join(lines), "utf-8")
    (tuning,) = commands("finetune", "train.conll", of="runs/base")
    assert finetune.main(tuning) == 0
    (asking,) = commands("encode", of="runs/tagger")
    assert encode.main(asking) == 0


def test_commands_answer_questions(runs, capsys):
    context = "the crane lifts the bird ."
    answers = [{"text": "bird", "answer_start": 20}]
    paragraph = {"context": context, "qas": [{"id": "1", "question": "lifts", "answers": answers}]}
    for name in ("train.json", "dev.json"):
        (runs / name).write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}))
    (tuning,) = commands("finetune", "train.json", of="runs/base")
    assert finetune.main(tuning) == 0
    (asking,) = commands("encode", of="runs/reader")
    assert encode.main(asking) == 0


@pytest.mark.java
def test_commands_serve_the_run(runs, capfd):
    """The README's lines from the export to the three requests, and the vectors of encode."""
    (archive,) = commands("export", "--format mar")
    assert export.main(archive) == 0
    (arguments,) = commands("serve", "bert.mar")
    asked = re.findall(r"^ {4}curl -H '(.*): (.*)' -d '(.*)' (\S+)$", TEXT, re.M)
    assert len(asked) == 3
    ports = free_ports()
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "serve.py"), *arguments]
        + ["--port", str(ports[0]), "--management-port", str(ports[1])],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert "serving at" in server.stdout.readline()
        vectors, masks, following = (
            requests.post(address.replace("8080", str(ports[0])), body, headers={name: value}).json()
            for name, value, body, address in asked
        )
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait() == 130
    assert len(masks["predictions"][0]) == 3
    assert 0 < following["next_sentence_probability"] < 1
    capfd.readouterr()
    assert encode.main(["runs/d2l-1", vectors["text"], "--json"]) == 0
    expected = json.loads(capfd.readouterr().out)
    for name in ("cls", "mean", "pooled"):
        np.testing.assert_allclose(vectors[name], expected[name], atol=1e-5)


def check_pretrain_flags(flags):
    parsed = pretrain.parser().parse_args(flags)
    pretrain.config_from(parsed, pretrain.preset(parsed.preset or "d2l"))


@pytest.mark.parametrize("tool, arguments", COMMANDS)
def test_commands_have_flags_that_exist(tool, arguments, capsys):
    arguments = shlex.split(arguments)
    if {"--help", "--help-all"} & set(arguments):
        assert TOOLS[tool].main(arguments) == 0
    elif tool == "launch":
        behind = arguments.index("--")
        launch.parser().parse_args(arguments[:behind])
        python, script, *flags = arguments[behind + 1 :]
        assert python == "python" and (ROOT / script).is_file()
        check_pretrain_flags(flags)
    elif tool == "soak":
        soak.parser().parse_args(arguments[: arguments.index("--")])
    elif tool == "pretrain":
        check_pretrain_flags(arguments)
    else:
        TOOLS[tool].parser().parse_args(arguments)


def test_commands_were_found():
    found = [tool for tool, _ in COMMANDS]
    assert set(found) == set(TOOLS)
    assert len(found) >= 18


def test_named_presets_files_and_pictures_exist():
    for name in PRESETS:
        assert f"| `{name}` |" in README
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)]+)\)", text):
            path, _, section = target.partition("#")
            assert target.startswith("https://") or (page.parent / path).exists(), f"{page.name}: {target}"
            if section and not target.startswith("https://"):
                titles = re.findall(r"^#+ (.+)$", (page.parent / path).read_text("utf-8"), re.M)
                assert section in [title.lower().replace(" ", "-") for title in titles], target


def test_fields_that_a_resumed_run_may_change_are_listed():
    page = (ROOT / "docs" / "pretraining.md").read_text("utf-8")
    section = page.partition("\n## Resume\n")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"`([a-z_]+)`", section)) == sorted(changeable())


def test_named_test_files_exist():
    names = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert set(re.findall(r"\b(test_\w+\.py)\b", TEXT)) <= names


@pytest.mark.parametrize("name", PRESETS)
def test_table_of_presets_is_true(name):
    config = PRESETS[name]
    row = next(line for line in README.splitlines() if line.startswith(f"| `{name}` |"))
    figures = [cell.strip() for cell in row.split("|")[2:8]]
    assert figures == [
        str(config.model.num_layers),
        str(config.model.units),
        str(config.model.num_heads),
        str(config.data.max_seq_length),
        str(config.train.batch_size),
        f"{config.train.lr:.4f}".rstrip("0"),
    ]
