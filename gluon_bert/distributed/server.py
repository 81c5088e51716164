"""A scheduler or a server of MXNet's kvstore, as DMLC_ROLE says; tools/launch.py starts them."""

from __future__ import annotations

import pickle
from typing import Any

from .. import runtime


def refuse(*_: Any, **__: Any) -> Any:
    """Stand in for pickle.loads: whoever reaches a server's port could send it code."""
    raise pickle.UnpicklingError("a server of gluon_bert adds up gradients, and takes no optimizer")


if __name__ == "__main__":
    pickle.loads = refuse
    runtime.import_mxnet()  # serves, and leaves the process when all workers have left
