"""Warm starts: what a run takes from an earlier one, what is refused, and new words."""

import json

import numpy as np
import pretrain
import pytest
from conftest import small_text
from support.runs import SIZES
from support.token_vectors import encode

from gluon_bert.data.prepared import prepare
from gluon_bert.data.vocab import Vocabulary
from gluon_bert.data.wordpiece import SPECIAL_TOKENS, WordPieceVocabulary
from gluon_bert.errors import InputError
from gluon_bert.inference.predictor import Predictor
from gluon_bert.model.parameters import weights_of
from gluon_bert.presets import preset
from gluon_bert.run import load_run
from gluon_bert.warm_start import load_initial_weights

SMALL = [*SIZES, "--batch-size", "16", "--num-steps", "3"]
# So small that a step changes nothing that float32 can hold.
STILL = ["--lr", "1e-12", "--num-steps", "1", "--weight-decay", "0"]


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """Runs to start from, of words and of word pieces, and a corpus with new words."""
    folder = tmp_path_factory.mktemp("before")
    (folder / "first.txt").write_text(small_text(), "utf-8")
    domain = small_text(80, seed=1).replace("tower", "turbine").replace("follows", "lifting")
    (folder / "domain.txt").write_text(domain, "utf-8")
    for name, flags in (
        ("words", ["--preset", "d2l"]),
        (
            "pieces",
            ["--preset", "bert-tiny", "--num-heads", "2", "--tokenizer", "wordpiece", "--vocab-size", "60"],
        ),
    ):
        command = [*flags, *SMALL, "--corpus", str(folder / "first.txt"), "--output", str(folder / name)]
        assert pretrain.main(command) == 0
    return folder


def go_on(before, name, output, *flags):
    corpus = ["--corpus", str(before / "domain.txt")]
    return pretrain.main(["--init", str(before / name), *corpus, "--output", str(output), *flags])


both = pytest.mark.parametrize("name", ["words", "pieces"])


@both
def test_init_takes_weights_network_and_vocabulary(before, name, tmp_path):
    assert go_on(before, name, tmp_path / "run", *STILL) == 0
    old, new = load_run(before / name), load_run(tmp_path / "run")
    assert new.vocab.tokens == old.vocab.tokens
    assert new.config.model == old.config.replace(init=str(before / name)).model
    assert new.config.data.max_seq_length == old.config.data.max_seq_length
    after = weights_of(new.net)
    for parameter, array in weights_of(old.net).items():
        np.testing.assert_allclose(after[parameter], array, atol=1e-7)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["environment"]["init_step"] == 3


@both
def test_extend_vocab_changes_no_output_before_training(before, name, tmp_path, capsys):
    assert go_on(before, name, tmp_path / "run", *STILL, "--extend-vocab", "50") == 0
    old, new = load_run(before / name), load_run(tmp_path / "run")
    known = len(old.vocab)
    assert new.vocab.tokens[:known] == old.vocab.tokens
    assert {"turbine", "lifting"} <= set(new.vocab.tokens[known:])
    word = {"words": "turbine", "pieces": "lifting"}[name]
    before_words = [old.vocab.pieces(word), new.vocab.pieces(word)]
    if name == "words":
        # An unknown word was <unk>; the new row is that row.
        one, other = (encode(run.net, run.vocab, ["the", "turbine"]) for run in (old, new))
        np.testing.assert_allclose(one.asnumpy(), other.asnumpy(), atol=1e-5)
    else:
        assert len(before_words[0]) > 1
        assert before_words[1] == ["lifting"]
    ids, row = old.vocab.to_indices(before_words[0]), new.vocab.to_indices([word])[0]
    for parameter in ("encoder.embeddings.tokens.weight", "mlm.decoder.bias"):
        was, now = weights_of(old.net)[parameter], weights_of(new.net)[parameter]
        np.testing.assert_allclose(now[row], was[ids].mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(now[:known], was, atol=1e-6)
    asked = ["the", old.vocab.tokens[old.vocab.mask], "."]
    (one,), (other,) = (Predictor.of(run).predict([run.reader.tokens(asked)]) for run in (old, new))
    np.testing.assert_allclose(other.mask_scores[:, :known], one.mask_scores, atol=1e-5)


def test_config_of_an_init_run_repeats_it(before, tmp_path):
    assert go_on(before, "words", tmp_path / "one", "--extend-vocab", "3", "--num-steps", "2") == 0
    config = tmp_path / "one" / "config.json"
    assert pretrain.main(["--config", str(config), "--output", str(tmp_path / "two")]) == 0
    one, two = (weights_of(load_run(tmp_path / name).net) for name in ("one", "two"))
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])


