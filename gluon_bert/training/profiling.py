"""Load balance of contexts: by the work they get, and by a profile of their computing time."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Sequence

import numpy as np

from .device_batch import DeviceBatch


class LoadBalance:
    """Counts the tokens, without padding, and the masked tokens of each context.

    A step waits for the context with the most.
    """

    def __init__(self) -> None:
        self._most, self._mean = np.zeros(2), np.zeros(2)

    def add(self, shards: Sequence[DeviceBatch]) -> None:
        """Count the shards that the contexts compute at once."""
        given = np.array([(shard.num_tokens, shard.num_masked) for shard in shards], dtype=float)
        self._most += given.max(axis=0)
        self._mean += given.mean(axis=0)

    def shares(self) -> tuple[float, float]:
        """Return the mean of the contexts' tokens, and of their masked tokens, as a share of the largest."""
        with np.errstate(invalid="ignore"):
            tokens, masked = (self._mean / self._most).tolist()
        return tokens, masked

    def __str__(self) -> str:
        tokens, masked = self.shares()
        return (
            f"load of the contexts: on average {tokens:.1%} of the tokens and {masked:.1%} of the masked "
            "tokens of the largest load"
        ).replace("%", " %")


class DeviceUtilization(NamedTuple):
    """Seconds in which each context, any context and all contexts computed."""

    contexts: Mapping[str, float]
    any: float
    all: float

    def __str__(self) -> str:
        each = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.contexts.items())
        return f"at work: {each}; any of them {self.any:.2f} s, all at once {self.all:.2f} s of that"


def device_utilization(trace: Path, contexts: Sequence[Any]) -> DeviceUtilization:
    """Read the utilization of contexts of one kind from the trace of MXNet's profiler."""
    events = json.loads(trace.read_text("utf-8"))["traceEvents"]
    names = {event["args"]["name"]: event["pid"] for event in events if event["ph"] == "M"}
    # A CPU context's place is its number. Beyond the last core the trace has another device's name there.
    rank_and_size = {
        name: each.device_id if each.device_type == "cpu" else names[name]
        for each in contexts
        for name in [f"{each.device_type}/{each.device_id}"]
    }
    places = set(rank_and_size.values())
    changes = sorted(
        (event["ts"], 1 if event["ph"] == "B" else -1, event["pid"])
        for event in events
        if event.get("cat") == "operator" and event["ph"] in "BE"
    )
    begun: dict[int, int] = defaultdict(int)
    at_work: dict[int, float] = defaultdict(float)
    together: dict[int, float] = defaultdict(float)  # by how many
    before = 0.0
    for now, change, place in changes:
        busy = [each for each in places if begun[each]]
        for each in busy:
            at_work[each] += (now - before) / 1e6
        together[len(busy)] += (now - before) / 1e6
        begun[place] += change
        before = now
    return DeviceUtilization(
        {name: at_work[place] for name, place in rank_and_size.items()},
        sum(seconds for number, seconds in together.items() if number),
        together[len(places)],
    )
