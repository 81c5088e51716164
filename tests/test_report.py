"""What the user sees of a run."""

import io
import json
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure

from gluon_bert.config import TrainConfig
from gluon_bert.training.meters import Averages, Progress
from gluon_bert.training.report import Report, in_words

DATA = SimpleNamespace(vocab=range(100), unigram_loss=4.0, held_out_unigram_loss=3.5)


def progress(step, mlm_loss):
    window = Averages(mlm_loss, 0.7, 0.05, 0.5)
    return Progress(step, window, window, 100.0, 90.0, float(step), lr=1e-3 / step, gradient_norm=2.5)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def told(folder, mlm_losses, held_out=None, screen=None):
    screen = screen or io.StringIO()
    report = Report(folder, TrainConfig(num_steps=10, lr=1e-3), DATA, screen=screen)
    for step, loss in enumerate(mlm_losses, 1):
        report.stepped(step)
        report.progressed(progress(step, loss))
    if held_out is not None:
        report.evaluated(len(mlm_losses), Averages(held_out, 0.69, 0.1, 0.5))
    report.close()
    return report, screen.getvalue()


def test_without_a_terminal_there_is_a_plain_line_per_window(tmp_path):
    _, screen = told(tmp_path, [5.0, 4.5], held_out=4.4)
    lines = screen.splitlines()
    assert lines[0].startswith(
        "step 1/10: MLM loss 5.000 (5.0 % right), NSP loss 0.700 (50.0 % right), lr 0.001"
    )
    assert lines[0].endswith("100.0 pairs/s, 00:09 left")
    assert (
        lines[2] == "held-out text after step 2: MLM loss 4.400 (10.0 % right), NSP loss 0.690 (50.0 % right)"
    )
    assert "\r" not in screen


def test_on_a_terminal_there_is_a_bar(tmp_path):
    _, screen = told(tmp_path, [5.0, 4.5], screen=Terminal())
    assert "\r" in screen
    assert "2/10" in screen
    assert "MLM 4.500 (5%) NSP 0.700 (50%) lr 0.0005 100 pairs/s" in screen


def test_the_log_has_an_object_a_line(tmp_path):
    told(tmp_path, [5.0, float("nan")], held_out=4.4)
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
        "held_out": {"mlm_loss": 4.4, "nsp_loss": 0.69, "mlm_accuracy": 0.1, "nsp_accuracy": 0.5},
    }


def test_the_summary_begins_with_the_books_two_lines_and_names_the_references(tmp_path):
    report, _ = told(tmp_path, [5.0], held_out=3.0)
    lines = report.summary(["cpu(0)"])
    assert lines[0] == "MLM loss 5.000, NSP loss 0.700 (means of 1 steps)"
    assert lines[1] == "90.0 sentence pairs/sec on ['cpu(0)']"
    assert "4.605 = ln V" in lines[-1] and "0.693 = ln 2" in lines[-1]
    assert "4.000 = entropy of the words' frequencies (3.500 on the held-out text)" in lines[-1]


@pytest.mark.parametrize(
    ("training", "held_out", "line"),
    [(5.0, None, "4.000"), (3.9, None, None), (3.0, 3.6, "3.500"), (5.0, 3.4, None)],
)
def test_a_loss_above_that_of_the_words_frequencies_is_explained(tmp_path, training, held_out, line):
    report, _ = told(tmp_path, [training], held_out)
    last = report.summary([])[-1]
    assert (f"is still above {line}" in last) if line else ("is still above" not in last)


def test_the_picture_is_a_png_of_a_readable_size(tmp_path):
    told(tmp_path, [5.0, 4.5, 4.2], held_out=4.4)
    content = (tmp_path / "losses.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    assert width >= 1000 and height >= 400


def test_accuracies_are_percentages():
    assert in_words(Averages(7.0, 0.7, 0.051, 1.0)).endswith("NSP loss 0.700 (100.0 % right)")


def test_the_picture_names_every_reference(tmp_path, monkeypatch):
    figures = []

    class Kept(Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            figures.append(self)

    monkeypatch.setattr("gluon_bert.training.report.Figure", Kept)
    told(tmp_path, [5.0, 4.5], held_out=4.4)
    labels = {text.get_text() for axes in figures[0].axes for text in axes.get_legend().get_texts()}
    assert labels == {
        "training",
        "held-out text",
        "ln V = 4.61",
        "word frequencies alone = 4.00",
        "word frequencies alone, held out = 3.50",
        "a coin, ln 2 = 0.69",
    }
