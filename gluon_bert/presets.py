"""Configurations by name: demo, d2l, quick, thorough, bert-tiny to bert-large. Defines no options."""

from __future__ import annotations

from .config import Config, DataConfig, ModelConfig, TrainConfig
from .errors import InputError


def _bert(layers: int, units: int, batch_size: int) -> Config:
    """Return a preset of a published size, trained as in Devlin et al. 2018.

    The sizes are those of Turc et al. 2019 (arXiv 1908.08962, table 1) and Devlin et al. 2018.
    """
    model = ModelConfig(
        num_layers=layers,
        units=units,
        ffn_units=4 * units,
        num_heads=units // 64,
        dropout=0.1,
        max_positions=512,
        activation="gelu",
        norm_epsilon=1e-12,
        embedding_norm=True,
        tied_decoder=True,
        init="normal",
    )
    data = DataConfig(max_seq_length=128, pairs="packed", num_buckets=4)
    train = TrainConfig(
        batch_size=batch_size,
        num_steps=1000,
        # Devlin et al. 2018, appendix A.2: Adam at 1e-4, betas .9 and .999, weight decay 0.01, a linear fall.
        lr=1e-4,
        schedule="linear",
        # There 10,000 of 1,000,000 steps; in their code's defaults (run_pretraining.py) of 100,000. A short
        # run needs the larger share: the running means must settle before the steps are long.
        warmup_ratio=0.1,
        # In their code (optimization.py), not in the paper: no bias correction, this epsilon, clipping to 1.
        optimizer="bertadam",
        epsilon=1e-6,
        weight_decay=0.01,
        clip_norm=1.0,
        eval_every=500,
    )
    return Config(model, data, train)


# A small network on sentences, for a CPU. docs/results.md has what each setting does.
_SMALL = _bert(2, 128, 64).replace(
    max_seq_length=64,
    pairs="sentences",
    mlm_probability=0.3,
    final_mlm_probability=0.15,
    position="relative-bias",
    init_embeddings="cooccurrence",
    decoder_bias="unigram",
    # A short run was worse with dropout.
    dropout=0.0,
    optimizer="muon",
    lr=3e-3,
    warmup_ratio=0.05,
)

_QUICK = _SMALL.replace(num_layers=4, weight_decay=0.1, num_steps=4400)

PRESETS: dict[str, Config] = {
    # The first run: it ends below the word frequencies of the text in this Python.
    # On two cores the compiled operators take less than two minutes.
    "demo": _SMALL.replace(num_steps=1100, eval_every=200),
    # D2L's section "Pretraining BERT": its model, its preparation of the data, its 50 steps.
    "d2l": Config(
        ModelConfig(),
        DataConfig(preparation="d2l", dynamic_masking=False),
        TrainConfig(),
    ),
    # The recipe that learned most of WikiText-2 in half an hour on two cores: docs/results.md.
    "quick": _QUICK,
    # The recipe that learned most of WikiText-2 in two hours on one core: docs/results.md.
    "thorough": _QUICK.replace(units=256, num_heads=4, ffn_units=1024, dropout=0.1, lr=2e-3, num_steps=7200),
    "bert-tiny": _bert(2, 128, 256),
    "bert-mini": _bert(4, 256, 256),
    "bert-small": _bert(4, 512, 256),
    "bert-medium": _bert(8, 512, 256),
    "bert-base": _bert(12, 768, 256),
    "bert-large": _bert(24, 1024, 256),
}


DEFAULT = "demo"


def preset(name: str) -> Config:
    """Return the configuration of a preset. Raise InputError, which lists the presets, for other names."""
    if name not in PRESETS:
        raise InputError(f"preset must be one of {', '.join(PRESETS)}, got {name}.")
    return PRESETS[name]