def test_init_run_is_resumed(before, tmp_path):
    assert go_on(before, "words", tmp_path / "run", "--extend-vocab", "3", "--num-steps", "2") == 0
    assert pretrain.main(["--resume", str(tmp_path / "run"), "--num-steps", "3"]) == 0
    assert load_run(tmp_path / "run").step == 3


def test_preset_gives_the_recipe_init_the_network(before, tmp_path):
    assert (
        go_on(before, "words", tmp_path / "run", "--preset", "bert-base", *STILL, "--max-seq-length", "16")
        == 0
    )
    config = load_run(tmp_path / "run").config
    assert (config.model.units, config.model.activation) == (16, "relu")
    assert (config.train.optimizer, config.data.pairs) == ("bertadam", "packed")


def test_init_from_a_run_with_vectors_of_the_text(before, tmp_path, capsys):
    first = ["--preset", "d2l", *SMALL, "--corpus", str(before / "first.txt"), "--num-steps", "1"]
    first += ["--init-embeddings", "cooccurrence", "--output", str(tmp_path / "first")]
    assert pretrain.main(first) == 0
    init = ["--init", str(tmp_path / "first"), "--corpus", str(before / "domain.txt"), *STILL]
    assert pretrain.main([*init, "--output", str(tmp_path / "second")]) == 0
    old, new = (weights_of(load_run(tmp_path / name).net) for name in ("first", "second"))
    for name, array in old.items():
        np.testing.assert_allclose(new[name], array, atol=1e-7)
    flags = ["--init-embeddings", "cooccurrence", "--output", str(tmp_path / "third")]
    assert pretrain.main([*init, *flags]) == 2
    assert "--init-embeddings has no effect with --init RUN" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--units", "32"], "--init {0} needs --units 16, got --units 32"),
        (["--tied-decoder"], "--init {0} needs --no-tied-decoder, got --tied-decoder"),
        (
            ["--position", "relative-bias"],
            "--init {0} needs --position absolute, got --position relative-bias",
        ),
        (["--tokenizer", "wordpiece"], "--init {0} needs --tokenizer words, got --tokenizer wordpiece"),
        (["--no-lowercase"], "--init {0} needs --lowercase, got --no-lowercase"),
        (["--vocab-file", "x.json"], "--init {0} needs --vocab-file {0}/vocab.json, got --vocab-file x.json"),
        (["--vocab-size", "100"], "--vocab-size has no effect without --tokenizer wordpiece"),
        (["--max-seq-length", "2000"], "--max-seq-length must be at most --max-positions 1000, got 2000"),
        (["--init-checkpoint", "9"], "--checkpoint must be one of"),
    ],
)
def test_init_contradicting_options_are_refused(before, flags, message, tmp_path, capsys):
    assert go_on(before, "words", tmp_path / "run", *flags) == 2
    assert message.format(before / "words") in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_init_without_a_run_is_refused(before, tmp_path, capsys):
    assert go_on(before, "xaveir", tmp_path / "run") == 2
    assert "--init must be xavier, normal or the folder of a run, got " in capsys.readouterr().err


def test_init_with_another_vocabulary_is_refused(before):
    run = load_run(before / "words")
    with pytest.raises(InputError, match="vocab_file must begin with the"):
        load_initial_weights(run.net, Vocabulary(["crane"]), run)


# The vocabulary alone


def test_extend_vocab_wordpiece_adds_whole_words():
    vocab = WordPieceVocabulary([*SPECIAL_TOKENS, "t", "##u", "##r", "crane"])
    counts = {"tur": 9, "crane": 8, "[MASK]": 7, "<unk>": 7, "tu": 9, "t": 3, "rare": 1, "x" * 101: 5}
    more = vocab.extended(counts, 9, min_freq=2)
    assert more.tokens == [*vocab.tokens, "tu", "tur"]
    assert vocab.extended(counts, 1, min_freq=2).tokens[-1] == "tu"
    assert vocab.extended(counts, 0, min_freq=2) is vocab


def test_vocab_file_of_words_is_used(text_file, tmp_path):
    Vocabulary(["crane", "zebra"]).save(tmp_path / "vocab.json")
    config = preset("d2l").replace(
        corpus=(str(text_file),), vocab_file=str(tmp_path / "vocab.json"), min_freq=1
    )
    first = prepare(config.data, tmp_path / "cache")
    assert first.vocab.tokens[5:] == ["crane", "zebra"]
    more = prepare(config.replace(extend_vocab=2).data, tmp_path / "cache")
    assert len(more.vocab) == 9
    assert more.fingerprint != first.fingerprint
