"""Pretrains BERT: `python tools/pretrain.py --help` tells how."""

from __future__ import annotations

import argparse
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

from command_line import add_config_flags, config_from, guarded, run

from gluon_bert import runtime
from gluon_bert.config import PRESETS, Config, preset
from gluon_bert.errors import BadInput

EXAMPLES = """\
examples:
  python tools/pretrain.py                                   the book's small BERT on the text in this Python
  python tools/pretrain.py --corpus wikitext-2 --gpus 0,1    the book's text, on two GPUs
  python tools/pretrain.py --preset bert-tiny --corpus my_texts/ --num-steps 5000 --eval-every 500
  python tools/pretrain.py --preset bert-tiny --max-minutes 30 --eval-every 100 --patience 5
  python tools/pretrain.py --cpus 2 --batch-size 64 --seed 7

What stands in brackets is what the presets have. A run's folder holds config.json, vocab.json, log.jsonl,
losses.png and checkpoints/.
"""


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    p = argparse.ArgumentParser(
        prog="pretrain",
        usage="python tools/pretrain.py [flags]",
        description="Pretrain BERT (masked language model, next-sentence prediction) on one device or many.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--preset", metavar="NAME", help=f"{', '.join(PRESETS)} (d2l)")
    p.add_argument("--config", type=Path, metavar="FILE", help="an earlier run's config.json, not a preset")
    p.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="the run's new folder (runs/PRESET-1, or the next free number)",
    )
    where = p.add_argument_group("where it runs (every GPU that MXNet sees, else one CPU)")
    where.add_argument("--gpus", metavar="N[,N...]", help="these GPUs, such as 0 or 0,1")
    where.add_argument(
        "--cpus", type=int, metavar="N", help="N contexts on the CPU, each with its shard of the batch"
    )
    add_config_flags(p)
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    try:
        arguments = parser().parse_args(argv)
    except SystemExit as stop:  # argparse has told what is wrong
        return int(stop.code or 0)
    return guarded(lambda: pretrain(arguments), "pretrain")


def pretrain(arguments: argparse.Namespace) -> int:
    """Pretrain as the flags say."""
    config = config_from(arguments, starting_point(arguments))
    gpus = None if arguments.gpus is None else runtime.parse_gpus(arguments.gpus)
    contexts = runtime.contexts(gpus, arguments.cpus)
    name = arguments.preset or ("d2l" if arguments.config is None else "repeat")
    output = _free_folder(name) if arguments.output is None else arguments.output
    return train(config, contexts, output)


def starting_point(arguments: argparse.Namespace) -> Config:
    """The configuration that the flags change: a preset's, or an earlier run's."""
    if arguments.config is None:
        return preset(arguments.preset or "d2l")
    if arguments.preset is not None:
        raise BadInput("--config and --preset exclude each other: give one of them")
    from gluon_bert.checkpoint import read_config  # needs MXNet, which --help does not

    return read_config(arguments.config)


def train(config: Config, contexts: list[Any], output: Path) -> int:
    """The run itself: data, network, steps, and what is left in the folder."""
    from gluon_bert.checkpoint import check_new, create_run, save_checkpoint
    from gluon_bert.data.loader import load_data
    from gluon_bert.model.bert import BERTModel
    from gluon_bert.training.report import References, Report
    from gluon_bert.training.trainer import Trainer, check_evaluable

    class SavingReport(Report):
        """Keeps the weights of each evaluation, and whenever it is asked to."""

        saved: int | None = None

        def evaluated(self, step: int, held_out: Any, best: Any) -> None:
            super().evaluated(step, held_out, best)
            self.save(best=best.step == step)

        def save(self, best: bool = False) -> None:
            """Keep the weights after the step that was made last; once more does nothing."""
            if self.saved != self.step:
                save_checkpoint(output, net, self.step, best=best, keep=config.train.keep)
                self.saved = self.step

    check_new(output)
    data = load_data(config.data, config.train.batch_size, config.train.seed)
    check_evaluable(config.train, data)
    net = BERTModel(len(data.vocab), config.model)
    net.setup(contexts, config.train.seed, data.word_counts)
    facts = {
        "contexts": [str(context) for context in contexts],
        "versions": runtime.versions(),
        "text": data.fingerprint,
        "losses_for_comparison": References.of(data)._asdict(),
    }
    create_run(output, config, data.vocab, facts)
    print(f"{describe(net, data, contexts)}\nrun folder: {output}", file=sys.stderr)
    trainer = Trainer(net, config.train, contexts)
    report = SavingReport(output, config.train, data)
    try:
        with interrupts_between_steps(trainer):
            trainer.fit(data, report)
        report.save()
    except KeyboardInterrupt:
        report.save()
        print(f"the weights after step {report.step} are kept in {output}", file=sys.stderr)
        raise
    finally:
        report.close()
    print("\n".join(report.summary(contexts)))
    return 0


@contextmanager
def interrupts_between_steps(trainer: Any) -> Iterator[None]:
    """Let a first Ctrl-C wait for the end of the step; a second one ends the process at once."""

    def handle(*_: Any) -> None:
        print("stopping after this step; Ctrl-C again stops at once", file=sys.stderr)
        trainer.interrupted = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
        if trainer.interrupted:
            raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, before)


def describe(net: Any, data: Any, contexts: list[Any]) -> str:
    """A line on what is about to be trained."""
    parameters = sum(p.data(contexts[0]).size for p in net.collect_params().values())
    held_out = data.held_out.documents if data.held_out else ()
    return (
        f"{len(data.train.documents):,} documents to train on and {len(held_out):,} held out, "
        f"{len(data.train.pairs(0)):,} sentence pairs, a vocabulary of {len(data.vocab):,}, "
        f"{parameters:,} parameters, on {contexts}"
    )


def _free_folder(preset_name: str) -> Path:
    number = 1
    while Path("runs", f"{preset_name}-{number}").exists():
        number += 1
    return Path("runs", f"{preset_name}-{number}")


if __name__ == "__main__":
    run(main)
