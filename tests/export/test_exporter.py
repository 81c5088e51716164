"""The exported symbol: free of batch and length, named, equal to the run, and read back by MXNet alone."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from support import reference_bert as reference

from gluon_bert.data.vocab import Vocabulary
from gluon_bert.data.wordpiece import SPECIAL_TOKENS, WordPieceVocabulary
from gluon_bert.errors import InputError
from gluon_bert.export import exporter as formats
from gluon_bert.export.exporter import export_mxnet, load_exported
from gluon_bert.export.manifest import MANIFEST, OUTPUTS, Manifest
from gluon_bert.export.mxnet_symbol import PARAMETERS, SYMBOL, BlockNetwork, ModuleNetwork
from gluon_bert.export.verify import differences, random_texts
from gluon_bert.inference.predictor import GluonNetwork, Predictor
from gluon_bert.model.bert import BERTModel
from gluon_bert.numpy_compat import old_names
from gluon_bert.presets import preset
from gluon_bert.run import Run
from gluon_bert.runtime import mx

# What a pretrained network may be exported with.
OF_PRETRAINED = ("encoder", "all")

VOCAB = Vocabulary([f"w{i}" for i in range(50)])
MAX_SEQ_LENGTH = 24

# Every operator of the exported graphs: all are MXNet's own. One more is a decision, not an accident.
OPERATORS = {
    "null", "_arange", "_contrib_arange_like", "_copy", "_mul_scalar", "Activation", "batch_dot", "BlockGrad",
    "broadcast_add", "broadcast_greater_equal", "broadcast_like", "elemwise_add", "Embedding",
    "expand_dims", "FullyConnected", "gather_nd", "LayerNorm", "LeakyReLU", "repeat", "Reshape", "slice_axis",
    "slice_like", "softmax", "stack", "SwapAxis", "transpose", "zeros_like",
}  # fmt: skip


def run_of(seed=0, name="bert-tiny", **changes):
    config = preset(name).replace(
        units=32, ffn_units=48, num_heads=2, max_seq_length=MAX_SEQ_LENGTH, **changes
    )
    net = BERTModel(len(VOCAB), config.model)
    net.initialize(ctx=[mx.cpu()], seed=seed)
    net.hybridize()
    reference.randomise_relative_bias(net)
    return Run(net, VOCAB, config, step=7)


@pytest.fixture(scope="module")
def run():
    return run_of()


@pytest.fixture(scope="module")
def exports(run, tmp_path_factory):
    """The folders of both kinds of export."""
    folder = tmp_path_factory.mktemp("exports")
    for outputs in OF_PRETRAINED:
        export_mxnet(run, folder / outputs, outputs)
    return folder


@pytest.mark.parametrize("outputs", OF_PRETRAINED)
@pytest.mark.parametrize("network", [BlockNetwork, ModuleNetwork])
def test_mxnet_export_any_shape_equals_the_network(run, exports, outputs, network):
    manifest = Manifest.load(exports / outputs)
    other = network(exports / outputs, manifest)
    rng = np.random.default_rng(1)
    for shape in ((2, 3), (1, MAX_SEQ_LENGTH), (5, 11), (9, 17)):
        texts = random_texts(rng, *shape, VOCAB)
        found = differences(GluonNetwork(run.net), other, [texts])
        assert set(found) == set(OUTPUTS[outputs])
        assert max(found.values()) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "d2l"},
        {"norm": "pre"},
        {"tied_decoder": False, "embedding_norm": False},
        {"num_layers": 1, "activation": "relu"},
        {"position": "relative-bias"},
    ],
)
def test_mxnet_export_every_variant_is_equal(tmp_path, changes):
    manifest = export_mxnet(run_of(**changes), tmp_path / "export")
    found = manifest.comparison["largest differences"]
    assert set(found) == {"SymbolBlock", "Module"}
    assert all(set(by_output) == set(OUTPUTS["all"]) for by_output in found.values())


def test_mxnet_export_of_another_network_is_refused(run, tmp_path, monkeypatch):
    other = run_of(seed=1)
    rng = np.random.default_rng(0)
    found = differences(GluonNetwork(run.net), GluonNetwork(other.net), [random_texts(rng, 2, 9, VOCAB)])
    assert min(found.values()) > 1e-2
    monkeypatch.setattr(formats, "GluonNetwork", lambda net: GluonNetwork(other.net))
    with pytest.raises(
        InputError, match=r"read back by SymbolBlock, the difference of encoded .* must be at most 1e-05"
    ):
        export_mxnet(run, tmp_path / "export")
    assert not list(tmp_path.iterdir())


def test_differences_with_nan_are_infinite(run):
    class Broken:
        def __call__(self, texts):
            outputs = GluonNetwork(run.net)(texts)
            outputs.pooled[0, 0] = np.nan
            return outputs

    texts = [random_texts(np.random.default_rng(0), 2, 9, VOCAB) for _ in range(2)]
    assert differences(GluonNetwork(run.net), Broken(), texts)["pooled"] == np.inf


@pytest.mark.parametrize("network", [BlockNetwork, ModuleNetwork])
def test_mxnet_export_too_long_text_is_an_error(exports, network):
    other = network(exports / "all", Manifest.load(exports / "all"))
    texts = random_texts(np.random.default_rng(0), 2, MAX_SEQ_LENGTH + 1, VOCAB)
    with pytest.raises(RuntimeError, match="Slice axis 1 with size 25"):
        other(texts)


def test_mxnet_export_names_inputs_and_outputs(exports):
    for outputs, folder in ((name, exports / name) for name in OF_PRETRAINED):
        symbol = mx.sym.load(str(folder / SYMBOL))
        content = json.loads((folder / MANIFEST).read_text("utf-8"))
        inputs = [each["name"] for each in content["inputs"]]
        assert set(symbol.list_inputs()) == set(inputs) | set(parameters_of(folder))
        assert symbol.list_outputs() == [f"{each['name']}_output" for each in content["results"]]
        assert all(each["meaning"] and each["dtype"] == "float32" for each in content["inputs"])
        assert ("masked_positions" in inputs) == (outputs == "all")


def parameters_of(folder):
    return [name.split(":")[1] for name in mx.nd.load(str(folder / PARAMETERS))]


def test_mxnet_export_has_only_mxnets_operators(exports):
    nodes = json.loads((exports / "all" / SYMBOL).read_text("utf-8"))["nodes"]
    assert {node["op"] for node in nodes} <= OPERATORS


def test_mxnet_export_runs_without_this_package(run, exports, tmp_path):
    """A process that knows nothing of this package, only what the manifest says."""
    code = """
