"""Benchmarks take turns, compare results and refuse bad flags."""

import dataclasses
import importlib.util
import json
import time

import benchmark
import numpy as np
import pytest
from benchmarks import encode, prepare, products, scale, train
from conftest import ROOT, skip_without_compiled_operators, small_text, untrained_run

from gluon_bert import ops
from gluon_bert.data.loader import load_pretraining_data
from gluon_bert.errors import InputError
from gluon_bert.export.evaluation_texts import validation_texts
from gluon_bert.presets import preset
from gluon_bert.run import load_run


@pytest.fixture
def run_folder(text_file, tmp_path):
    config = preset("bert-tiny").replace(
        corpus=(str(text_file),),
        max_seq_length=16,
        units=16,
        ffn_units=32,
        num_heads=2,
        validation_fraction=0.3,
        num_buckets=1,
    )
    return untrained_run(tmp_path / "run", config, load_pretraining_data(config.data, batch_size=8).vocab)


def test_encode_baselines_take_turns(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    turns = []

    def taking(name, *seconds):
        left = iter(seconds)

        def work():
            turns.append(name)
            now[0] += next(left)

        return work

    works = {"slow": taking("slow", 2, 4, 8), "fast": taking("fast", 1, 1, 8)}
    slow, fast = encode.in_rounds(works, rounds=3, units=16)
    assert turns == ["slow", "fast"] * 3
    assert slow.rates == [8, 4, 2]
    assert fast.rates == [16, 16, 2]
    assert fast.ratios == [2, 4, 1]
    assert (fast.rate, fast.ratio) == (16, 2)
    assert "fast                    16.0    2.00   1.00 .. 4.00" in encode.table("", [slow, fast])


def test_encode_refuses_different_vectors():
    vectors = np.zeros((3, 4), np.float32)
    encode.check_same_results({"plain": vectors, "same": vectors + 1e-6})
    for wrong in (vectors + 0.01, vectors + np.nan):
        with pytest.raises(InputError, match=r"the vectors of quick differ by .* from those of plain"):
            encode.check_same_results({"plain": vectors, "quick": wrong})


def test_encode_prints_and_writes_figures(run_folder, tmp_path, capsys):
    figures = tmp_path / "speed.json"
    command = ["encode", str(run_folder), "--against", "exported", "--rounds", "2", "--texts", "24"]
    assert benchmark.main([*command, "--json", str(figures)]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()[2:]] == ["plain", "encode", "exported"]
    content = json.loads(figures.read_text("utf-8"))["texts_per_second"]
    assert set(content) == {"plain", "encode", "exported"}
    assert all(len(each["rates"]) == len(each["ratios"]) == 2 for each in content.values())


def test_encode_reads_a_text_file(run_folder, tmp_path, capsys):
    texts = tmp_path / "texts.txt"
    texts.write_text("the crane\nthe river || the bird\n", "utf-8")
    command = ["encode", str(run_folder), "--against", "encode", "--rounds", "1", "--texts", "5"]
    assert benchmark.main([*command, "--text-file", str(texts)]) == 0
    assert "5 texts of 4 to 7 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in encode.ENCODERS if name not in ("plain", "served")])
def test_encode_baselines_compute_the_same_vectors(run_folder, tmp_path, name):
    if name == "encode-bf16" and ops.bf16_unsupported_reason():
        pytest.skip(ops.bf16_unsupported_reason())
    if encode.missing(name):
        pytest.skip(f"{' and '.join(encode.missing(name))} not installed")
    run = load_run(run_folder)
    texts = validation_texts(run, 12)
    run = dataclasses.replace(run, config=run.config.replace(corpus=()))  # as a converted run
    setup = encode.Setup(run, texts, tmp_path, None)
    expected = encode.plain(setup)(texts)
    atol = {"fp32": 1e-4, "bf16": 0.1, "int8": 0.3}[encode.precision_of(name)]
    np.testing.assert_allclose(encode.ENCODERS[name][0](setup)(texts), expected, atol=atol)


@pytest.fixture
def corpus(tmp_path):
    """A folder as WikiText-2's, with a few hundred pairs."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, count in (("train", 200), ("valid", 20)):
        paragraphs = small_text(count).replace("\n\n", "\t").replace("\n", " ").replace("\t", "\n")
        (folder / f"wiki.{name}.tokens").write_text(paragraphs, "utf-8")
    return folder


def test_train_measures_compiled_and_mxnet(corpus, tmp_path, capsys):
    skip_without_compiled_operators()
    figures = tmp_path / "speed.json"
    command = ["train", "--corpus", str(corpus), "--steps", "2", "--rounds", "1", "--json", str(figures)]
    assert benchmark.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["compiled", "mxnet"]
    assert "compiled: mxnet 1.9.1, operators: compiled for this processor, precision fp32" in lines
    (content,) = json.loads(figures.read_text("utf-8"))["cases"]
    ours, theirs = (content["rounds"][name][0] for name in ("compiled", "mxnet"))
    assert ours["pairs"] == theirs["pairs"] > 100
    assert ours["mlm_loss"] == pytest.approx(theirs["mlm_loss"], abs=0.2)
    assert ours["seconds"] > 0 < ours["cpu_seconds"]
    assert content["baselines"]["compiled"]["flop_per_pair"] > 1e6


def test_train_makes_a_table_per_length(articles, tmp_path, capsys):
    skip_without_compiled_operators()
    figures = tmp_path / "speed.json"
    command = ["train", "--preset", "bert-tiny", "--lengths", "16,24", "--batch-size", "4", "--steps", "1"]
    flags = ["--against", "mxnet", "--rounds", "1", "--corpus", str(articles), "--json", str(figures)]
    assert benchmark.main([*command, *flags]) == 0
    assert "bert-tiny, 4 pairs of at most 24 tokens" in capsys.readouterr().out
    short, long = (each["baselines"]["compiled"] for each in json.loads(figures.read_text("utf-8"))["cases"])
    assert long["flop_per_pair"] > 1.3 * short["flop_per_pair"]


def test_written_batches_match_the_loader(corpus, tmp_path):
    config = train.case_config("d2l", corpus, None, None)
    assert config == preset("d2l").replace(corpus=(str(corpus),))
    train.write_batches(config, 2, tmp_path / "batches.npz")
    first = next(load_pretraining_data(config.data, 512).train.epoch(0))
    with np.load(tmp_path / "batches.npz") as arrays:
        for name, array in vars(first).items():
            np.testing.assert_array_equal(arrays[f"{name}-0"], array)


def report(seconds, loss):
    return {
        "seconds": seconds,
        "cpu_seconds": 2 * seconds,
        "pairs": 8,
        "mlm_loss": loss,
        "peak_gigabytes": 0.5,
    }


def test_train_table_has_medians_and_ratios():
    rounds = {"compiled": [report(1, 5.0), report(4, 4.0)], "d2l": [report(2, 5.0), report(16, 4.1)]}
    details = {name: {"ready_seconds": 1.5, "software": "this"} for name in rounds}
    table = train.table("", rounds, details)
    assert (
        "d2l                       2.2   0.38   0.25 .. 0.50          1.1   0.38     0.50      1.5     4.100"
        in table
    )


def test_train_refuses_a_higher_loss():
    rounds = {"compiled": [report(1, 5.0)], "d2l": [report(2, 4.9)]}
    train.check_losses(rounds)
    for loss in (5.2, float("nan")):
        rounds["compiled"] = [report(1, loss)]
        with pytest.raises(InputError, match=r"loss of compiled must not exceed that of d2l, 4\.900, got"):
            train.check_losses(rounds)


def test_train_reports_the_last_line_of_a_baseline(tmp_path):
    config = train.case_config("d2l", tmp_path / "nowhere", None, None)
    with pytest.raises(InputError, match=r"compiled ended with status 1: .*nowhere"):
        train.Baseline("compiled", config, tmp_path, "1")
    with pytest.raises(InputError, match=r"the batches cannot be written: .*nowhere"):
        train.write_batches(config, 1, tmp_path / "batches.npz")


def test_train_refuses_bad_flags(run_folder, capsys):
    def printed(*arguments):
        assert benchmark.main([*arguments]) == 2
        return capsys.readouterr().err

    assert "--against must be some of compiled, compiled-bf16, mxnet, d2l" in printed(
        "train", "--against", "jax"
    )
    assert "--steps must be at least 1, got 0" in printed("train", "--steps", "0")
    assert "--batch-size must be at least 1, got 0" in printed("train", "--batch-size", "0")
    assert "--lengths must be numbers of at least 1" in printed("train", "--lengths", "x")
    assert "--preset must be some of " in printed("train", "--preset", "gpt")
    assert "--against d2l needs --preset d2l, got bert-tiny" in printed(
        "train", "--preset", "bert-tiny", "--against", "d2l"
    )
    assert "got " + str(run_folder) in printed("train", str(run_folder))
    assert "RUN must be given." in printed("encode")
    assert "{train,encode,prepare,scale,products} must be given." in printed()


def test_encode_refuses_bad_flags(run_folder, monkeypatch, capsys):
    def printed(*arguments):
        assert benchmark.main(["encode", str(run_folder), *arguments]) == 2
        return capsys.readouterr().err

    assert "--against must be some of plain, encode" in printed("--against", "numpy")
    shown = printed("--rounds", "0", "--texts", "-1", "--json", "/nowhere/at/all.json")
    assert "--rounds must be at least 1, got 0" in shown
    assert "--texts must be at least 1, got -1" in shown
    assert "the folder /nowhere/at does not exist" in shown
    monkeypatch.setitem(encode.ENCODERS, "served", (encode.served, ("no_such_package",)))
    assert "--against served needs the packages no_such_package" in printed("--against", "served")
    assert "served" not in encode.installed()


def test_prepare_makes_the_same_batch_each_time(corpus, tmp_path, capsys):
    figures = tmp_path / "speed.json"
    command = ["prepare", "--corpus", str(corpus), "--preprocessing-workers", "0,2", "--against", "cached"]
    assert benchmark.main([*command, "--rounds", "2", "--json", str(figures)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["workers-0", "workers-2", "cached"]
    rounds = json.loads(figures.read_text("utf-8"))["rounds"]
    assert len({each["first_batch"] for own in rounds.values() for each in own}) == 1
    assert all(len(own) == 2 and own[0]["seconds"] > 0 < own[0]["peak_gigabytes"] for own in rounds.values())
    medians = {name: min(each["seconds"] for each in own) for name, own in rounds.items()}
    assert medians["cached"] < medians["workers-2"]  # the others start without a cache


def test_prepare_table_has_medians_and_ratios():
    def rounds(*seconds):
        return [{"seconds": each, "peak_gigabytes": 0.5} for each in seconds]

    table = prepare.table("", 12.0, {"workers-0": rounds(2, 4), "d2l": rounds(20, 10)})
    assert "d2l               15.00     0.8   0.25   0.10 .. 0.40       0.50" in table


def test_prepare_refuses_different_batches():
    rounds = {"workers-0": [{"first_batch": "a"}], "d2l": [{"first_batch": "b"}]}
    prepare.check_same_batches(rounds)
    rounds["cached"] = [{"first_batch": "c"}]
    with pytest.raises(InputError, match="first batches must be equal, but differ between workers-0, cached"):
        prepare.check_same_batches(rounds)


def test_enlarged_text_repeats_the_paragraphs(corpus, tmp_path):
    folder = prepare.enlarged(corpus, 1, tmp_path / "large")
    made = (folder / "wiki.train.tokens").read_bytes()
    before = (corpus / "wiki.train.tokens").read_bytes().splitlines()
    assert 1e6 <= len(made) < 1e6 + 1000
    assert set(made.splitlines()) == set(before)
    assert made.splitlines()[: len(before)] != before
    assert (folder / "wiki.valid.tokens").read_bytes() == (corpus / "wiki.valid.tokens").read_bytes()
    again = prepare.enlarged(corpus, 1, tmp_path / "again")
    assert (again / "wiki.train.tokens").read_bytes() == made


def test_prepare_refuses_bad_flags(tmp_path, capsys):
    flags = ["--against", "jax", "--preprocessing-workers", "1,x", "--megabytes", "-1"]
    assert benchmark.main(["prepare", *flags]) == 2
    printed = capsys.readouterr().err
    assert "--against must be some of cached, d2l, got jax" in printed
    assert "--preprocessing-workers must be numbers of at least 0 with commas, such as 1,2," in printed
    assert "--megabytes must be at least 0, got -1" in printed
    assert benchmark.main(["prepare", "--corpus", str(tmp_path)]) == 2
    assert "lacks wiki.train.tokens and wiki.valid.tokens" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"workers-0 ended with status 1: .*nowhere"):
        prepare.Preparation("workers-0", tmp_path / "nowhere", tmp_path).make()


def test_scale_cases_differ_from_the_first_in_one_value():
    by = ["dist_sync", "horovod"]
    rows = scale.cases(by, ["bert-small", "bert-tiny"], [128, 64, 128], [16], [1, 4], [1, 2])
    assert rows == [
        ("bert-small", 128, 16, 1, 1, "device"),
        ("bert-tiny", 128, 16, 1, 1, "device"),
        ("bert-small", 64, 16, 1, 1, "device"),
        ("bert-small", 128, 16, 4, 1, "device"),
        ("bert-small", 128, 16, 1, 2, "dist_sync"),
        ("bert-small", 128, 16, 1, 2, "horovod"),
    ]


def test_products_measures_each_shape(tmp_path, monkeypatch, capsys):
    skip_without_compiled_operators()
    monkeypatch.setattr(products, "FLOP", 1.0)
    command = ["products", "--preset", "bert-tiny", "--tokens", "24", "--rounds", "1"]
    assert benchmark.main([*command, "--json", str(tmp_path / "products.json")]) == 0
    rows = json.loads((tmp_path / "products.json").read_text("utf-8"))["rows"]
    assert [row["rows"] for row in rows[:3]] == [24, 24, 24] and rows[2]["columns"] == 512
    assert all(rate > 0 for row in rows for found in row["gflops"].values() for rate in found)
    assert "gradient of expand       512 x   24 x  128" in capsys.readouterr().out


def test_products_matrices_have_the_shape():
    for shape in products.shapes("bert-tiny", 24):
        left, right = products.matrices(shape)
        assert (left @ right).shape == (shape.rows, shape.columns)


SCALE = ["scale", "--presets", "bert-tiny", "--lengths", "24", "--batch-sizes", "8"]


@pytest.fixture
def articles(corpus):
    """The corpus, with ten paragraphs per article."""
    for path in corpus.iterdir():
        lines = path.read_text("utf-8").splitlines()
        parts = (lines[start : start + 10] for start in range(0, len(lines), 10))
        path.write_text("".join(f" \n = Cranes = \n \n{chr(10).join(part)}\n" for part in parts), "utf-8")
    return corpus


def scaled(corpus, tmp_path, *flags):
    """Run the command and return the rows of its JSON."""
    figures = tmp_path / "scale.json"
    given = ["--corpus", str(corpus), "--rounds", "1", "--steps", "2", "--json", str(figures)]
    assert benchmark.main([*SCALE, *given, *flags]) == 0
    return json.loads(figures.read_text("utf-8"))["rows"]


def test_scale_contexts_share_the_steps(articles, tmp_path, capsys):
    skip_without_compiled_operators()
    rows = scaled(articles, tmp_path, "--contexts", "1,2", "--workers", "1")
    assert [row["contexts"] for row in rows] == [1, 2]
    one, two = (row["rounds"][0] for row in rows)
    assert one["pairs"] == two["pairs"] == 16
    assert one["tokens"] == two["tokens"] > 0.9 * 16 * 24  # packed
    assert one["flop"] == two["flop"] > 1e8
    assert one["load_balance"]["tokens"] == 1.0 >= two["load_balance"]["tokens"] > 0.9
    for each in (one, two):
        parts = each["parts"]
        assert parts["step"] == pytest.approx(sum(parts.values()) - parts["step"])
        assert min(parts["computing"], parts["updating"], each["peak_gigabytes"]) > 0
    assert [line.split()[:5] for line in capsys.readouterr().out.splitlines()[2:4]] == [
        ["bert-tiny", "24", "8", "1", "1"],
        ["bert-tiny", "24", "8", "2", "1"],
    ]


@pytest.mark.workers
def test_scale_workers_share_the_steps(articles, tmp_path):
    by = ["dist_sync"] + ["horovod"] * bool(importlib.util.find_spec("horovod"))
    flags = ["--contexts", "1", "--workers", "1,2", "--kvstore", ",".join(by)]
    one, *several = (row["rounds"][0] for row in scaled(articles, tmp_path, *flags))
    assert len(several) == len(by)
    for two in several:
        assert one["pairs"] == two["pairs"] == 16 and one["flop"] == two["flop"]
        assert two["parts"]["summing"] > one["parts"]["summing"]
        assert two["peak_gigabytes"] > 1.5 * one["peak_gigabytes"]
    assert several[0]["peak_gigabytes"] > 2 * one["peak_gigabytes"]  # includes a server


def test_scale_table_has_ratios_and_share_of_peak():
    def measured(seconds, tokens, fastest):
        parts = {"step": 2.0, "batch": 0.1, "computing": 1.0, "summing": 0.5, "updating": 0.4}
        work = {"pairs": 8, "tokens": tokens, "flop": 1e9, "peak_matmul_flops": fastest}
        return {"seconds": seconds, **work, "parts": parts, "peak_gigabytes": seconds}

    base, other = scale.cases(["dist_sync"], ["bert-small"], [128], [8], [1, 2], [1])
    rounds = {
        base: [measured(1, 1000, 4e9), measured(2, 1000, 2e9)],
        other: [measured(2, 1000, 1), measured(1, 1000, 1)],
    }
    table = scale.table("", rounds)
    reached = "6.0      750   1.25   0.50 .. 2.00          19%     2.00       50%       25%       20%"
    assert f"bert-small     128     8        2       1  device         {reached}" in table
    assert "peak of matrix products in this run: 4.0 GFLOP/s" in table


def test_scale_refuses_bad_flags_before_it_measures(corpus, monkeypatch, capsys, no_horovod):
    def printed(*flags):
        assert benchmark.main(["scale", "--corpus", str(corpus), *flags]) == 2
        return capsys.readouterr().err

    shown = printed(
        "--presets", "bert-tiny,bert-huge", "--lengths", "64,x", "--contexts", "0", "--workers", "1,,2"
    )
    assert "--presets must be some of demo, d2l, quick, thorough, bert-tiny" in shown
    assert "--lengths must be numbers of at least 1 with commas, such as 1,2, got 64,x" in shown
    assert "--contexts must be numbers of at least 1" in shown
    assert "--workers must be numbers of at least 1" in shown
    shown = printed("--lengths", "128,600", "--batch-sizes", "16,3")
    assert "--max-seq-length must be at most --max-positions 512, got 600" in shown
    assert "got 3. Use" not in shown  # as only the first row has two workers
    assert "the number of workers, 2, got 3. Use 2 or 4." in printed("--batch-sizes", "3")
    monkeypatch.setattr(scale, "machine_memory", lambda contexts: 2e9)
    shown = printed()
    assert "bert-base, 128 tokens, 16 pairs, 1 contexts, 1 workers: the run" in shown
    assert "bert-tiny" not in shown
    assert "--kvstore must be some of dist_sync, horovod, got device" in printed(
        "--kvstore", "dist_sync,device"
    )
    shown = printed("--presets", "bert-tiny", "--kvstore", "horovod")
    assert "2 workers by horovod: kvstore horovod needs Horovod built for MXNet (" in shown
    assert benchmark.main(["train", "--estimate"]) == 2
    assert "got --estimate. --help lists them." in capsys.readouterr().err


def test_scale_reports_the_last_line_of_a_row(tmp_path):
    row = scale.ScaleCase("bert-tiny", 24, 8, 1, 1)
    with pytest.raises(InputError, match=r"bert-tiny, 24 tokens, .* ended with status 1: .*nowhere"):
        row.measure(tmp_path / "nowhere", 1)


def sent_in_a_ring(size, members):
    """Bytes that a member sends in a ring: one round to sum, one round to distribute the sum."""
    return sum(size / members for _ in range(members - 1)) + sum(size / members for _ in range(members - 1))


def test_scale_estimate_follows_from_bytes_and_flops(capsys):
    assert scale.all_reduce_bytes(12.0, 4) == pytest.approx(sent_in_a_ring(12.0, 4))
    assert benchmark.main(["scale", "--estimate"]) == 0
    lines = capsys.readouterr().out.splitlines()
    page = (ROOT / "docs" / "performance.md").read_text("utf-8")
    assert "".join(f"    {line}\n" for line in lines) in page
    rows = [line.split() for line in lines if line.startswith("bert-")]
    assert [row[:2] for row in rows[::2]] == [
        ["bert-base", "128"],
        ["bert-base", "512"],
        ["bert-large", "128"],
        ["bert-large", "512"],
    ]
    gradients = 110e6 * 4  # bytes of the published BERT-Base
    assert float(rows[0][2]) == pytest.approx(gradients / 1e6, rel=0.01)
    computing, of_a_machine, *of_networks = (float(rows[0][place]) / 1e3 for place in (5, 7, 10, 13, 16))
    assert of_a_machine - computing == pytest.approx(sent_in_a_ring(gradients, 8) / 12e9, rel=0.02)
    sent = sent_in_a_ring(gradients, 32)
    for step, network in zip(of_networks, (1.25e9, 3.125e9, 12.5e9)):
        assert step - of_a_machine == pytest.approx(sent / network, rel=0.03)
    # Most FLOPs: six per token for each weight of the layers.
    assert computing * float(rows[0][4]) * 1e12 == pytest.approx(6 * 86e6 * 8192, rel=0.1)
