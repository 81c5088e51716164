"""Serve a run over HTTP; `python tools/serve.py --help` shows how."""

from __future__ import annotations

import argparse
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gluon_bert.cli import parser_of, run, run_command
from gluon_bert.errors import InputError, Terminated
from gluon_bert.serving.server import ServerFailed, Settings, check_server, serving

EXAMPLES = """\
examples:
  python tools/serve.py exported/bert.mar
  python tools/serve.py runs/d2l-1 --port 9090 --management-port 9091

The server listens on this machine alone, at http://127.0.0.1:8080/predictions/bert. A request is a JSON
object:

  "text", "pair"         a text, or two. As ids without <cls> and <sep>: "ids" and "pair_ids"
  "question", "context"  a question and its context, for a network that answers questions
  "ask"                  "vectors" (default), "masks", "next", "score", "task" (default of a fine-tuned
                         network), "similarity" of "text" and "pair", or a list of them
  "top"                  number of words for each <mask> (5)
  "pooling", "normalize" for the embedding of the text: "mean", "cls" or "max"; true or false (the model's)
  "truncate"             true: truncate a text that is too long
  "token_vectors"        true: also return the vector of every token

The response is the object that `tools/encode.py --json` prints. A bad request, such as a text that is too
long, gets status 400 and {"error": "why"}. Ctrl-C and SIGTERM stop the server, with exit status 130 or 143.
The status is 1 if the server fails, and 2 for bad input.
"""


def parser() -> argparse.ArgumentParser:
    """Return the command's flags."""
    p = parser_of(
        "serve",
        "WHAT [flags]",
        "Serve a trained network with multi-model-server (the extra `serve`, and Java).",
        EXAMPLES,
    )
    p.add_argument(
        "what", type=Path, metavar="WHAT", help="a .mar archive, the folder of one, an export, or a run"
    )
    default = Settings()
    flags = {
        "--port": (default.port, "port of the predictions"),
        "--management-port": (
            default.management_port,
            "port of the management, without a password",
        ),
        "--server-workers": (
            default.server_workers,
            "processes that answer requests, each with a copy of the network",
        ),
        "--batch-size": (default.batch_size, "maximum number of requests per batch"),
        "--max-batch-delay": (
            default.max_batch_delay,
            "maximum milliseconds that a request waits for others",
        ),
        "--threads": (default.threads, "threads of each server worker"),
    }
    for name, (value, text) in flags.items():
        shown = "the cores divided by the server workers" if value is None else value
        p.add_argument(name, type=int, default=value, metavar="N", help=f"{text} ({shown})")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    try:
        arguments = parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed what is wrong
        return int(stop.code or 0)
    before = {number: signal.signal(number, _stop_once) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return run_command(lambda: serve(arguments), "serve")
    except Terminated:
        print("serve: stopped", file=sys.stderr)
        return 128 + signal.SIGTERM
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def serve(arguments: argparse.Namespace) -> int:
    """Serve as the flags say, until a signal or the server itself ends it."""
    settings = Settings(**{name: value for name, value in vars(arguments).items() if name != "what"})
    try:
        settings.check()
        check_server()
        with ExitStack() as stack:
            archive = archive_of(arguments.what, stack)
            print(f"starting the server with {archive}", file=sys.stderr)
            server = stack.enter_context(serving(archive, settings))
            print(f"serving at {server.address}, log at {server.log}; Ctrl-C stops it. Try:")
            print(example(server.address), flush=True)
            server.wait()
    except ServerFailed as error:
        print(f"serve: {error}", file=sys.stderr)
        return 1
    return 0


def archive_of(what: Path, stack: ExitStack) -> Path:
    """Return the named archive, or make one in a temporary folder of the stack."""
    from gluon_bert.export.model_archive import ARCHIVE, export_archive, pack

    if what.is_file():
        return what
    if (what / ARCHIVE).is_file():
        return what / ARCHIVE
    folder = Path(stack.enter_context(TemporaryDirectory(prefix="gluon_bert-archive-")))
    if (what / "manifest.json").is_file():
        return pack(what, folder)
    if (what / "config.json").is_file():
        from gluon_bert.run import load_run

        return export_archive(load_run(what), folder / "archive")
    raise InputError(f"{what}: must be an archive ({ARCHIVE}), an export or a run")


def example(address: str) -> str:
    """Return a request to paste into a shell."""
    return f"""curl -H 'Content-Type: application/json' -d '{{"text": "a crane is flying"}}' {address}"""


def _stop_once(number: int, _: Any) -> None:
    """End by an exception, and let no second signal interrupt the cleaning up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


if __name__ == "__main__":
    run(main)
