"""The command encode.py."""

import io
import json
import shutil
import signal
import subprocess
import sys
import time

import encode
import numpy as np
import pytest
from conftest import ROOT, untrained_run

from gluon_bert import ops
from gluon_bert.checkpoint import save_checkpoint
from gluon_bert.data.vocab import Vocabulary
from gluon_bert.export.exporter import export_mxnet
from gluon_bert.inference.predictor import Predictor
from gluon_bert.presets import preset
from gluon_bert.run import create_run, load_run
from gluon_bert.runtime import mx

WORDS = ["a", "crane", "is", "flying", "driver", "came", "he", "just", "left"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = preset("d2l").replace(max_seq_length=16, units=16, ffn_units=32, max_positions=32)
    return untrained_run(folder, config, Vocabulary(WORDS))


@pytest.fixture(scope="module")
def predictor(run_folder):
    return Predictor.of(load_run(run_folder))


def answer(predictor, *texts):
    (found,) = predictor.predict([predictor.reader.text(*texts)])
    return found


def lines_of(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_vectors_of_d2l_sentences_as_json(run_folder, predictor, capsys):
    texts = ["A crane is flying", "a crane driver came || he just left"]
    assert encode.main([str(run_folder), "--json", *texts]) == 0
    single, pair = lines_of(capsys)
    assert single["text"] == "A crane is flying"
    assert (pair["text"], pair["pair"]) == ("a crane driver came", "he just left")
    assert single["tokens"] == ["<cls>", "a", "crane", "is", "flying", "<sep>"]
    np.testing.assert_allclose(single["cls"], answer(predictor, texts[0]).cls, atol=1e-5)
    np.testing.assert_allclose(single["mean"], answer(predictor, texts[0]).mean, atol=1e-5)
    expected = answer(predictor, "a crane driver came", "he just left")
    np.testing.assert_allclose(pair["pooled"], expected.pooled, atol=1e-5)


def test_bf16_vectors_are_near_those_of_fp32(run_folder, predictor, capsys):
    if ops.bf16_unsupported_reason():
        pytest.skip(ops.bf16_unsupported_reason())
    assert encode.main([str(run_folder), "a crane", "--json", "--precision", "bf16"]) == 0
    (content,) = lines_of(capsys)
    distance = np.abs(np.array(content["mean"]) - answer(predictor, "a crane").mean).max()
    assert 0 < distance < 0.05


def test_bf16_is_refused_where_it_cannot_be(run_folder, tmp_path, monkeypatch, capsys):
    export_mxnet(load_run(run_folder), tmp_path / "export")
    assert encode.main([str(tmp_path / "export"), "a crane", "--precision", "bf16"]) == 2
    assert "--precision must be fp32 for an export such as" in capsys.readouterr().err
    monkeypatch.setattr(ops, "bf16_unsupported_reason", lambda: "this processor cannot")
    assert encode.main([str(run_folder), "a crane", "--precision", "bf16"]) == 2
    assert "precision must be fp32 here, got bf16: this processor cannot" in capsys.readouterr().err


def test_token_vectors_are_printed(run_folder, predictor, capsys):
    assert encode.main([str(run_folder), "a crane", "--json", "--token-vectors"]) == 0
    (content,) = lines_of(capsys)
    np.testing.assert_allclose(content["token_vectors"], answer(predictor, "a crane").vectors, atol=1e-5)


def test_vectors_are_printed_for_people(run_folder, capsys):
    assert encode.main([str(run_folder), "a zebra"]) == 0
    shown = capsys.readouterr()
    assert "<cls> a zebra <sep>" in shown.out
    assert "(16 numbers)" in shown.out
    assert "not in the vocabulary, read as <unk> (1 of 4 tokens): zebra" in shown.err


def test_fill_mask_prints_the_likeliest_words(run_folder, predictor, capsys):
    text = "the <mask> is <mask>"
    assert encode.main([str(run_folder), "--fill-mask", text, "--top", "3", "--json"]) == 0
    (content,) = lines_of(capsys)
    expected = answer(predictor, text).fill_masks(predictor.reader.vocab, 3)
    for found, words in zip(content["predictions"], expected):
        assert [each["token"] for each in found] == [word for word, _ in words]
        assert [each["probability"] for each in found] == pytest.approx([p for _, p in words], abs=1e-5)
    assert encode.main([str(run_folder), "--fill-mask", text]) == 0
    assert "<mask> 2 of 2" in capsys.readouterr().out


@pytest.mark.parametrize("texts", [["a crane", "he left"], ["a crane || he left"]])
def test_next_prints_a_probability(run_folder, predictor, capsys, texts):
    assert encode.main([str(run_folder), "--json", "--next", *texts]) == 0
    (content,) = lines_of(capsys)
    assert content["next_sentence_probability"] == pytest.approx(
        answer(predictor, "a crane", "he left").next_sentence_probability, abs=1e-5
    )


@pytest.fixture
def sentences(tmp_path):
    """100 lines of all lengths: also pairs, unknown words, and two that are too long."""
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(WORDS + ["zebra"], size=rng.integers(1, 12))) for _ in range(100)]
    lines[7] = "a crane || he left"
    lines[20] = lines[40] = "a " * 30
    path = tmp_path / "sentences.txt"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def test_input_file_becomes_an_npz(run_folder, predictor, sentences, tmp_path, capsys):
    output = tmp_path / "vectors.npz"
    arguments = [str(run_folder), "--input", str(sentences), "--output", str(output), "--token-vectors"]
    assert encode.main(arguments) == 0
    message = capsys.readouterr().err
    assert "zebra" in message
    assert f"truncated to 16 tokens (2 of 100 texts): {sentences}, line 21; " in message
    with np.load(output) as arrays:
        assert arrays["cls"].shape == arrays["mean"].shape == arrays["pooled"].shape == (100, 16)
        assert np.flatnonzero(arrays["truncated"]).tolist() == [20, 40]
        for i, line in enumerate(sentences.read_text("utf-8").splitlines()):
            text = predictor.reader.text(*line.split(" || "), truncate=True)
            (expected,) = predictor.predict([text])
            np.testing.assert_allclose(arrays["mean"][i], expected.mean, atol=1e-5)
            start, stop = arrays["starts"][i : i + 2]
            np.testing.assert_allclose(arrays["vectors"][start:stop], expected.vectors, atol=1e-5)