import json, sys, numpy
vars(numpy).setdefault("bool", bool)
folder, found, *removed = sys.argv[1:]
for name in removed:
    vars(numpy).setdefault(name, numpy.inf)
import mxnet as mx
manifest = json.load(open(f"{folder}/manifest.json"))
names = [each["name"] for each in manifest["inputs"]]
net = mx.gluon.SymbolBlock.imports(f"{folder}/bert-symbol.json", names, f"{folder}/bert-0000.params")
symbol, parameters, _ = mx.model.load_checkpoint(f"{folder}/bert", 0)
inputs = {
    "tokens": [[3, 9, 2, 4, 7, 4], [3, 8, 4, 1, 1, 1]],
    "token_types": [[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0]],
    "valid_length": [6, 3],
    "masked_positions": [[2], [0]],
}
arrays = [mx.nd.array(inputs[name]) for name in names]
module = mx.mod.Module(symbol, names, label_names=None)
module.bind([(name, array.shape) for name, array in zip(names, arrays)], for_training=False)
module.set_params(parameters, {})
module.forward(mx.io.DataBatch(arrays), is_train=False)
outputs = [each["name"] for each in manifest["results"]]
numpy.savez(
    found,
    **{f"block_{name}": result.asnumpy() for name, result in zip(outputs, net(*arrays))},
    **{f"module_{name}": result.asnumpy() for name, result in zip(outputs, module.get_outputs())},
)
assert not any(name.startswith("gluon_bert") for name in sys.modules)
"""
    found = tmp_path / "found.npz"
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-W", "ignore", "-c", code, str(exports / "all"), str(found), *old_names()]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    inputs = [[3, 9, 2, 4, 7, 4], [3, 8, 4, 1, 1, 1]], [[0, 0, 0, 0, 1, 1], [0] * 6], [6, 3]
    encoded = run.net.encoder(*(mx.nd.array(each) for each in inputs))
    pooled = run.net.pooler(encoded)
    expected = {
        "encoded": encoded,
        "pooled": pooled,
        "mask_scores": run.net.mlm(encoded, mx.nd.array([[0, 1], [2, 0]])).expand_dims(1),
        "next_scores": run.net.nsp(pooled),
    }
    with np.load(found) as arrays:
        for name, array in expected.items():
            real = np.arange(6) < [[6], [3]] if name == "encoded" else ...  # padding's vectors mean nothing
            for reader in ("block", "module"):
                found_array = arrays[f"{reader}_{name}"]
                np.testing.assert_allclose(found_array[real], array.asnumpy()[real], atol=1e-5)


def test_mxnet_export_of_equal_runs_is_equal(exports, tmp_path):
    export_mxnet(run_of(), tmp_path / "again", "all")
    for name in (SYMBOL, PARAMETERS, "vocab.json"):
        assert (tmp_path / "again" / name).read_bytes() == (exports / "all" / name).read_bytes()


def test_mxnet_export_predicts_like_its_run(run, exports):
    exported = load_exported(exports / "all")
    predictors = Predictor(exported.network, exported.reader), Predictor.of(run)
    texts = [exported.reader.text("w1 W2 w9"), exported.reader.text("w1 <mask> w2 <mask>", "w3 <mask> w4")]
    for one, other in zip(*(predictor.predict(texts) for predictor in predictors)):
        np.testing.assert_allclose(one.vectors, other.vectors, atol=1e-5)
        np.testing.assert_allclose(one.next_scores, other.next_scores, atol=1e-5)
    np.testing.assert_allclose(one.mask_scores, other.mask_scores, atol=1e-5)
    assert one.mask_scores.shape == (3, len(VOCAB))


def test_mxnet_export_with_wordpiece_predicts_alike(run, tmp_path):
    vocab = WordPieceVocabulary(["[unused0]", *SPECIAL_TOKENS, "the", "crane", "##s", "fly"])
    config = run.config.replace(tokenizer="wordpiece")
    net = BERTModel(len(vocab), config.model)
    net.initialize(ctx=[mx.cpu()], seed=0)
    net.hybridize()
    pieces = Run(net, vocab, config, step=1)
    manifest = export_mxnet(pieces, tmp_path / "export")
    assert manifest.tokenizer["ids"] == {"pad": 1, "unk": 2, "cls": 3, "sep": 4, "mask": 5}
    exported = load_exported(tmp_path / "export")
    text = exported.reader.text("The cranes [MASK] away")
    assert text.tokens == ["[CLS]", "the", "crane", "##s", "[MASK]", "away", "[SEP]"]
    (one,) = Predictor(exported.network, exported.reader).predict([text])
    (other,) = Predictor.of(pieces).predict([text])
    np.testing.assert_allclose(one.vectors, other.vectors, atol=1e-5)
    np.testing.assert_allclose(one.mask_scores, other.mask_scores, atol=1e-5)


def test_encoder_export_without_heads_names_them(exports):
    exported = load_exported(exports / "encoder")
    predictor = Predictor(exported.network, exported.reader)
    (answer,) = predictor.predict([exported.reader.text("w1 <mask>", "w3")])
    assert answer.vectors.shape == (6, 32)
    assert answer.pooled is None
    with pytest.raises(InputError, match=r"for masked words\. Export again with outputs=all"):
        answer.fill_masks(VOCAB)
    with pytest.raises(InputError, match="must have outputs for the next sentence"):
        _ = answer.next_sentence_probability


def test_mxnet_export_to_a_taken_folder_is_refused(run, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"output must be a new folder, got .*, which is not empty"):
        export_mxnet(run, tmp_path)
    with pytest.raises(InputError, match="must be a new folder"):
        export_mxnet(run, tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    export_mxnet(run, tmp_path / "empty")
    assert (tmp_path / "empty" / MANIFEST).exists()


@pytest.fixture
def export(exports, tmp_path):
    """A copy of an export, to be damaged."""
    for path in (exports / "all").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize("name", [SYMBOL, PARAMETERS, "vocab.json"])
def test_load_exported_damaged_file_is_named(export, name):
    content = (export / name).read_bytes()
    (export / name).write_bytes(content[:-7])
    with pytest.raises(InputError, match=f"{name}: differs from the exported file"):
        load_exported(export)
    (export / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing"):
        load_exported(export)


@pytest.mark.parametrize(
    "change, what",
    [
        ({"manifest": 99}, "version must be 1, got 99"),
        ({"format": "tflite"}, "holds unknown values"),
        ({"outputs": "some"}, "holds unknown values"),
        ({"outputs": []}, "holds unknown values"),
        ({"max_seq_length": "24"}, "holds unknown values"),
        ({"max_seq_length": -1}, "holds unknown values"),
        ({"tokenizer": {"kind": "sentencepiece"}}, "holds unknown values"),
        ({"tokenizer": []}, "holds unknown values"),
        ({"files": []}, "holds unknown values"),
        ({"files": {"../secret": "0"}}, "must be a file of this folder"),
        ({"vocabulary_size": 7}, "must have 7 tokens, got 55"),
    ],
)
def test_manifest_with_unknown_values_is_refused(export, change, what):
    content = json.loads((export / MANIFEST).read_text("utf-8"))
    (export / MANIFEST).write_text(json.dumps({**content, **change}), "utf-8")
    with pytest.raises(InputError, match=what):
        load_exported(export)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"manifest": 1}'])
def test_manifest_that_is_not_one_is_refused(export, content):
    (export / MANIFEST).write_bytes(content)
    with pytest.raises(InputError, match="cannot be read as an export's manifest"):
        load_exported(export)
    (export / MANIFEST).unlink()
    with pytest.raises(InputError, match=r"must be an export, with manifest\.json"):
        load_exported(export)
