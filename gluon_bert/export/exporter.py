"""Exports a run in each format, compares it with the run, and reads exports back."""

from __future__ import annotations

import dataclasses
import logging
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, Mapping, NamedTuple, Sequence

import numpy as np

from ..data.tokenizer import EncodedText, PaddedBatch, Tokenizer
from ..data.vocab import Normalization
from ..errors import InputError
from ..fileio import atomic_folder, check_new_folder, check_utf8_path
from ..inference.predictor import Backend, GluonNetwork, Predictor
from ..model.pooling import Pooling
from ..model.precision import check_precision
from ..model.task import Task
from ..run import Run, load_run
from ..runtime import versions
from .low_precision import check_bf16, check_int8, to_bf16, to_int8
from .manifest import MANIFEST, OUTPUTS, Manifest, hashes
from .mxnet_symbol import BlockNetwork, ModuleNetwork, save_graph, trace
from .onnx_graph import OnnxNetwork, onnx_versions, package, save_onnx
from .onnx_int8 import quantize
from .verify import NUM_GROUPS, batches, compare, differences, random_texts, relative_distances

log = logging.getLogger(__name__)

# The operators and numbers are the same. Different shapes may change the order of sums.
FP32_TOLERANCE = 1e-5

# The default limits on the difference that `compare` measures.
# onnxruntime computes in float32 too: 2e-6 at most was measured, on bert-tiny and bert-base.
ONNX_ERROR = 1e-5
# A vector that is off by e has a cosine of 1 - e * e / 2 or more: 0.995 and 0.9998. The means were
# up to 0.05 with int8 and 0.008 with bf16, on bert-tiny and bert-base.
INT8_ERROR = 0.1
BF16_ERROR = 0.02

# Formats that onnxruntime reads.
ONNX_FORMATS = ("onnx", "onnx-int8")
# Formats that some CPUs cannot compute.
CPU_CHECKS = {"int8": check_int8, "bf16": check_bf16}


class Exported(NamedTuple):
    """An export read back: the network, its tokenizer and its manifest."""

    network: Backend
    reader: Tokenizer
    manifest: Manifest

    @property
    def predictor(self) -> Predictor:
        """Return a predictor for this export."""
        task, pooling = self.manifest.task, self.manifest.pooling
        return Predictor(
            self.network,
            self.reader,
            None if task is None else Task.from_json(task, MANIFEST),
            self.manifest.untrained,
            None if pooling is None else Pooling.from_json(pooling, MANIFEST),
        )


def load_exported(folder: Path, context: Any | None = None) -> Exported:
    """Read an export of any format, by default onto the CPU; raise InputError if it is damaged.

    context: the device; only the format mxnet supports GPUs.
    """
    folder = Path(folder)
    check_utf8_path(folder)
    manifest = Manifest.load(folder)
    if manifest.format != "mxnet" and context is not None and context.device_type != "cpu":
        raise InputError(f"{folder}: an export in {manifest.format} runs on the CPU only, not on {context}")
    return Exported(_network(folder, manifest, context), manifest.reader(folder), manifest)


def load_predictor(
    folder: Path, context: Any, checkpoint: str | int = "latest", precision: str = "fp32"
) -> Predictor:
    """Return the predictor of a run or of an export.

    checkpoint: as in `load_run`. precision: of a run's matrix products, fp32 or bf16. Raise InputError if an
    export is given another checkpoint or precision.
    """
    if not (folder / MANIFEST).exists():
        check_precision(precision, [context])
        run = load_run(folder, [context], checkpoint)
        run.net.set_matmul_precision(precision)
        return Predictor.of(run)
    if precision != "fp32":
        raise InputError(f"precision must be fp32 for an export such as {folder}, got {precision}.")
    if checkpoint != "latest":
        raise InputError(f"checkpoint must be omitted for an export such as {folder}, got {checkpoint}.")
    return load_exported(folder, context).predictor


