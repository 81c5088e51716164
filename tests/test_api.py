"""The Python API: pretrain, resume, load_run and what a run can do.

Runs of Python and of the command are alike.
"""

import threading

import numpy as np
import pretrain as command
import pytest
from conftest import small_text

import gluon_bert as gb
from gluon_bert.model.parameters import weights_of
from gluon_bert.presets import PRESETS
from gluon_bert.runtime import mx

SMALL = {
    "units": 16,
    "ffn_units": 16,
    "num_heads": 2,
    "num_layers": 1,
    "max_seq_length": 16,
    "batch_size": 16,
    "num_steps": 4,
    "log_every": 2,
    "checkpoint_every": 2,
}


def config_for(text_file, preset="d2l", **changes):
    return gb.preset(preset).replace(**{**SMALL, "corpus": str(text_file), **changes})


def flags_for(text_file, folder, **changes):
    values = {**SMALL, "corpus": str(text_file), "output": str(folder), "cpus": 1, **changes}
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def assert_same_weights(one, other):
    first, second = weights_of(one.net), weights_of(other.net)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(small_text(), "utf-8")
    return path


@pytest.fixture(scope="module")
def run(text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("api") / "run"
    return gb.pretrain(config_for(text_file), output=folder, devices=[mx.cpu(0)])


def test_pretrain_leaves_a_run_that_load_run_reads(run):
    again = gb.load_run(run.folder)
    assert (again.step, again.config) == (4, run.config)
    assert_same_weights(run, again)
    assert {path.name for path in run.folder.iterdir()} >= {
        "config.json",
        "log.jsonl",
        "losses.png",
        "vocab.json",
    }


def test_metrics_are_those_of_the_log(run):
    assert run.metrics["validation"]["step"] == run.best_step == 4
    assert run.metrics["validation"]["mlm_loss"] > 0 and run.metrics["train"]["step"] == 4


def test_pretrain_equals_the_command(run, text_file, tmp_path):
    assert command.main(["--preset", "d2l", *flags_for(text_file, tmp_path / "run")]) == 0
    assert_same_weights(run, gb.load_run(tmp_path / "run"))


@pytest.mark.parametrize("first, second", [("python", "command"), ("command", "python")])
def test_resume_continues_runs_of_python_and_command(run, text_file, tmp_path, first, second):
    folder = tmp_path / "run"
    if first == "python":
        gb.pretrain(config_for(text_file, num_steps=2), output=folder, devices=[mx.cpu(0)])
    else:
        assert command.main(["--preset", "d2l", *flags_for(text_file, folder, num_steps=2)]) == 0
    if second == "python":
        resumed = gb.resume(folder, num_steps=4)
    else:
        assert command.main(["--resume", str(folder), "--num-steps", "4"]) == 0
        resumed = gb.load_run(folder)
    assert_same_weights(resumed, run)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains_from_python(name, text_file, tmp_path):
    small = {**SMALL, "num_steps": 1, "min_freq": 1}
    run = gb.pretrain(
        gb.preset(name).replace(corpus=str(text_file), **small), output=tmp_path / "run", devices=[mx.cpu(0)]
    )
    assert run.step == 1


def test_pretrain_works_in_another_thread(text_file, tmp_path):
    runs = []
    thread = threading.Thread(
        target=lambda: runs.append(gb.pretrain(config_for(text_file, num_steps=1), tmp_path / "run"))
    )
    thread.start()
    thread.join()
    assert runs[0].step == 1


def test_resume_without_a_checkpoint_starts_at_step_0(run, text_file, tmp_path, monkeypatch, caplog):
    folder = tmp_path / "run"

    def killed(*_, **__):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("gluon_bert.pretraining._train", killed)
        with pytest.raises(MemoryError):
            gb.pretrain(config_for(text_file), output=folder, devices=[mx.cpu(0)])
    caplog.set_level("INFO")
    resumed = gb.resume(folder)
    assert "has no checkpoint yet: it starts at step 0" in caplog.text
    assert_same_weights(resumed, run)


def test_resume_auto_starts_and_then_continues(run, text_file, tmp_path, capsys):
    flags = ["--preset", "d2l", "--resume", "auto"]
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)  # of a start that was killed at once
    assert command.main([*flags, *flags_for(text_file, folder, num_steps=2)]) == 0
    assert command.main([*flags, *flags_for(text_file, folder)]) == 0
    assert_same_weights(run, gb.load_run(folder))
    assert command.main([*flags, *flags_for(text_file, folder, units=32)]) == 2
    assert "units" in capsys.readouterr().err


def test_encode_poolings_are_those_of_the_token_vectors(run):
    texts = ["a crane is flying", ("it rained", "she left")]
    reader = run.reader
    inputs = [reader.text("a crane is flying"), reader.text("it rained", "she left")]
    for pooling, pool in {
        "mean": lambda v: v.mean(0),
        "max": lambda v: v.max(0),
        "cls": lambda v: v[0],
    }.items():
        for found, text in zip(run.encode(texts, pooling=pooling), inputs):
            arrays = ([text.ids], [text.token_types], [len(text)])
            vectors = run.net.encoder(*(mx.nd.array(each) for each in arrays))[0].asnumpy()
            np.testing.assert_allclose(found, pool(vectors[: len(text)]), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(run.encode(texts, normalize=True), axis=1), 1, rtol=1e-6)
    assert run.encode([]).shape == (0, 16)
    with pytest.raises(gb.InputError, match="texts must be a list of texts, got the string 'a crane'"):
        run.encode("a crane")
    for wrong in (3, ("a", "b", "c"), ("a", None)):
        with pytest.raises(gb.InputError, match="a text must be a string or a pair of strings, got"):
            run.encode([wrong])
    with pytest.raises(gb.InputError, match="pooling must be one of mean, cls, max, got 'sum'"):
        run.encode(texts, pooling="sum")


def test_fill_mask_and_next_sentence_give_probabilities(run):
    (words,) = run.fill_mask("the <mask> is flying", top=len(run.vocab))
    assert sum(probability for _, probability in words) == pytest.approx(1, abs=1e-4)
    assert words == sorted(words, key=lambda pair: -pair[1])
    assert 0 < run.next_sentence("it rained", "she left") < 1
    with pytest.raises(gb.InputError):
        run.predict(["a text"])


def test_a_corpus_may_be_a_string():
    assert gb.preset("quick").replace(corpus="wikitext-2").data.corpus == ("wikitext-2",)


def test_memory_estimate_can_be_ignored(text_file, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("gluon_bert.training.memory_plan.machine_memory", lambda _: 1000)
    with pytest.raises(gb.InputError, match="ignore_memory_estimate"):
        gb.pretrain(config_for(text_file), output=tmp_path / "run", devices=[mx.cpu(0)])
    assert not (tmp_path / "run").exists()
    run = gb.pretrain(
        config_for(text_file, num_steps=1), tmp_path / "run", [mx.cpu(0)], ignore_memory_estimate=True
    )
    assert run.step == 1 and "trains anyway" in caplog.text
