"""The options as frozen dataclasses, with their checks and their JSON. Parses no command line.

Each option is defined once, by its field. Its name is the JSON key and the flag (`max_seq_length` ->
`--max-seq-length`). Its metadata have the help text and the bounds. Error messages name fields;
`cli.with_flags` makes flags of them, also of `tokenizer="wordpiece"`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Sequence, Tuple, get_type_hints

from .errors import InputError

# [CLS] a [SEP] b [SEP] is 5 tokens; with fewer than 8 hardly a sentence keeps a second word.
SHORTEST_MAX_SEQ_LENGTH = 8


def option(
    default: Any,
    help: str,
    *,
    at_least: Any = None,
    at_most: Any = None,
    choices: Sequence[str] = (),
    may_change: bool = False,
) -> Any:
    """Return a dataclass field with what its flag needs: help text, bounds, choices.

    may_change: whether a resumed run may have another value.
    """
    bounds = {"at_least": at_least, "at_most": at_most, "choices": tuple(choices)}
    return field(default=default, metadata={"help": help, **bounds, "may_change": may_change})


# Rows of a relative bias; model/relative_position.py describes them.
DISTANCE_BUCKETS = 32


@dataclass(frozen=True)
class ModelConfig:
    """The size and the variant of the network, without the vocabulary's size."""

    num_layers: int = option(2, "encoder layers", at_least=1)
    units: int = option(128, "width of the hidden states (C)", at_least=1)
    ffn_units: int = option(256, "width of the feed-forward network in a layer", at_least=1)
    num_heads: int = option(2, "attention heads per layer (H); must divide --units", at_least=1)
    dropout: float = option(
        0.2, "dropout rate of attention, layers and embeddings", at_least=0.0, at_most=0.9
    )
    max_positions: int = option(1000, "number of position embeddings; the longest sequence", at_least=1)
    position: str = option(
        "absolute",
        "how the network knows positions. absolute: BERT's position embeddings. relative-bias: a learned "
        "bias for the distance of two tokens, added to the attention scores of each head and layer",
        choices=("absolute", "relative-bias"),
    )
    activation: str = option(
        "relu",
        "activation of the feed-forward network and the MLM head; gelu_tanh is the original BERT's "
        "approximation of GELU",
        choices=("relu", "gelu", "gelu_tanh"),
    )
    norm: str = option(
        "post", "apply LayerNorm after (post) or before (pre) each sub-layer", choices=("post", "pre")
    )
    norm_epsilon: float = option(1e-5, "epsilon of each LayerNorm", at_least=1e-12)
    embedding_norm: bool = option(
        False, "apply LayerNorm and dropout to the embeddings, as the original BERT does"
    )
    tied_decoder: bool = option(False, "share the token embedding with the MLM decoder")
    init: str = option(
        "xavier",
        "initial weights: xavier, normal (N(0, 0.02)), or RUN, the folder of an earlier run or of converted "
        "weights. RUN also gives the network's size and the tokenizer",
    )
    init_embeddings: str = option(
        "random",
        "initial word vectors: random, or from the co-occurrences of words in the text. Computing them takes "
        "seconds, once per text",
        choices=("random", "cooccurrence"),
    )
    init_checkpoint: str = option("latest", "checkpoint of --init RUN: latest, best, or a step")
    decoder_bias: str = option(
        "zeros",
        "initial biases of the MLM decoder: zeros, or unigram, with which the network starts from the "
        "frequencies of the words",
        choices=("zeros", "unigram"),
    )


# The second segments of each objective's negative pairs: random ones, swapped ones, or none.
# training/losses.py has the objectives' losses.
NEGATIVE_PAIRS = {"mlm+nsp": "random", "mlm": "none", "mlm+sop": "swapped"}