def test_input_file_becomes_jsonl(run_folder, sentences, tmp_path, capsys):
    output = tmp_path / "answers.jsonl"
    assert encode.main([str(run_folder), "--input", str(sentences), "--output", str(output)]) == 0
    written = output.read_text("utf-8")
    capsys.readouterr()
    assert encode.main([str(run_folder), "--input", str(sentences), "--json"]) == 0
    assert capsys.readouterr().out == written
    assert len(written.splitlines()) == 100


def test_export_gives_the_answers_of_its_run(run_folder, tmp_path, capsys):
    export_mxnet(load_run(run_folder), tmp_path / "export")
    texts = ["a crane", "a <mask>", "a || he"]
    assert encode.main([str(run_folder), "--json", *texts]) == 0
    expected = lines_of(capsys)
    assert encode.main([str(tmp_path / "export"), "--json", *texts]) == 0
    for one, other in zip(lines_of(capsys), expected):
        assert one["tokens"] == other["tokens"]
        np.testing.assert_allclose(one["cls"], other["cls"], atol=1e-5)
        np.testing.assert_allclose(one["pooled"], other["pooled"], atol=1e-5)


def message(capsys, *arguments):
    """What a refused command says."""
    assert encode.main([str(argument) for argument in arguments]) == 2
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    return shown.err


def test_contradicting_flags_are_refused(run_folder, sentences, tmp_path, capsys):
    assert "text 2: must have a <mask>. Put one" in message(
        capsys, run_folder, "--fill-mask", "a <mask>", "a crane"
    )
    assert "must have a <mask> in its first 16 tokens" in message(
        capsys, run_folder, "--fill-mask", "a " * 20 + "<mask>"
    )
    assert "text 1: must be a pair" in message(capsys, run_folder, "--next", "a crane")
    assert "--similar must have at least two texts, got 1" in message(
        capsys, run_folder, "--similar", "3", "a crane"
    )
    assert "text 1: 32 tokens" in message(capsys, run_folder, "a " * 30, "--too-long", "error")
    assert "text 1: each text of the pair must have at least one word" in message(capsys, run_folder, "a ||")
    assert "texts must be given" in message(capsys, run_folder)
    assert "--input must be omitted with texts" in message(capsys, run_folder, "a", "--input", sentences)
    assert "--top must be at least 1, got 0" in message(capsys, run_folder, "a", "--top", "0")


