"""The output of a run for the user."""

import io
import json
import math
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure

from gluon_bert.config import TrainConfig
from gluon_bert.training.plots import References
from gluon_bert.training.progress import ProgressLogger, format_metrics
from gluon_bert.training.state import StepReport, TrainState, best_of

DATA = SimpleNamespace(vocab=range(100), unigram_loss=4.0, validation_unigram_loss=3.5)


def metrics(mlm_loss, nsp_loss, mlm_accuracy, nsp_accuracy):
    return {
        "mlm_loss": mlm_loss,
        "nsp_loss": nsp_loss,
        "mlm_accuracy": mlm_accuracy,
        "nsp_accuracy": nsp_accuracy,
    }


def progress(step, mlm_loss):
    window = metrics(mlm_loss, 0.7, 0.05, 0.5)
    return StepReport(step, 10, window, window, 100.0, 90.0, float(step), 10.0 - step, 1e-3 / step, 2.5)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def message(folder, mlm_losses, validation=None, screen=None, **changes):
    screen = screen or io.StringIO()
    config = TrainConfig(**{"num_steps": 10, "lr": 1e-3, **changes})
    trainer = SimpleNamespace(config=config, state=TrainState(), monitor="mlm_loss")
    report = ProgressLogger(folder, References.of(DATA), screen)
    report.on_fit_begin(trainer)
    for step, loss in enumerate(mlm_losses, 1):
        report.on_step(trainer, step)
        report.on_log(trainer, progress(step, loss))
    evaluations = [validation] if isinstance(validation, float) else validation or []
    best = None
    for step, loss in enumerate(evaluations, len(mlm_losses) - len(evaluations) + 1):
        averages = metrics(loss, 0.69, 0.1, 0.5)
        best = best_of(best, step, averages)
        report.on_evaluate(trainer, step, averages, best)
    report.on_fit_end(trainer)
    return report, screen.getvalue()


def test_without_a_terminal_each_window_is_a_line(tmp_path):
    _, screen = message(tmp_path, [5.0, 4.5], validation=4.4)
    lines = screen.splitlines()
    assert lines[0].startswith(
        "step 1/10: MLM loss 5.000 (5.0 % correct), NSP loss 0.700 (50.0 % correct), lr 0.001"
    )
    assert lines[0].endswith("100.0 pairs/s, 00:09 left")
    assert lines[2] == (
        "validation after step 2: MLM loss 4.400 (10.0 % correct), NSP loss 0.690 (50.0 % correct), "
        "perplexity 81.5"
    )
    assert "\r" not in screen


def test_on_a_terminal_there_is_a_bar(tmp_path):
    _, screen = message(tmp_path, [5.0, 4.5], screen=Terminal())
    assert "\r" in screen
    assert "2/10" in screen
    assert "MLM 4.500 (5%) NSP 0.700 (50%) lr 0.0005 100 pairs/s" in screen


def test_log_has_an_object_a_line(tmp_path):
    message(tmp_path, [5.0, float("nan")], validation=4.4)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert records[0] == {
        "step": 1,
        "mlm_loss": 5.0,
        "nsp_loss": 0.7,
        "mlm_accuracy": 0.05,
        "nsp_accuracy": 0.5,
        "lr": 1e-3,
        "gradient_norm": 2.5,
        "pairs_per_second": 100.0,
        "seconds": 1.0,
    }
    assert (records[1]["mlm_loss"], records[1]["lr"]) == (None, 5e-4)
    assert records[2] == {
        "step": 2,
        "validation": {
            "mlm_loss": 4.4,
            "nsp_loss": 0.69,
            "mlm_accuracy": 0.1,
            "nsp_accuracy": 0.5,
            "perplexity": pytest.approx(math.exp(4.4)),
        },
    }


def test_worse_evaluation_names_the_best(tmp_path):
    _, screen = message(tmp_path, [5.0] * 3, validation=[4.4, 4.6, 4.3])
    first, second, third = (line for line in screen.splitlines() if line.startswith("validation"))
    assert second.endswith("; best: MLM loss 4.400 after step 1")
    assert "best" not in first + third


def test_summary_names_the_best_evaluation(tmp_path):
    report, _ = message(tmp_path / "a", [5.0] * 3, validation=[4.4, 3.0, 4.6])
    assert (
        "best of 3 evaluations, after step 2: MLM loss 3.000 (10.0 % correct), NSP loss 0.690 "
        "(50.0 % correct), perplexity 20.1 (checkpoint best)"
    ) in report.summary([])
    # Its loss is below that of the words' frequencies, though the last one's is not.
    assert "is not yet below" not in report.summary([])[-1]
    report, _ = message(tmp_path / "b", [5.0] * 3, validation=[4.4, 4.3, 4.2])
    assert "This was the best of 3 evaluations." in report.summary([])
    report, _ = message(tmp_path / "c", [5.0] * 3, validation=4.2)
    assert not [line for line in report.summary([]) if "best of" in line]