@dataclass(frozen=True)
class DataConfig:
    """The text, and its preparation as masked pairs."""

    corpus: Tuple[str, ...] = option(
        ("pydoc",),
        "training text: pydoc (the prose in this Python installation), wikitext-2 (downloaded once), or "
        "files and folders of UTF-8 text, also .gz, .bz2, .xz or .zst. A file named *.tokens is read as "
        "WikiText",
        may_change=True,  # the same text may have moved
    )
    text_format: str = option(
        "auto",
        "format of text files. wikitext: one paragraph per line, tokens separated by spaces. articles: "
        "WikiText with articles as documents. sentences: one per line, blank lines between documents. prose: "
        "running text, blank lines between documents. paragraphs: running text, one document per line. "
        "jsonl: one object with a field text per line. wikiextractor: its output. auto: guessed from the "
        "first lines",
        choices=(
            "auto",
            "wikitext",
            "articles",
            "sentences",
            "prose",
            "paragraphs",
            "jsonl",
            "wikiextractor",
        ),
    )
    language: str = option("en", "two-letter language code for splitting running text into sentences")
    validation_fraction: float = option(
        0.05,
        "share of the documents for validation, unless the corpus has its own validation file",
        at_least=0.0,
        at_most=0.5,
    )
    lowercase: bool = option(True, "convert the text to lower case")
    strip_accents: str = option(
        "auto",
        "WordPiece: remove accents; auto removes them from lower-cased text",
        choices=("auto", "yes", "no"),
    )
    tokenize_chinese_chars: bool = option(True, "WordPiece: treat each Chinese character as a word")
    added_tokens: Tuple[str, ...] = option(
        (), "WordPiece: tokens that are never split; they are found after lower-casing"
    )
    additional_special_tokens: Tuple[str, ...] = option(
        (), "WordPiece: tokens that are never split; they are found before lower-casing"
    )
    tokenizer: str = option(
        "words",
        "what a token is: words, or wordpiece, pieces of words as in the original BERT (needs the extra "
        "wordpiece)",
        choices=("words", "wordpiece"),
    )
    vocab_file: str = option(
        "",
        "an existing vocabulary: a WordPiece vocab.txt with one token per line, or the vocab.json of a run. "
        "By default a vocabulary is built from the text",
        may_change=True,  # the same file may have moved
    )
    extend_vocab: int = option(
        0,
        "add up to N frequent words of the corpus to the vocabulary of --vocab-file or --init; each word "
        "must occur --min-freq times",
        at_least=0,
    )
    # [PAD] [UNK] [CLS] [SEP] [MASK] and some pieces; the default is Devlin et al. 2018's, uncased.
    vocab_size: int = option(
        30522, "maximum size of a WordPiece vocabulary built from the text (V)", at_least=8
    )
    min_freq: int = option(
        5,
        "minimum frequency of a word or word piece to enter the vocabulary; rarer words become <unk>",
        at_least=1,
    )
    max_seq_length: int = option(
        64,
        "maximum length of a pair in tokens (T), with <cls> and two <sep>",
        at_least=SHORTEST_MAX_SEQ_LENGTH,
    )
    pairs: str = option(
        "sentences",
        "length of segments. sentences: each is one sentence. packed: as in the original BERT, as many "
        "sentences as fill --max-seq-length in two segments",
        choices=("sentences", "packed"),
    )
    # Devlin et al. 2018's code, create_pretraining_data.py, as is its value.
    short_seq_prob: float = option(
        0.1, "share of packed pairs with a random shorter length", at_least=0.0, at_most=1.0
    )
    preparation: str = option(
        "bert",
        "rules for pairs and masks. bert: truncate long pairs; draw random second segments from other "
        "documents; random tokens are words; never predict <unk>. d2l, as in Dive into Deep Learning: drop "
        "long pairs; draw random second segments from all sentences; random tokens are any tokens; predict "
        "<unk>",
        choices=("bert", "d2l"),
    )
    objective: str = option(
        "mlm+nsp",
        "pretraining losses: masked words and next sentences (mlm+nsp), masked words only (mlm, as RoBERTa), "
        "or masked words and sentence order (mlm+sop, as ALBERT)",
        choices=tuple(NEGATIVE_PAIRS),
    )
    random_next_prob: float = option(
        0.5,
        "share of pairs with a random second segment; with --objective mlm+sop, share of swapped pairs",
        at_least=0.0,
        at_most=1.0,
    )
    dynamic_masking: bool = option(True, "draw new pairs and masks in each epoch")
    mlm_probability: float = option(
        0.15, "share of a pair's tokens to predict; at least one token", at_least=0.001, at_most=1.0
    )
    final_mlm_probability: float = option(
        0.0,
        "share of a pair's tokens to predict at the end of the run and in evaluations; training begins with "
        "--mlm-probability and changes linearly; 0: constant",
        at_least=0.0,
        at_most=1.0,
    )
    masking: str = option(
        "tokens",
        "unit of masking: single tokens, whole words, or ngrams of up to --max-ngram words",
        choices=("tokens", "words", "ngrams"),
    )
    # Lan et al. 2019 (ALBERT), section 3.1, has 3, and n words with a probability in proportion to 1/n.
    max_ngram: int = option(
        3, "maximum number of words in a row for --masking ngrams", at_least=1, at_most=10
    )
    mask_token_rate: float = option(
        0.8, "share of the predicted tokens that are replaced by <mask>", at_least=0.0, at_most=1.0
    )
    random_token_rate: float = option(
        0.1, "share of the predicted tokens that are replaced by a random token", at_least=0.0, at_most=1.0
    )
    num_buckets: int = option(
        1, "number of lengths to which batches are padded; 1: pad all to --max-seq-length", at_least=1
    )
    preprocessing_workers: int = option(
        0,
        "processes that prepare the text; 0: the main process. Use one per core for large texts",
        at_least=0,
        may_change=True,
    )

    @property
    def negative_pairs(self) -> str:
        """Return what the second segments of negative pairs are: random, swapped or none."""
        return NEGATIVE_PAIRS[self.objective]

    @property
    def predict_unknown(self) -> bool:
        """Return whether <unk> is a word to predict."""
        return self.preparation == "d2l"

    def at(self, progress: float) -> DataConfig:
        """Return the configuration with the share of masked tokens at a point of a run, from 0 to 1."""
        if not self.final_mlm_probability:
            return self
        share = (1 - progress) * self.mlm_probability + progress * self.final_mlm_probability
        return dataclasses.replace(self, mlm_probability=share, final_mlm_probability=0.0)


