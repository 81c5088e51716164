"""Export a run for other programs; `python tools/export.py --help` shows how."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Sequence

from gluon_bert.cli import add_checkpoint_flag, main_with_exit_status, parser_of, run
from gluon_bert.errors import InputError

EXAMPLES = """\
examples:
  python tools/export.py runs/d2l-1 --format mxnet --outputs encoder
  python tools/export.py runs/d2l-1 --format mar && python tools/serve.py runs/d2l-1/export/mar
  python tools/export.py runs/d2l-1 --format onnx --text-file my_sentences.txt

formats:
  mxnet   bert-symbol.json and bert-0000.params, for gluon.SymbolBlock.imports and mx.mod.Module
  mar     bert.mar, a complete archive for multi-model-server (extra serve)
  onnx    for onnxruntime and others (extra onnx)
  onnx-int8   as onnx, with matrix products in 8 bits, except layers with large errors
  int8    as mxnet, with matrix products in 8 bits, for CPUs
  bf16    as mxnet, with matrix products in bfloat16, for CPUs that have it

The folder also holds the vocabulary and manifest.json: inputs and outputs with their meaning, max_seq_length,
hashes, versions, and the differences from the run. The command reads each export back and compares it with
the run. If they differ too much, it fails and writes nothing. A text longer than max_seq_length
is an error of the exported network; it is never truncated. The manifest names untrained heads. Without a
trained head only the encoder is exported.
"""


def parser() -> argparse.ArgumentParser:
    """Return the command's flags."""
    p = parser_of("export", "RUN [flags]", "Write a pretrained network in a form that others run.", EXAMPLES)
    p.add_argument("run", type=Path, metavar="RUN", help="the folder of a run")
    p.add_argument(
        "--format",
        choices=("mxnet", "mar", "onnx", "onnx-int8", "int8", "bf16"),
        default="mxnet",
        help="format of the export (mxnet)",
    )
    p.add_argument(
        "--outputs",
        choices=("encoder", "all"),
        default="all",
        help="encoder: the encoder's vectors alone; all: also those of pooler, masks and next sentence (all)",
    )
    p.add_argument("--output", type=Path, metavar="FOLDER", help="a new folder (RUN/export/FORMAT)")
    add_checkpoint_flag(p)
    validation = p.add_argument_group("comparison with the run (onnx, onnx-int8, int8 and bf16)")
    validation.add_argument(
        "--text-file",
        type=Path,
        metavar="FILE",
        help="one text per line (the run's validation text)",
    )
    validation.add_argument("--max-error", type=float, metavar="X", help="fail above this error (by format)")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return main_with_exit_status(parser(), argv, export)


def export(arguments: argparse.Namespace) -> int:
    """Export as the flags say."""
    from gluon_bert.export import exporter as formats
    from gluon_bert.export import model_archive as archive
    from gluon_bert.fileio import check_new_folder
    from gluon_bert.run import load_run

    check(arguments)
    folder = arguments.output or arguments.run / "export" / arguments.format
    check_new_folder(folder)
    run = load_run(arguments.run, checkpoint=arguments.checkpoint)
    if arguments.format == "mar":
        path = archive.export_archive(run, folder, arguments.outputs)
        print(f"{path}: serve it with python tools/serve.py {path}")
        return 0
    if arguments.format == "mxnet":
        manifest = formats.export_mxnet(run, folder, arguments.outputs)
    else:
        write = {
            "onnx": formats.export_onnx,
            "onnx-int8": formats.export_onnx_int8,
            "int8": formats.export_int8,
            "bf16": formats.export_bf16,
        }
        texts = texts_of(run, arguments.text_file)
        manifest = write[arguments.format](run, folder, arguments.outputs, texts, arguments.max_error)
    print(f"{folder}: {', '.join(manifest.files)}, manifest.json")
    print(summary(manifest))
    return 0


def summary(manifest: Any) -> str:
    """Return how far an export is from its run, as text."""
    from gluon_bert.export.verify import table

    if manifest.format != "mxnet":
        return "\n".join(table(manifest.comparison["groups"]))
    shapes = ", ".join(f"{rows} x {length}" for rows, length in manifest.comparison["shapes (B, T)"])
    found = manifest.comparison["largest differences"]
    largest = max(difference for by_output in found.values() for difference in by_output.values())
    readers = " and ".join(found)
    return f"read back by {readers} and compared at B x T of {shapes}: largest difference {largest:.1e}"


def check(arguments: argparse.Namespace) -> None:
    """Raise one InputError that names everything that is wrong with the flags."""
    problems = []
    if arguments.format in ("mxnet", "mar"):
        problems += [
            f"{flag} must be omitted with --format {arguments.format}, which is not compared on text."
            for flag, value in (("--text-file", arguments.text_file), ("--max-error", arguments.max_error))
            if value is not None
        ]
    if arguments.max_error is not None and not arguments.max_error > 0:
        problems.append(f"--max-error must be above 0, got {arguments.max_error}.")
    if problems:
        raise InputError("\n".join(problems))


def texts_of(run: Any, path: Path | None) -> Sequence[Any]:
    """Return the texts to compare on: a file's, truncated where too long, or the run's validation texts."""
    from gluon_bert.export.evaluation_texts import validation_texts
    from gluon_bert.inference.text_files import count_lines, read_lines

    if path is None:
        return validation_texts(run)
    count_lines(path, "text_file")
    return [run.reader.text(*line.given, truncate=True) for line in read_lines(path, "text_file")]


if __name__ == "__main__":
    run(main)
