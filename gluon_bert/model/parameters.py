"""A network's parameters by name: get them, set them, load them. Reads no file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping

import numpy as np

from ..errors import InputError
from ..runtime import mx


def weights_of(net: Any) -> dict[str, np.ndarray]:
    """A copy of the network's weights on the host, float32, by structural names. Waits for the devices.

    A weight that two blocks share is there once, under its first name.
    """
    return {name: parameter.list_data()[0].asnumpy() for name, parameter in named_parameters(net).items()}


def set_weights(net: Any, weights: Mapping[str, np.ndarray], where: Path | str) -> None:
    """Give an initialized network these weights, on all its contexts; InputError where they are another's.

    The inverse of `weights_of`.
    """
    parameters = named_parameters(net)
    problems = [f"{name} is missing" for name in parameters.keys() - weights.keys()]
    problems += [f"there is no {name}" for name in weights.keys() - parameters.keys()]
    for name in parameters.keys() & weights.keys():
        expected, found = tuple(parameters[name].shape), weights[name].shape
        if expected != found or weights[name].dtype != np.float32:
            problems.append(f"{name} is {weights[name].dtype} {found}, not float32 {expected}")
        elif not np.isfinite(weights[name]).all():
            problems.append(f"{name} holds values that are no numbers")
    if problems:
        raise InputError(
            f"{where}: cannot be read as the weights of this run ({min(problems)}): it is damaged, or "
            f"config.json or the vocabulary is another run's; name another with --checkpoint"
        )
    put_weights(net, weights)


def put_weights(net: Any, weights: Mapping[str, np.ndarray]) -> None:
    """Give those parameters of an initialized network that are named these values, on all its contexts."""
    parameters = named_parameters(net)
    for name, array in weights.items():
        parameters[name].set_data(mx.nd.array(array, dtype=np.float32))


def named_parameters(net: Any) -> dict[str, Any]:
    """The network's parameters by structural names, such as "encoder.layers.0.attend.query.weight"."""
    names: dict[Any, str] = {}
    for name, parameter in net._collect_params_with_prefix().items():
        names.setdefault(parameter, name)
    return {name: parameter for parameter, name in names.items()}