@dataclass(frozen=True)
class TrainConfig:
    """How the network is trained."""

    batch_size: int = option(512, "sentence pairs per optimizer step, over all devices (B)", at_least=1)
    micro_batch: int = option(
        0,
        "pairs per forward and backward pass, over all devices; gradients are accumulated over the batch to "
        "save memory; 0: the whole batch",
        at_least=0,
        may_change=True,
    )
    recompute: bool = option(
        False,
        "recompute each layer in the backward pass: less memory, a quarter more time",
        may_change=True,
    )
    precision: str = option(
        "fp32",
        "precision of matrix products: fp32; fp16 with a dynamic loss scale, on GPUs; or bf16, on CPUs that "
        "support it. Everything else is float32",
        choices=("fp32", "fp16", "bf16"),
    )
    num_steps: int = option(
        50,
        "optimizer steps; 0: no limit, the default with --max-minutes",
        at_least=0,
        may_change=True,
    )
    max_minutes: float = option(
        0.0,
        "end the run after this many minutes, or after --num-steps; 0: no limit. Evaluations count, except "
        "the last; preparing the text does not. A learning rate that decays follows the clock, so the run is "
        "not reproducible",
        at_least=0.0,
        at_most=1e6,
        may_change=True,
    )
    nsp_weight: float = option(
        1.0,
        "weight of the next-sentence loss, or with --objective mlm+sop of the sentence-order loss, in the "
        "total; that of the MLM loss is 1",
        at_least=0.0,
        at_most=100.0,
    )
    lr: float = option(1e-3, "peak learning rate", at_least=0.0, at_most=1e3, may_change=True)
    schedule: str = option(
        "constant",
        "learning rate after the warm-up: constant, or a linear or cosine decay to 0 at the end of the run",
        choices=("constant", "linear", "cosine"),
    )
    warmup_ratio: float = option(
        0.0, "share of the run in which the learning rate rises to --lr", at_least=0.0, at_most=1.0
    )
    optimizer: str = option(
        "adam",
        "adam, adamw (decoupled weight decay), bertadam (the original BERT's: adamw without bias "
        "correction), lamb (for large batches) or muon (orthogonal steps of the encoder's matrices, adamw "
        "for the others)",
        choices=("adam", "adamw", "bertadam", "lamb", "muon"),
    )
    # Jordan et al. 2024.
    momentum: float = option(
        0.95, "momentum of the encoder's matrices, with --optimizer muon", at_least=0.0, at_most=0.9999
    )
    # Kingma and Ba 2015, section 2, as are MXNet's defaults.
    beta1: float = option(0.9, "decay rate of the running mean of the gradient", at_least=0.0, at_most=0.9999)
    beta2: float = option(
        0.999, "decay rate of the running mean of the squared gradient", at_least=0.0, at_most=0.999999
    )
    epsilon: float = option(1e-8, "epsilon of the optimizer", at_least=1e-12, at_most=1.0)
    weight_decay: float = option(
        0.0,
        "weight decay; biases and LayerNorm are exempt",
        at_least=0.0,
        at_most=1.0,
    )
    clip_norm: float = option(
        0.0,
        "maximum norm of the gradient; 0: no limit",
        at_least=0.0,
        at_most=1e6,
    )
    seed: int = option(
        0, "random seed of weights, dropout, pairs, masks and order", at_least=0, at_most=2**31 - 1
    )
    log_every: int = option(10, "steps between log lines", at_least=1, may_change=True)
    eval_every: int = option(
        0,
        "steps between evaluations on validation text; 0: evaluate at the end only",
        at_least=0,
        may_change=True,
    )
    patience: int = option(
        0,
        "stop after this many evaluations in a row without a better MLM loss on validation text; 0: never",
        at_least=0,
        may_change=True,
    )
    on_nonfinite: str = option(
        "stop",
        "what to do on a non-finite loss or gradient: stop; skip the step (at most 10 in a row); or roll "
        "back to the latest checkpoint (at most 3 times) and continue with other batches",
        choices=("stop", "skip", "rollback"),
        may_change=True,
    )
    save_nonfinite_batch: bool = option(
        False, "save the batch of a non-finite step to RUN/nonfinite-batches/", may_change=True
    )
    on_checkpoint_error: str = option(
        "stop",
        "what to do when a checkpoint cannot be written: stop, or continue and try again at the next one",
        choices=("stop", "continue"),
        may_change=True,
    )
    checkpoint_every: int = option(
        500,
        "steps between checkpoints. There is also one at each evaluation and at the end of the run; 0: only "
        "those",
        at_least=0,
        may_change=True,
    )
    # Two: if the latest is damaged, the one before is used.
    keep_checkpoints: int = option(
        2,
        "number of recent checkpoints to keep, in addition to the best; 0: all",
        at_least=0,
        may_change=True,
    )


