"""Measures speed side by side: training steps, encoding, text preparation, scaling, matrix products."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from gluon_bert.cli import main_with_exit_status, parser_of, run
from gluon_bert.config import flag_name
from gluon_bert.errors import InputError
from gluon_bert.presets import PRESETS

EXAMPLES = """\
examples:
  python tools/benchmark.py train --against mxnet,d2l,pytorch --json speed.json
  python tools/benchmark.py train --preset bert-base --lengths 128,512 --against pytorch,transformers
  python tools/benchmark.py encode runs/d2l-1 --against onnxruntime,transformers
  python tools/benchmark.py prepare --against cached,d2l
  python tools/benchmark.py scale --json scale.json
  python tools/benchmark.py products --preset bert-base --tokens 512

All baselines do the same work in turns, round by round (A B C, A B C, ...), so other load on the machine
slows them equally. Results are medians over all rounds. A ratio is the median of each round's ratio to the
first baseline. A baseline whose results differ from those of the first is an error.
`benchmark.py train --help` and so on list each benchmark's flags.
"""

TRAIN = """\
baselines (each in its own process):
  compiled      this package with its compiled operators; compiled-bf16: in bf16
  mxnet         this package with MXNet's own operators
  d2l           the code of Dive into Deep Learning, d2l 0.17.6 on MXNet
  pytorch       the same network in PyTorch, optimized; pytorch-bf16: in bf16
  pytorch-all           the last layer computes all vectors, as published code does; pytorch-all-bf16: in bf16
  pytorch-compile       pytorch by torch.compile; pytorch-compile-bf16: in bf16
  transformers  BertForPreTraining as its users run it; transformers-bf16: in bf16
d2l, pytorch and transformers get environments of their own below MXNet's data folder at first use.
d2l needs --preset d2l, transformers another preset.

The table also shows pairs per CPU second, which other load changes less than pairs per second, the peak
memory, and the MLM loss of the last round. If the first baseline has a higher loss than another, it fails.
"""

ENCODE = """\
baselines:
  plain         the hybridized network, batches in text order, padded to the longest text
  encode        as in tools/encode.py: batches of texts of similar length; encode-bf16: in bf16
  exported      the same with the exported symbol in gluon.SymbolBlock
  served        one text per request to multi-model-server, 8 connections (extra serve, Java)
  onnxruntime   the exported ONNX graph (extra onnx); onnxruntime-int8: dense layers in int8, calibrated on
                the texts
  transformers  PyTorch transformers' BertModel with the same weights (torch, transformers);
                transformers-bf16: its weights and activations in bf16
  ctranslate2   CTranslate2's Encoder with the same weights (torch, transformers, ctranslate2);
                ctranslate2-int8: dense layers in int8
"""

PREPARE = """\
baselines (a new process each time):
  workers-N     this package with N processes, for each N of --preprocessing-workers
  cached        this package with its cache of an earlier run
  d2l           the code of Dive into Deep Learning
The table shows seconds without the start of Python, MB per second, and the peak memory of a process.
"""

SCALE = """\
The first value of each flag makes the first row. Every other value makes a row with that value in its place.
Texts are packed to the length. Several workers are started by tools/launch.py on this machine.

