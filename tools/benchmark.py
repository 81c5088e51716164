"""Measures speed side by side: `python tools/benchmark.py --help` tells how."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.encode import encode
from benchmarks.prepare import prepare
from benchmarks.scale import COUNTS, scale
from benchmarks.train import train

from gluon_bert.cli import main_with_exit_status, parser_of, run
from gluon_bert.errors import InputError
from gluon_bert.presets import PRESETS

EXAMPLES = """\
examples:
  python tools/benchmark.py encode runs/d2l-1
  python tools/benchmark.py encode runs/d2l-1 --against onnxruntime,transformers --rounds 9 --json speed.json
  python tools/benchmark.py train --against mxnet,seed,pytorch --json speed.json
  python tools/benchmark.py prepare --against cached,seed
  python tools/benchmark.py prepare --megabytes 1000 --workers 0,1,2 --rounds 1
  python tools/benchmark.py scale --json scale.json
  python tools/benchmark.py scale --presets bert-large --lengths 512 --batch-sizes 2 --contexts 1 --workers 1
  python tools/benchmark.py scale --estimate

All contestants get the same work in turns, round by round (A B C, A B C, ...), so that whatever else the
machine does meets them all. Told are the medians over the rounds, and the median of each round's ratio to the
first. A contestant whose results are not the first one's is an error.

train: optimizer steps of the book's model, 512 pairs each, from text in memory to new weights and their loss
  compiled      this package with its compiled operators; compiled-bf16: in bf16
  mxnet         this package with MXNet's own operators
  seed          the book's own code, d2l 0.17.6 on MXNet
  pytorch       the same network in PyTorch, as fast as its own operators make it; pytorch-bf16: in bf16
  Each is a process; seed and pytorch are installed in environments of their own, below MXNet's data folder,
  when they are first asked for. Told are also the rate by the time that all cores together were at work,
  which other processes change less, the peak memory, and the MLM loss of the last round: a first contestant
  that has learnt less than another is an error.

prepare: from files of text to the first batch of the preset d2l, a new process each time
  workers-N     this package with --preprocessing-workers N, for each N of --workers
  cached        this package, from what it has kept of an earlier time
  seed          the book's own code
  Told are seconds without the start of Python, MB a second, and the memory of the process that took the
  most. --megabytes makes a larger text of the corpus: its paragraphs again and again, in new orders.

scale: optimizer steps of other networks, lengths, batch sizes, contexts and workers, in new processes each
  time (several workers by tools/launch.py, all on this machine)
  The first value of each flag makes the first row; each other one is a row with that in its place. Texts are
  packed to the length. Told are medians: pairs and tokens a second, the latter's ratio to the first row's,
  which part of the fastest products seen in this run the products of the steps reach, the peak memory of
  all processes of a row added up, and how a step's time is divided, in one more step that waits after each
  part: computing losses and gradients, summing these over contexts and workers, updating the weights.

encode: vectors of texts of mixed lengths, from text in memory to numbers on the host
  plain         the hybridized network, batches in the texts' order, padded to the longest
  encode        what tools/encode.py does: batches of like length
  exported      the same with the exported symbol, read back by gluon.SymbolBlock
  served        requests of a text each to multi-model-server over 8 connections (extra serve, Java)
  onnxruntime   the exported ONNX graph with batches as encode has them (extra onnx)
  transformers  PyTorch transformers' BertModel with the same weights and batches (torch, transformers)
