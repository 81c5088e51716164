"""Files of torch.save, read without PyTorch; nothing in them is run."""

from __future__ import annotations

import pickle
import zipfile

import numpy as np
import pytest

from gluon_bert.conversion.torch_pickle import read_tensors
from gluon_bert.errors import InputError

# pytorch_model.bin, without PyTorch


class Evil:
    def __reduce__(self):
        return (print, ("this ran",))


def a_bin(path, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/data/0", np.arange(6, dtype="<f4").tobytes())


def test_bin_with_a_function_call_runs_nothing(tmp_path, capsys):
    a_bin(tmp_path / "x.bin", pickle.dumps({"a": Evil()}))
    with pytest.raises(InputError, match=r"it needs (builtins|__builtin__)\.print, which weights never need"):
        read_tensors(tmp_path / "x.bin")
    assert capsys.readouterr().out == ""


def tensor_pickle(offset, size, stride):
    """What torch.save writes for one tensor, spelt out."""
    return (
        b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage"
        b"ctorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQ"
        + b"".join(_pickled(each) for each in (offset, size, stride))
        + b"\x89}tRs."
    )


def _pickled(value):
    if isinstance(value, int):
        return b"J" + np.int32(value).tobytes()
    return b"(" + b"".join(_pickled(each) for each in value) + b"t"


def test_bin_tensor_with_offset_and_stride_is_read(tmp_path):
    a_bin(tmp_path / "x.bin", tensor_pickle(1, (2, 2), (1, 2)))
    np.testing.assert_array_equal(read_tensors(tmp_path / "x.bin")["a"], [[1, 3], [2, 4]])


@pytest.mark.parametrize("offset, size, stride", [(3, (4,), (1,)), (-1, (2,), (1,)), (0, (2,), (-1,))])
def test_bin_tensor_outside_its_storage_is_refused(offset, size, stride, tmp_path):
    a_bin(tmp_path / "x.bin", tensor_pickle(offset, size, stride))
    with pytest.raises(InputError, match="reaches outside its storage"):
        read_tensors(tmp_path / "x.bin")


def test_bin_that_is_a_plain_pickle_is_refused(tmp_path):
    (tmp_path / "x.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError, match=r"cannot be read as weights .* Save them as model\.safetensors"):
        read_tensors(tmp_path / "x.bin")