def test_missing_gpu_is_refused_without_advising_a_flag_that_is_missing(run_folder, capsys):
    shown = message(capsys, run_folder, "a crane", "--gpus", "0")
    assert "--gpus 0 needs" in shown and "or omit --gpus" in shown and "cpus" not in shown


def test_output_problems_are_reported_at_once(run_folder, tmp_path, capsys):
    output = tmp_path / "nowhere" / "out.txt"
    shown = message(capsys, run_folder, "a", "--output", output, "--json")
    assert "must end in .npz, for vectors, or in .jsonl" in shown
    assert "--output must be in an existing folder" in shown
    assert "--json must be omitted with --output" in shown
    assert "must be a .jsonl file for results other than vectors" in message(
        capsys, run_folder, "--next", "a", "he", "--output", tmp_path / "x.npz"
    )


def test_bad_line_leaves_no_file(run_folder, sentences, tmp_path, capsys):
    sentences.write_text(sentences.read_text("utf-8") + "a ||\n", "utf-8")
    output = tmp_path / "vectors.npz"
    assert "sentences.txt, line 101: each text of the pair must have" in message(
        capsys, run_folder, "--input", sentences, "--output", output
    )
    assert [path.name for path in tmp_path.iterdir()] == ["sentences.txt"]


def test_output_that_is_the_input_is_refused(run_folder, sentences, tmp_path, capsys):
    same = tmp_path / "same.jsonl"
    sentences.rename(same)
    content = same.read_bytes()
    shown = message(capsys, run_folder, "--input", same, "--output", tmp_path / "x" / ".." / "same.jsonl")
    assert "must be in an existing folder" in shown or "is the file of --input" in shown
    assert "is the file of --input" in message(capsys, run_folder, "--input", same, "--output", same)
    assert same.read_bytes() == content
    (tmp_path / "folder.npz").mkdir()
    assert "which is a folder" in message(capsys, run_folder, "a", "--output", tmp_path / "folder.npz")
    assert "--top has no effect without --fill-mask" in message(capsys, run_folder, "a", "--top", "3")


