"""Shared fixtures: small texts, the real corpus if it is there, a separate data folder."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
from pathlib import Path

import pytest

from gluon_bert.data.prepared import prepare
from gluon_bert.errors import InputError

# Threads that wait must not spin: as many test files run at once as there are cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
ROOT = Path(__file__).resolve().parent.parent
WIKITEXT = ROOT.parent / "shared" / "wikitext-2"


@pytest.fixture(scope="session", autouse=True)
def data_home(tmp_path_factory):
    """MXNet's data folder, where downloads and prepared text go; never the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("mxnet")
        patch.setenv("MXNET_HOME", str(folder))
        yield folder


@pytest.fixture
def no_horovod(monkeypatch):
    """As if Horovod were not installed."""
    loaded = [name for name in sys.modules if name.startswith("horovod.")]
    for name in ("horovod", *loaded):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture(scope="session")
def wikitext():
    """The folder of the real WikiText-2."""
    if not (WIKITEXT / "wiki.train.tokens").is_file():
        pytest.skip(f"WikiText-2 is not at {WIKITEXT}")
    return WIKITEXT


@pytest.fixture(scope="session")
def wikitext_prepared(wikitext):
    """The real WikiText-2 as ids, as the preset d2l prepares it."""
    from gluon_bert.presets import preset

    return prepare(preset("d2l").replace(corpus=(str(wikitext),)).data)


def skip_without_compiled_operators():
    """Skip where the compiled operators cannot be had, with the reason."""
    from gluon_bert import ops

    if ops.describe() != "compiled for this processor":
        pytest.skip(f"the operators are {ops.describe()}")


def skip_without(format):
    """Skip where this machine cannot run an export of this format, with the reason."""
    if format in ("onnx", "onnx-int8"):
        missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
        if missing:
            pytest.skip(f"the extra onnx is not installed: there is no {' and no '.join(missing)}")
    from gluon_bert.export.exporter import CPU_CHECKS

    try:
        CPU_CHECKS.get(format, lambda: None)()
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture
def text_file(tmp_path):
    """A file of 200 documents of two to six short sentences, a sentence a line."""
    path = tmp_path / "text.txt"
    path.write_text(small_text(), "utf-8")
    return path


@pytest.fixture
def command(request, text_file, tmp_path):
    """Runs tools/pretrain.py with the module's SMALL flags on a small text; returns status and folder."""
    import pretrain

    def run(*flags, name="run"):
        folder = tmp_path / name
        small = [*request.module.SMALL, "--corpus", str(text_file), "--output", str(folder)]
        return pretrain.main([*small, *flags]), folder

    return run


def untrained_run(folder: Path, config, vocab):
    """A run's folder with the weights that its network begins with, as after one step; returns the folder."""
    from gluon_bert.checkpoint import save_checkpoint
    from gluon_bert.model.bert import BERTModel
    from gluon_bert.run import create_run
    from gluon_bert.runtime import mx

    net = BERTModel(len(vocab), config.model)
    net.initialize(ctx=[mx.cpu()], seed=0)
    net.hybridize()
    create_run(folder, config, vocab)
    save_checkpoint(folder, net, 1)
    return folder


def small_text(num_documents: int = 200, seed: int = 0) -> str:
    """Sentences of a small grammar, so that a small model can learn something."""
    rng = random.Random(seed)
    nouns = ["crane", "bird", "driver", "city", "river", "tower", "storm", "engine"]
    verbs = ["lifts", "sees", "leaves", "finds", "passes", "follows"]
    documents = []
    for _ in range(num_documents):
        noun = rng.choice(nouns)
        count = rng.randint(2, 6)
        lines = [
            f"the {noun} {rng.choice(verbs)}" + rng.choice(["", " it", f" the {rng.choice(nouns)}"]) + " ."
            for _ in range(count)
        ]
        documents.append("\n".join(lines))
    return "\n\n".join(documents) + "\n"


def pytest_addoption(parser):
    parser.addoption(
        "--kills",
        type=int,
        default=5,
        help="how often the run of test_resume.py is killed (5; tried with 100)",
    )


@pytest.fixture
def kills(request):
    """How often a run is killed."""
    return request.config.getoption("--kills")
