"""Measures speed side by side: `python tools/benchmark.py --help` tells how."""

from __future__ import annotations

import argparse
import os
import platform
import re
import statistics
import sys
import time
from contextlib import ExitStack
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import numpy as np
from command_line import command, parser_of, run

from gluon_bert import runtime
from gluon_bert.config import PRESETS, write_json
from gluon_bert.errors import BadInput

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
  compiled      this package with its compiled operators
  mxnet         this package with MXNet's own operators
  seed          the book's own code, d2l 0.17.6 on MXNet
  pytorch       the same network in PyTorch, as fast as its own operators make it; pytorch-bf16: in bf16
  Each is a process; seed and pytorch are installed in environments of their own, below MXNet's data folder,
  when they are first asked for. Told are also the rate by the time that all cores together were at work,
  which other processes change less, the peak memory, and the MLM loss of the last round: a first contestant
  that has learnt less than another is an error.

prepare: from files of text to the first batch of the preset d2l, a new process each time
  workers-N     this package with --num-workers N, for each N of --workers
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


# Pairs of a text are the same, and so is the network; what is left is initial weights, dropout, order.
LEARNT_LESS = 0.2  # nats after a few dozen steps

# Flags that take numbers with commas between them, in the order of a row of scale.
COUNTS = ("lengths", "batch_sizes", "contexts", "workers")

# Two ways to compute the same vectors in single precision are no further apart.
SAME = 1e-3


class Result(NamedTuple):
    """How fast a contestant was: units a second round by round, and their ratios to the first one's."""

    name: str
    rates: list[float]
    ratios: list[float]

    @property
    def rate(self) -> float:
        """The median rate."""
        return statistics.median(self.rates)

    @property
    def ratio(self) -> float:
        """The median ratio to the first contestant."""
        return statistics.median(self.ratios)


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
        "--text", type=Path, metavar="FILE", help="encode: a text a line (the run's own held-out text)"
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
    return command(parser(), argv, benchmark)


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


def prepare(arguments: argparse.Namespace) -> int:
    """A text made ready, by processes in turns."""
    from preparations import TRAIN, VALID, Preparation, enlarged, refuse_other_batches

    names = [f"workers-{number}" for number in arguments.workers.split(",")]
    names += arguments.against.split(",") if arguments.against else []
    corpus = corpus_folder(arguments.corpus)
    with TemporaryDirectory(prefix="gluon_bert-benchmark-") as folder:
        if arguments.megabytes:
            corpus = enlarged(corpus, arguments.megabytes, Path(folder, "text"))
        megabytes = sum((corpus / name).stat().st_size for name in (TRAIN, VALID)) / 1e6
        contestants = []
        for name in dict.fromkeys(names):
            print(f"getting {name} ready", file=sys.stderr)
            Path(folder, name).mkdir()
            contestants.append(Preparation(name, corpus, Path(folder, name)))
        answers: dict[str, list[dict[str, Any]]] = {each.name: [] for each in contestants}
        for _ in range(arguments.rounds):
            for each in contestants:
                answers[each.name].append(each.make())
    refuse_other_batches(answers)
    told = f"{megabytes:.1f} MB, {arguments.rounds} rounds, {machine()}"
    print(prepare_table(told, megabytes, answers))
    if arguments.json:
        content = {"what": "prepare", "work": told, "versions": runtime.versions()}
        write_json(arguments.json, {**content, "rounds": answers})
    return 0


def prepare_table(told: str, megabytes: float, answers: Mapping[str, list[dict[str, Any]]]) -> str:
    """How long it took to make a text ready, for people."""
    first = next(iter(answers.values()))
    lines = [told, f"{'':14}{'seconds':>9}{'MB/s':>8}{'ratio':>7}   {'from .. to':14}{'peak GB':>9}"]
    for name, own in answers.items():
        seconds = statistics.median(each["seconds"] for each in own)
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(first, own)]
        spread = f"{min(ratios):.2f} .. {max(ratios):.2f}"
        lines.append(
            f"{name:14}{seconds:9.2f}{megabytes / seconds:8.1f}{statistics.median(ratios):7.2f}   {spread:14}"
            f"{max(each['peak_gigabytes'] for each in own):9.2f}"
        )
    return "\n".join(lines)


