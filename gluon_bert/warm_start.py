"""Start a run from another one: its network, its weights and its tokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from .config import RANDOM_INITS, Config, ModelConfig
from .data.vocab import Normalization, Vocabulary
from .errors import InputError
from .model.parameters import put_weights, weights_of
from .run import Run, load_run

# Fields of the network that may change, because no weight's shape or meaning depends on them.
_FREE = ("dropout", "init", "init_checkpoint", "init_embeddings", "decoder_bias")
_FROM_RUN = {
    "model": tuple(f.name for f in dataclasses.fields(ModelConfig) if f.name not in _FREE),
    "data": ("tokenizer", *Normalization._fields),
}
# The parameters with a row for each token.
_BY_TOKEN = {"encoder.embeddings.tokens.weight", "mlm.decoder.weight", "mlm.decoder.bias"}


def names_a_run(init: str) -> bool:
    """Return whether `init` names the folder of a run."""
    return init not in RANDOM_INITS


def load_init_run(config: Config) -> Run | None:
    """Return the run that `init` names, None if the weights are random.

    Raise InputError if there is no such run, or if the configuration has another network or tokenizer.
    """
    init = config.model.init
    if not names_a_run(init):
        return None
    run = _load(init, config.model.init_checkpoint)
    asked, has = _from_run(config), _from_run(run.config)
    problems = [
        f"init={init} needs {name}={has[name]!r}, got {name}={value!r}."
        for name, value in asked.items()
        if value != has[name]
    ]
    expected = _vocabulary_file(run, init)
    if Path(config.data.vocab_file) != Path(expected):
        problems.append(
            f"init={init} needs vocab_file={expected}, got vocab_file={config.data.vocab_file}. To add words "
            "of the corpus, use extend_vocab."
        )
    if problems:
        raise InputError("\n".join(problems))
    return run


def config_from_run(init: str, checkpoint: str, recipe: Config | None) -> Config:
    """Return a configuration with the network and tokenizer of a run, and the other options of `recipe`.

    recipe: None takes the other options from the run. Raise InputError if there is no such run.
    """
    run = _load(init, checkpoint)
    return (recipe or run.config).replace(
        **_from_run(run.config),
        dropout=run.config.model.dropout,
        init_embeddings=ModelConfig().init_embeddings,
        vocab_file=_vocabulary_file(run, init),
        vocab_size=Config().data.vocab_size,
        extend_vocab=0,
    )


def _load(init: str, checkpoint: str) -> Run:
    if not Path(init).is_dir():
        raise InputError(f"init must be {', '.join(RANDOM_INITS)} or the folder of a run, got {init}.")
    run = load_run(Path(init), checkpoint=checkpoint)
    if run.task:
        raise InputError(f"init must be a pretraining run, got {init}, which was fine-tuned.")
    return run


def _from_run(config: Config) -> dict[str, Any]:
    """Return the options that the weights fix."""
    return {
        name: getattr(getattr(config, group), name) for group, names in _FROM_RUN.items() for name in names
    }


def _vocabulary_file(run: Run, init: str) -> str:
    """Return the vocabulary file of a run."""
    return str(Path(init) / run.vocab.FILE)


def load_initial_weights(net: Any, vocab: Vocabulary, run: Run) -> None:
    """Give a network the weights of a run; `vocab` begins with the run's tokens.

    The row of a new token is the mean of its pieces' rows, or the row of <unk>. So the network's output does
    not change. Raise InputError if the vocabulary does not begin with the run's tokens.
    """
    known = len(run.vocab)
    if vocab.tokens[:known] != run.vocab.tokens:
        raise InputError(f"vocab_file must begin with the {known:,} tokens of the run in init.")
    pieces = [run.vocab.to_indices(run.vocab.pieces(token)) for token in vocab.tokens[known:]]
    weights = weights_of(run.net)
    if pieces:
        for name in weights.keys() & _BY_TOKEN:
            rows = weights[name]
            weights[name] = np.concatenate([rows, [rows[ids].mean(axis=0) for ids in pieces]])
    put_weights(net, weights)
