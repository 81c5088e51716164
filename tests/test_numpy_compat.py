"""MXNet beside NumPy 1 and 2: removed names, operators' parameters, and the wheel that allows NumPy 2."""

import csv
import hashlib
import subprocess
import sys
import zipfile
from base64 import urlsafe_b64encode
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from gluon_bert import numpy_compat
from gluon_bert.runtime import mx

sys.path.insert(0, str(ROOT / "packaging"))

import repackage

TWO, THREE, ONE, ZERO = np.int64(2), np.int32(3), np.int64(1), np.int64(0)
HALF = np.float32(0.5)
# Each operator of the project with its parameters as NumPy's scalars. The inputs are (2, 3, 4) but for those
# given.
OPERATORS = [
    ("reshape", {"shape": (THREE, TWO, -1)}, []),
    ("transpose", {"axes": (TWO, ZERO, ONE)}, []),
    ("expand_dims", {"axis": ONE}, []),
    ("slice", {"begin": (ZERO, ONE), "end": (TWO, THREE)}, []),
    ("slice_axis", {"axis": ONE, "begin": ZERO, "end": TWO}, []),
    ("broadcast_to", {"shape": (TWO, THREE, np.int64(4))}, [(1, 3, 4)]),
    ("repeat", {"repeats": TWO, "axis": ONE}, []),
    ("tile", {"reps": (ONE, TWO, ONE)}, []),
    ("sum", {"axis": (ZERO, TWO)}, []),
    ("mean", {"axis": (ZERO, TWO)}, []),
    ("max", {"axis": (ZERO, ONE)}, []),
    ("norm", {"axis": (ONE, TWO), "ord": TWO}, []),
    ("softmax", {"axis": TWO}, []),
    ("log_softmax", {"axis": TWO}, []),
    ("argmax", {"axis": TWO}, []),
    ("topk", {"axis": TWO, "k": TWO}, []),
    ("clip", {"a_min": -HALF, "a_max": HALF}, []),
    ("stack", {"axis": ONE}, [(2, 3), (2, 3)]),
    ("concat", {"dim": ONE}, [(2, 3), (2, 3)]),
    ("split", {"num_outputs": TWO, "axis": ZERO}, []),
    ("slice_like", {"axes": (ZERO, ONE)}, [(2, 3, 4), (1, 2, 4)]),
    ("broadcast_like", {"lhs_axes": (ZERO,), "rhs_axes": (ONE,)}, [(1, 3), (2, 5)]),
    ("one_hot", {"depth": THREE}, [(2, 3)]),
    ("pick", {"axis": TWO}, [(2, 3, 4), (2, 3)]),
    ("take", {"axis": ONE}, [(2, 3), (2,)]),
    ("FullyConnected", {"num_hidden": THREE, "no_bias": True, "flatten": False}, [(2, 4), (3, 4)]),
    ("Embedding", {"input_dim": np.int64(5), "output_dim": THREE}, [(2, 2), (5, 3)]),
    ("LayerNorm", {"axis": TWO, "eps": np.float64(1e-5)}, [(2, 3, 4), (4,), (4,)]),
    ("Dropout", {"p": HALF, "axes": (ZERO,)}, []),
    ("zeros", {"shape": (TWO, THREE)}, None),
    ("ones", {"shape": (TWO, THREE)}, None),
    ("arange", {"start": ZERO, "stop": THREE, "step": ONE}, None),
    ("full", {"shape": (TWO, THREE), "val": HALF}, None),
]
NAMES = [name for name, _, _ in OPERATORS]


def plain(value):
    """The same parameter without NumPy's scalars."""
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    return value.item() if isinstance(value, np.generic) else value


def arrays_of(result):
    return [each.asnumpy() for each in (result if isinstance(result, list) else [result])]


@pytest.fixture(params=OPERATORS, ids=NAMES)
def case(request):
    """The operator's name, its parameters, and its input arrays."""
    name, parameters, shapes = request.param
    shapes = [] if shapes is None else shapes or [(2, 3, 4)]
    arrays = [mx.nd.arange(np.prod(shape).item()).reshape(shape) % 5 for shape in shapes]
    return name, parameters, arrays