def scale(arguments: argparse.Namespace) -> int:
    """Steps of networks, lengths, batches, contexts and workers, each in new processes, in turns."""
    from scaling import Row, estimate, refuse_what_cannot_be, rows_of

    from gluon_bert import ops

    if arguments.estimate:
        print(estimate())
        return 0
    values = [[int(number) for number in getattr(arguments, name).split(",")] for name in COUNTS]
    rows = rows_of(arguments.kvstore.split(","), arguments.presets.split(","), *values)
    corpus = corpus_folder(arguments.corpus)
    refuse_what_cannot_be(rows, corpus)
    answers: dict[Row, list[dict[str, Any]]] = {row: [] for row in rows}
    for number in range(arguments.rounds):
        for row in rows:
            answers[row].append(row.measure(corpus, arguments.steps))
            (rate,) = rates(answers[row][-1:])
            print(f"round {number + 1} of {arguments.rounds}: {row}: {rate:.1f} pairs/s", file=sys.stderr)
    threads, words = runtime.versions()["threads"], answers[rows[0]][0]["vocabulary"]
    told = (
        f"{arguments.rounds} rounds of {arguments.steps} steps, {threads} threads, {machine()}, "
        f"operators: {ops.in_use()}, a vocabulary of {words:,}"
    )
    print(scale_table(told, answers))
    if arguments.json:
        content = {"what": "scale", "work": told, "versions": runtime.versions()}
        of_rows = [{**row._asdict(), "rounds": own} for row, own in answers.items()]
        write_json(arguments.json, {**content, "rows": of_rows})
    return 0


def scale_table(told: str, answers: Mapping[Any, list[dict[str, Any]]]) -> str:
    """What each row reaches, for people; of a step's parts those that are not the making of its batch."""
    fastest = max(answer["flop_per_second_of_products"] for own in answers.values() for answer in own)
    parts = ("computing", "summing", "updating")
    first = next(iter(answers.values()))
    lines = [told, f"{'':11}{'tokens':>7}{'pairs':>6}{'contexts':>9}{'workers':>8}  {'summed by':9}"]
    lines[-1] += (
        f"{'pairs/s':>9}{'tokens/s':>9}{'ratio':>7}   {'from .. to':14}{'of products':>11}{'peak GB':>9}"
    )
    lines[-1] += "".join(f"{part:>10}" for part in parts)
    for row, own in answers.items():
        ratios = [a / b for a, b in zip(rates(own, of="tokens"), rates(first, of="tokens"))]
        spread = f"{min(ratios):.2f} .. {max(ratios):.2f}"
        lines.append(
            f"{row.preset:11}{row.length:7}{row.batch_size:6}{row.contexts:9}{row.workers:8}  {row.kvstore:9}"
            f"{statistics.median(rates(own)):9.1f}{statistics.median(rates(own, of='tokens')):9.0f}"
            f"{statistics.median(ratios):7.2f}   {spread:14}"
            f"{statistics.median(rates(own, of='flop')) / fastest:>11.0%}"
            f"{max(answer['peak_gigabytes'] for answer in own):9.2f}"
        )
        for part in parts:
            shares = [answer["parts"][part] / answer["parts"]["step"] for answer in own]
            lines[-1] += f"{statistics.median(shares):>10.0%}"
    return "\n".join([*lines, f"the fastest products seen in this run: {fastest / 1e9:.1f} GFLOP a second"])


def corpus_folder(name: str) -> Path:
    """Where the two files of --corpus are; WikiText-2 itself is downloaded once."""
    from gluon_bert.data.wikitext import FILES, wikitext2_folder

    folder = wikitext2_folder() if name == "wikitext-2" else Path(name).absolute()
    missing = [file for file in FILES if not (folder / file).is_file()]
    if missing:
        raise BadInput(f"--corpus {name}: has no {' and no '.join(missing)}")
    return folder