@dataclass(frozen=True)
class FineTuneConfig:
    """How a pretrained network is fine-tuned."""

    # Devlin et al. 2018, appendix A.3, has 2 to 4 epochs, 16 or 32 and 2e-5 to 5e-5; Turc et al. 2019 up to
    # 3e-4 for small networks.
    epochs: int = option(3, "number of passes over the training rows", at_least=1)
    batch_size: int = option(32, "examples per optimizer step", at_least=1)
    micro_batch: int = option(
        0, "examples per forward and backward pass, over all devices, to save memory; 0: all", at_least=0
    )
    recompute: bool = option(False, "recompute each layer in the backward pass, to save memory")
    precision: str = option(
        "fp32", "precision of matrix products, as in pretraining", choices=("fp32", "fp16", "bf16")
    )
    lr: float = option(5e-5, "peak learning rate; small networks need up to 3e-4", at_least=0.0, at_most=1e3)
    warmup_ratio: float = option(
        0.1, "share of the run in which the learning rate rises to --lr", at_least=0.0, at_most=0.99
    )
    weight_decay: float = option(
        0.01, "weight decay; biases and LayerNorm are exempt", at_least=0.0, at_most=1.0
    )
    clip_norm: float = option(1.0, "maximum norm of the gradient; 0: no limit", at_least=0.0, at_most=1e6)
    dropout: float = option(0.1, "dropout rate", at_least=0.0, at_most=0.9)
    max_seq_length: int = option(0, "maximum length of a text in tokens; 0: as in pretraining", at_least=0)
    best_metric: str = option(
        "auto",
        "metric that chooses the best epoch; auto: accuracy of classes and plain tags, Pearson correlation "
        "of scores, F1 of entities and answers",
        choices=(
            *("auto", "accuracy", "f1", "matthews", "pearson", "spearman", "mse"),
            *("precision", "recall", "exact_match"),
        ),
    )
    seed: int = option(
        0, "random seed of the head's weights, dropout and order", at_least=0, at_most=2**31 - 1
    )


