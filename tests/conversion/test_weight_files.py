"""Weight files of every kind give the same arrays. Other files are refused in one sentence."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import ROOT
from support.conversion import assert_bits, converted, huggingface_folder, rewrite

from gluon_bert.conversion.converter import network
from gluon_bert.conversion.huggingface import read_huggingface
from gluon_bert.conversion.weight_files import SAFETENSORS, read_safetensors
from gluon_bert.errors import InputError
from gluon_bert.run import load_run

CASES = ROOT.parent / "shared" / "cases"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 440449768\n"


def same_as(run, folder):
    found = read_huggingface(folder)
    assert_bits(run.net, network(found.weights, len(found.vocab), found.model))
    return found


def in_two(folder, save, name):
    """Replace the weights by two shards and their index."""
    arrays = read_safetensors(folder / SAFETENSORS)
    (folder / SAFETENSORS).unlink()
    stem, ending = name.rsplit(".", 1)
    places = {}
    for number, names in enumerate((list(arrays)[::2], list(arrays)[1::2]), 1):
        file = f"{stem}-0000{number}-of-00002.{ending}"
        save({each: arrays[each] for each in names}, str(folder / file))
        places.update(dict.fromkeys(names, file))
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def saver(kind):
    if kind == "model.safetensors":
        import safetensors.numpy

        return safetensors.numpy.save_file
    torch = pytest.importorskip("torch", reason="needs the extra test-others")
    return lambda arrays, path: torch.save({n: torch.from_numpy(a.copy()) for n, a in arrays.items()}, path)


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_shards_are_read_and_a_missing_one_is_named(kind, tmp_path):
    run, folder = huggingface_folder(tmp_path)
    in_two(folder, saver(kind), kind)
    same_as(run, folder)
    missing = next(folder.glob("*00002-of-00002*"))
    missing.unlink()
    with pytest.raises(InputError, match=f"{missing.name} must be there too"):
        read_huggingface(folder)


@pytest.mark.parametrize("nested", ["", "model", "state_dict"])
@pytest.mark.parametrize("legacy", [True, False])
def test_bin_old_new_and_nested_is_read(legacy, nested, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra test-others")
    run, folder = huggingface_folder(tmp_path)
    arrays = {n: torch.from_numpy(a.copy()) for n, a in read_safetensors(folder / SAFETENSORS).items()}
    (folder / SAFETENSORS).unlink()
    content = {nested: arrays, "epoch": 3, "optimizer": {"lr": 0.1}} if nested else arrays
    path = folder / "pytorch_model.bin"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    same_as(run, folder)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be read as weights"):
        read_huggingface(folder)


@pytest.mark.parametrize("prefix", ["module.", "bert.", "0.auto_model.", "model.encoder_q.bert."])
def test_common_prefix_of_all_names_is_taken_off(prefix, tmp_path):
    _, folder = huggingface_folder(tmp_path)
    inner = "" if prefix in ("0.auto_model.",) else "bert."

    def rename(name):
        return prefix + (name[len("bert.") :] if not inner and name.startswith("bert.") else name)

    def change(arrays):
        outer = prefix[: -len("bert.")] if prefix.endswith("bert.") else prefix
        if prefix.endswith("bert."):
            return {outer + name: array for name, array in arrays.items()}
        return {rename(name): array for name, array in arrays.items()}

    rewrite(folder, change)
    found = read_huggingface(folder)
    for name, array in read_huggingface(folder).weights.items():
        np.testing.assert_array_equal(array, found.weights[name])
    heads = set() if prefix != "0.auto_model." else {"mlm", "nsp"}
    assert set(found.untrained) == heads


def test_weights_of_two_berts_are_refused(tmp_path):
    _, folder = huggingface_folder(tmp_path)
    rewrite(folder, lambda arrays: {p + n: a for p in ("one.", "two.") for n, a in arrays.items()})
    with pytest.raises(InputError, match=r"must be one BERT's, got those of several, named 'one\.bert\.'"):
        read_huggingface(folder)


def test_weights_of_another_network_are_refused(tmp_path):
    _, folder = huggingface_folder(tmp_path)
    rewrite(folder, lambda arrays: {"wte.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(InputError, match=r"It has wte\.weight \.\.\.: another network"):
        read_huggingface(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json", "vocab.txt",
                                  "tokenizer_config.json"])  # fmt: skip
def test_git_lfs_pointer_is_named(name, tmp_path):
    _, folder = huggingface_folder(tmp_path)
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(LFS)
    with pytest.raises(InputError, match=f"{name}: is a git-lfs pointer.* Run `git lfs pull`"):
        read_huggingface(folder)


@pytest.mark.parametrize("name", ["tf_model.h5", "adapter_model.safetensors", "model.onnx"])
def test_folder_with_other_weights_names_them(name, tmp_path):
    _, folder = huggingface_folder(tmp_path)
    (folder / "model.safetensors").rename(folder / name)
    (folder / "pytorch_model.bin").unlink(missing_ok=True)
    with pytest.raises(InputError, match=f"must hold model.safetensors or .*, got {name}"):
        read_huggingface(folder)


def test_quantized_weights_are_refused_by_type(tmp_path):
    _, folder = huggingface_folder(tmp_path)
    rewrite(folder, lambda arrays: {name: array.astype(np.int8) for name, array in arrays.items()})
    with pytest.raises(InputError, match=r"model.safetensors: \S+ must be of type F64, F32, .*, got I8"):
        read_huggingface(folder)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{}", "must be the configuration of a BERT"),
        ("[]", "must hold an object of JSON, got list"),
        ('{"model_type": "bert", "pruned_heads": {"0": [1]}}', "pruned_heads must be {}"),
        ('{"model_type": "distilbert"}', "model_type must be 'bert', got 'distilbert'"),
        ("", "cannot be read as JSON"),
    ],
)
def test_config_that_is_not_berts_is_refused(content, message, tmp_path):
    _, folder = huggingface_folder(tmp_path)
    (folder / "config.json").write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        read_huggingface(folder)
    assert len(str(caught.value).splitlines()) == 1


def test_config_with_a_byte_order_mark_is_read(tmp_path):
    run, folder = huggingface_folder(tmp_path)
    (folder / "config.json").write_text("\ufeff" + (folder / "config.json").read_text(), "utf-8")
    same_as(run, folder)


def test_heads_of_other_tasks_are_left_out_in_one_line(tmp_path):
    run, folder = huggingface_folder(tmp_path)
    more = {"cls.species.weight": np.zeros((6, 16)), "qa_outputs.weight": np.zeros((2, 16))}
    rewrite(folder, lambda arrays: {**arrays, **{n: a.astype(np.float32) for n, a in more.items()}})
    found = same_as(run, folder)
    (note,) = found.notes
    assert note.endswith("heads: cls.species.weight qa_outputs.weight")


ARCHITECTURES = {
    "BertModel": ("mlm", "nsp"),
    "BertForMaskedLM": ("pooler", "nsp"),
    "BertForPreTraining": (),
    "BertForNextSentencePrediction": ("mlm",),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture_gives_transformers_hidden_states(name, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra test-others")
    transformers = pytest.importorskip("transformers", reason="needs the extra test-others")
    run, folder = huggingface_folder(tmp_path)
    torch.manual_seed(1)
    config = transformers.BertConfig.from_pretrained(folder)
    model = getattr(transformers, name)(config).eval()
    model.save_pretrained(folder)
    converted("--from", "huggingface", folder, "--to", tmp_path / "back")
    back = load_run(tmp_path / "back")
    assert back.untrained == ARCHITECTURES[name]
    text = run.reader.text("w1 w2 w3")
    from gluon_bert.inference.predictor import Predictor

    (found,) = Predictor.of(back).predict([text])
    expected = model(torch.tensor([text.ids.tolist()]), output_hidden_states=True).hidden_states[-1]
    np.testing.assert_allclose(found.vectors, expected[0].detach().numpy(), rtol=0, atol=2e-5)
    if {"mlm", "nsp"} & set(back.untrained) and name != "BertForNextSentencePrediction":
        converted("--from", tmp_path / "back", "--to", "huggingface", tmp_path / "again")
        saved = set(read_safetensors(tmp_path / "again" / SAFETENSORS))
        assert any(each.startswith("cls.predictions") for each in saved) == (name == "BertForMaskedLM")
        assert not any(each.startswith("cls.seq_relationship") for each in saved)


@pytest.mark.parametrize("labels", [["no", "maybe", "yes"], None], ids=["classes", "score"])
def test_classifier_gives_the_logits_of_transformers(labels, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra test-others")
    transformers = pytest.importorskip("transformers", reason="needs the extra test-others")
    from gluon_bert.inference.predictor import Predictor

    run, folder = huggingface_folder(tmp_path)
    torch.manual_seed(1)
    config = transformers.BertConfig.from_pretrained(folder)
    config.id2label = dict(enumerate(labels)) if labels else {0: "LABEL_0"}
    config.label2id = {label: i for i, label in config.id2label.items()}
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    converted("--from", "huggingface", folder, "--to", tmp_path / "back")
    back = load_run(tmp_path / "back")
    for given in (("w1 w2 w3",), ("w1 w2", "w3 w4 w5")):
        text = run.reader.text(*given)
        (found,) = Predictor.of(back).predict([text])
        inputs = {
            "input_ids": torch.tensor([text.ids.tolist()]),
            "token_type_ids": torch.tensor([text.token_types.tolist()]),
        }
        expected = model(**inputs).logits[0].detach()
        if labels:
            probabilities = torch.softmax(expected, 0).numpy()
            assert list(found.task_prediction["probabilities"]) == labels
            np.testing.assert_allclose(
                list(found.task_prediction["probabilities"].values()), probabilities, atol=1e-5
            )
        else:
            assert found.task_prediction["score"] == pytest.approx(float(expected[0]), abs=1e-5)
    converted("--from", tmp_path / "back", "--to", "huggingface", tmp_path / "again")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "again").eval()
    np.testing.assert_allclose(again(**inputs).logits.detach(), model(**inputs).logits.detach(), atol=1e-5)
    assert again.config.id2label == config.id2label