def train(arguments: argparse.Namespace) -> int:
    """Optimizer steps of processes in turns."""
    from trainers import CONTESTANTS, Contestant, write_batches

    names = ["compiled", *(arguments.against or "mxnet").split(",")]
    unknown = [name for name in names if name not in CONTESTANTS]
    if unknown:
        raise BadInput(f"--against {unknown[0]}: must be some of {', '.join(CONTESTANTS)}")
    corpus = corpus_folder(arguments.corpus)
    threads = os.environ.get("OMP_NUM_THREADS", str(runtime.usable_cores()))
    with TemporaryDirectory(prefix="gluon_bert-benchmark-") as folder, ExitStack() as stack:
        batches = Path(folder, "batches.npz")
        write_batches(corpus, (arguments.rounds + 1) * arguments.steps, batches)
        contestants = []
        for name in dict.fromkeys(names):
            print(f"getting {name} ready", file=sys.stderr)
            contestants.append(Contestant(name, corpus, batches, threads))
            stack.callback(contestants[-1].close)
        answers: dict[str, list[dict[str, Any]]] = {each.name: [] for each in contestants}
        for number in range(arguments.rounds + 1):
            for each in contestants:
                answer = each.make(arguments.steps)
                if number:  # the first one is to warm up
                    answers[each.name].append(answer)
        facts = {each.name: each.facts for each in contestants}
    told = f"{arguments.rounds} rounds of {arguments.steps} steps, {threads} threads, {machine()}"
    print(train_table(told, answers, facts))
    if arguments.json:
        content = {"what": "train", "work": told, "versions": runtime.versions()}
        write_json(arguments.json, {**content, "contestants": facts, "rounds": answers})
    refuse_learning_less(answers)
    return 0


def train_table(
    told: str, answers: Mapping[str, list[dict[str, Any]]], facts: Mapping[str, Mapping[str, Any]]
) -> str:
    """The rates of training for people, and which part of the possible the first contestant reaches."""
    clock, cores = (
        {name: rates(own, key) for name, own in answers.items()} for key in ("seconds", "cpu_seconds")
    )
    first = next(iter(answers))
    lines = [told, f"{'':14}{'pairs/s':>9}{'ratio':>7}   {'from .. to':14}{'pairs/CPU s':>11}{'ratio':>7}"]
    lines[-1] += f"{'peak GB':>9}{'ready s':>9}{'MLM loss':>10}"
    for name, own in answers.items():
        ratios = [a / b for a, b in zip(clock[name], clock[first])]
        cpu_ratios = [a / b for a, b in zip(cores[name], cores[first])]
        spread = f"{min(ratios):.2f} .. {max(ratios):.2f}"
        lines.append(
            f"{name:14}{statistics.median(clock[name]):9.1f}{statistics.median(ratios):7.2f}   {spread:14}"
            f"{statistics.median(cores[name]):11.1f}{statistics.median(cpu_ratios):7.2f}"
            f"{own[-1]['peak_gigabytes']:9.2f}{facts[name]['ready_seconds']:9.1f}{own[-1]['mlm_loss']:10.3f}"
        )
    lines += [f"{name}: {fact['with']}" for name, fact in facts.items()]
    counted = [name for name, fact in facts.items() if "flop_per_pair" in fact]
    return "\n".join([*lines, *(of_the_possible(name, cores[name], facts[name]) for name in counted)])


def of_the_possible(name: str, cpu_rates: Sequence[float], facts: Mapping[str, Any]) -> str:
    """Which part of the floor, the products of a step without padding, this package's step reaches."""
    most = facts["fastest_products"]["flop_per_cpu_second"]
    reached = facts["flop_per_pair"] * statistics.median(cpu_rates)
    return (
        f"{name}: {facts['flop_per_pair'] / 1e6:.0f} MFLOP of products a pair, {reached / 1e9:.1f} GFLOP a "
        f"CPU second, {reached / most:.0%} of the {most / 1e9:.1f} of the fastest products seen in this run"
    )


def rates(answers: Sequence[Mapping[str, Any]], seconds: str = "seconds", of: str = "pairs") -> list[float]:
    """Pairs, or another work, a second of each round, by this clock."""
    return [answer[of] / answer[seconds] for answer in answers]


def refuse_learning_less(answers: Mapping[str, list[dict[str, Any]]]) -> None:
    """Raise BadInput if the first contestant's loss is above another's: speed alone does not count."""
    first, *others = ((name, own[-1]["mlm_loss"]) for name, own in answers.items())
    for name, loss in others:
        if not first[1] <= loss + LEARNT_LESS:
            raise BadInput(f"{first[0]} has learnt less than {name}: MLM loss {first[1]:.3f}, not {loss:.3f}")


