"""Exports to ONNX, int8 and bf16: close to the network they came from at any length, or not written."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, skip_without, small_text
from support import reference_bert as reference

from gluon_bert.data.prepared import prepare
from gluon_bert.data.tokenizer import Tokenizer, pad
from gluon_bert.data.vocab import Normalization
from gluon_bert.errors import InputError
from gluon_bert.export import low_precision as quantized
from gluon_bert.export import onnx_graph
from gluon_bert.export.evaluation_texts import LENGTH_SHARES, validation_texts
from gluon_bert.export.exporter import (
    BF16_ERROR,
    INT8_ERROR,
    ONNX_ERROR,
    export_bf16,
    export_int8,
    export_onnx,
    load_exported,
)
from gluon_bert.export.manifest import OUTPUTS, Manifest
from gluon_bert.export.mxnet_symbol import PARAMETERS, SYMBOL, BlockNetwork, ModuleNetwork
from gluon_bert.export.verify import compare, differences, question, random_texts, table
from gluon_bert.inference.predictor import GluonNetwork, Predictor
from gluon_bert.model.bert import BERTModel
from gluon_bert.presets import preset
from gluon_bert.run import Run
from gluon_bert.runtime import mx

MAX_SEQ_LENGTH = 32
EXPORTS = {"onnx": export_onnx, "int8": export_int8, "bf16": export_bf16}
# The largest difference of any single number, in units of the largest of its output.
LARGEST = {"onnx": 1e-5, "int8": 0.1, "bf16": 0.02}

# What a pretrained network may be exported with.
OF_PRETRAINED = ("encoder", "all")


@pytest.fixture(params=EXPORTS)
def format(request):
    """Each format that this machine can run."""
    skip_without(request.param)
    return request.param


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(small_text(), "utf-8")
    return path


@pytest.fixture(scope="module")
def run(corpus):
    return run_of(corpus)


@pytest.fixture(scope="module")
def texts(run):
    return validation_texts(run, 48)


@pytest.fixture(scope="module")
def exports(run, texts, tmp_path_factory):
    """Gives the folder of an export, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("exports")

    def export(format, outputs):
        path = folder / f"{format}-{outputs}"
        if not path.exists():
            EXPORTS[format](run, path, outputs, texts)
        return path

    return export


def run_of(corpus, name="bert-tiny", **changes):
    """A run with a small network of large random weights, so that nothing is close to 0."""
    small = {"max_seq_length": MAX_SEQ_LENGTH, "units": 32, "ffn_units": 48, "num_heads": 2, "min_freq": 1}
    config = preset(name).replace(**{**small, "corpus": (str(corpus),), "init": "xavier", **changes})
    vocab = prepare(config.data).vocab
    net = BERTModel(len(vocab), config.model)
    net.initialize(ctx=[mx.cpu()], seed=3)
    net.hybridize()
    reference.randomise_relative_bias(net)
    return Run(net, vocab, config, step=7)


def reader_of(run):
    return Tokenizer(run.vocab, MAX_SEQ_LENGTH, Normalization(run.config.data.lowercase))


@pytest.mark.parametrize("outputs", OF_PRETRAINED)
def test_format_any_shape_agrees_with_the_network(run, exports, format, outputs):
    exported = load_exported(exports(format, outputs))
    rng = np.random.default_rng(1)
    for shape in ((2, 3), (1, MAX_SEQ_LENGTH), (5, 11), (9, 17)):
        batch = random_texts(rng, *shape, run.vocab)
        found = differences(GluonNetwork(run.net), exported.network, [batch])
        assert set(found) == set(OUTPUTS[outputs])
        assert max(found.values()) < LARGEST[format]
        if format != "onnx":
            assert min(found.values()) > 1e-5, "computed in float32 all the same"


def test_format_without_masks_gives_the_same_vectors(run, exports, format):
    network = load_exported(exports(format, "all")).network
    masked = random_texts(np.random.default_rng(1), 3, 11, run.vocab)
    plain = masked._replace(masked_positions=masked.masked_positions[:, :0])
    assert network(plain).mask_scores is None
    np.testing.assert_allclose(network(plain).encoded, network(masked).encoded, rtol=0, atol=1e-6)
    outputs = [array for array in network(masked) if array is not None]
    assert {array.dtype for array in outputs} == {np.dtype("float32")}
    assert len(outputs) == len(OUTPUTS["all"])