@dataclass(frozen=True)
class Config:
    """All options of a run, except its devices and its folder."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()

    def to_json(self) -> Dict[str, Any]:
        """Return the three groups as plain values; the inverse of `from_json`."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, groups: Mapping[str, Any], where: str = "config") -> Config:
        """Return the configuration that `to_json` gave. Raise InputError for unknown keys or other types."""
        fields: Dict[str, Dict[str, Any]] = {name: {} for name in GROUPS}
        for group, values in groups.items():
            if group not in GROUPS or not isinstance(values, Mapping):
                raise InputError(f"{where}: groups must be {', '.join(GROUPS)}, got {group!r}.")
            for name, value in values.items():
                hint = get_type_hints(GROUPS[group]).get(name)
                if hint is None:
                    raise InputError(f"{where}: unknown key {group}.{name}")
                fields[group][name] = _typed(value, hint, f"{where}: {group}.{name}")
        return cls(**{name: group(**fields[name]) for name, group in GROUPS.items()})

    def replace(self, **values: Any) -> Config:
        """Return a copy with changed fields, named without their group.

        `max_minutes` without `num_steps` sets `num_steps` to 0, and the reverse, so that a preset's limit
        does not end the run.

        >>> preset("d2l").replace(batch_size=8, units=64).train.batch_size
        8
        >>> preset("d2l").replace(max_minutes=30).train.num_steps
        0
        """
        if values.get("max_minutes"):
            values = {"num_steps": 0, **values}
        elif values.get("num_steps"):
            values = {"max_minutes": 0.0, **values}
        groups = {}
        for group_name, kind in GROUPS.items():
            hints = get_type_hints(kind)
            changes = {
                name: _typed(values.pop(name), hints[name], name) for name in hints.keys() & values.keys()
            }
            groups[group_name] = dataclasses.replace(getattr(self, group_name), **changes)
        if values:
            raise InputError(f"unknown option {', '.join(sorted(values))}")
        return Config(**groups)

    def check(self) -> None:
        """Raise one InputError with a line for each problem; each line names a field."""
        problems = [problem for group in GROUPS for problem in problems_of(getattr(self, group))]
        if self.data.max_seq_length > self.model.max_positions:
            problems.append(
                f"max_seq_length must be at most max_positions={self.model.max_positions}, "
                f"got {self.data.max_seq_length}."
            )
        if self.data.extend_vocab and not self.data.vocab_file and self.model.init in RANDOM_INITS:
            problems.append("extend_vocab has no effect without vocab_file=FILE or init=RUN.")
        if self.train.lr == 0:
            problems.append("lr must be above 0, got 0.0.")
        if self.train.nsp_weight != 1 and not has_labelled_pairs(self.data.objective):
            problems.append(f'nsp_weight has no effect with objective="{self.data.objective}".')
        if problems:
            raise InputError("\n".join(problems))


# Distributions of the initial weights; any other `init` names a run.
RANDOM_INITS = ("xavier", "normal")

GROUPS: Dict[str, Any] = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}


def flag_name(name: str) -> str:
    """Return the flag of a field: `max_seq_length` -> `--max-seq-length`."""
    return "--" + name.replace("_", "-")


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


def _typed(value: Any, hint: Any, where: str) -> Any:
    if hint == Tuple[str, ...]:
        if isinstance(value, str):
            return (value,)
        if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
            return tuple(value)
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif type(value) is hint:
        return value
    kind = "a list of strings" if hint == Tuple[str, ...] else _KINDS[hint]
    raise InputError(f"{where} must be {kind}, got {value!r}.")


def changeable() -> List[str]:
    """Return the fields that a resumed run may change."""
    fields = (f for group in GROUPS.values() for f in dataclasses.fields(group))
    return [f.name for f in fields if f.metadata["may_change"]]


def check_changes(before: Config, after: Config, where: str) -> None:
    """Raise InputError if a resumed run changes a field that it may not change; name all of them."""
    problems = []
    for group in GROUPS:
        for f in dataclasses.fields(getattr(before, group)):
            old, new = (getattr(getattr(config, group), f.name) for config in (before, after))
            if old != new and not f.metadata["may_change"]:
                problems.append(f"{where} was started with {f.name}={old!r}, got {f.name}={new!r}.")
    if problems:
        may = f"A resumed run may change {', '.join(changeable())}. Start a new run to change others."
        raise InputError("\n".join([*problems, may]))


def check_group(group: Any) -> None:
    """Raise InputError with all problems of one group of options."""
    problems = problems_of(group)
    if problems:
        raise InputError("\n".join(problems))


def problems_of(group: Any) -> List[str]:
    """Return a sentence for each problem of one group of options."""
    problems = []
    for f in dataclasses.fields(group):
        value, meta = getattr(group, f.name), f.metadata
        low, high, choices = meta["at_least"], meta["at_most"], meta["choices"]
        # "not at least" rather than "below", so that a NaN is refused too.
        if low is not None and not value >= low:
            problems.append(f"{f.name} must be at least {low}, got {value}.")
        elif high is not None and not value <= high:
            problems.append(f"{f.name} must be at most {high}, got {value}.")
        elif choices and value not in choices:
            problems.append(f"{f.name} must be one of {', '.join(choices)}, got {value}.")
    return problems + _CONTRADICTIONS[type(group)](group)


