"""What a pretraining run begins with where --init names another run: its network and its tokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from .config import RANDOM_INITS, Config, ModelConfig, flag_name
from .data.vocab import Normalization, Vocabulary
from .errors import InputError
from .model.parameters import put_weights, weights_of
from .run import Run, load_run

# Fields of the network that can be set anew, as no weight's shape or meaning depends on them.
_FREE = ("dropout", "init", "init_checkpoint", "init_embeddings", "decoder_bias")
_FROM_RUN = {
    "model": tuple(f.name for f in dataclasses.fields(ModelConfig) if f.name not in _FREE),
    "data": ("tokenizer", *Normalization._fields),
}
# The parameters with a row for each token.
_BY_TOKEN = {"encoder.embeddings.tokens.weight", "mlm.decoder.weight", "mlm.decoder.bias"}


def names_a_run(init: str) -> bool:
    """Whether an --init is a folder, rather than a way to draw weights."""
    return init not in RANDOM_INITS


def load_init_run(config: Config) -> Run | None:
    """The run that a configuration begins with, None if it draws its weights.

    Raises InputError where there is none, or where it is asked for another network or tokenizer than it has.
    """
    init = config.model.init
    if not names_a_run(init):
        return None
    run = _load(init, config.model.init_checkpoint)
    asked, has = _from_run(config), _from_run(run.config)
    problems = [
        f"{flag_name(name)} {_shown(value)}: --init {init} has {_shown(has[name])}, which its weights are made for"
        for name, value in asked.items()
        if value != has[name]
    ]
    expected = _vocabulary_file(run, init)
    if Path(config.data.vocab_file) != Path(expected):
        problems.append(
            f"--vocab-file {config.data.vocab_file}: --init {init} has its own, {expected}; --extend-vocab "
            "adds words of the corpus"
        )
    if problems:
        raise InputError("\n".join(problems))
    return run


def config_from_run(init: str, checkpoint: str, recipe: Config | None) -> Config:
    """A configuration for going on from a run: its network and tokenizer, and the recipe's all else.

    recipe: how data are prepared and the network is trained; None: as in the run. InputError where there is
    no such run.
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
        raise InputError(
            f"--init {init}: is no folder; it must be {', '.join(RANDOM_INITS)} or the folder of a run"
        )
    run = load_run(Path(init), checkpoint=checkpoint)
    if run.task:
        raise InputError(f"--init {init}: was fine-tuned, and has no heads to pretrain; name the run before")
    return run


def _from_run(config: Config) -> dict[str, Any]:
    """The options that weights are made for."""
    return {
        name: getattr(getattr(config, group), name) for group, names in _FROM_RUN.items() for name in names
    }


def _vocabulary_file(run: Run, init: str) -> str:
    """Where the vocabulary of a run stands, as --vocab-file takes it."""
    return str(Path(init) / run.vocab.FILE)


def load_initial_weights(net: Any, vocab: Vocabulary, run: Run) -> None:
    """Give a network the weights of a run; `vocab` begins with the run's tokens.

    The rows of a new token are the mean of those of the pieces that it was before, or those of <unk>: to the
    network nothing has changed yet. InputError where the vocabulary does not begin so.
    """
    known = len(run.vocab)
    if vocab.tokens[:known] != run.vocab.tokens:
        raise InputError(f"--vocab-file: does not begin with the {known:,} tokens of the run to begin with")
    pieces = [run.vocab.to_indices(run.vocab.pieces(token)) for token in vocab.tokens[known:]]
    weights = weights_of(run.net)
    if pieces:
        for name in weights.keys() & _BY_TOKEN:
            rows = weights[name]
            weights[name] = np.concatenate([rows, [rows[ids].mean(axis=0) for ids in pieces]])
    put_weights(net, weights)


def _shown(value: Any) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)
