"""Convert weights to runs and back; `python tools/convert.py --help` shows how."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from gluon_bert.cli import OnOff, add_checkpoint_flag, main_with_exit_status, parser_of, run, with_flags
from gluon_bert.config import flag_name
from gluon_bert.errors import InputError

EXAMPLES = """\
examples:
  python tools/convert.py --from huggingface bert-base-uncased/ --to runs/base
  python tools/convert.py --from huggingface all-MiniLM-L6-v2/ --to runs/minilm
  python tools/convert.py --from tensorflow uncased_L-12_H-768_A-12/ --to runs/base
  python tools/convert.py --from gluonnlp bert.params vocab.json --num-heads 12 --to runs/base
  python tools/convert.py --from d2l bert.params vocab.json --num-heads 2 --to runs/d2l
  python tools/convert.py --from runs/my-1 --checkpoint best --to huggingface my_bert/

formats:
  huggingface  DIR            any BERT of PyTorch transformers, or a model of sentence-transformers with a
                              BERT: config.json, vocab.txt or tokenizer.json, and weights in
                              safetensors or pytorch_model.bin, also in shards (extra convert)
  tensorflow   DIR            a checkpoint of google-research/bert: bert_config.json, vocab.txt,
                              bert_model.ckpt.*; can only be read (extra convert-google)
  gluonnlp     PARAMS VOCAB   a file of save_parameters of GluonNLP 0.10's BERTModel, and vocab.json or
                              vocab.txt; --to needs a folder
  d2l          PARAMS VOCAB   the same of D2L's BERTModel for MXNet; its vocabulary's idx_to_token, one
                              token per line, or as JSON

The conversion keeps every number. A converted run has one checkpoint, step 0. All commands accept it:
encode.py, export.py, finetune.py, and pretrain.py --init. The run includes the tokenizer's settings and
the pooling of sentence-transformers. A tokenizer that is not BERT's is an error. A head that the files
do not have is marked as untrained. Commands refuse to use it until it is trained. Other weights are left out,
and one line names them.
"""


class Format(NamedTuple):
    """What --from or --to names: a package's format and its paths; a run has the kind "run"."""

    kind: str
    paths: list[Path]


# The formats, and the paths that each takes to be read and to be written; "": it cannot be written.
KINDS = {
    "huggingface": ("DIR", "DIR"),
    "tensorflow": ("DIR", ""),
    "gluonnlp": ("PARAMS VOCAB", "DIR"),
    "d2l": ("PARAMS VOCAB", "DIR"),
}
# Flags that say what a format's files do not say, and the formats that they are for.
READING_FLAGS = {
    "num_heads": ("gluonnlp", "d2l"),
    "gelu": ("tensorflow",),
    "step": ("tensorflow",),
    "pairs": ("huggingface",),
    "max_seq_length": tuple(KINDS),
    "lowercase": tuple(KINDS),
}


def parser() -> argparse.ArgumentParser:
    """Return the command's flags."""
    p = parser_of(
        "convert",
        "--from FORMAT PATH [PATH] --to RUN [flags]\n--from RUN --to FORMAT FOLDER [flags]",
        "Convert weights of other packages to a run, or a run's weights to them.",
        EXAMPLES,
    )
    p.add_argument(
        "--from", nargs="+", required=True, metavar="WHAT", dest="source", help="FORMAT PATH, or RUN"
    )
    p.add_argument(
        "--to", nargs="+", required=True, metavar="WHAT", help="RUN, or FORMAT FOLDER; a new folder"
    )
    reading = p.add_argument_group("settings that the other package's files lack")
    reading.add_argument(
        "--num-heads", type=int, metavar="N", help="attention heads per layer, for gluonnlp and d2l"
    )
    reading.add_argument(
        "--max-seq-length",
        type=int,
        metavar="N",
        help="maximum length of a text in tokens (from the files; at most the number of position embeddings; "
        "64 for d2l)",
    )
    reading.add_argument("--lowercase", action=OnOff, help="whether text is lower-cased (from the files)")
    reading.add_argument(
        "--pairs", action=OnOff, help="whether a BertForSequenceClassification takes pairs of texts (both)"
    )
    reading.add_argument(
        "--gelu",
        choices=("exact", "tanh"),
        help='meaning of "gelu" in tensorflow: tanh as in its code today, exact as in transformers (tanh)',
    )
    reading.add_argument(
        "--step", type=int, metavar="N", help="choose the tensorflow checkpoint after this step"
    )
    add_checkpoint_flag(p)
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return main_with_exit_status(parser(), argv, convert)


def convert(arguments: argparse.Namespace) -> int:
    """Convert as the flags say."""
    source, target = parse_format("--from", arguments.source), parse_format("--to", arguments.to)
    check(arguments, source, target)
    notes = write(arguments, source, target) if source.kind == "run" else read(arguments, source, target)
    for note in notes:
        print(with_flags(note))
    return 0


