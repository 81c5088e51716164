"""The estimate before the first step, against networks, batches and papers; runs that cannot fit are
refused."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pretrain
import pytest
from conftest import ROOT
from support.compiled_operators import VARIANTS
from support.runs import SMALL_SIZES

from gluon_bert import checkpoint, run, system
from gluon_bert.data.loader import load_pretraining_data
from gluon_bert.errors import InputError
from gluon_bert.model.bert import BERTModel
from gluon_bert.model.task import Task
from gluon_bert.presets import PRESETS, preset
from gluon_bert.system import machine_memory
from gluon_bert.training import resources as plans
from gluon_bert.training.gpu_memory import estimate_gpu_memory
from gluon_bert.training.resources import (
    Workload,
    check_memory,
    estimate_resources,
    flops_per_pair,
    max_masked,
    num_outputs,
)

SMALL = [*SMALL_SIZES, "--batch-size", "64", "--num-steps", "2"]
LARGE = preset("bert-large").replace(max_seq_length=512)
CPU = [SimpleNamespace(device_type="cpu")]


def memory(config, num_contexts=1, compiled=True, vocab_size=30522, **changes):
    return estimate_resources(Workload(config.replace(**changes), vocab_size, num_contexts), compiled).memory


@pytest.mark.parametrize("model", VARIANTS.values(), ids=VARIANTS)
def test_parameter_count_equals_the_network(model):
    parameters = BERTModel(50, model).collect_params().values()
    count = sum(int(np.prod(parameter.shape)) for parameter in parameters)
    assert plans.parameter_count(model, 50) == count


def test_presets_have_the_published_parameter_counts():
    """Devlin et al. 2018, section 3: 110 M and 340 M; Turc et al. 2019, table 1: 4.4 M to 41.7 M."""
    millions = {name: plans.parameter_count(PRESETS[name].model, 30522) / 1e6 for name in PRESETS}
    assert millions["bert-large"] == pytest.approx(340, rel=0.02)
    assert millions["bert-base"] == pytest.approx(110, rel=0.01)
    assert millions["bert-medium"] == pytest.approx(41.7, rel=0.02)
    assert millions["bert-tiny"] == pytest.approx(4.4, rel=0.02)


def test_flops_equal_the_published():
    """Jiao et al. 2020 (TinyBERT), table 1: BERT-base takes 22.5 G forward, of 128 tokens without heads."""
    base = preset("bert-base").model
    assert flops_per_pair(base, 30522, 128, 0) / 3 == pytest.approx(22.5e9, rel=0.02)
    decoder = flops_per_pair(base, 30522, 128, 10) - flops_per_pair(base, 30522, 128, 0)
    assert decoder == 10 * 6 * (768 * 768 + 768 * 30522)


def test_flops_of_few_outputs_lack_the_other_queries_of_the_last_layer():
    """Its query, output and feed-forward matrices, and both products of attention."""
    base = preset("bert-base").model
    whole, few = (flops_per_pair(base, 30522, 128, 0, outputs) for outputs in (None, 28))
    of_query = 2 * (2 * 768 * 768 + 2 * 768 * 3072) + 2 * 2 * 128 * 768
    assert whole - few == 100 * 3 * of_query
    assert flops_per_pair(base, 30522, 128, 0, 128) == whole


def test_num_outputs_counts_cls_and_masked_tokens_of_compiled_operators():
    tagging, classes = (Task(kind, False, ("a", "b")) for kind in ("tagging", "classification"))
    assert num_outputs(19, compiled=True) == 20
    assert num_outputs(0, compiled=True, task=classes) == 1
    assert num_outputs(19, compiled=False) is num_outputs(0, compiled=True, task=tagging) is None


@pytest.mark.parametrize("preparation", ["bert", "d2l"])
def test_max_masked_is_the_most_of_any_pair(tmp_path, preparation):
    text_file = tmp_path / "text.txt"  # pairs of 21 words, which are 24 tokens
    sentence = " ".join(f"w{i}" for i in range(10))
    document = f"{sentence}\n{sentence} end\n" * 3
    text_file.write_text("\n".join([document] * 20), "utf-8")
    config = preset("bert-tiny").replace(
        corpus=(str(text_file),),
        max_seq_length=24,
        pairs="sentences",
        preparation=preparation,
        min_freq=1,
        num_buckets=1,
    )
    data = load_pretraining_data(config.data, 16)
    counts = [n for batch in data.train.epoch(0) for n in np.bincount(batch.masked_positions[0])]
    assert max(counts) == max_masked(config)


# Memory


def test_micro_batch_and_recompute_take_less_memory():
    for compiled in (True, False):
        sizes = [memory(LARGE, compiled=compiled, micro_batch=n) for n in (1, 2, 8, 256)]
        twice = [memory(LARGE, compiled=compiled, micro_batch=n, recompute=True) for n in (1, 2, 8, 256)]
        assert sizes == sorted(sizes) and twice == sorted(twice)
        assert all(less < more for less, more in zip(twice, sizes))
        assert memory(LARGE, 2, compiled) > memory(LARGE, 1, compiled)
    model = estimate_resources(Workload(LARGE, 30522), True).model
    assert model == 16 * plans.parameter_count(LARGE.model, 30522)


def test_fp16_shrinks_activations_of_a_gpu():
    def estimated(precision, batch_size):
        return estimate_gpu_memory(Workload(LARGE.replace(precision=precision, batch_size=batch_size), 30522))

    kept = [estimated(precision, 64) for precision in ("fp32", "fp16")]
    assert 0.6 * kept[0].activations < kept[1].activations < 0.9 * kept[0].activations
    assert kept[0].model == kept[1].model
    one = [estimated(precision, 1) for precision in ("fp32", "fp16")]
    assert one[1].activations > one[0].activations  # the float16 copy of the weights


STEPS = """
import sys
import numpy as np
sys.path.insert(0, "tests")
from support import reference_bert as reference
from gluon_bert import ops
from gluon_bert.model.bert import BERTModel
from gluon_bert.presets import preset
from gluon_bert.runtime import mx
from gluon_bert.system import peak_memory
from gluon_bert.training.resources import Workload, estimate_resources
from gluon_bert.training.trainer import Trainer

