"""The watchdog ends a process that makes no progress."""

import threading
import time

from support.trainers import small_data, trainer_on

from gluon_bert.training.watchdog import watched


def watchdog_is_running():
    return "watchdog" in {thread.name for thread in threading.enumerate()}


def test_watchdog_ends_a_silent_process():
    ended = threading.Event()
    with watched(0.05, ended.set):
        assert ended.wait(5)
    assert not watchdog_is_running()


def test_watchdog_spares_a_process_that_reports():
    ended = []
    with watched(0.5, lambda: ended.append(1)) as alive:
        for _ in range(10):
            time.sleep(0.1)
            alive()
    assert not ended and not watchdog_is_running()


def test_watchdog_without_timeout_does_not_start():
    with watched(0, lambda: None) as alive:
        alive()
        assert not watchdog_is_running()


def test_trainer_reports_each_step_and_evaluation_batch():
    data = small_data()
    trainer, reports = trainer_on(1, data, num_steps=3), []
    trainer.alive = lambda: reports.append(trainer.state.step)
    trainer.fit(data.train, validation=data.validation)
    batches = len(list(data.validation.epoch(0)))
    assert [reports.count(step) for step in (1, 2, 3)] == [1, 1, batches + 1]