def parse_format(flag: str, words: list[str]) -> Format:
    """Return what a flag names; raise InputError if it is neither a format with its paths nor a run."""
    kind, *paths = words
    given = f"{flag} {' '.join(words)}"
    if kind not in KINDS:
        if paths:
            raise InputError(f"{given}: the format must be one of {', '.join(KINDS)}; a run is one folder")
        return Format("run", [Path(kind)])
    expected = KINDS[kind][flag == "--to"]
    if not expected:
        raise InputError(f"{given}: {kind} can only be read. Use --to huggingface, which most others read.")
    if len(paths) != len(expected.split()):
        raise InputError(f"{given}: must be {kind} {expected}")
    return Format(kind, [Path(path) for path in paths])


def check(arguments: argparse.Namespace, source: Format, target: Format) -> None:
    """Raise one InputError that names everything that is wrong with the flags."""
    problems = []
    if (source.kind == "run") == (target.kind == "run"):
        what = "both are runs" if source.kind == "run" else "neither is a run"
        problems.append(f"--from and --to: {what}. Name a run and a format.")
    for name, kinds in READING_FLAGS.items():
        if getattr(arguments, name) is not None and source.kind not in kinds:
            flag = flag_name(name)
            what = "a run has its own" if source.kind == "run" else f"{source.kind} does not need it"
            problems.append(f"{flag} must be omitted unless --from is {' or '.join(kinds)}: {what}.")
    if source.kind != "run" and arguments.checkpoint != "latest":
        problems.append(f"--checkpoint must be omitted unless --from is a run, got {arguments.checkpoint}.")
    if problems:
        raise InputError("\n".join(problems))


def read(arguments: argparse.Namespace, source: Format, target: Format) -> list[str]:
    """Convert another package's weights to a run; return what a user should know."""
    from gluon_bert.conversion.converter import save_run
    from gluon_bert.run import check_new_run

    (folder,) = target.paths
    check_new_run(folder, "--to")
    converted = converted_from(arguments, source)
    positions = converted.model.max_positions
    max_seq_length = arguments.max_seq_length or min(converted.max_seq_length or positions, positions)
    came_from = {"kind": source.kind, "paths": [str(path) for path in source.paths]}
    config = save_run(converted, folder, max_seq_length, came_from)
    return [*summary(folder, config, converted), *converted.notes]


def summary(folder: Path, config: Any, converted: Any) -> list[str]:
    """Return two lines on the network and on how it reads text."""
    model, data = config.model, config.data
    text = [
        f"up to {data.max_seq_length} tokens of {model.max_positions} positions",
        "lower-cased" if data.lowercase else "cased",
    ]
    text += {"yes": ["accents stripped"], "no": ["accents kept"]}.get(data.strip_accents, [])
    text += [] if data.tokenize_chinese_chars else ["Chinese characters not split"]
    added = len(data.added_tokens) + len(data.additional_special_tokens)
    text += [f"{added} added tokens"] if added else []
    if converted.pooling:
        normalized = ", normalized" if converted.pooling.normalize else ""
        text.append(f"sentence vectors by {converted.pooling.mode} pooling{normalized}")
    if converted.task:
        outputs = " ".join(converted.task.labels) or {"regression": "a score"}.get(
            converted.task.kind, "answers"
        )
        text.append(f"fine-tuned for {outputs}")
    return [
        f"{folder}: {model.num_layers} layers of {model.units}, {model.num_heads} heads, {model.activation}, "
        f"LayerNorm epsilon {model.norm_epsilon:g}, a vocabulary of {len(converted.vocab):,}",
        f"text: {', '.join(text)}",
    ]


def converted_from(arguments: argparse.Namespace, source: Format) -> Any:
    """Return the network of another package."""
    if source.kind == "huggingface":
        from gluon_bert.conversion.huggingface import read_huggingface

        return read_huggingface(source.paths[0], arguments.lowercase, arguments.pairs)
    if source.kind == "tensorflow":
        from gluon_bert.conversion.tensorflow import read_tensorflow

        gelu = "gelu" if arguments.gelu == "exact" else "gelu_tanh"
        return read_tensorflow(source.paths[0], gelu, arguments.lowercase, arguments.step)
    from gluon_bert.conversion.mxnet_params import read_parameters

    parameters, vocab = source.paths
    return read_parameters(source.kind, parameters, vocab, arguments.num_heads, arguments.lowercase)


def write(arguments: argparse.Namespace, source: Format, target: Format) -> list[str]:
    """Convert a run to another package's format; return what a user should know."""
    from gluon_bert.conversion.huggingface import write_huggingface
    from gluon_bert.conversion.mxnet_params import write_parameters
    from gluon_bert.fileio import check_new_folder
    from gluon_bert.run import load_run

    (folder,) = target.paths
    check_new_folder(folder, "--to")
    loaded = load_run(source.paths[0], checkpoint=arguments.checkpoint)
    if loaded.task and target.kind != "huggingface":
        raise InputError(f"--from must be a pretraining run, got {source.paths[0]}, which was fine-tuned.")
    if target.kind == "huggingface":
        notes = write_huggingface(loaded, folder)
    else:
        notes = write_parameters(target.kind, loaded, folder)
    return [f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}", *notes]


if __name__ == "__main__":
    run(main)