def test_nd_operator_takes_numpy_scalars(case):
    name, parameters, arrays = case
    found = getattr(mx.nd, name)(*arrays, **parameters)
    wanted = getattr(mx.nd, name)(*arrays, **{key: plain(each) for key, each in parameters.items()})
    for one, other in zip(arrays_of(found), arrays_of(wanted)):
        np.testing.assert_array_equal(one, other)


def test_sym_operator_takes_numpy_scalars(case):
    name, parameters, arrays = case
    variables = [mx.sym.var(f"input{number}") for number in range(len(arrays))]
    inputs = {each.name: array for each, array in zip(variables, arrays)}
    graph = getattr(mx.sym, name)(*variables, **parameters)
    # The text of the graph, which an export writes, is read back as another process would.
    found = mx.sym.load_json(graph.tojson()).bind(mx.cpu(), inputs).forward()
    wanted = getattr(mx.nd, name)(*arrays, **{key: plain(each) for key, each in parameters.items()})
    for one, other in zip(arrays_of(found), arrays_of(wanted)):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["normal", "uniform"])
def test_random_operators_take_numpy_scalars(name):
    assert getattr(mx.nd.random, name)(shape=(TWO, THREE)).shape == (2, 3)
    graph = getattr(mx.sym.random, name)(shape=(TWO, THREE))
    assert graph.bind(mx.cpu(), {}).forward()[0].shape == (2, 3)


def test_optimizer_operators_take_numpy_scalars():
    steps = []
    for rate in (np.float64(0.5), 0.5):
        weight, gradient, mean, variance = (mx.nd.ones((2,)) for _ in range(4))
        mx.nd.adam_update(weight, gradient, mean, variance, out=weight, lr=rate, wd=np.float32(0))
        steps.append(weight.asnumpy())
    np.testing.assert_array_equal(*steps)


def test_indexing_takes_numpy_scalars():
    array = mx.nd.arange(24).reshape((2, 3, 4))
    np.testing.assert_array_equal(array[ONE, ZERO:TWO].asnumpy(), array.asnumpy()[1, 0:2])


def test_variable_keeps_a_shape_of_numpy_scalars():
    assert mx.sym.var("x", shape=(TWO, THREE)).attr("__shape__") == "(2, 3)"


def test_gluon_block_takes_numpy_scalars():
    net = mx.gluon.nn.Dense(THREE, in_units=TWO)
    net.initialize()
    net.hybridize()
    assert net(mx.nd.ones((4, 2))).shape == (4, 3)


@pytest.mark.parametrize(
    "value, text",
    [
        ((np.int64(3), 2), "(3, 2)"),
        ([np.int32(3)], "[3]"),
        (((np.int64(1), np.int64(2)), None), "((1, 2), None)"),
        ((True, "same", 0.5), "(True, 'same', 0.5)"),
        (np.float32(0.1), "0.1"),
        (np.int64(7), "7"),
        (None, "None"),
        ("valid", "valid"),
    ],
)
def test_parameter_text_has_no_numpy_names(value, text):
    assert numpy_compat.parameter_text(value) == text


# The removed names


def run(code):
    """Run Python code in a fresh interpreter, where nothing has imported MXNet yet."""
    return subprocess.run([sys.executable, "-c", code], cwd=str(ROOT), capture_output=True, text=True)


def test_numpy_is_as_before_after_the_import():
    code = "\n".join(
        [
            "import numpy",
            "before = set(vars(numpy))",
            "from gluon_bert.runtime import mx",
            # NumPy loads some of its own modules late; MXNet's import puts nothing else there.
            "added = {n for n in set(vars(numpy)) - before if not isinstance(vars(numpy)[n], type(numpy))}",
            "print(sorted(added - {'bool'}), mx.nd.ones(3).sum().asscalar())",
        ]
    )
    done = run(code)
    assert done.stdout.strip() == "[] 3.0", done.stderr


