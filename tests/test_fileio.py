"""Files are whole or not there at all."""

import stat
import sys
from contextlib import suppress

import pytest

from gluon_bert import fileio
from gluon_bert.errors import Terminated
from gluon_bert.fileio import atomic_folder, atomic_write, temporary_folder


def test_atomic_write_error_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["a.txt"]


def test_atomic_write_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "a.bin"
    with atomic_write(path, "wb") as file:
        file.write(b"whole")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"whole"


def test_atomic_write_has_the_usual_permissions(tmp_path):
    (tmp_path / "plain").write_text("")
    with atomic_write(tmp_path / "aside") as file:
        file.write("ü\n")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "aside")}
    assert len(modes) == 1
    assert (tmp_path / "aside").read_bytes() == b"\xc3\xbc\n"


def content_of(folder):
    return {
        str(path.relative_to(folder)): path.read_text("utf-8") for path in folder.rglob("*") if path.is_file()
    }


def interrupted_at(line, body):
    """Run `body`; raise Terminated before the n-th line that runs in fileio.py, as a signal's handler does.

    Return whether it was raised: fewer lines may run.
    """
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if frame.f_code.co_filename != fileio.__file__:
            return None
        if event == "line":
            count += 1
            if count == line:
                raise Terminated
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        body()
    except Terminated:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("create", [atomic_write, atomic_folder, temporary_folder])
def test_signal_while_a_temporary_file_is_created_leaves_none(tmp_path, create):
    created = False

    def body():
        nonlocal created
        with create(tmp_path / "result"):
            created = True
            sys.settrace(None)  # the clean-up itself is not interrupted
            raise RuntimeError

    line = 1
    while not created:
        with suppress(RuntimeError):
            interrupted_at(line, body)
        assert list(tmp_path.iterdir()) == []
        line += 1
    assert line > 4  # one for each line that could be interrupted


def test_signal_while_a_folder_is_replaced_leaves_the_old_or_the_new(tmp_path):
    folder = tmp_path / "result"

    def body():
        with atomic_folder(folder, replace=True) as aside:
            (aside / "new").write_text("new")

    line, states = 1, []
    interrupted = True
    while interrupted:
        with atomic_folder(folder, replace=True) as aside:
            (aside / "old").write_text("old")
        interrupted = interrupted_at(line, body)
        fileio.remove_temporary_files(tmp_path)
        states.append(content_of(tmp_path))
        line += 1
    assert states[0] == {"result/old": "old"} and states[-1] == {"result/new": "new"}
    assert all(state in (states[0], states[-1]) for state in states)
