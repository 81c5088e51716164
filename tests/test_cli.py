"""Flags and messages: --help and --help-all, --flag and --no-flag, errors of the library as flags."""

import re

import finetune
import pretrain
import pytest

from gluon_bert.cli import flags_of, with_flags


def flags_in(text):
    return re.findall(r"^  (?:-h, )?(--[a-z-]+)", text, re.MULTILINE)


@pytest.mark.parametrize("command", [pretrain, finetune])
def test_help_shows_at_most_16_flags_of_help_all(command, capsys):
    assert command.main(["--help"]) == 0
    basic = flags_in(capsys.readouterr().out)
    assert command.main(["--help-all"]) == 0
    everything = flags_in(capsys.readouterr().out)
    assert {"--help", "--help-all", "--batch-size"} <= set(basic) and len(basic) <= 16
    assert set(basic) < set(everything)


@pytest.mark.parametrize(
    "flags, expected",
    [
        ([], {}),
        (["--lowercase"], {"lowercase": True}),
        (["--no-lowercase"], {"lowercase": False}),
        (["--no-lowercase", "--lowercase"], {"lowercase": True}),
    ],
)
def test_flag_and_no_flag_set_a_boolean(flags, expected):
    given = vars(pretrain.parser().parse_args(flags))
    assert {name: given[name] for name in ("lowercase",) if name in given} == expected


@pytest.mark.parametrize("flags", [["--recompute", "yes"], ["--recompute=yes"], ["--no-lr"]])
def test_boolean_flag_with_a_value_is_refused(flags):
    with pytest.raises(SystemExit):
        pretrain.parser().parse_args(flags)


def test_flags_of_gives_back_the_options():
    options = {"recompute": True, "lowercase": False, "lr": 0.01, "preset": "quick"}
    given = vars(pretrain.parser().parse_args(flags_of(options)))
    assert {name: given[name] for name in options} == options


@pytest.mark.parametrize(
    "message, expected",
    [
        ("lr must be at most 1000.0, got 1e+30.", "--lr must be at most 1000.0, got 1e+30."),
        ("Use a smaller max_seq_length.", "Use a smaller --max-seq-length."),
        ("x has no effect without init=RUN.", "x has no effect without --init RUN."),
        ('Use tokenizer="wordpiece".', "Use --tokenizer wordpiece."),
        ("Use recompute=True with micro_batch=8.", "Use --recompute with --micro-batch 8."),
        ("it needs lowercase=False", "it needs --no-lowercase"),
        ("It may change corpus, lr, log_every.", "It may change --corpus, --lr, --log-every."),
        ("lr, units and seed must be the same.", "--lr, --units and --seed must be the same."),
        ("lr and the text must be the same.", "--lr and the text must be the same."),
        ("units must be 1.\nlr must be 2.", "--units must be 1.\n--lr must be 2."),
        ("the units of the text must be words", "the units of the text must be words"),
        ("run/config.json: max_seq_length must be 8.", "run/config.json: max_seq_length must be 8."),
        ("my_micro_batch.txt cannot be read", "my_micro_batch.txt cannot be read"),
    ],
)
def test_with_flags_replaces_names_of_options(message, expected):
    assert with_flags(message) == expected
