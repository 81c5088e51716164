"""The configuration: fields, presets, JSON, and what is refused."""

import dataclasses
import json

import pytest

from gluon_bert.config import GROUPS, Config
from gluon_bert.errors import InputError
from gluon_bert.fileio import write_json
from gluon_bert.presets import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_survive_json(name):
    config = preset(name)
    config.check()
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_d2l_preset_has_the_values_of_d2l():
    d2l = preset("d2l")
    model = d2l.model
    assert (model.num_layers, model.units, model.ffn_units, model.num_heads) == (2, 128, 256, 2)
    assert (model.dropout, d2l.data.max_seq_length, d2l.data.min_freq) == (0.2, 64, 5)
    assert (d2l.train.batch_size, d2l.train.num_steps, d2l.train.lr) == (512, 50, 1e-3)


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("bert-")])
def test_bert_presets_train_as_the_original_bert(name):
    train = preset(name).train
    assert (train.optimizer, train.beta1, train.beta2, train.epsilon) == ("bertadam", 0.9, 0.999, 1e-6)
    assert (train.weight_decay, train.clip_norm) == (0.01, 1.0)
    assert (train.lr, train.schedule, train.warmup_ratio) == (1e-4, "linear", 0.1)


def test_d2l_preset_is_plain_adam():
    train = preset("d2l").train
    assert (train.optimizer, train.beta1, train.beta2, train.epsilon) == ("adam", 0.9, 0.999, 1e-8)
    assert (train.weight_decay, train.clip_norm, train.schedule, train.warmup_ratio) == (
        0.0,
        0.0,
        "constant",
        0.0,
    )


def test_options_have_distinct_names():
    names = [field.name for group in GROUPS.values() for field in dataclasses.fields(group)]
    assert len(names) == len(set(names))


def test_options_have_help_texts():
    for group in GROUPS.values():
        for field in dataclasses.fields(group):
            assert len(field.metadata["help"]) > 8, field.name


def test_write_json_refuses_nan(tmp_path):
    write_json(tmp_path / "a.json", {"a": {"b": float("nan"), "c": 1.5}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": {"b": None, "c": 1.5}}


def test_replace_other_type_is_refused():
    with pytest.raises(InputError, match="--corpus is 3, which is no list of strings"):
        preset("d2l").replace(corpus=3)


def test_replace_reaches_all_groups_refuses_other_names():
    changed = preset("d2l").replace(units=64, max_seq_length=32, seed=5)
    assert (changed.model.units, changed.data.max_seq_length, changed.train.seed) == (64, 32, 5)
    with pytest.raises(InputError, match="unitz"):
        preset("d2l").replace(unitz=64)


def test_all_problems_are_reported_at_once():
    config = preset("d2l").replace(
        num_heads=3, max_seq_length=2, batch_size=0, preparation="burn", lr=float("nan")
    )
    with pytest.raises(InputError) as told:
        config.check()
    lines = str(told.value).splitlines()
    assert "--num-heads 3: must divide --units 128" in lines
    assert "--max-seq-length 2: must be at least 8" in lines
    assert "--batch-size 0: must be at least 1" in lines
    assert "--preparation burn: must be one of bert, d2l" in lines
    assert any(line.startswith("--lr nan") for line in lines)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"max_seq_length": 1001}, "--max-seq-length 1001: must not exceed --max-positions 1000"),
        ({"mask_token_rate": 0.9, "random_token_rate": 0.2}, "must not exceed 1 together"),
        ({"lr": 0.0}, "--lr 0.0: must be above 0"),
        ({"num_buckets": 65}, "--num-buckets 65: must not exceed --max-seq-length 64"),
        ({"seed": 2**31}, "--seed 2147483648: must be at most 2147483647"),
        ({"lr": float("inf")}, "--lr inf: must be at most"),
        ({"validation_fraction": 0.9}, "--validation-fraction 0.9: must be at most 0.5"),
        ({"weight_decay": 0.01}, "--weight-decay 0.01: must be 0 with --optimizer adam; adamw, bertadam"),
        ({"weight_decay": -0.1}, "--weight-decay -0.1: must be at least 0.0"),
        ({"schedule": "cubic"}, "--schedule cubic: must be one of constant, linear, cosine"),
        ({"optimizer": "sgd"}, "--optimizer sgd: must be one of adam, adamw, bertadam, lamb, muon"),
        ({"momentum": 0.9}, "--momentum 0.9: has no effect, it needs --optimizer muon"),
        ({"optimizer": "muon", "momentum": 1.0}, "--momentum 1.0: must be at most 0.9999"),
        ({"warmup_ratio": 1.5}, "--warmup-ratio 1.5: must be at most 1.0"),
        ({"beta1": 1.0}, "--beta1 1.0: must be at most 0.9999"),
        ({"beta2": float("nan")}, "--beta2 nan: must be at least 0.0"),
        ({"epsilon": 0.0}, "--epsilon 0.0: must be at least 1e-12"),
        ({"clip_norm": -1.0}, "--clip-norm -1.0: must be at least 0.0"),
        ({"clip_norm": float("inf")}, "--clip-norm inf: must be at most"),
        ({"num_heads": 0}, "--num-heads 0: must be at least 1"),
        (
            {"vocab_file": "v.txt"},
            "--vocab-file v.txt: has no effect, it needs --tokenizer wordpiece; a vocabulary of words",
        ),
        ({"extend_vocab": 9}, "--extend-vocab 9: has no effect, it needs --vocab-file or --init RUN"),
        ({"init": ""}, "--init: must be xavier, normal or the folder of a run"),
        ({"init_checkpoint": "best"}, "--init-checkpoint best: has no effect, it needs --init RUN"),
        ({"vocab_size": 8000}, "--vocab-size 8000: has no effect, it needs --tokenizer wordpiece"),
        (
            {"tokenizer": "wordpiece", "vocab_file": "v.txt", "vocab_size": 8000},
            "--vocab-size 8000: has no effect, it needs --tokenizer wordpiece, and no --vocab-file",
        ),
        ({"short_seq_prob": 0.2}, "--short-seq-prob 0.2: has no effect, it needs --pairs packed"),
        ({"max_ngram": 2}, "--max-ngram 2: has no effect, it needs --masking ngrams"),
        ({"masking": "ngrams", "max_ngram": 1}, "--max-ngram 1: must be at least 2 for --masking ngrams"),
        ({"pairs": "packed"}, "--preparation d2l: has no packed pairs; add --preparation bert"),
    ],
)
def test_check_contradictions_name_the_options(changes, told):
    with pytest.raises(InputError, match=told):
        preset("d2l").replace(**changes).check()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"model": {"unitz": 1}}, "config: unknown key model.unitz"),
        ({"modle": {}}, "'modle' is no group"),
        ({"model": {"units": "many"}}, "model.units is 'many', which is no int"),
        ({"model": {"units": True}}, "model.units is True"),
        ({"data": {"corpus": 3}}, "data.corpus is 3"),
        ({"train": 3}, "'train' is no group"),
    ],
)
def test_from_json_unknown_key_or_type_is_refused(content, told):
    with pytest.raises(InputError, match=told):
        Config.from_json(content)


def test_preset_unknown_name_lists_the_known():
    with pytest.raises(InputError, match="--preset bert-huge: must be one of demo, d2l, quick, bert-tiny"):
        preset("bert-huge")