def machine() -> str:
    """The processor in a phrase, as far as it is known."""
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:  # no Linux
        names = []
    return f"{names[0] if names else platform.machine()}, {runtime.usable_cores()} cores"


def encode(arguments: argparse.Namespace) -> int:
    """Vectors of texts by contestants in turns."""
    from encoders import CONTESTANTS

    from gluon_bert.checkpoint import load_run

    names = chosen(arguments.against)
    run = load_run(arguments.run)
    texts = texts_of(run, arguments)
    with TemporaryDirectory(prefix="gluon_bert-benchmark-") as folder, ExitStack() as stack:
        works = {}
        for name in names:
            print(f"getting {name} ready", file=sys.stderr)
            works[name] = CONTESTANTS[name][0](run, Path(folder), stack)
        refuse_other_results({name: work(texts) for name, work in works.items()})
        results = in_rounds(
            {n: partial(work, texts) for n, work in works.items()}, arguments.rounds, len(texts)
        )
    lengths = [len(text) for text in texts]
    told = (
        f"{len(texts)} texts of {min(lengths)} to {max(lengths)} tokens, {arguments.rounds} rounds, "
        f"{runtime.versions()['threads']} threads"
    )
    print(table(told, results))
    if arguments.json:
        content = {"what": arguments.what, "work": told, "versions": runtime.versions()}
        figures = {each.name: each._asdict() for each in results}
        write_json(arguments.json, {**content, "texts a second": figures})
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Raise one BadInput that tells everything that is wrong with the flags."""
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
        raise BadInput("\n".join(problems))


def chosen(against: str | None) -> list[str]:
    """The contestants, in their order; BadInput for one that is unknown or not installed."""
    from encoders import CONTESTANTS, installed, missing

    if against is None:
        left_out = [f"{name} (needs {' and '.join(missing(name))})" for name in CONTESTANTS if missing(name)]
        if left_out:
            print(f"left out, as not installed: {', '.join(left_out)}", file=sys.stderr)
        return installed()
    names = against.split(",")
    unknown = [name for name in names if name not in CONTESTANTS]
    if unknown:
        raise BadInput(f"--against {unknown[0]}: must be some of {', '.join(CONTESTANTS)}")
    absent = {name: missing(name) for name in names if missing(name)}
    if absent:
        raise BadInput(
            "\n".join(f"--against {n}: needs {' and '.join(p)} installed" for n, p in absent.items())
        )
    return [name for name in CONTESTANTS if name in {"plain", "encode", *names}]


def texts_of(run: Any, arguments: argparse.Namespace) -> Sequence[Any]:
    """The texts to encode: of a file, over and over if they are fewer, or held out by the run."""
    if arguments.text is None:
        from gluon_bert.export.held_out import held_out_texts

        return held_out_texts(run, arguments.texts)
    from gluon_bert.text_files import count_lines, read_lines

    count_lines(arguments.text, "--text")
    texts = [run.reader.text(*line.given, truncate=True) for line in read_lines(arguments.text, "--text")]
    return list(islice(cycle(texts), arguments.texts))


def refuse_other_results(found: Mapping[str, np.ndarray]) -> None:
    """Raise BadInput unless all made the same: what computes something else is not faster."""
    (first, expected), *others = found.items()
    for name, vectors in others:
        difference = float(np.abs(vectors - expected).max())
        if not difference <= SAME:
            raise BadInput(f"the vectors of {name} differ by {difference:.1e} from those of {first}")


def in_rounds(works: Mapping[str, Callable[[], Any]], rounds: int, units: int) -> list[Result]:
    """Let all do the same work in turns; `units` is how much work it is. All have done it once before."""
    rates: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            before = time.perf_counter()
            work()
            rates[name].append(units / (time.perf_counter() - before))
    first = next(iter(rates.values()))
    return [Result(name, own, [a / b for a, b in zip(own, first)]) for name, own in rates.items()]


def table(told: str, results: Sequence[Result]) -> str:
    """The results for people."""
    lines = [told, f"{'':14}{'texts/s':>10}{'ratio':>8}   from .. to"]
    for each in results:
        spread = f"{min(each.ratios):.2f} .. {max(each.ratios):.2f}"
        lines.append(f"{each.name:14}{each.rate:10.1f}{each.ratio:8.2f}   {spread}")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
