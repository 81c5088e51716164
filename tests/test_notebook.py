"""The notebook for readers of Dive into Deep Learning runs from its first cell to its last."""

import base64
import json

import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "docs" / "pretraining-bert.ipynb"
FEWER = {
    "num_steps=1300, eval_every=100, log_every=10": "num_steps=4, eval_every=2, log_every=1, batch_size=8",
    "epochs=5": "epochs=1",
}


def executed(notebook, folder, monkeypatch):
    """Return the outputs of all code cells of a notebook, run in a kernel of its own."""
    client = pytest.importorskip("nbclient", reason="needs the extra notebook")
    pytest.importorskip("ipykernel", reason="needs the extra notebook")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    client.NotebookClient(
        notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def read():
    nbformat = pytest.importorskip("nbformat", reason="needs the extra notebook")
    return nbformat.read(NOTEBOOK, as_version=4)


def assert_outputs_are_complete(outputs):
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 3  # pretraining and fine-tuning draw their losses, and the attention
    for picture in pictures:
        assert base64.b64decode(picture).startswith(b"\x89PNG")
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "MLM loss" in text and "sentence pairs/sec on" in text
    assert "step 1/" not in text  # the picture takes the place of the lines
    assert "'crane', 'is', 'flying'" in text and "on the validation file" in text


def test_notebook_runs_with_few_steps(tmp_path, monkeypatch):
    notebook = read()
    for before, after in FEWER.items():
        cells = [cell for cell in notebook.cells if before in cell.source]
        assert len(cells) == 1, before
        cells[0].source = cells[0].source.replace(before, after)
    assert_outputs_are_complete(executed(notebook, tmp_path, monkeypatch))


@pytest.mark.slow
def test_notebook_runs_as_it_is(tmp_path, monkeypatch):
    assert_outputs_are_complete(executed(read(), tmp_path, monkeypatch))


def test_notebook_has_small_outputs_and_no_local_paths():
    text = NOTEBOOK.read_text("utf-8")
    cells = json.loads(text)["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert all(output["output_type"] != "error" for output in outputs)
    assert len(text) < 400_000
    assert "/work/" not in text and "/root" not in text and "/home/" not in text
