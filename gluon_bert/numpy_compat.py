"""Lets MXNet 1.9.1, which was written for NumPy 1, work with NumPy 2.

Nothing here runs with NumPy 1 but `restore_bool`. The rest of NumPy stays as the user has it.
"""

from __future__ import annotations

import builtins
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Callable, Iterator

import numpy

# Constants that NumPy 2.0 removed, with their values.
CONSTANTS = {
    "Inf": float("inf"),
    "Infinity": float("inf"),
    "NAN": float("nan"),
    "NINF": -float("inf"),
    "NZERO": -0.0,
    "NaN": float("nan"),
    "PINF": float("inf"),
    "PZERO": 0.0,
    "infty": float("inf"),
}
# Functions and types that NumPy 2.0 to 2.4 removed, with the one that does the same.
RENAMED = {
    "alltrue": "all",
    "bool8": "bool_",
    "cumproduct": "cumprod",
    "float_": "float64",
    "product": "prod",
    "round_": "round",
    "row_stack": "vstack",
    "sometrue": "any",
    "trapz": "trapezoid",
    "unicode_": "str_",
}
# Functions that NumPy removed without a successor. In NumPy 1 the financial ones only raise an error.
GONE = (
    *("asfarray", "find_common_type", "in1d", "msort"),
    *("fv", "ipmt", "irr", "mirr", "nper", "npv", "pmt", "ppmt", "pv", "rate"),
)
# The modules of MXNet that write an operator's parameters as text.
WRITERS = ("mxnet._ctypes.ndarray", "mxnet._ctypes.symbol", "mxnet.symbol.symbol")


def import_mxnet() -> Any:
    """Import `mxnet` and return it, whichever NumPy is installed."""
    restore_bool()
    with removed_names():
        mxnet = import_module("mxnet")
    if is_numpy_2():
        for name in WRITERS:
            # These modules use `str` only on parameters.
            vars(import_module(name))["str"] = parameter_text
    return mxnet


def is_numpy_2(version: str = numpy.__version__) -> bool:
    """Return whether a version of NumPy is 2.0 or later."""
    return int(version.split(".")[0]) >= 2


def restore_bool() -> None:
    """Give `numpy.bool` back, which NumPy 1.24 to 1.26 lack and MXNet reads."""
    # Through vars, since hasattr(numpy, "bool") prints a warning in some versions.
    vars(numpy).setdefault("bool", bool)


@contextmanager
def removed_names() -> Iterator[None]:
    """Give NumPy 2 the names that NumPy 1 had, for as long as the context lasts."""
    added = {}
    if is_numpy_2():
        added = {name: value for name, value in old_names().items() if name not in vars(numpy)}
    vars(numpy).update(added)
    try:
        yield
    finally:
        for name in added:
            vars(numpy).pop(name, None)


def old_names() -> dict[str, Any]:
    """Return every name that NumPy removed and MXNet may read, with its value."""
    # NumPy 1 lacks some of the new names, such as trapezoid.
    renamed = {old: getattr(numpy, new) for old, new in RENAMED.items() if hasattr(numpy, new)}
    return {**CONSTANTS, **renamed, **{name: _removed(name) for name in GONE}}


def _removed(name: str) -> Callable[..., Any]:
    """Return a function that raises an error: NumPy has removed it."""

    def removed(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"NumPy {numpy.__version__} does not have numpy.{name}. Use another function.")

    removed.__name__ = name
    return removed


def parameter_text(value: Any = "") -> str:
    """Write an operator's parameter as NumPy 1 did: NumPy 2 writes (3,) as (np.int64(3),)."""
    return builtins.str(_plain(value) if isinstance(value, (tuple, list)) else value)


def _plain(value: Any) -> Any:
    """Return a tuple or list with Python's numbers where it had NumPy's."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    if isinstance(value, list):
        return list(map(_plain, value))
    return value.item() if isinstance(value, numpy.generic) else value
