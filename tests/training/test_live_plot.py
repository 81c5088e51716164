"""The picture below a notebook's cell: drawn in notebooks only, replaced, and never most of the time."""

import io
import sys
from types import ModuleType, SimpleNamespace

import pytest

from gluon_bert.config import TrainConfig
from gluon_bert.training import live_plot
from gluon_bert.training.live_plot import LivePlot, notebook_display
from gluon_bert.training.progress import ProgressLogger
from gluon_bert.training.state import StepReport, TrainState


class Display:
    """Keeps the pictures that IPython.display would show, those of one output in one list."""

    def __init__(self):
        self.outputs = []

    def Image(self, data):
        assert data.startswith(b"\x89PNG")
        return data

    def display(self, image, display_id):
        assert display_id is True
        self.outputs.append([image])
        return SimpleNamespace(update=self.outputs[-1].append)


@pytest.fixture
def display(monkeypatch):
    """Return the display of a notebook that the test seems to run in."""
    shown = Display()
    monkeypatch.setattr("gluon_bert.training.progress.notebook_display", lambda: shown)
    return shown


def train(logger, losses):
    trainer = SimpleNamespace(config=TrainConfig(num_steps=9), state=TrainState(), monitor="mlm_loss")
    logger.on_fit_begin(trainer)
    for step, loss in enumerate(losses, 1):
        window = {"mlm_loss": loss}
        logger.on_log(trainer, StepReport(step, 9, window, window, 100.0, 90.0, float(step), 1.0, 1e-3, 2.5))
    logger.on_fit_end(trainer)


def test_progress_in_a_notebook_replaces_one_picture(display, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(live_plot, "LARGEST_SHARE", 1e9)
    train(ProgressLogger(tmp_path), [5.0, 4.0, 3.0])
    (pictures,) = display.outputs
    assert len(pictures) == 4 and len(set(pictures)) == 3  # the last one is drawn again
    assert "step 1" not in capsys.readouterr().err
    assert (tmp_path / "losses.png").exists()


def test_slow_pictures_are_left_out_but_for_the_last(display, monkeypatch):
    monkeypatch.setattr(live_plot, "LARGEST_SHARE", 0.0)
    plot, records = LivePlot(display), [{"step": 1, "mlm_loss": 5.0}]
    plot.draw(records)
    plot.draw([*records, {"step": 2, "mlm_loss": 4.0}])
    plot.draw([*records, {"step": 2, "mlm_loss": 3.0}], last=True)
    assert len(display.outputs[0]) == 2


def test_nothing_is_drawn_without_losses(display):
    LivePlot(display).draw([], last=True)
    assert display.outputs == []


def test_own_screen_gets_lines_in_a_notebook(display, tmp_path):
    screen = io.StringIO()
    train(ProgressLogger(tmp_path, screen=screen), [5.0])
    assert display.outputs == [] and "step 1/9" in screen.getvalue()


def test_notebook_display_is_none_elsewhere(monkeypatch):
    ipython, kernel = ModuleType("IPython"), object()
    ipython.display = ModuleType("IPython.display")
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", ipython.display)
    ipython.get_ipython = lambda: SimpleNamespace(kernel=kernel)
    assert notebook_display() is ipython.display
    ipython.get_ipython = lambda: SimpleNamespace()  # a shell in a terminal
    assert notebook_display() is None
    ipython.get_ipython = lambda: None  # a program that imports IPython
    assert notebook_display() is None
    monkeypatch.delitem(sys.modules, "IPython")
    assert notebook_display() is None