def test_pipe_gets_no_progress_bar(run_folder, capsys):
    assert encode.main([str(run_folder), "a \x1b[31mcrane\x07"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\x07" not in shown
    assert "\\x1b[31mcrane" in shown


def test_nan_weights_are_reported(run_folder, tmp_path, capsys):
    folder = copy_of(run_folder, tmp_path / "run")
    net = load_run(folder).net
    net.encoder.embeddings.positions.weight.set_data(mx.nd.full((32, 16), np.nan))
    save_checkpoint(folder, net, 2)
    assert "encoder.embeddings.positions.weight contains NaN or infinite values" in message(
        capsys, folder, "a"
    )
    assert encode.main([str(folder), "a", "--checkpoint", "1"]) == 0


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_sigterm_leaves_no_file(run_folder, tmp_path, number, status):
    texts = tmp_path / "texts.txt"
    texts.write_text("a crane is flying\n" * 200_000, "utf-8")
    output = tmp_path / "vectors.npz"
    command = [sys.executable, str(ROOT / "tools" / "encode.py"), str(run_folder), "--input", str(texts)]
    process = subprocess.Popen([*command, "--output", str(output)], stderr=subprocess.PIPE)
    while not list(tmp_path.glob(".vectors.npz*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait() == status
    assert [path.name for path in tmp_path.iterdir()] == ["texts.txt"]


def test_folder_without_a_run_is_refused(run_folder, tmp_path, capsys):
    assert "must be the folder of a run" in message(capsys, tmp_path / "nothing", "a")
    assert "must be the folder of a run" in message(capsys, tmp_path, "a")


def test_run_without_a_checkpoint_is_refused(tmp_path, capsys):
    create_run(tmp_path / "run", preset("d2l"), Vocabulary(WORDS))
    assert "must have a checkpoint" in message(capsys, tmp_path / "run", "a")


def copy_of(run_folder, folder):
    for path in run_folder.rglob("*"):
        if path.is_file():
            copy = folder / path.relative_to(run_folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_damaged_weights_are_refused(run_folder, tmp_path, capsys, damage):
    folder = copy_of(run_folder, tmp_path / "run")
    (weights,) = folder.glob("checkpoints/*/weights.npz")
    content = weights.read_bytes()
    weights.write_bytes(
        {"truncated": content[: len(content) // 2], "empty": b"", "text": b"no weights"}[damage]
    )
    assert f"{weights}: is damaged: its content differs from manifest.json" in message(capsys, folder, "a")


def test_vocabulary_of_other_size_is_refused(run_folder, tmp_path, capsys):
    folder = copy_of(run_folder, tmp_path / "run")
    Vocabulary([*WORDS, "more"]).save(folder / "vocab.json")
    assert "the weights do not fit this run" in message(capsys, folder, "a")


def test_command_runs_in_a_process(run_folder):
    ops.describe()  # so that they are built, which is reported once
    command = [sys.executable, str(ROOT / "tools" / "encode.py"), str(run_folder), "a crane", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = io.StringIO(done.stdout)
    assert json.loads(line)["tokens"] == ["<cls>", "a", "crane", "<sep>"]
    assert done.stderr == ""


def test_checkpoint_flag_chooses_the_network(run_folder, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    net = load_run(folder).net
    for step in (2, 3):
        weight = net.encoder.embeddings.tokens.weight
        weight.set_data(weight.data() + 1)
        save_checkpoint(folder, net, step, best=step == 2)
    found = {}
    for which in ("1", "2", "3", "best", "latest", None):
        flags = [] if which is None else ["--checkpoint", which]
        assert encode.main([str(folder), "a crane", "--json", *flags]) == 0
        (content,) = lines_of(capsys)
        found[which] = content["mean"]
    assert found["best"] == found["2"]
    assert found[None] == found["latest"] == found["3"]
    assert found["1"] != found["2"] != found["3"]


def test_checkpoint_flag_unknown_is_refused(run_folder, tmp_path, capsys):
    assert encode.main([str(run_folder), "a crane", "--checkpoint", "7"]) == 2
    assert "encode: --checkpoint must be one of latest, " in capsys.readouterr().err
    export_mxnet(load_run(run_folder), tmp_path / "export")
    assert encode.main([str(tmp_path / "export"), "a crane", "--checkpoint", "best"]) == 2
    assert "must be omitted for an export such as " in capsys.readouterr().err


def test_encode_attention_draws_a_picture(run_folder, tmp_path, capsys):
    picture = tmp_path / "attention.png"
    assert encode.main([str(run_folder), "--attention", str(picture), "a crane came || he left"]) == 0
    assert capsys.readouterr().out == f"{picture}: 2 layers, 2 heads, 8 tokens\n"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_encode_nearest_prints_words_and_cosines(run_folder, capsys):
    assert encode.main([str(run_folder), "--nearest", "crane", "--top", "3"]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    found = load_run(run_folder).nearest("crane", 3)
    assert shown == [[f"{cosine:.4f}", word] for word, cosine in found]
    assert encode.main([str(run_folder), "--nearest", "crane", "--top", "3", "--json"]) == 0
    assert lines_of(capsys) == [{"word": "crane", "nearest": [list(each) for each in found]}]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--attention", "a.png"], "texts must be given"),
        (["--attention", "a.png", "a crane", "is flying"], "--attention must have one text or pair, got 2"),
        (["--attention", "a.txt", "a crane"], "--attention must end in .png, .pdf, .svg, got a.txt."),
        (["--nearest", "crane", "a text"], "texts must be omitted with --nearest"),
        (["--nearest", "stork"], "got 'stork'"),
        (["--nearest", "crane", "--input", "a.txt"], "--nearest cannot be used with --input"),
    ],
)
def test_encode_look_inside_refuses_bad_input(flags, problem, run_folder, capsys):
    assert encode.main([str(run_folder), *flags]) == 2
    assert problem in capsys.readouterr().err