config = preset("bert-mini").replace(batch_size=16, micro_batch=8, max_seq_length=128, recompute={recompute})
before = peak_memory()
net = BERTModel(30522, config.model)
net.initialize(ctx=[mx.cpu()])
net.hybridize()
trainer = Trainer(net, config.train, [mx.cpu()])
for seed in range(3):
    trainer.step(reference.random_batch([128] * 16, 128, 30522, seed))
    mx.nd.waitall()
expected = estimate_resources(Workload(config, 30522), ops.compiled([mx.cpu()]))
print(peak_memory() - before, expected.model + expected.activations)
"""


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("operators", ["auto", "mxnet"])
def test_steps_take_about_the_estimated_memory(operators, recompute):
    if not Path("/proc/self/status").is_file():
        pytest.skip("the memory of a process is not message here")
    environment = {**os.environ, "GLUON_BERT_OPERATORS": operators}
    code = [sys.executable, "-c", STEPS.replace("{recompute}", str(recompute))]
    done = subprocess.run(code, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    taken, expected = map(float, done.stdout.split())
    assert 0.6 * expected < taken < 1.4 * expected


# Where there is too little


def test_too_large_run_is_refused_with_what_fits():
    with pytest.raises(InputError) as refused:
        check_memory(Workload(LARGE, 30522), True, 24 * 2**30)
    message = str(refused.value)
    assert message.startswith("the run needs about ")
    assert "and the machine has 25.8 GB. Use micro_batch=" in message
    assert len(message.splitlines()) == 1
    alone, twice = message.split("Use ")[1].rstrip(".").split(" or ")
    micro_batch, again = int(alone.split("=")[-1]), int(twice.split("=")[-1])
    assert twice == f"recompute=True with micro_batch={again}" and 1 <= micro_batch < again < 256
    check_memory(Workload(LARGE.replace(micro_batch=micro_batch), 30522), True, 24 * 2**30)
    check_memory(Workload(LARGE.replace(micro_batch=again, recompute=True), 30522), True, 24 * 2**30)


def test_recompute_alone_or_nothing_may_fit():
    needed = memory(LARGE, batch_size=16, recompute=True)
    with pytest.raises(InputError, match=r"Use micro_batch=\d+ or recompute=True\.$"):
        check_memory(Workload(LARGE.replace(batch_size=16), 30522), True, needed / plans.SAFE + 1)
    with pytest.raises(InputError, match="Use a smaller network or a smaller max_seq_length"):
        check_memory(Workload(LARGE, 30522, 2), True, 4e9)
    with pytest.raises(InputError, match=r"Use micro_batch=\d+\.$"):
        check_memory(Workload(LARGE.replace(recompute=True), 30522), True, 12e9)


def test_command_refuses_before_reading_or_writing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(system, "machine_memory", lambda contexts: 8e9)
    flags = ["--corpus", str(tmp_path / "none"), "--output", str(tmp_path / "run"), "--preset", "bert-large"]
    assert pretrain.main(flags) == 2
    err = capsys.readouterr().err
    assert "pretrain: the run needs about" in err
    assert not (tmp_path / "run").exists() and "none" not in err


@pytest.fixture
def room(monkeypatch):
    """The machine has as much memory as is said."""
    return lambda count: monkeypatch.setattr(
        "gluon_bert.training.memory_plan.machine_memory", lambda devices: count
    )


def test_command_prints_estimate_and_resumes_with_less(command, capsys, room):
    status, folder = command()
    err = capsys.readouterr().err
    assert status == 0
    assert "memory expected: 0.3 GB of " in err and "activations of 64 pairs 0.0 GB" in err
    assert "a step: 64 pairs, 128 masked tokens at most, " in err
    assert re.search(r"^memory taken: \d+\.\d GB at the peak, 0\.3 GB expected$", err, re.M)
    room(1e8)
    assert pretrain.main(["--resume", str(folder), "--num-steps", "3"]) == 2
    assert "Use a smaller network or a smaller --max-seq-length" in capsys.readouterr().err
    room(None)
    smaller = ["--micro-batch", "16", "--recompute"]
    assert pretrain.main(["--resume", str(folder), "--num-steps", "3", *smaller]) == 0
    assert "activations of 16 pairs" in capsys.readouterr().err
    assert checkpoint.steps(folder)[-1] == 3
    assert dataclasses.asdict(run.read_config(folder / "config.json").train)["micro_batch"] == 16


# How much there is


def files(**texts):
    """Reads these files and no others."""

    def read(path):
        try:
            return texts[str(path)]
        except KeyError:
            raise FileNotFoundError(path) from None

    return read


GROUPS = "/sys/fs/cgroup"


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ({"/proc/self/cgroup": "0::/a/b\n", f"{GROUPS}/a/b/memory.max": "5000\n"}, 5000),
        (
            {
                "/proc/self/cgroup": "0::/a/b\n",
                f"{GROUPS}/a/b/memory.max": "max",
                f"{GROUPS}/a/memory.max": "7",
            },
            7,
        ),
        ({"/proc/self/cgroup": "0::/outside\n", f"{GROUPS}/memory.max": "6000\n"}, 6000),
        (
            {
                "/proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/job\n0::/\n",
                f"{GROUPS}/memory/job/memory.limit_in_bytes": "4000",
                f"{GROUPS}/memory/memory.limit_in_bytes": "9223372036854771712",
            },
            4000,
        ),
    ],
    ids=["version 2", "a group above", "inside a container", "version 1"],
)
def test_machine_memory_respects_a_container_limit(texts, expected):
    assert machine_memory(CPU, files(**texts)) == expected


def test_machine_memory_without_a_limit_is_physical():
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert machine_memory(CPU, files()) == physical
    unlimited = files(**{"/proc/self/cgroup": "0::/\n", f"{GROUPS}/memory.max": "max\n"})
    assert machine_memory(CPU, unlimited) == physical
    assert 0 < machine_memory(CPU) <= physical
    assert machine_memory([SimpleNamespace(device_type="gpu")]) is None  # whose memory is another


def test_peak_memory_is_that_of_the_system():
    status = {"/proc/self/status": "Name:\tpython\nVmHWM:\t  2048 kB\nVmRSS:\t 1024 kB\n"}
    assert system.peak_memory(files(**status)) == 2048 * 1024
    assert system.peak_memory(files()) is None
    assert system.peak_memory(files(**{"/proc/7/status": "VmHWM: 1 kB\n"}), process=7) == 1024
    one = estimate_resources(Workload(preset("d2l"), 100), True)
    assert one.outcome(2e9).startswith("memory taken: 2.0 GB at the peak, ")


def test_threads_are_those_of_the_environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert system.threads() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert system.threads() >= 1


def test_estimate_needs_no_mxnet():
    code = "import sys, gluon_bert.training.resources; sys.exit('mxnet' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
