"""Event files for TensorBoard have the figures of the log, also after a crash and a resumption."""

import math
import sys
from types import SimpleNamespace

import pytest
from conftest import small_text
from support.runs import log_of

import gluon_bert as gb
from gluon_bert.errors import InputError
from gluon_bert.runtime import mx
from gluon_bert.training.state import StepReport, TrainState
from gluon_bert.training.tensorboard import TRAIN, VALIDATION, TensorBoardLogger

REASON = "needs the extra tensorboard"
FIGURES = {name: f"training/{name}" for name in ("gradient_norm", "pairs_per_second")}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(small_text(), "utf-8")
    return gb.preset("d2l").replace(
        corpus=str(path),
        units=16,
        ffn_units=16,
        num_layers=1,
        max_seq_length=16,
        batch_size=16,
        num_steps=8,
        log_every=1,
        eval_every=4,
        checkpoint_every=3,
        validation_fraction=0.2,
    )


def events_of(folder):
    """Return TensorBoard's reading of a folder."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason=REASON
    ).EventAccumulator(str(folder), purge_orphaned_data=True, size_guidance={"scalars": 0, "tensors": 0})
    return accumulator.Reload()


def curve(events, tag):
    return [(each.step, pytest.approx(each.value, rel=1e-6)) for each in events.Scalars(tag)]


def assert_curves_are_those_of_the_log(folder):
    windows = [record for record in log_of(folder) if "lr" in record]
    train = events_of(folder / "tensorboard" / TRAIN)
    names = {
        **FIGURES,
        "lr": "training/learning_rate",
        "mlm_loss": "loss/mlm",
        "nsp_loss": "loss/nsp",
        "mlm_accuracy": "accuracy/mlm",
    }
    for name, tag in names.items():
        assert curve(train, tag) == [(record["step"], record[name]) for record in windows], name
    validation = events_of(folder / "tensorboard" / VALIDATION)
    evaluated = log_of(folder, "validation")
    for name, tag in (("mlm_loss", "loss/mlm"), ("perplexity", "perplexity")):
        expected = [(record["step"], record["validation"][name]) for record in evaluated]
        assert curve(validation, tag) == expected, name


def test_pretrain_tensorboard_equals_the_log(config, tmp_path):
    pytest.importorskip("tensorboardX", reason=REASON)
    gb.pretrain(config, tmp_path / "run", [mx.cpu(0)], tensorboard=True)
    assert_curves_are_those_of_the_log(tmp_path / "run")


class Crash(gb.Callback):
    def on_log(self, trainer, report):
        if report.step == 5:
            raise RuntimeError("crash")


def test_resume_after_a_crash_continues_the_curves(config, tmp_path):
    pytest.importorskip("tensorboardX", reason=REASON)
    with pytest.raises(RuntimeError, match="crash"):
        gb.pretrain(config, tmp_path / "run", [mx.cpu(0)], tensorboard=True, callbacks=[Crash()])
    gb.resume(tmp_path / "run")  # from step 4; step 5 is in the first event file and made again
    assert_curves_are_those_of_the_log(tmp_path / "run")


def report(step, loss):
    window = {"mlm_loss": loss}
    return StepReport(step, 9, window, window, 100.0, 90.0, float(step), 1.0, 1e-3, 2.5)


def test_rollback_removes_the_steps_after_the_checkpoint(tmp_path):
    pytest.importorskip("tensorboardX", reason=REASON)
    logger, trainer = TensorBoardLogger(tmp_path), SimpleNamespace(state=TrainState())
    logger.on_fit_begin(trainer)
    for step, loss in ((1, 5.0), (2, 4.0), (3, 9.0)):
        logger.on_log(trainer, report(step, loss))
    trainer.state.step = 1
    logger.on_rollback(trainer, None)
    logger.on_log(trainer, report(2, 4.5))
    logger.on_log(trainer, report(3, math.nan))
    logger.on_fit_end(trainer)
    assert curve(events_of(tmp_path / TRAIN), "loss/mlm") == [(1, 5.0), (2, 4.5)]


def test_sentences_are_written_at_start_and_evaluations(tmp_path):
    pytest.importorskip("tensorboardX", reason=REASON)
    logger = TensorBoardLogger(tmp_path, iter(["| first |", "| second |"]).__next__)
    trainer = SimpleNamespace(state=TrainState())
    logger.on_fit_begin(trainer)
    logger.on_evaluate(trainer, 4, {"mlm_loss": 3.0}, None)
    logger.on_fit_end(trainer)
    texts = events_of(tmp_path / VALIDATION).Tensors("masked_sentences/text_summary")
    found = [(each.step, each.tensor_proto.string_val[0]) for each in texts]
    assert found == [(0, b"| first |"), (4, b"| second |")]


def test_full_disk_ends_the_files_and_not_the_run(tmp_path, caplog):
    writer = pytest.importorskip("tensorboardX.event_file_writer", reason=REASON).EventsWriter
    logger, trainer = TensorBoardLogger(tmp_path), SimpleNamespace(state=TrainState())
    logger.on_fit_begin(trainer)
    logger.on_log(trainer, report(1, 5.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "write_event", full_disk)
        logger.on_log(trainer, report(2, 4.0))
    logger.on_log(trainer, report(3, 3.0))
    logger.on_fit_end(trainer)
    assert caplog.messages == [f"{tmp_path}: event files end here (No space left on device)"]
    assert curve(events_of(tmp_path / TRAIN), "loss/mlm") == [(1, 5.0)]


def full_disk(*_):
    raise OSError(28, "No space left on device")


def test_pretrain_without_tensorboardx_leaves_nothing(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(InputError, match=r"needs the package tensorboardX.*\[tensorboard\]") as caught:
        gb.pretrain(config, tmp_path / "run", [mx.cpu(0)], tensorboard=True)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()
