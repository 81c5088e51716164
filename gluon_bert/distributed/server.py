"""Runs a scheduler or a server of MXNet's kvstore, depending on DMLC_ROLE."""

from __future__ import annotations

import pickle
from typing import Any

from .. import runtime


def reject(*_: Any, **__: Any) -> Any:
    """Replace pickle.loads: anyone who can reach the port could send code."""
    raise pickle.UnpicklingError("servers of gluon_bert sum gradients only; they accept no optimizer")


if __name__ == "__main__":
    pickle.loads = reject
    runtime.import_mxnet()  # serves, and exits when all workers have left
