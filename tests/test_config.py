"""The configuration: fields, presets, JSON, and invalid values."""

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
    with pytest.raises(InputError, match="corpus must be a list of strings, got 3"):
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
    with pytest.raises(InputError) as message:
        config.check()
    lines = str(message.value).splitlines()
    assert "num_heads must divide units=128, got 3." in lines
    assert "max_seq_length must be at least 8, got 2." in lines
    assert "batch_size must be at least 1, got 0." in lines
    assert "preparation must be one of bert, d2l, got burn." in lines
    assert any(line.startswith("lr must be at least 0.0, got nan") for line in lines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_seq_length": 1001}, "max_seq_length must be at most max_positions=1000, got 1001"),
        ({"mask_token_rate": 0.9, "random_token_rate": 0.2}, "must be at most 1 together, got 0.9 and 0.2"),
        ({"lr": 0.0}, "lr must be above 0, got 0.0"),
        ({"num_buckets": 65}, "num_buckets must be at most max_seq_length=64, got 65"),
        ({"seed": 2**31}, "seed must be at most 2147483647, got 2147483648"),
        ({"lr": float("inf")}, "lr must be at most"),
        ({"validation_fraction": 0.9}, "validation_fraction must be at most 0.5, got 0.9"),
        (
            {"weight_decay": 0.01},
            "weight_decay must be 0 with optimizer=.adam., got 0.01. Use adamw, bertadam",
        ),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0.0, got -0.1"),
        ({"schedule": "cubic"}, "schedule must be one of constant, linear, cosine, got cubic"),
        ({"optimizer": "sgd"}, "optimizer must be one of adam, adamw, bertadam, lamb, muon, got sgd"),
        ({"momentum": 0.9}, "momentum has no effect without optimizer=.muon."),
        ({"optimizer": "muon", "momentum": 1.0}, "momentum must be at most 0.9999, got 1.0"),
        ({"warmup_ratio": 1.5}, "warmup_ratio must be at most 1.0, got 1.5"),
        ({"beta1": 1.0}, "beta1 must be at most 0.9999, got 1.0"),
        ({"beta2": float("nan")}, "beta2 must be at least 0.0, got nan"),
        ({"epsilon": 0.0}, "epsilon must be at least 1e-12, got 0.0"),
        ({"clip_norm": -1.0}, "clip_norm must be at least 0.0, got -1.0"),
        ({"clip_norm": float("inf")}, "clip_norm must be at most"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        (
            {"vocab_file": "v.txt"},
            "vocab_file has no effect without tokenizer=.wordpiece., unless it is the vocab.json of a run",
        ),
        ({"extend_vocab": 9}, "extend_vocab has no effect without vocab_file=FILE or init=RUN"),
        ({"init": ""}, "init must be xavier, normal or the folder of a run"),
        ({"init_checkpoint": "best"}, "init_checkpoint has no effect without init=RUN"),
        ({"vocab_size": 8000}, "vocab_size has no effect without tokenizer=.wordpiece."),
        (
            {"tokenizer": "wordpiece", "vocab_file": "v.txt", "vocab_size": 8000},
            "vocab_size has no effect without tokenizer=.wordpiece., or with vocab_file",
        ),
        ({"short_seq_prob": 0.2}, "short_seq_prob has no effect without pairs=.packed."),
        ({"max_ngram": 2}, "max_ngram has no effect without masking=.ngrams."),
        (
            {"final_mlm_probability": 0.15, "dynamic_masking": False},
            "final_mlm_probability must be 0 with dynamic_masking=False, got 0.15",
        ),
        ({"masking": "ngrams", "max_ngram": 1}, "max_ngram must be at least 2 with masking=.ngrams., got 1"),
        (
            {"pairs": "packed"},
            "pairs must be sentences with preparation=.d2l., got packed. Use preparation=.bert.",
        ),
    ],
)
def test_check_contradictions_name_the_options(changes, message):
    with pytest.raises(InputError, match=message):
        preset("d2l").replace(**changes).check()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"unitz": 1}}, "config: unknown key model.unitz"),
        ({"modle": {}}, "groups must be model, data, train, got 'modle'"),
        ({"model": {"units": "many"}}, "model.units must be a whole number, got 'many'"),
        ({"model": {"units": True}}, "model.units must be a whole number, got True"),
        ({"data": {"corpus": 3}}, "data.corpus must be a list of strings, got 3"),
        ({"train": 3}, "groups must be model, data, train, got 'train'"),
    ],
)
def test_from_json_unknown_key_or_type_is_refused(content, message):
    with pytest.raises(InputError, match=message):
        Config.from_json(content)


def test_preset_unknown_name_lists_the_known():
    with pytest.raises(InputError, match="preset must be one of demo, d2l, quick, thorough, bert-tiny"):
        preset("bert-huge")