"""


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    p = parser_of(
        "benchmark",
        "{encode RUN,prepare,scale,train} [flags]",
        "Measure speed, side by side with others, in rounds.",
        EXAMPLES,
    )
    p.add_argument("what", choices=("encode", "prepare", "scale", "train"), help="what to measure")
    p.add_argument("run", type=Path, nargs="?", metavar="RUN", help="encode: the folder of a run")
    p.add_argument(
        "--rounds",
        type=int,
        metavar="N",
        help="rounds; encode, train: after one that does not count (5; scale: 3, in a quarter of an hour)",
    )
    p.add_argument("--texts", type=int, default=512, metavar="N", help="encode: texts a round (512)")
    p.add_argument(
        "--text", type=Path, metavar="FILE", help="encode: a text a line (the run's own validation text)"
    )
    p.add_argument("--steps", type=int, default=3, metavar="N", help="scale, train: steps a round (3)")
    p.add_argument(
        "--corpus",
        default="wikitext-2",
        metavar="NAME",
        help="prepare, scale, train: wikitext-2 or a folder with its two files (wikitext-2, downloaded once)",
    )
    p.add_argument(
        "--workers",
        metavar="N[,N...]",
        help="prepare: numbers of processes to measure (0); scale: numbers of workers (1,2)",
    )
    p.add_argument(
        "--presets",
        default="bert-small,bert-tiny,bert-mini,bert-base",
        metavar="NAME[,NAME...]",
        help="scale: networks (bert-small,bert-tiny,bert-mini,bert-base)",
    )
    for name, default, what in (
        ("lengths", "128,64,256,512", "tokens of a pair"),
        ("batch-sizes", "16,4,64", "pairs of a step"),
        ("contexts", "1,2,4", "contexts of a process, on the CPU"),
    ):
        p.add_argument(f"--{name}", default=default, metavar="N[,N...]", help=f"scale: {what} ({default})")
    p.add_argument(
        "--kvstore",
        default="dist_sync",
        metavar="NAME[,NAME]",
        help="scale: what sums the gradients of several workers: dist_sync, horovod or both (dist_sync)",
    )
    p.add_argument(
        "--estimate",
        action="store_true",
        help="scale: measure nothing, and print what can be expected of eight GPUs and of 32 machines",
    )
    p.add_argument("--megabytes", type=int, default=0, metavar="N", help="prepare: of a text to be made (0)")
    p.add_argument(
        "--against",
        metavar="NAME[,NAME...]",
        help="encode: only these beside plain and encode (all that are installed); prepare: cached, seed or "
        "both (none); train: these beside compiled (mxnet)",
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="write every figure to a file")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return main_with_exit_status(parser(), argv, benchmark)


def benchmark(arguments: argparse.Namespace) -> int:
    """Measure as the flags say."""
    scales = arguments.what == "scale"
    if arguments.rounds is None:
        arguments.rounds = 3 if scales else 5
    if arguments.workers is None:
        arguments.workers = "1,2" if scales else "0"
    check(arguments)
    commands = {"encode": encode, "prepare": prepare, "scale": scale, "train": train}
    return commands[arguments.what](arguments)


def check(arguments: argparse.Namespace) -> None:
    """Raise one InputError that tells everything that is wrong with the flags."""
    problems = [
        f"--{name} {getattr(arguments, name)}: must be at least 1"
        for name in ("rounds", "texts", "steps")
        if getattr(arguments, name) < 1
    ]
    if arguments.what == "encode" and arguments.run is None:
        problems.append("encode: name the folder of a run")
    if arguments.what != "encode" and arguments.run is not None:
        problems.append(f"{arguments.what} {arguments.run}: takes no run; --corpus names a text")
    for name in COUNTS:
        given, least = getattr(arguments, name), int(arguments.what == "scale")
        if not all(number.isdecimal() and int(number) >= least for number in given.split(",")):
            flag = f"--{name.replace('_', '-')}"
            problems.append(f"{flag} {given}: numbers from {least} on with commas between them, such as 1,2")
    unknown = [name for name in arguments.presets.split(",") if name not in PRESETS]
    problems += [f"--presets {name}: must be some of {', '.join(PRESETS)}" for name in unknown]
    others = set(arguments.kvstore.split(",")) - {"dist_sync", "horovod"}
    problems += [f"--kvstore {name}: must be dist_sync, horovod or both" for name in sorted(others)]
    if arguments.estimate and arguments.what != "scale":
        problems.append(f"--estimate: is for scale, not for {arguments.what}")
    if arguments.megabytes < 0:
        problems.append(
            f"--megabytes {arguments.megabytes}: must be at least 0, which takes the text as it is"
        )
    if arguments.what == "prepare":
        others = set((arguments.against or "cached").split(",")) - {"cached", "seed"}
        problems += [f"--against {name}: must be cached, seed or both" for name in sorted(others)]
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        problems.append(f"--json {arguments.json}: there is no folder {arguments.json.parent}")
    if problems:
        raise InputError("\n".join(problems))


if __name__ == "__main__":
    run(main)
