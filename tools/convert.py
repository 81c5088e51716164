"""Converts weights to runs and back: `python tools/convert.py --help` tells how."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from gluon_bert.cli import add_checkpoint_flag, main_with_exit_status, parser_of, run, yes_or_no
from gluon_bert.errors import InputError

EXAMPLES = """\
examples:
  python tools/convert.py --from huggingface bert-base-uncased/ --to runs/base
  python tools/convert.py --from google uncased_L-12_H-768_A-12/ --to runs/base
  python tools/convert.py --from gluonnlp bert.params vocab.json --num-heads 12 --to runs/base
  python tools/convert.py --from d2l bert.params vocab.json --num-heads 2 --to runs/book
  python tools/convert.py --from runs/my-1 --checkpoint best --to huggingface my_bert/

what stands behind the kinds:
  huggingface  DIR            config.json, vocab.txt or tokenizer.json, model.safetensors or
                              pytorch_model.bin, as BertForPreTraining of PyTorch transformers has
                              them (extra convert)
  google       DIR            bert_config.json, vocab.txt, bert_model.ckpt.*, as google-research/bert
                              has them; can be read only (extra convert-google, which is TensorFlow)
  gluonnlp     PARAMS VOCAB   what save_parameters of GluonNLP 0.10's BERTModel wrote, and vocab.json or
                              vocab.txt; --to takes a folder
  d2l          PARAMS VOCAB   the same of the book's BERTModel for MXNet; its vocabulary's idx_to_token, a
                              token a line, or as JSON