def test_format_predicts_as_the_run_does(run, exports, format):
    exported = load_exported(exports(format, "all"))
    text = exported.reader.text("the <mask> lifts it .", "the driver <mask> .")
    ours, theirs = (
        next(Predictor(network, exported.reader).predict([text]))
        for network in (GluonNetwork(run.net), exported.network)
    )
    assert ours.fill_masks(run.vocab, 1)[0][0][0] == theirs.fill_masks(run.vocab, 1)[0][0][0]
    assert ours.next_sentence_probability == pytest.approx(theirs.next_sentence_probability, abs=0.02)
    np.testing.assert_allclose(ours.mean, theirs.mean, atol=0.05)


def test_format_too_long_text_is_an_error(run, exports, format):
    network = load_exported(exports(format, "encoder")).network
    rng = np.random.default_rng(0)
    assert network(random_texts(rng, 2, MAX_SEQ_LENGTH, run.vocab)).encoded.shape[1] == MAX_SEQ_LENGTH
    with pytest.raises(Exception, match=r"slice_like|invalid expand shape"):
        network(random_texts(rng, 2, MAX_SEQ_LENGTH + 1, run.vocab))


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "d2l"},
        {"name": "d2l", "activation": "gelu", "norm": "pre", "embedding_norm": True},
        {"norm": "pre", "activation": "relu"},
        {"tied_decoder": False, "num_heads": 4, "num_layers": 1},
        {"position": "relative-bias"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_format_every_variant_agrees(corpus, tmp_path, format, changes):
    run = run_of(corpus, **changes)
    texts = validation_texts(run, 12)
    for outputs in OF_PRETRAINED:
        manifest = EXPORTS[format](run, tmp_path / outputs, outputs, texts)
        assert load_exported(tmp_path / outputs).manifest == manifest


@pytest.mark.parametrize("outputs", OF_PRETRAINED)
def test_format_manifest_has_errors_and_speed_by_length(texts, exports, format, outputs):
    manifest = load_exported(exports(format, outputs)).manifest
    assert (manifest.format, manifest.outputs, manifest.step) == (format, outputs, 7)
    comparison = manifest.comparison
    limit = {"onnx": ONNX_ERROR, "int8": INT8_ERROR, "bf16": BF16_ERROR}[format]
    assert comparison["limit"] == {"kind": "largest" if format == "onnx" else "mean", "value": limit}
    groups = comparison["groups"]
    # int8 keeps one half of the texts for its calibration.
    assert sum(group["texts"] for group in groups) == len(texts) // (2 if format == "int8" else 1)
    ends = [group["tokens"] for group in groups]
    assert [ends[0][0], ends[-1][1]] == [min(map(len, texts)), max(map(len, texts))] or format == "int8"
    assert ends[0][1] < ends[1][1] < ends[2][1]
    for group in groups:
        assert set(group["errors"]) == set(OUTPUTS[outputs])
        for error in group["errors"].values():
            assert 0 <= error["mean"] <= error["largest"]
            assert error[comparison["limit"]["kind"]] <= limit
        assert group["cosine"]["mean"]["smallest"] > 0.99
        assert group["speed ratio"] > 0
        assert ("mlm loss" in group) == ("same word" in group) == (outputs == "all")
    lines = table(groups)
    assert len(lines) == 4
    assert lines[1].startswith("{} to {} ".format(*ends[0]))
    assert f"{groups[0]['speed ratio']:.2f} x" in lines[1]


def test_format_above_max_error_leaves_nothing(run, texts, tmp_path, format):
    with pytest.raises(InputError, match=r"on texts of \d+ to \d+ tokens .* at most 1\.0e-12 \(max_error\)"):
        EXPORTS[format](run, tmp_path / "export", "all", texts, 1e-12)
    assert not list(tmp_path.iterdir())


def test_format_of_another_network_is_refused(run, texts, tmp_path, format, monkeypatch):
    network = BlockNetwork if format != "onnx" else onnx_graph.OnnxNetwork
    right = network.__call__

    def wrong(self, batch):
        outputs = right(self, batch)
        # NaN, too, is a difference.
        return outputs._replace(
            encoded=outputs.encoded * np.where(batch.valid_length > 20, np.nan, 1)[:, None, None]
        )

    monkeypatch.setattr(network, "__call__", wrong)
    with pytest.raises(InputError, match=r"difference of encoded .* got inf"):
        EXPORTS[format](run, tmp_path / "export", "encoder", texts)
    assert not list(tmp_path.iterdir())


def test_format_to_a_taken_folder_is_refused(run, texts, tmp_path, format):
    (tmp_path / "mine.txt").write_text("mine", "utf-8")
    with pytest.raises(InputError, match="must be a new folder"):
        EXPORTS[format](run, tmp_path, "all", texts)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_format_with_a_damaged_file_is_refused(run, texts, tmp_path, format):
    manifest = EXPORTS[format](run, tmp_path / "export", "encoder", texts)
    largest = max(manifest.files, key=lambda name: (tmp_path / "export" / name).stat().st_size)
    content = bytearray((tmp_path / "export" / largest).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "export" / largest).write_bytes(content)
    with pytest.raises(InputError, match=rf"{largest}: differs from the exported file"):
        load_exported(tmp_path / "export")


def test_format_with_too_few_texts_is_refused(run, texts, tmp_path, format):
    with pytest.raises(InputError, match=r"text must have at least [36] texts .* got 2"):
        EXPORTS[format](run, tmp_path / "export", "all", texts[:2])
    assert not list(tmp_path.iterdir())


# ONNX


def test_onnx_file_has_opset_and_names(exports):
    skip_without("onnx")
    import onnx

    for outputs in OF_PRETRAINED:
        folder = exports("onnx", outputs)
        model = onnx.load(str(folder / onnx_graph.FILE))
        manifest = load_exported(folder).manifest
        assert [(each.domain, each.version) for each in model.opset_import] == [("", onnx_graph.OPSET)]
        assert [each.name for each in model.graph.input] == manifest.input_names
        assert tuple(each.name for each in model.graph.output) == manifest.output_names
        axes = [[d.dim_param for d in each.type.tensor_type.shape.dim] for each in model.graph.input]
        assert axes == [["B", "T"], ["B", "T"], ["B"], ["B", "K"]][: len(axes)]
        assert set(manifest.versions) >= {"onnx", "onnxruntime", "mxnet"}
        assert onnx.checker.DEFAULT_CONTEXT.opset_imports == {"": onnx.defs.onnx_opset_version()}


def test_onnx_without_masks_skips_their_scores(exports):
    skip_without("onnx")
    network = load_exported(exports("onnx", "all")).network
    whole, part = network._sessions[OUTPUTS["all"]], network._sessions[("encoded", "pooled", "next_scores")]
    assert {each.name for each in whole.get_inputs()} - {each.name for each in part.get_inputs()} == {
        "masked_positions"
    }
    assert "mask_scores" not in [each.name for each in part.get_outputs()]


def test_onnx_file_that_is_not_one_is_refused(tmp_path):
    skip_without("onnx")
    (tmp_path / onnx_graph.FILE).write_bytes(b"not ONNX")
    with pytest.raises(InputError, match=r"bert\.onnx: cannot be read as ONNX"):
        onnx_graph.OnnxNetwork(tmp_path, Manifest("onnx", "all", MAX_SEQ_LENGTH, 0, {}, 0, {}, {}))


def test_onnx_with_too_many_weights_is_refused(run, texts, tmp_path, monkeypatch):
    skip_without("onnx")
    monkeypatch.setattr(onnx_graph, "MAX_BYTES", 10_000)
    with pytest.raises(
        InputError, match=r"weights must be at most .* for format=onnx, got .* Use format=mxnet"
    ):
        export_onnx(run, tmp_path / "export", "all", texts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_onnx_without_the_extra_names_the_remedy(run, texts, tmp_path, monkeypatch, missing):
    skip_without("onnx")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=rf"needs the package {missing} .*pip install -e '\.\[cpu,onnx\]'"):
        export_onnx(run, tmp_path / "export", "all", texts)
    assert not list(tmp_path.iterdir())


def test_onnx_threads_equal_mxnets(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert onnx_graph._threads() == 3


# int8 and bf16


@pytest.mark.parametrize("low", ["int8", "bf16"])
def test_low_precision_weights_have_its_type(exports, low):
    skip_without(low)
    folder = exports(low, "all")
    arrays = mx.nd.load(str(folder / PARAMETERS))
    kinds = {"int8": np.dtype("int8"), "bf16": quantized.BFLOAT16}
    dense = [a for name, a in arrays.items() if "dense" in name and "weight" in name and a.ndim == 2]
    assert len(dense) == 15, "6 for each of 2 layers, and 3 of the heads"
    assert {np.dtype(array.dtype) for array in dense} == {kinds[low]}
    operators = {node["op"] for node in json.loads((folder / SYMBOL).read_text("utf-8"))["nodes"]}
    assert ("amp_cast" if low == "bf16" else "_contrib_quantize_v2") in operators
    assert not operators & {"_contrib_quantized_embedding", "_contrib_quantized_elemwise_add"}


@pytest.mark.parametrize("low", ["int8", "bf16"])
def test_low_precision_is_read_by_module(run, exports, low):
    skip_without(low)
    folder = exports(low, "all")
    exported = load_exported(folder)
    batch = random_texts(np.random.default_rng(1), 3, 11, run.vocab)
    # Not equal: a Module joins operators, and so rounds to bfloat16 at fewer places.
    for other in (exported.network, GluonNetwork(run.net)):
        found = differences(other, ModuleNetwork(folder, exported.manifest), [batch])
        assert max(found.values()) < LARGEST[low]


@pytest.mark.parametrize(
    "low, message",
    [
        ("bf16", "bf16 needs a CPU with AVX-512"),
        ("int8", "int8 needs a CPU with AVX512_VNNI"),
    ],
)
def test_low_precision_on_a_cpu_without_it_is_refused(low, message):
    code = f"from gluon_bert.export.low_precision import check_{low}; check_{low}()"
    limited = {**os.environ, "DNNL_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=limited, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"InputError: {message}" in done.stderr


def test_format_on_a_gpu_is_refused(exports, format):
    with pytest.raises(InputError, match=rf"an export in {format} runs on the CPU only, not on gpu\(0\)"):
        load_exported(exports(format, "encoder"), mx.gpu(0))


# What is compared, and on what


def test_validation_texts_have_all_lengths(run, texts):
    validation = prepare(run.config.data).validation.tokens.tolist()
    lengths = np.array([len(text) for text in texts])
    assert lengths.max() > 0.9 * MAX_SEQ_LENGTH
    for third, (low, high) in enumerate(LENGTH_SHARES):
        assert lengths[third::3].min() >= round(low * MAX_SEQ_LENGTH)
        assert lengths[third::3].max() <= round(high * MAX_SEQ_LENGTH)
    for text in texts:
        words = [i for i in text.ids.tolist() if i not in (run.vocab.cls, run.vocab.sep)]
        assert any(validation[i : i + len(words)] == words for i in range(len(validation)))
        assert text.is_pair
    again = validation_texts(run, 48)
    assert [text.tokens for text in again] == [text.tokens for text in texts]


def test_validation_texts_of_another_corpus_are_refused(run, tmp_path):
    path = tmp_path / "other.txt"
    path.write_text(small_text().replace("crane", "heron"), "utf-8")
    other = dataclasses.replace(run, config=run.config.replace(corpus=(str(path),)))
    with pytest.raises(InputError, match=r"corpus must be the text that the run was .*text_file=FILE"):
        validation_texts(other)
    path.unlink()
    with pytest.raises(InputError, match=r"other\.txt.*\nName a file of similar texts .*text_file=FILE"):
        validation_texts(other)


def test_validation_texts_missing_name_the_remedy(corpus):
    run = run_of(corpus, validation_fraction=0.0)
    with pytest.raises(InputError, match=r"no validation text\. Name .*text_file=FILE"):
        validation_texts(run)


def test_question_masks_known_words_and_keeps_labels(run):
    text = reader_of(run).text("the crane lifts it . the <mask> xyzzy", "the driver sees it .")
    asked = question(text, run.vocab, np.random.default_rng(0))
    (given,) = text.masks
    places = asked.text.masks
    assert len(places) == 2, "15 % of 12 words, and the one that came masked"
    assert asked.masked_ids[places == given] == [-1]
    (chosen,) = places[places != given]
    assert asked.masked_ids[places == chosen] == [text.ids[chosen]]
    assert asked.text.tokens[chosen] == text.tokens[given]
    assert text.ids[chosen] not in (run.vocab.unk, run.vocab.cls, run.vocab.sep)
    others = np.setdiff1d(np.arange(len(text)), places)
    np.testing.assert_array_equal(asked.text.ids[others], text.ids[others])


def test_compare_errors_are_relative_by_length(run, texts):
    network = GluonNetwork(run.net)

    def tenth_longer(batch):
        outputs = network(batch)
        return outputs._replace(encoded=outputs.encoded * (1.1 if batch.valid_length.max() > 26 else 1.0))

    groups = compare(network, tenth_longer, texts, reader_of(run), with_masks=True)
    errors = [group["errors"]["encoded"] for group in groups]
    assert [error["largest"] for error in errors[:2]] == [0, 0]
    assert errors[2]["mean"] == pytest.approx(0.1, abs=1e-4)
    assert errors[2]["largest"] == pytest.approx(0.1, abs=1e-4)
    for group in groups:
        assert group["cosine"]["cls"]["smallest"] == pytest.approx(1, abs=1e-5)
        assert group["same word"] == 1
        assert group["mlm loss"]["reference"] == group["mlm loss"]["export"]
        assert group["errors"]["mask_scores"] == {"mean": 0, "largest": 0}


def test_compare_loss_is_of_the_masked_words(run, texts):
    network = GluonNetwork(run.net)

    def unsure(batch):
        outputs = network(batch)
        return outputs._replace(mask_scores=np.zeros_like(outputs.mask_scores))

    for group in compare(network, unsure, texts, reader_of(run), with_masks=True):
        assert group["mlm loss"]["export"] == pytest.approx(np.log(len(run.vocab)), abs=1e-5)
        assert group["mlm loss"]["reference"] != pytest.approx(np.log(len(run.vocab)), abs=1e-2)


def test_compare_without_masks_computes_no_scores(run, texts):
    network = GluonNetwork(run.net)
    asked = []

    def watched(batch):
        asked.append(batch.masked_positions.size)
        return network(batch)

    groups = compare(watched, watched, texts, reader_of(run), with_masks=False)
    assert asked and not any(asked)
    assert "same word" not in groups[0]


def test_compare_texts_of_unknown_words_are_refused(run):
    network, unknown = GluonNetwork(run.net), [reader_of(run).text("xyzzy " * n) for n in (1, 2, 3)]
    assert len(compare(network, network, unknown, reader_of(run), with_masks=False)) == 3
    with pytest.raises(InputError, match="text must have known words: no text of 3 to 3 tokens has"):
        compare(network, network, unknown, reader_of(run), with_masks=True)


def test_compare_ignores_padding(run):
    network = GluonNetwork(run.net)

    def noise_behind(batch):
        outputs = network(batch)
        real = np.arange(batch.tokens.shape[1]) < batch.valid_length[:, None]
        return outputs._replace(encoded=np.where(real[:, :, None], outputs.encoded, 7))

    mixed = [reader_of(run).text("the crane " * n) for n in (1, 3, 5, 7, 9, 11)]
    assert pad(mixed, MAX_SEQ_LENGTH).tokens.shape[1] > len(mixed[0])
    for group in compare(network, noise_behind, mixed, reader_of(run), with_masks=False):
        assert group["errors"]["encoded"]["largest"] == 0
