"""The contestants of `benchmark.py prepare`: processes that make a text ready, up to a batch."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from trainers import PEERS, python_of

from gluon_bert.data.wikitext import FILES
from gluon_bert.errors import BadInput

TRAIN, VALID = FILES  # the names of its two files
# Of the order of a larger text's paragraphs.
_SEED = 20_201


class Preparation:
    """A way to make a text ready: with so many workers, from what is kept of the last time, or the seed's."""

    def __init__(self, name: str, corpus: Path, home: Path) -> None:
        """home: a new folder for what is kept."""
        self.name = name
        self._home = home
        if name == "seed":
            self._command = [python_of("seed"), "prepare_seed.py", str(corpus)]
        else:
            workers = "0" if name == "cached" else name.split("-")[1]
            self._command = [python_of(None), "prepare_ours.py", str(corpus), workers]
        if name == "cached":
            self._once(home)

    def make(self) -> dict[str, Any]:
        """Make the text ready in a new process; see `peers/protocol.py` for the answer."""
        if self.name == "cached":
            return self._once(self._home)
        with TemporaryDirectory(dir=self._home) as home:
            return self._once(Path(home))

    def _once(self, home: Path) -> dict[str, Any]:
        variables = {**os.environ, "MXNET_HOME": str(home)}
        done = subprocess.run(self._command, cwd=PEERS, env=variables, capture_output=True, encoding="utf-8")
        if done.returncode:
            last = (done.stderr.strip() or "it says nothing").splitlines()[-1]
            raise BadInput(f"{self.name} ended with status {done.returncode}: {last}")
        return json.loads(done.stdout)


def enlarged(corpus: Path, megabytes: int, folder: Path) -> Path:
    """A corpus whose training text has the paragraphs of another's, again and again in new orders.

    It has so many MB or a paragraph more, in `folder`, which is made.
    """
    folder.mkdir()
    paragraphs = [line + b"\n" for line in (corpus / TRAIN).read_bytes().splitlines()]
    rng, written = random.Random(_SEED), 0
    with (folder / TRAIN).open("wb") as file:
        while written < megabytes * 1e6:
            for paragraph in rng.sample(paragraphs, len(paragraphs)):
                written += file.write(paragraph)
                if written >= megabytes * 1e6:
                    break
    (folder / VALID).write_bytes((corpus / VALID).read_bytes())
    return folder


def refuse_other_batches(answers: dict[str, list[dict[str, Any]]]) -> None:
    """Raise BadInput unless this package has made the same first batch each time, in all its ways."""
    made = {name: {each["made"] for each in own} for name, own in answers.items() if name != "seed"}
    if len(set().union(*made.values())) > 1:
        raise BadInput(f"not the same first batch was made by {', '.join(made)}")