def export_mxnet(run: Run, folder: Path, outputs: str = "all") -> Manifest:
    """Write a run's network as an MXNet symbol with its parameters, vocabulary and manifest.

    It is read back by `gluon.SymbolBlock.imports` and by `mx.mod.Module`. Both are compared with the network
    at three batch sizes and lengths. Raise InputError and write nothing if the folder is not empty or they
    differ.
    """
    outputs = outputs_of_run(run, outputs)
    with _new_export(folder) as aside:
        save_graph(aside, trace(run.net, outputs, run.config.data.max_seq_length))
        manifest = describe(aside, run, "mxnet", outputs)
        shapes = ((1, 5), (3, run.config.data.max_seq_length // 2 + 1), (7, run.config.data.max_seq_length))
        found = {
            "SymbolBlock": _differences(run, BlockNetwork(aside, manifest), shapes),
            "Module": _differences(run, ModuleNetwork(aside, manifest), shapes),
        }
        check_errors(FP32_TOLERANCE, found)
        comparison = {"shapes (B, T)": shapes, "largest differences": found}
        manifest = dataclasses.replace(manifest, comparison=comparison)
        manifest.save(aside)
    return manifest


def export_onnx(
    run: Run, folder: Path, outputs: str, texts: Sequence[EncodedText], max_error: float | None = None
) -> Manifest:
    """Write a run's network as ONNX with its vocabulary and manifest, once onnxruntime agrees on the texts.

    No vector may differ by more than max_error. Raise InputError and write nothing if one does, if the folder
    is not empty, or if the extra `onnx` is missing.
    """
    for name in ("onnx", "onnxruntime"):
        package(name)
    outputs = outputs_of_run(run, outputs)
    limit = ErrorLimit("largest", ONNX_ERROR if max_error is None else max_error)
    with _new_export(folder) as aside:
        save_onnx(aside, trace(run.net, outputs, run.config.data.max_seq_length), outputs)
        return _compared(aside, run, "onnx", outputs, texts, limit)


def export_onnx_int8(
    run: Run, folder: Path, outputs: str, texts: Sequence[EncodedText], max_error: float | None = None
) -> Manifest:
    """Write a run's network as ONNX with dense layers in int8, with its vocabulary and manifest.

    Every other text, by length, decides which layers stay in float32: those with the largest errors, until
    the mean difference on these texts is within max_error. The rest are compared, as in `export_int8`. Raise
    InputError and write nothing if they differ too much, if the folder is not empty, or if the extra `onnx`
    is missing.
    """
    for name in ("onnx", "onnxruntime"):
        package(name)
    calibration, compared = _halves(texts)
    outputs = outputs_of_run(run, outputs)
    limit = ErrorLimit("mean", INT8_ERROR if max_error is None else max_error)
    asked = _calibrating(run, calibration, outputs)
    reference = GluonNetwork(run.net)
    expected = [reference(each) for each in asked]
    with _new_export(folder) as aside:
        save_onnx(aside, trace(run.net, outputs, run.config.data.max_seq_length), outputs)
        manifest = describe(aside, run, "onnx-int8", outputs)

        def is_close() -> bool:
            other = OnnxNetwork(aside, manifest)
            found = (relative_distances(one, other(each), each) for one, each in zip(expected, asked))
            return all(distances.mean() <= limit.value for each in found for distances in each.values())

        num_kept = quantize(aside, OUTPUTS[outputs], asked, is_close)
        log.info("%d dense layers stay in float32", num_kept)
        return _compared(aside, run, "onnx-int8", outputs, compared, limit)


def _halves(texts: Sequence[EncodedText]) -> tuple[Sequence[EncodedText], Sequence[EncodedText]]:
    """Return every other text, by length, and the rest: to calibrate int8 and to compare it."""
    if len(texts) < 2 * NUM_GROUPS:
        raise InputError(
            f"text must have at least {2 * NUM_GROUPS} texts for int8, half of them for calibration, "
            f"got {len(texts)}."
        )
    ordered = sorted(texts, key=len)
    return ordered[::2], ordered[1::2]


def export_int8(
    run: Run, folder: Path, outputs: str, texts: Sequence[EncodedText], max_error: float | None = None
) -> Manifest:
    """Write a run's network with dense layers in int8, as an MXNet symbol with its vocabulary and manifest.

    Every other text, by length, calibrates it. The rest are compared: none of their thirds may differ by more
    than max_error on average. Raise InputError and write nothing if one does, if the folder is not empty, or
    if the CPU cannot compute in int8.
    """
    check_int8()
    calibration, compared = _halves(texts)
    outputs = outputs_of_run(run, outputs)
    limit = ErrorLimit("mean", INT8_ERROR if max_error is None else max_error)
    with _new_export(folder) as aside:
        graph = trace(run.net, outputs, run.config.data.max_seq_length)
        save_graph(aside, to_int8(graph, outputs, _calibrating(run, calibration, outputs)))
        return _compared(aside, run, "int8", outputs, compared, limit)


def export_bf16(
    run: Run, folder: Path, outputs: str, texts: Sequence[EncodedText], max_error: float | None = None
) -> Manifest:
    """Write a run's network with dense layers in bfloat16, as an MXNet symbol with vocabulary and manifest.

    The results may not differ by more than max_error on average, on any third of the texts by length.
    Raise InputError and write nothing if they do, if the folder is not empty, or if the CPU cannot compute in
    bfloat16.
    """
    check_bf16()
    outputs = outputs_of_run(run, outputs)
    limit = ErrorLimit("mean", BF16_ERROR if max_error is None else max_error)
    with _new_export(folder) as aside:
        graph = trace(run.net, outputs, run.config.data.max_seq_length)
        save_graph(aside, to_bf16(graph))
        return _compared(aside, run, "bf16", outputs, texts, limit)


class ErrorLimit(NamedTuple):
    """The limit on the difference between an export's vectors and the network's: the largest, or the mean."""

    kind: str
    value: float

    def check(self, groups: Sequence[Mapping[str, Any]], remedy: str = "") -> None:
        """Raise InputError, with a remedy, unless every output of each group of `compare` is within."""
        for group in groups:
            for output, error in group["errors"].items():
                if not error[self.kind] <= self.value:
                    shortest, longest = group["tokens"]
                    raise InputError(
                        f"on texts of {shortest} to {longest} tokens the {self.kind} difference of {output} "
                        f"from the network's must be at most {self.value:.1e} (max_error), got "
                        f"{error[self.kind]:.1e}. Nothing was written.{remedy}"
                    )


def _calibrating(run: Run, texts: Sequence[EncodedText], outputs: str) -> list[PaddedBatch]:
    with_masks = "mask_scores" in OUTPUTS[outputs]
    asked = batches(texts, run.reader, np.random.default_rng(1), with_masks)
    return [each.texts for each in asked if each.texts.masked_positions.size or not with_masks]


@contextmanager
def _new_export(folder: Path) -> Iterator[Path]:
    check_new_folder(folder)
    check_utf8_path(folder)
    with atomic_folder(folder) as aside:
        yield aside


def _compared(
    folder: Path, run: Run, format: str, outputs: str, texts: Sequence[EncodedText], limit: ErrorLimit
) -> Manifest:
    """Read an export's files back and compare them; write and return the manifest with the result."""
    manifest = describe(folder, run, format, outputs)
    if format in ONNX_FORMATS:
        manifest = dataclasses.replace(manifest, versions={**manifest.versions, **onnx_versions()})
    with_masks = "mask_scores" in OUTPUTS[outputs]
    other = _network(folder, manifest)
    groups = compare(GluonNetwork(run.net), other, texts, run.reader, with_masks)
    remedy = " Try the format onnx-int8." if format == "int8" else ""
    limit.check(groups, remedy)
    comparison = {"limit": limit._asdict(), "groups": groups}
    manifest = dataclasses.replace(manifest, comparison=comparison)
    manifest.save(folder)
    return manifest


def _network(folder: Path, manifest: Manifest, context: Any | None = None) -> Backend:
    if manifest.format in ONNX_FORMATS:
        return OnnxNetwork(folder, manifest)
    if manifest.format in CPU_CHECKS:
        CPU_CHECKS[manifest.format]()
    return BlockNetwork(folder, manifest, context)


def outputs_of_run(run: Run, outputs: str) -> str:
    """Return the key of OUTPUTS that a run's network has.

    All outputs of a fine-tuned network are those of its task. Without a trained head they are the encoder's.
    """
    if outputs != "all":
        return outputs
    if run.task:
        return "token-task" if run.task.scores_tokens else "task"
    return "encoder" if {"mlm", "nsp"} <= set(run.untrained) else "all"


def describe(folder: Path, run: Run, format: str, outputs: str) -> Manifest:
    """Write the vocabulary beside the graph's files in a folder; return their manifest."""
    run.vocab.save(folder / run.vocab.FILE)
    return Manifest(
        format=format,
        outputs=outputs,
        max_seq_length=run.config.data.max_seq_length,
        vocabulary_size=len(run.vocab),
        tokenizer={
            "kind": run.config.data.tokenizer,
            # Lists, as JSON reads them back.
            **{
                name: list(value) if isinstance(value, tuple) else value
                for name, value in Normalization.from_config(run.config.data)._asdict().items()
            },
            "ids": {name: getattr(run.vocab, name) for name in ("unk", "pad", "mask", "cls", "sep")},
        },
        step=run.step,
        files=hashes(folder),
        versions=versions(),
        task=run.task.to_json() if run.task else None,
        untrained=list(run.untrained),
        pooling=run.pooling.to_json() if run.pooling else None,
    )


def check_errors(tolerance: float, found: Mapping[str, Mapping[str, float]]) -> None:
    """Raise InputError unless every difference is within the tolerance."""
    for name, by_output in found.items():
        for output, difference in by_output.items():
            if not difference <= tolerance:
                raise InputError(
                    f"read back by {name}, the difference of {output} from the network's must be at most "
                    f"{tolerance:.0e}, got {difference:.1e}. Nothing was written."
                )


def _differences(run: Run, other: Backend, shapes: Any) -> dict[str, float]:
    rng = np.random.default_rng(0)
    batches = [random_texts(rng, rows, length, run.vocab) for rows, length in shapes]
    return differences(GluonNetwork(run.net), other, batches)