def _model_contradictions(model: ModelConfig) -> List[str]:
    if model.num_heads > 0 and model.units % model.num_heads:
        return [f"num_heads must divide units={model.units}, got {model.num_heads}."]
    if not model.init:
        return [f"init must be {', '.join(RANDOM_INITS)} or the folder of a run, got nothing."]
    if model.init in RANDOM_INITS and model.init_checkpoint != "latest":
        return ["init_checkpoint has no effect without init=RUN."]
    if model.init not in RANDOM_INITS and model.init_embeddings != "random":
        return ["init_embeddings has no effect with init=RUN, which has its own vectors."]
    return []


def _data_contradictions(data: DataConfig) -> List[str]:
    problems = []
    if data.mask_token_rate + data.random_token_rate > 1 + 1e-9:
        problems.append(
            "mask_token_rate and random_token_rate must be at most 1 together, "
            f"got {data.mask_token_rate} and {data.random_token_rate}. Lower one of them."
        )
    if data.num_buckets > data.max_seq_length:
        problems.append(
            f"num_buckets must be at most max_seq_length={data.max_seq_length}, got {data.num_buckets}."
        )
    if data.final_mlm_probability and not data.dynamic_masking:
        problems.append(
            f"final_mlm_probability must be 0 with dynamic_masking=False, got {data.final_mlm_probability}."
        )
    if data.masking == "ngrams" and data.max_ngram == 1:
        problems.append('max_ngram must be at least 2 with masking="ngrams", got 1. Use masking="words".')
    if data.pairs == "packed" and data.preparation == "d2l":
        problems.append('pairs must be sentences with preparation="d2l", got packed. Use preparation="bert".')
    return problems + _without_effect(data)


def has_labelled_pairs(objective: str) -> bool:
    """Return whether an objective learns which pairs are negative; true of an unknown one."""
    return NEGATIVE_PAIRS.get(objective) != "none"


def _without_effect(data: DataConfig) -> List[str]:
    """Return a sentence for each option that was changed and has no effect with the others."""
    builds_pieces = data.tokenizer == "wordpiece" and not data.vocab_file
    used = {
        "vocab_file": (
            data.tokenizer == "wordpiece" or data.vocab_file.endswith(".json"),
            'without tokenizer="wordpiece", unless it is the vocab.json of a run',
        ),
        **dict.fromkeys(
            ("strip_accents", "tokenize_chinese_chars", "added_tokens", "additional_special_tokens"),
            (data.tokenizer == "wordpiece", 'without tokenizer="wordpiece"'),
        ),
        "vocab_size": (builds_pieces, 'without tokenizer="wordpiece", or with vocab_file'),
        "short_seq_prob": (data.pairs == "packed", 'without pairs="packed"'),
        "max_ngram": (data.masking == "ngrams", 'without masking="ngrams"'),
        "random_next_prob": (has_labelled_pairs(data.objective), f'with objective="{data.objective}"'),
    }
    defaults = DataConfig()
    return [
        f"{name} has no effect {condition}."
        for name, (is_used, condition) in used.items()
        if not is_used and getattr(data, name) != getattr(defaults, name)
    ]


def _train_contradictions(train: TrainConfig) -> List[str]:
    problems = []
    if train.optimizer == "adam" and train.weight_decay:
        problems.append(
            f'weight_decay must be 0 with optimizer="adam", got {train.weight_decay}. '
            "Use adamw, bertadam, lamb or muon."
        )
    if train.optimizer != "muon" and train.momentum != TrainConfig().momentum:
        problems.append('momentum has no effect without optimizer="muon".')
    if train.num_steps == 0 and train.max_minutes == 0:
        problems.append("num_steps must be at least 1 without max_minutes, got 0.")
    if train.warmup_ratio == 1 and train.schedule != "constant":
        problems.append(f'warmup_ratio must be below 1 with schedule="{train.schedule}", got 1.0.')
    if train.patience and not train.eval_every:
        problems.append(f"patience must be 0 without eval_every, got {train.patience}.")
    return problems


_CONTRADICTIONS: Dict[Any, Any] = {
    ModelConfig: _model_contradictions,
    DataConfig: _data_contradictions,
    TrainConfig: _train_contradictions,
    FineTuneConfig: lambda tuning: [] if tuning.lr else ["lr must be above 0, got 0.0."],
}
