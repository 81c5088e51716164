"""The command export.py and its messages."""

import json

import export
import pytest
from conftest import skip_without, untrained_run

from gluon_bert.checkpoint import save_checkpoint
from gluon_bert.data.loader import load_pretraining_data
from gluon_bert.export.exporter import load_exported
from gluon_bert.inference.predictor import Predictor
from gluon_bert.presets import preset
from gluon_bert.run import load_run


@pytest.fixture
def run_folder(text_file, tmp_path):
    config = preset("bert-tiny").replace(
        corpus=(str(text_file),),
        max_seq_length=16,
        units=32,
        ffn_units=64,
        num_heads=2,
        validation_fraction=0.3,
        num_buckets=1,
    )
    return untrained_run(tmp_path / "run", config, load_pretraining_data(config.data, batch_size=8).vocab)


def message(capsys, *arguments):
    """What a refused command says."""
    assert export.main([str(argument) for argument in arguments]) == 2
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    return shown.err


def test_export_mxnet_prints_files_and_errors(run_folder, capsys):
    assert export.main([str(run_folder), "--format", "mxnet", "--outputs", "encoder"]) == 0
    shown = capsys.readouterr().out
    assert "bert-0000.params, bert-symbol.json, vocab.json, manifest.json" in shown
    assert (
        "read back by SymbolBlock and Module and compared at B x T of 1 x 5, 3 x 9, 7 x 16: largest" in shown
    )
    folder = run_folder / "export" / "mxnet"
    assert load_exported(folder).manifest.outputs == "encoder"
    assert f"--output must be a new folder, got {folder}" in message(capsys, run_folder)


@pytest.mark.parametrize("name", ["onnx", "int8", "bf16"])
def test_export_formats_print_a_table(run_folder, tmp_path, capsys, name):
    skip_without(name)
    folder = tmp_path / name
    assert export.main([str(run_folder), "--format", name, "--output", str(folder)]) == 0
    title, *rows = capsys.readouterr().out.splitlines()[1:]
    assert "error" in title and "speed" in title
    assert len(rows) == 3
    exported = load_exported(folder)
    groups = exported.manifest.comparison["groups"]
    assert all(group["speed ratio"] > 0 and group["errors"]["encoded"]["largest"] < 0.5 for group in groups)
    predictor = Predictor(exported.network, exported.reader)
    (answer,) = predictor.predict([exported.reader.text("the crane <mask>")])
    assert len(answer.fill_masks(exported.reader.vocab, 3)[0]) == 3


def test_export_text_file_is_compared_on(run_folder, tmp_path, capsys):
    skip_without("onnx")
    texts = tmp_path / "texts.txt"
    texts.write_text("the crane\n" + "the bird || sees it\n" + "the river " * 30 + "\n", "utf-8")
    arguments = [str(run_folder), "--format", "onnx", "--text-file", str(texts)]
    assert export.main(arguments) == 0
    content = json.loads((run_folder / "export" / "onnx" / "manifest.json").read_text("utf-8"))
    assert [group["tokens"] for group in content["comparison"]["groups"]] == [[4, 4], [7, 7], [16, 16]]


def test_export_above_max_error_leaves_nothing(run_folder, capsys):
    skip_without("onnx")
    shown = message(capsys, run_folder, "--format", "onnx", "--max-error", "1e-9")
    assert "must be at most 1.0e-09 (--max-error)" in shown
    assert not list((run_folder / "export").iterdir())


def test_export_wrong_flags_are_refused(run_folder, tmp_path, capsys):
    assert "must be the folder of a run" in message(capsys, tmp_path / "nothing")
    shown = message(capsys, run_folder, "--text-file", "x.txt", "--max-error", "0")
    assert "--text-file must be omitted with --format " in shown
    assert "--max-error must be omitted with --format " in shown
    assert "--max-error must be above 0, got 0.0" in shown
    missing = message(capsys, run_folder, "--format", "bf16", "--text-file", tmp_path / "x.txt")
    assert "--text-file" in missing and "must be a file that can be read, got " in missing
    (tmp_path / "file").write_text("mine")
    assert f"Writing to {tmp_path / 'file'} is not allowed" in message(
        capsys, run_folder, "--output", tmp_path / "file" / "x"
    )


def test_export_without_its_corpus_names_the_remedy(run_folder, text_file, capsys):
    text_file.unlink()
    shown = message(capsys, run_folder, "--format", "bf16")
    assert "the run's corpus cannot be read" in shown
    assert "--text-file FILE" in shown


def test_export_checkpoint_flag_chooses_the_step(run_folder, capsys):
    save_checkpoint(run_folder, load_run(run_folder).net, 5)
    for which, step in (("1", 1), ("latest", 5)):
        folder = run_folder / "export" / which
        assert export.main([str(run_folder), "--checkpoint", which, "--output", str(folder)]) == 0
        assert load_exported(folder).manifest.step == step
    assert ", got best." in message(capsys, run_folder, "--checkpoint", "best")