def test_removed_names_are_there_only_in_the_context(monkeypatch):
    monkeypatch.setattr(numpy_compat, "is_numpy_2", lambda: True)
    monkeypatch.delitem(vars(np), "round_", raising=False)
    kept = vars(np)["all"]
    with numpy_compat.removed_names():
        assert vars(np)["round_"] is np.round and vars(np)["all"] is kept
        assert set(numpy_compat.old_names()) <= set(vars(np))
    assert "round_" not in vars(np)


def test_removed_names_leave_after_a_failed_import(monkeypatch):
    monkeypatch.setattr(numpy_compat, "is_numpy_2", lambda: True)
    monkeypatch.delitem(vars(np), "PZERO", raising=False)
    with pytest.raises(ImportError), numpy_compat.removed_names():
        raise ImportError
    assert "PZERO" not in vars(np)


def test_numpy_1_gets_no_names(monkeypatch):
    monkeypatch.setattr(numpy_compat, "is_numpy_2", lambda: False)
    before = set(vars(np))
    with numpy_compat.removed_names():
        assert set(vars(np)) == before


def test_removed_function_says_so_when_called():
    with pytest.raises(RuntimeError, match="does not have numpy"):
        numpy_compat.old_names()["pmt"](1, 2)


@pytest.mark.parametrize(
    "version, answer", [("1.17.0", False), ("1.26.4", False), ("2.0.0rc1", True), ("3.1", True)]
)
def test_is_numpy_2_reads_the_major_version(version, answer):
    assert numpy_compat.is_numpy_2(version) is answer


def test_numpy_bool_is_given_back_where_it_is_missing(monkeypatch):
    monkeypatch.delitem(vars(np), "bool", raising=False)
    numpy_compat.restore_bool()
    assert vars(np)["bool"] is bool


def test_numpy_bool_is_left_alone_where_it_is(monkeypatch):
    monkeypatch.setitem(vars(np), "bool", "its own")
    numpy_compat.restore_bool()
    assert vars(np)["bool"] == "its own"


# The wheel that allows NumPy 2

METADATA = (
    "Metadata-Version: 2.1\nName: mxnet\nVersion: 1.9.1\nRequires-Dist: numpy (<2.0.0,>1.16.0)\n\nnumpy\n"
)
INFO = "mxnet-1.9.1.dist-info/"


def published_wheel(folder: Path) -> Path:
    """Write a small wheel as MXNet's is."""
    path = folder / "mxnet-1.9.1-py3-none-any.whl"
    record = f"mxnet/libmxnet.so,sha256=x,5\n{INFO}METADATA,sha256=y,9\n{INFO}RECORD,,\n"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("mxnet/libmxnet.so", b"12345")
        wheel.writestr(f"{INFO}METADATA", METADATA)
        wheel.writestr(f"{INFO}RECORD", record)
    return path


def test_rewrite_changes_only_the_metadata(tmp_path):
    changed, new = tmp_path / "changed.whl", "mxnet-1.9.1+numpy2.dist-info/"
    repackage.rewrite(published_wheel(tmp_path), changed, INFO, new)
    with zipfile.ZipFile(changed) as wheel:
        assert wheel.namelist() == ["mxnet/libmxnet.so", f"{new}METADATA", f"{new}RECORD"]
        assert wheel.read("mxnet/libmxnet.so") == b"12345"
        metadata = wheel.read(f"{new}METADATA")
        rows = list(csv.reader(wheel.read(f"{new}RECORD").decode().splitlines()))
    wanted = METADATA.replace("1.9.1", "1.9.1+numpy2").replace("numpy (<2.0.0,>1.16.0)", "numpy>=2")
    assert metadata.decode() == wanted
    digest = urlsafe_b64encode(hashlib.sha256(metadata).digest()).rstrip(b"=").decode()
    assert rows == [
        ["mxnet/libmxnet.so", "sha256=x", "5"],
        [f"{new}METADATA", f"sha256={digest}", str(len(metadata))],
        [f"{new}RECORD", "", ""],
    ]


@pytest.mark.parametrize(
    "metadata", [METADATA.replace("numpy (", "other ("), METADATA.replace("Version: 1", "V: 1")]
)
def test_other_metadata_is_refused(metadata):
    with pytest.raises(ValueError, match="must have one Version and one Requires-Dist"):
        repackage.allow_numpy_2(metadata)
