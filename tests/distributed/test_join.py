"""A worker reads its rank from the environment; options that workers cannot share are refused."""

import pretrain
import pytest

from gluon_bert.distributed.join import check_enough, check_sharing, rank_and_size
from gluon_bert.errors import InputError
from gluon_bert.presets import preset


@pytest.fixture
def environment(monkeypatch):
    """Sets the DMLC_ variables of a worker."""

    def set_variables(**variables):
        for name in ("DMLC_ROLE", "DMLC_TASK_ID", "DMLC_NUM_WORKER"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(f"DMLC_{name}", value)

    set_variables()
    return set_variables


def test_rank_and_size_come_from_the_environment(environment):
    assert rank_and_size("device") == (0, 1)
    environment(ROLE="worker", TASK_ID="2", NUM_WORKER="4")
    assert rank_and_size("dist_sync") == (2, 4)


@pytest.mark.parametrize(
    ("kvstore", "variables", "message"),
    [
        ("dist_async", {}, "kvstore must not be dist_async. Its workers do not wait for each other"),
        ("dist_fast", {}, "kvstore must be one of device, dist_sync, horovod, got dist_fast"),
        ("dist_sync", {}, "DMLC_TASK_ID, DMLC_NUM_WORKER and DMLC_ROLE. Start the workers with tools/launch"),
        ("dist_sync", {"ROLE": "worker", "TASK_ID": "one", "NUM_WORKER": "2"}, "tools/launch.py"),
        ("dist_sync", {"ROLE": "worker", "TASK_ID": "2", "NUM_WORKER": "2"}, "tools/launch.py"),
        ("dist_sync", {"ROLE": "server", "TASK_ID": "0", "NUM_WORKER": "2"}, "tools/launch.py"),
        (
            "device",
            {"ROLE": "worker"},
            "kvstore must be dist_sync in a worker of a dist_sync job, got device",
        ),
    ],
)
def test_impossible_kvstore_is_refused(environment, capsys, tmp_path, kvstore, variables, message):
    environment(**variables)
    assert pretrain.main(["--kvstore", kvstore, "--output", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "30"], "must be a multiple of the number of workers, 4, got 30. Use 28 or 32."),
        (["--batch-size", "3"], "must be a multiple of the number of workers, 4, got 3. Use 4."),
        (["--max-minutes", "5"], "must be 0 with several workers, got 5."),
        (["--step-timeout", "-1"], "timeout"),
        (["--step-timeout", "nan"], "timeout"),
    ],
)
def test_options_that_workers_cannot_share_are_refused(environment, capsys, tmp_path, flags, message):
    environment(ROLE="worker", TASK_ID="1", NUM_WORKER="4")
    given = ["--kvstore", "dist_sync", "--output", str(tmp_path / "run"), "--corpus", str(tmp_path / "no")]
    assert pretrain.main([*given, *flags]) == 2
    assert message in capsys.readouterr().err


def test_workers_need_an_output_folder(environment, capsys):
    environment(ROLE="worker", TASK_ID="0", NUM_WORKER="2")
    assert pretrain.main(["--kvstore", "dist_sync"]) == 2
    assert "--output" in capsys.readouterr().err


def test_less_text_than_workers_is_refused():
    check_enough(4, 4)
    with pytest.raises(InputError, match="at least one sentence pair per worker, got 3 for 4 workers"):
        check_enough(3, 4)


def test_one_process_may_use_any_batch_size():
    check_sharing(preset("d2l").replace(batch_size=7, max_minutes=1.0), 1)