def test_summary_names_patience(tmp_path):
    report, _ = message(tmp_path / "a", [5.0] * 3, [4.4, 4.5, 4.6], patience=2, eval_every=1)
    ended = "The run ended after step 3: 2 evaluations in a row did not improve on the best (patience 2)."
    assert ended in report.summary([])
    assert report.summary([])[-1].endswith("Train with more patience.")
    report, _ = message(tmp_path / "b", [5.0] * 3, [4.4, 4.5, 4.6], patience=3, eval_every=1)
    assert not [line for line in report.summary([]) if "ended" in line]


@pytest.mark.parametrize("screen", [io.StringIO(), Terminal()], ids=["lines", "bar"])
def test_timed_run_shows_the_expected_steps(tmp_path, screen):
    changes = {"num_steps": 0, "max_minutes": 1.0}
    report, shown = message(tmp_path, [5.0, 4.5], screen=screen, **changes)
    assert "2/~10" in shown
    assert report.summary([])[-1].endswith("Train for more minutes.")


def test_summary_has_d2l_lines_and_references(tmp_path):
    report, _ = message(tmp_path, [5.0], validation=3.0)
    lines = report.summary(["cpu(0)"])
    assert lines[0] == "MLM loss 5.000, NSP loss 0.700 (means of 1 steps)"
    assert lines[1] == "90.0 sentence pairs/sec on ['cpu(0)']"
    assert lines[-2] == (
        "baselines: MLM uniform 4.605 (ln V), unigram 4.000 (3.500 on validation); NSP chance 0.693 (ln 2)"
    )


@pytest.mark.parametrize(
    ("training", "validation", "line"),
    [(5.0, None, "4.000"), (3.9, None, None), (3.0, 3.6, "3.500"), (5.0, 3.4, None), (3.998, None, "4.000")],
)
def test_summary_explains_a_loss_not_below_unigram(tmp_path, training, validation, line):
    report, _ = message(tmp_path, [training], validation)
    last = report.summary([])[-1]
    assert (f"is not yet below {line}" in last) if line else ("is not yet below" not in last)


def test_loss_below_word_frequencies_is_compared(tmp_path):
    report, _ = message(tmp_path / "a", [3.75])
    assert (
        "The MLM loss is 0.25 nats below that of word frequencies: 3.750 instead of 4.000."
        in (report.summary([])[-1])
    )
    report, _ = message(tmp_path / "b", [3.75], validation=2.5)
    assert (
        "on validation text is 1.00 nats below that of word frequencies: 2.500 instead of 3.500."
        in (report.summary([])[-1])
    )


def test_plot_is_a_png_of_a_readable_size(tmp_path):
    message(tmp_path, [5.0, 4.5, 4.2], validation=4.4)
    content = (tmp_path / "losses.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    assert width >= 1000 and height >= 400


def test_accuracies_are_percentages():
    assert format_metrics(metrics(7.0, 0.7, 0.051, 1.0)).endswith("NSP loss 0.700 (100.0 % correct)")


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn."""
    drawn = []

    class Kept(Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            drawn.append(self)

    monkeypatch.setattr("gluon_bert.training.plots.Figure", Kept)
    return drawn


def test_plot_names_every_reference(tmp_path, figures):
    message(tmp_path, [5.0, 4.5], validation=4.4)
    labels = {text.get_text() for axes in figures[0].axes for text in axes.get_legend().get_texts()}
    assert labels == {
        "training",
        "validation text",
        "ln V = 4.61",
        "unigram = 4.00",
        "unigram, validation = 3.50",
        "chance, ln 2 = 0.69",
    }


@pytest.mark.parametrize(
    ("losses", "crossing"),
    [([5.0, 3.9, 4.1, 3.8, 3.7], [4]), ([3.9, 3.8], [1]), ([5.0, 4.0], []), ([3.0, float("nan")], [])],
)
def test_picture_marks_where_word_frequencies_are_passed(tmp_path, figures, losses, crossing):
    message(tmp_path, losses)
    marks = [line for line in figures[0].axes[0].lines if "below word freq" in str(line.get_label())]
    assert [line.get_xdata()[0] for line in marks] == crossing


def test_plot_marks_the_best_evaluation(tmp_path, figures):
    message(tmp_path, [5.0] * 4, validation=[4.4, 3.9, 4.1, 4.0])
    for axes, value in zip(figures[0].axes, (3.9, 0.69)):
        (star,) = (line for line in axes.lines if line.get_label() == "best checkpoint, step 2")
        assert star.get_xydata().tolist() == [[2, value]]
        (curve,) = (line for line in axes.lines if line.get_label() == "validation text")
        assert len(curve.get_xydata()) == 4
