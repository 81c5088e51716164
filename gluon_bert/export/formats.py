"""A run to a folder in each format, compared before it takes its name; and back to what answers questions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Mapping, NamedTuple

import numpy as np

from ..checkpoint import Run
from ..data.texts import TextReader
from ..encoding import GluonNetwork, Network
from ..errors import BadInput
from ..files import folder_aside
from ..runtime import versions
from .comparison import differences, random_texts
from .manifest import VOCABULARY, Manifest, hashes
from .symbol import BlockNetwork, ModuleNetwork, save_graph, trace

# The same operators on the same numbers: what remains is the order of sums where shapes differ.
FP32_TOLERANCE = 1e-5


class Exported(NamedTuple):
    """An export read back: the network, what makes texts into its inputs, and its manifest."""

    network: Network
    reader: TextReader
    manifest: Manifest


def load_exported(folder: Path, context: Any | None = None) -> Exported:
    """Read an export of `export_mxnet`, by default onto the CPU; BadInput where it is damaged or none."""
    folder = Path(folder)
    manifest = Manifest.load(folder)
    return Exported(BlockNetwork(folder, manifest, context), manifest.reader(folder), manifest)


def export_mxnet(run: Run, folder: Path, outputs: str = "all") -> Manifest:
    """Write a run's network as an MXNet symbol with its parameters, vocabulary and manifest.

    It is read back by `gluon.SymbolBlock.imports` and by `mx.mod.Module`, and both are compared with the
    network at three other batch sizes and lengths. BadInput where the folder is taken, or where they
    differ, in which case nothing is left.
    """
    check_free(folder)
    with folder_aside(folder) as aside:
        save_graph(aside, trace(run.net, outputs, run.config.data.max_len))
        manifest = describe(aside, run, "mxnet", outputs)
        shapes = ((1, 5), (3, run.config.data.max_len // 2 + 1), (7, run.config.data.max_len))
        found = {
            "SymbolBlock": _differences(run, BlockNetwork(aside, manifest), shapes),
            "Module": _differences(run, ModuleNetwork(aside, manifest), shapes),
        }
        refuse_above(FP32_TOLERANCE, found)
        comparison = {"shapes (B, T)": shapes, "largest differences": found}
        manifest = dataclasses.replace(manifest, comparison=comparison)
        manifest.save(aside)
    return manifest


def check_free(folder: Path) -> None:
    """Raise BadInput where a folder holds something already; writes nothing."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise BadInput(f"--output {folder}: is there already; name a new folder, or remove it")


def describe(folder: Path, run: Run, format: str, outputs: str) -> Manifest:
    """The manifest of the graph's files in a folder, beside which the vocabulary is written."""
    run.vocab.save(folder / VOCABULARY)
    return Manifest(
        format=format,
        outputs=outputs,
        max_len=run.config.data.max_len,
        vocabulary_size=len(run.vocab),
        tokenizer={"kind": "words", "lowercase": run.config.data.lowercase},
        step=run.step,
        files=hashes(folder),
        versions=versions(),
    )


def refuse_above(tolerance: float, found: Mapping[str, Mapping[str, float]]) -> None:
    """Raise BadInput unless every difference is within the tolerance."""
    for name, by_output in found.items():
        for output, difference in by_output.items():
            if not difference <= tolerance:
                raise BadInput(
                    f"read back by {name}, the {output} of the export differ by {difference:.1e} from the "
                    f"network's, where {tolerance:.0e} is allowed: nothing was written"
                )


def _differences(run: Run, other: Network, shapes: Any) -> dict[str, float]:
    rng = np.random.default_rng(0)
    batches = [random_texts(rng, rows, length, len(run.vocab)) for rows, length in shapes]
    return differences(GluonNetwork(run.net), other, batches)