Every number is kept. A run of other weights has one checkpoint, step 0, and everything that takes a run takes
it: encode.py, export.py, finetune.py, and pretrain.py --init. Which row of the next-sentence head means
"follows", and how weights lie in memory, is changed where packages differ. What a package has no place for
is refused, and missing and unexpected weights are listed.
"""


class Format(NamedTuple):
    """What --from or --to names: a kind of package and its paths; a run is the kind "run"."""

    kind: str
    paths: list[Path]


# The kinds, and what stands behind each to be read and to be written; nothing: it cannot be.
KINDS = {
    "huggingface": ("DIR", "DIR"),
    "google": ("DIR", ""),
    "gluonnlp": ("PARAMS VOCAB", "DIR"),
    "d2l": ("PARAMS VOCAB", "DIR"),
}
# The length of the pairs that the book trains on; its model has position embeddings for 1,000.
D2L_MAX_LEN = 64


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    p = parser_of(
        "convert",
        "--from KIND PATH [PATH] --to RUN [flags]\n--from RUN --to KIND FOLDER [flags]",
        "Bring weights of other packages into a run, or a run's weights to them.",
        EXAMPLES,
    )
    p.add_argument(
        "--from", nargs="+", required=True, metavar="WHAT", dest="source", help="KIND PATH, or RUN"
    )
    p.add_argument("--to", nargs="+", required=True, metavar="WHAT", help="RUN, or KIND FOLDER; a new folder")
    reading = p.add_argument_group("what the other package's files do not say")
    reading.add_argument(
        "--num-heads", type=int, metavar="N", help="attention heads a layer, of gluonnlp and d2l"
    )
    reading.add_argument(
        "--max-seq-length",
        type=int,
        metavar="N",
        help="the longest text that the run takes, in tokens (its position embeddings, or the book's 64)",
    )
    reading.add_argument(
        "--lowercase", type=yes_or_no, metavar="{yes,no}", help="whether text is lower-cased (as it is told)"
    )
    reading.add_argument(
        "--gelu",
        choices=("exact", "tanh"),
        help='what "gelu" of google means: tanh as in its code today, exact as in transformers (tanh)',
    )
    reading.add_argument(
        "--init-missing-heads",
        type=yes_or_no,
        metavar="{yes,no}",
        default=False,
        help="draw the pooler or a head anew where it is missing as a whole (no)",
    )
    add_checkpoint_flag(p)
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return main_with_exit_status(parser(), argv, convert)


def convert(arguments: argparse.Namespace) -> int:
    """Convert as the flags say."""
    source, target = place("--from", arguments.source), place("--to", arguments.to)
    check(arguments, source, target)
    notes = write(arguments, source, target) if source.kind == "run" else read(arguments, source, target)
    for note in notes:
        print(note)
    return 0


def place(flag: str, words: list[str]) -> Format:
    """What a flag names; InputError where it is no kind with its paths and no run."""
    kind, *paths = words
    told = f"{flag} {' '.join(words)}"
    if kind not in KINDS:
        if paths:
            raise InputError(
                f"{told}: {kind} is no kind; they are {', '.join(KINDS)}, and a run is one folder"
            )
        return Format("run", [Path(kind)])
    behind = KINDS[kind][flag == "--to"]
    if not behind:
        raise InputError(f"{told}: {kind} can only be read; --to huggingface is what most others read")
    if len(paths) != len(behind.split()):
        raise InputError(f"{told}: must be {kind} {behind}")
    return Format(kind, [Path(path) for path in paths])


def check(arguments: argparse.Namespace, source: Format, target: Format) -> None:
    """Raise one InputError that tells everything that is wrong with the flags."""
    problems = []
    if (source.kind == "run") == (target.kind == "run"):
        what = (
            "both are runs" if source.kind == "run" else "neither is a run; convert to a run and from there"
        )
        problems.append(f"--from and --to: {what}; name a run and a kind")
    for name, kinds in (("num_heads", ("gluonnlp", "d2l")), ("gelu", ("google",))):
        value = getattr(arguments, name)
        if value is not None and source.kind not in kinds:
            problems.append(f"--{name.replace('_', '-')} {value}: is for --from {' and '.join(kinds)}")
    for name in ("max_seq_length", "lowercase"):
        if source.kind == "run" and getattr(arguments, name) is not None:
            problems.append(f"--{name.replace('_', '-')}: a run has its own; it is for --from a kind")
    if source.kind == "run" and arguments.init_missing_heads:
        problems.append("--init-missing-heads yes: a run has all heads")
    if source.kind != "run" and arguments.checkpoint != "latest":
        problems.append(f"--checkpoint {arguments.checkpoint}: is for --from a run")
    if problems:
        raise InputError("\n".join(problems))


def read(arguments: argparse.Namespace, source: Format, target: Format) -> list[str]:
    """From another package to a run; returns what a user should know."""
    from gluon_bert.conversion.converter import save_run
    from gluon_bert.run import check_new_run

    (folder,) = target.paths
    check_new_run(folder, "--to")
    foreign = foreign_of(arguments, source)
    positions = foreign.model.max_positions
    longest = min(positions, D2L_MAX_LEN) if source.kind == "d2l" else positions
    max_seq_length = longest if arguments.max_seq_length is None else arguments.max_seq_length
    came_from = {"kind": source.kind, "paths": [str(path) for path in source.paths]}
    config = save_run(foreign, folder, max_seq_length, came_from)
    model = config.model
    return [
        f"{folder}: {model.num_layers} layers of {model.units}, {model.num_heads} heads, {model.activation}, "
        f"LayerNorm epsilon {model.norm_epsilon:g}, a vocabulary of {len(foreign.vocab):,}, "
        f"{positions} positions, max_seq_length {max_seq_length}, text {'lower-cased' if foreign.lowercase else 'cased'}",
        *foreign.notes,
    ]


def foreign_of(arguments: argparse.Namespace, source: Format) -> Any:
    """The network of another package."""
    case, init_missing_heads = arguments.lowercase, arguments.init_missing_heads
    if source.kind == "huggingface":
        from gluon_bert.conversion.huggingface import read_huggingface

        return read_huggingface(source.paths[0], case, init_missing_heads)
    if source.kind == "google":
        from gluon_bert.conversion.tensorflow import read_tensorflow

        gelu = "gelu" if arguments.gelu == "exact" else "gelu_tanh"
        return read_tensorflow(source.paths[0], gelu, case, init_missing_heads)
    from gluon_bert.conversion.mxnet_params import read_parameters

    parameters, vocab = source.paths
    return read_parameters(source.kind, parameters, vocab, arguments.num_heads, case, init_missing_heads)


def write(arguments: argparse.Namespace, source: Format, target: Format) -> list[str]:
    """From a run to another package; returns what a user should know."""
    from gluon_bert.conversion.huggingface import write_huggingface
    from gluon_bert.conversion.mxnet_params import write_parameters
    from gluon_bert.export.exporter import check_new_folder
    from gluon_bert.run import load_run

    (folder,) = target.paths
    check_new_folder(folder, "--to")
    loaded = load_run(source.paths[0], which=arguments.checkpoint)
    if loaded.task:
        raise InputError(f"--from {source.paths[0]}: was fine-tuned; name the run that it began with")
    if target.kind == "huggingface":
        notes = write_huggingface(loaded, folder)
    else:
        notes = write_parameters(target.kind, loaded, folder)
    return [f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}", *notes]


if __name__ == "__main__":
    run(main)
