"""Gets and sets a network's parameters by name. Reads no files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping

import numpy as np

from ..errors import InputError
from ..runtime import mx


def weights_of(net: Any) -> dict[str, np.ndarray]:
    """Return a copy of the network's weights on the host, float32, by structural names.

    Waits for the devices.
    A weight that two blocks share appears once, under its first name.
    """
    return {name: parameter.list_data()[0].asnumpy() for name, parameter in named_parameters(net).items()}


def set_weights(net: Any, weights: Mapping[str, np.ndarray], where: Path | str) -> None:
    """Set all weights of an initialized network on all its contexts; raise InputError if they do not fit.

    The inverse of `weights_of`.
    """
    parameters = named_parameters(net)
    problems = [f"{name} is missing" for name in parameters.keys() - weights.keys()]
    problems += [f"{name} does not belong to the network" for name in weights.keys() - parameters.keys()]
    for name in parameters.keys() & weights.keys():
        expected, found = tuple(parameters[name].shape), weights[name].shape
        if expected != found or weights[name].dtype != np.float32:
            problems.append(f"{name} must be float32 {expected}, got {weights[name].dtype} {found}")
        elif not np.isfinite(weights[name]).all():
            problems.append(f"{name} contains NaN or infinite values")
    if problems:
        raise InputError(
            f"{where}: the weights do not fit this run ({min(problems)}). The file is damaged, or "
            f"config.json or the vocabulary belongs to another run. Choose another checkpoint."
        )
    put_weights(net, weights)


def put_weights(net: Any, weights: Mapping[str, np.ndarray]) -> None:
    """Set the named parameters of an initialized network, on all its contexts."""
    parameters = named_parameters(net)
    for name, array in weights.items():
        parameters[name].set_data(mx.nd.array(array, dtype=np.float32))


def named_parameters(net: Any) -> dict[str, Any]:
    """Return the network's parameters by structural names, such as "encoder.layers.0.attend.query.weight"."""
    names: dict[Any, str] = {}
    for name, parameter in net._collect_params_with_prefix().items():
        names.setdefault(parameter, name)
    return {name: parameter for parameter, name in names.items()}