The table shows medians of pairs and tokens per second, the ratio to the first row, the share of the fastest
matrix products measured in this run, and the peak memory of all processes of a row. Its last columns divide
the time of one more step into parts: losses and gradients, their sum over contexts and workers, the update.
"""

PRODUCTS = """\
baselines: the compiled operators; NumPy (OpenBLAS); MXNet (oneDNN); PyTorch, if it is installed here.
bf16 is measured where the processor has AVX512_BF16. Weights of the compiled operators are packed before.
"""

# Flags with comma-separated numbers.
COUNTS = ("lengths", "batch_sizes", "contexts", "workers", "preprocessing_workers")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    p = parser_of(
        "benchmark",
        "{train,encode RUN,prepare,scale,products} [flags]",
        "Measure speed in rounds, side by side with baselines.",
        EXAMPLES,
    )
    benchmarks = p.add_subparsers(
        dest="benchmark",
        required=True,
        prog="python tools/benchmark.py",
        metavar="{train,encode,prepare,scale,products}",
    )

    def add(name: str, description: str, epilog: str, rounds: int) -> argparse.ArgumentParser:
        sub = benchmarks.add_parser(
            name,
            help=description,
            description=f"Measure {description}.",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.add_argument(
            "--rounds", type=int, default=rounds, metavar="N", help=f"number of rounds ({rounds})"
        )
        sub.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file")
        return sub

    train = add("train", "optimizer steps of a preset", TRAIN, 5)
    encode = add("encode", "vectors of texts of mixed lengths", ENCODE, 5)
    prepare = add("prepare", "the way from text files to the first batch of the preset d2l", PREPARE, 5)
    scale = add("scale", "steps over networks, lengths, batch sizes, contexts and workers", SCALE, 3)
    products = add("products", "matrix products of a layer and of the decoder", PRODUCTS, 5)
    products.add_argument("--preset", default="bert-base", metavar="NAME", help="network (bert-base)")
    products.add_argument("--tokens", type=int, default=512, metavar="N", help="rows of a product (512)")
    add_train_flags(train)
    add_encode_flags(encode)
    add_prepare_flags(prepare)
    add_scale_flags(scale)
    return p


def add_train_flags(p: argparse.ArgumentParser) -> None:
    """Add the flags of `train`."""
    p.add_argument("--preset", default="d2l", metavar="NAME", help="network and batches (d2l)")
    p.add_argument("--lengths", metavar="N[,N...]", help="most tokens of a pair, a table each (the preset's)")
    p.add_argument("--batch-size", type=int, metavar="N", help="pairs of a step (d2l: 512, others: 16)")
    add_steps_flag(p)
    add_corpus_flag(p)
    p.add_argument(
        "--against",
        default="mxnet",
        metavar="NAME[,NAME...]",
        help="baselines in addition to compiled (mxnet)",
    )


def add_encode_flags(p: argparse.ArgumentParser) -> None:
    """Add the flags of `encode`."""
    p.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    p.add_argument("--texts", type=int, default=512, metavar="N", help="texts per round (512)")
    p.add_argument(
        "--text-file", type=Path, metavar="FILE", help="one text per line (the run's validation text)"
    )
    p.add_argument(
        "--against",
        metavar="NAME[,NAME...]",
        help="baselines in addition to plain and encode (all installed in fp32)",
    )


def add_prepare_flags(p: argparse.ArgumentParser) -> None:
    """Add the flags of `prepare`."""
    add_corpus_flag(p)
    p.add_argument(
        "--preprocessing-workers", default="0", metavar="N[,N...]", help="numbers of processes to measure (0)"
    )
    p.add_argument(
        "--megabytes",
        type=int,
        default=0,
        metavar="N",
        help="enlarge the corpus to this size by repeating its paragraphs in random order (0: as it is)",
    )
    p.add_argument("--against", metavar="NAME[,NAME]", help="more baselines: cached, d2l or both (none)")


def add_scale_flags(p: argparse.ArgumentParser) -> None:
    """Add the flags of `scale`."""
    add_steps_flag(p)
    add_corpus_flag(p)
    presets = "bert-small,bert-tiny,bert-mini,bert-base"
    p.add_argument("--presets", default=presets, metavar="NAME[,NAME...]", help=f"networks ({presets})")
    for name, default, what in (
        ("lengths", "128,64,256,512", "tokens per pair"),
        ("batch-sizes", "16,4,64", "pairs per step"),
        ("contexts", "1,2,4", "CPU contexts per process"),
        ("workers", "1,2", "numbers of workers"),
    ):
        p.add_argument(f"--{name}", default=default, metavar="N[,N...]", help=f"{what} ({default})")
    p.add_argument(
        "--kvstore",
        default="dist_sync",
        metavar="NAME[,NAME]",
        help="what sums the gradients of several workers: dist_sync, horovod or both (dist_sync)",
    )
    p.add_argument(
        "--estimate", action="store_true", help="print an estimate for eight GPUs and for 32 machines; no run"
    )


def add_steps_flag(p: argparse.ArgumentParser) -> None:
    """Add the flag of the benchmarks that train."""
    p.add_argument("--steps", type=int, default=3, metavar="N", help="steps per round (3)")


def add_corpus_flag(p: argparse.ArgumentParser) -> None:
    """Add the flag of the benchmarks that read a corpus."""
    p.add_argument(
        "--corpus",
        default="wikitext-2",
        metavar="NAME",
        help="wikitext-2 or a folder with its two files (wikitext-2, downloaded once)",
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return main_with_exit_status(parser(), argv, benchmark)


def benchmark(arguments: argparse.Namespace) -> int:
    """Run the benchmark that the flags describe."""
    check(arguments)
    return int(import_module(f"benchmarks.{arguments.benchmark}").run(arguments))


def check(arguments: argparse.Namespace) -> None:
    """Raise one InputError for all problems with the flags."""
    given, name = vars(arguments), arguments.benchmark
    problems = [
        f"{flag_name(flag)} must be at least 1, got {given[flag]}"
        for flag in ("rounds", "texts", "steps", "batch_size", "tokens")
        if (1 if given.get(flag) is None else given[flag]) < 1
    ]
    least = int(name in ("scale", "train"))
    for flag in COUNTS:
        numbers = (given.get(flag) or "1").split(",")
        if not all(number.isdecimal() and int(number) >= least for number in numbers):
            problems.append(
                f"{flag_name(flag)} must be numbers of at least {least} with commas, such as 1,2, "
                f"got {given[flag]}"
            )
    if name == "scale":
        problems += unknown_names("--presets", arguments.presets, tuple(PRESETS))
        problems += unknown_names("--kvstore", arguments.kvstore, ("dist_sync", "horovod"))
    if name in ("train", "products"):
        problems += unknown_names("--preset", arguments.preset, tuple(PRESETS))
    if name == "prepare":
        if arguments.megabytes < 0:
            problems.append(f"--megabytes must be at least 0, got {arguments.megabytes}")
        problems += unknown_names("--against", arguments.against or "cached", ("cached", "d2l"))
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        problems.append(f"--json {arguments.json}: the folder {arguments.json.parent} does not exist")
    if problems:
        raise InputError("\n".join(problems))


def unknown_names(flag: str, names: str, known: tuple[str, ...]) -> list[str]:
    """Return a problem for each of the comma-separated names that is not known."""
    return [
        f"{flag} must be some of {', '.join(known)}, got {name}"
        for name in names.split(",")
        if name not in known
    ]


if __name__ == "__main__":
    run(main)
