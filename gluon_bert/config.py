"""What can be set: three frozen dataclasses, their presets and their JSON. Parses no command line.

A field is the one place of its option: its name is the flag (`max_seq_length` -> `--max-seq-length`) and the JSON key,
its metadata the help text and the bounds.
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
    """A dataclass field that carries what its flag needs: help text, bounds, choices.

    may_change: whether it can be another when a run is resumed.
    """
    bounds = {"at_least": at_least, "at_most": at_most, "choices": tuple(choices)}
    return field(default=default, metadata={"help": help, **bounds, "may_change": may_change})


# Rows of a relative bias; model/relative_position.py describes them.
DISTANCE_BUCKETS = 32


@dataclass(frozen=True)
class ModelConfig:
    """The size and the variant of the network; the vocabulary's size is not part of it."""

    num_layers: int = option(2, "encoder layers", at_least=1)
    units: int = option(128, "C, the width of every hidden state", at_least=1)
    ffn_units: int = option(256, "the width inside a layer's feed-forward network", at_least=1)
    num_heads: int = option(2, "H, attention heads a layer; must divide --units", at_least=1)
    dropout: float = option(
        0.2, "dropout rate of attention, layers and embeddings", at_least=0.0, at_most=0.9
    )
    max_positions: int = option(1000, "the longest sequence that has position embeddings", at_least=1)
    position: str = option(
        "absolute",
        "how attention learns positions: absolute has BERT's position embeddings; relative-bias adds a learnt bias "
        "for the distance of two tokens to the attention scores of each head and layer",
        choices=("absolute", "relative-bias"),
    )
    activation: str = option(
        "relu",
        "of the feed-forward network and the MLM head; gelu_tanh is the approximation of GELU in the "
        "original BERT's code",
        choices=("relu", "gelu", "gelu_tanh"),
    )
    norm: str = option(
        "post", "LayerNorm after (post) or before (pre) each sub-layer", choices=("post", "pre")
    )
    norm_epsilon: float = option(1e-5, "epsilon of every LayerNorm", at_least=1e-12)
    embedding_norm: bool = option(False, "LayerNorm and dropout on the embeddings, as the original BERT has")
    tied_decoder: bool = option(False, "the MLM decoder shares its weight with the token embedding")
    init: str = option(
        "xavier",
        "weights from Xavier, from N(0, 0.02) (normal), or from RUN, the folder of an earlier run or of "
        "converted weights; its network and its tokenizer are then taken with them",
    )
    init_embeddings: str = option(
        "random",
        "the first vectors of the words: random, or from the co-occurrences of words in the text, which takes "
        "seconds and is kept with the prepared text",
        choices=("random", "cooccurrence"),
    )
    init_checkpoint: str = option(
        "latest", "which of that run's networks: the latest, the best, or that after a step"
    )
    decoder_bias: str = option(
        "zeros",
        "the MLM decoder's biases begin at zero, or so that its first scores are the frequencies of the "
        "words, which then need not be learnt",
        choices=("zeros", "unigram"),
    )


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes masked pairs."""

    corpus: Tuple[str, ...] = option(
        ("pydoc",),
        "pydoc (the prose in this Python installation), wikitext-2 (downloaded once), or files and folders "
        "of UTF-8 text, also .gz, .bz2, .xz or .zst; a name ending in .tokens is read as WikiText",
        may_change=True,  # to where the same text is now
    )
    text_format: str = option(
        "auto",
        "of text files: wikitext (a paragraph a line, tokens separated by spaces), articles (WikiText with whole "
        "articles as documents), sentences (one a line, blank lines between documents), prose (running text, "
        "blank lines between documents), paragraphs (running text, a document a line), jsonl (objects with a "
        "field text, a document each), wikiextractor (its output), or auto (guessed from the first lines)",
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
    language: str = option("en", "of running text, as a two-letter code: the rules its sentences end by")
    validation_fraction: float = option(
        0.05,
        "share of the documents kept for evaluation, unless the corpus has a file of its own for that",
        at_least=0.0,
        at_most=0.5,
    )
    lowercase: bool = option(True, "lower-case the text")
    strip_accents: str = option(
        "auto",
        "WordPiece: remove accents; auto removes them from lower-cased text",
        choices=("auto", "yes", "no"),
    )
    tokenize_chinese_chars: bool = option(True, "WordPiece: make each Chinese character a word")
    added_tokens: Tuple[str, ...] = option(
        (), "WordPiece: tokens that are found in the text, after lower-casing, before it is split into words"
    )
    additional_special_tokens: Tuple[str, ...] = option(
        (), "WordPiece: the same, but found as they are written, before lower-casing"
    )
    tokenizer: str = option(
        "words",
        "what a token is: a word, or a piece of one (WordPiece, as the original BERT has; it needs the extra "
        "wordpiece)",
        choices=("words", "wordpiece"),
    )
    vocab_file: str = option(
        "",
        "a published WordPiece vocabulary, vocab.txt, a token a line, or of words the vocab.json of a run; "
        "without, one is made of the text",
        may_change=True,  # to where the same file is now
    )
    extend_vocab: int = option(
        0,
        "add at most so many tokens to --vocab-file or to the vocabulary of --init: the corpus's most "
        "frequent words, --min-freq at least, that are no token yet",
        at_least=0,
    )
    # [PAD] [UNK] [CLS] [SEP] [MASK] and some pieces; the default is Devlin et al. 2018's, uncased.
    vocab_size: int = option(30522, "V, tokens of a WordPiece vocabulary that is made, at most", at_least=8)
    min_freq: int = option(
        5, "of rarer pieces WordPiece makes no token; rarer words become <unk>", at_least=1
    )
    max_seq_length: int = option(
        64, "T, the longest pair in tokens, with its <cls> and two <sep>", at_least=SHORTEST_MAX_SEQ_LENGTH
    )
    pairs: str = option(
        "sentences",
        "a segment is one sentence, or as many as fill --max-seq-length in two segments (packed, as the original "
        "BERT has), truncated at either end",
        choices=("sentences", "packed"),
    )
    # Devlin et al. 2018's code, create_pretraining_data.py, as is its value.
    short_seq_prob: float = option(
        0.1, "share of packed pairs that aim at a random shorter length", at_least=0.0, at_most=1.0
    )
    preparation: str = option(
        "bert",
        "how pairs and masks are made. bert: long pairs are truncated; random second segments come from other "
        "documents; random tokens are words; <unk> is never predicted. d2l: as in Dive into Deep Learning: long "
        "pairs are dropped; any sentence can be a second segment; any token can be a random token; <unk> is "
        "predicted",
        choices=("bert", "d2l"),
    )
    objective: str = option(
        "mlm+nsp",
        "what is learnt: masked words and next sentences (mlm+nsp), masked words alone, of segments in order "
        "(mlm, as RoBERTa), or masked words and the order of two segments (mlm+sop, as ALBERT)",
        choices=("mlm+nsp", "mlm", "mlm+sop"),
    )
    random_next_prob: float = option(
        0.5,
        "share of pairs with a random second segment, or with --objective mlm+sop of swapped pairs",
        at_least=0.0,
        at_most=1.0,
    )
    dynamic_masking: bool = option(True, "draw pairs and masks anew each epoch, not once for all")
    mlm_probability: float = option(
        0.15, "share of a pair's tokens to predict; one at least", at_least=0.001, at_most=1.0
    )
    masking: str = option(
        "tokens",
        "what is masked together: a token, all pieces of a word, or up to --max-ngram words in a row",
        choices=("tokens", "words", "ngrams"),
    )
    # Lan et al. 2019 (ALBERT), section 3.1, has 3, and n words with a probability in proportion to 1/n.
    max_ngram: int = option(3, "the most words in a row for --masking ngrams", at_least=1, at_most=10)
    mask_token_rate: float = option(0.8, "of those, the share shown as <mask>", at_least=0.0, at_most=1.0)
    random_token_rate: float = option(
        0.1, "of those, the share shown as a random token", at_least=0.0, at_most=1.0
    )
    num_buckets: int = option(
        1, "batches of like length, padded to this many lengths; 1: all to --max-seq-length", at_least=1
    )
    preprocessing_workers: int = option(
        0,
        "processes that prepare the text; 0: this one; large texts want one for each core",
        at_least=0,
        may_change=True,
    )

    @property
    def predict_unknown(self) -> bool:
        """Whether <unk> is a word to predict."""
        return self.preparation == "d2l"


@dataclass(frozen=True)
class TrainConfig:
    """How the network is trained."""

    batch_size: int = option(512, "B, sentence pairs an optimizer step, over all contexts", at_least=1)
    micro_batch: int = option(
        0,
        "sentence pairs computed at once, over all contexts, in less memory; their gradients are added up to "
        "that of the batch; 0: the whole batch",
        at_least=0,
        may_change=True,
    )
    recompute: bool = option(
        False,
        "compute each layer a second time for the gradient, rather than keep what is in it: less memory, a "
        "quarter more time",
        may_change=True,
    )
    precision: str = option(
        "fp32",
        "of the products of matrices: float32; on GPUs float16 (fp16), with a loss that is scaled so that "
        "small gradients do not vanish; on CPUs that have it bfloat16 (bf16). All else is float32",
        choices=("fp32", "fp16", "bf16"),
    )
    num_steps: int = option(
        50,
        "optimizer steps; 0: no limit, as is set where --max-minutes is given alone",
        at_least=0,
        may_change=True,
    )
    max_minutes: float = option(
        0.0,
        "minutes after which the run ends, if --num-steps does not end it before; 0: no limit. Evaluations "
        "count, but for the last, and reading the text does not. A learning rate that is not constant then "
        "follows the clock, and no seed repeats the run",
        at_least=0.0,
        at_most=1e6,
        may_change=True,
    )
    lr: float = option(1e-3, "the learning rate at its peak", at_least=0.0, at_most=1e3, may_change=True)
    schedule: str = option(
        "constant",
        "of the learning rate after the warm-up: constant, or falling to 0 at the end of the run, linear or "
        "as a cosine",
        choices=("constant", "linear", "cosine"),
    )
    warmup_ratio: float = option(
        0.0, "share of the run over which the learning rate rises to --lr", at_least=0.0, at_most=1.0
    )
    optimizer: str = option(
        "adam",
        "adam, adamw (weight decay decoupled from the gradient), bertadam (the original BERT's: adamw "
        "without bias correction), lamb (for large batches) or muon (orthogonal steps of the encoder's matrices, "
        "and adamw for all other weights)",
        choices=("adam", "adamw", "bertadam", "lamb", "muon"),
    )
    # Jordan et al. 2024.
    momentum: float = option(
        0.95, "muon: the momentum of the encoder's matrices", at_least=0.0, at_most=0.9999
    )
    # Kingma and Ba 2015, section 2, as are MXNet's defaults.
    beta1: float = option(0.9, "decay rate of the gradient's running mean", at_least=0.0, at_most=0.9999)
    beta2: float = option(
        0.999, "decay rate of the running mean of its square", at_least=0.0, at_most=0.999999
    )
    epsilon: float = option(
        1e-8, "the optimizer's, added to the root of that mean", at_least=1e-12, at_most=1.0
    )
    weight_decay: float = option(
        0.0,
        "a step's decay of the weights, as a share of the learning rate; of biases and LayerNorm none",
        at_least=0.0,
        at_most=1.0,
    )
    clip_norm: float = option(
        0.0,
        "the largest norm of the whole gradient; a longer one is shortened; 0: no limit",
        at_least=0.0,
        at_most=1e6,
    )
    seed: int = option(
        0, "of every random draw: weights, dropout, pairs, masks, order", at_least=0, at_most=2**31 - 1
    )
    log_every: int = option(10, "steps between two lines of the log", at_least=1, may_change=True)
    eval_every: int = option(
        0,
        "steps between two evaluations on validation text; 0: at the end only",
        at_least=0,
        may_change=True,
    )
    patience: int = option(
        0,
        "end the run after this many evaluations in a row that were no better than the best, by the MLM loss "
        "on validation text; 0: never",
        at_least=0,
        may_change=True,
    )
    on_nonfinite: str = option(
        "stop",
        "what to do when a loss or a gradient is no number: stop, skip the step (the weights stay as they "
        "were; ten in a row stop the run), or go back to the latest checkpoint and on with other batches "
        "(three times from one checkpoint, then stop)",
        choices=("stop", "skip", "rollback"),
        may_change=True,
    )
    save_nonfinite_batch: bool = option(
        False, "write the batch of a step whose numbers went wrong to RUN/nonfinite-batches/", may_change=True
    )
    on_checkpoint_error: str = option(
        "stop",
        "what to do when a checkpoint cannot be written: stop, or go on and try again with the next one",
        choices=("stop", "continue"),
        may_change=True,
    )
    checkpoint_every: int = option(
        500,
        "steps between two checkpoints, from which --resume goes on; each evaluation and the end of the run, "
        "however it is stopped, has one too; 0: these only",
        at_least=0,
        may_change=True,
    )
    # Two, so that there is one before the latest, should that be damaged.
    keep_checkpoints: int = option(
        2, "how many of the latest checkpoints stay, beside the best; 0: all", at_least=0, may_change=True
    )


@dataclass(frozen=True)
class FineTuneConfig:
    """How a pretrained network is fine-tuned."""

    # Devlin et al. 2018, appendix A.3, has 2 to 4 epochs, 16 or 32 and 2e-5 to 5e-5; Turc et al. 2019 up to
    # 3e-4 for small networks.
    epochs: int = option(3, "how often each example is seen", at_least=1)
    batch_size: int = option(32, "examples an optimizer step", at_least=1)
    micro_batch: int = option(
        0, "examples per forward and backward pass, over all devices, to save memory; 0: all", at_least=0
    )
    recompute: bool = option(False, "compute each layer again for the gradient, to save memory")
    precision: str = option("fp32", "of matrix products, as in pretraining", choices=("fp32", "fp16", "bf16"))
    lr: float = option(
        5e-5, "the learning rate at its peak; small networks want up to 3e-4", at_least=0.0, at_most=1e3
    )
    warmup_ratio: float = option(
        0.1, "share of the steps over which the learning rate rises", at_least=0.0, at_most=0.99
    )
    weight_decay: float = option(0.01, "as in pretraining", at_least=0.0, at_most=1.0)
    clip_norm: float = option(1.0, "the largest norm of the gradient; 0: no limit", at_least=0.0, at_most=1e6)
    dropout: float = option(0.1, "dropout rate", at_least=0.0, at_most=0.9)
    max_seq_length: int = option(
        0, "tokens of a text that are read; 0: as many as in pretraining", at_least=0
    )
    best_metric: str = option(
        "auto",
        "the metric by which the best epoch is chosen (accuracy of classes, Pearson's correlation of scores, "
        "F1 of entities and answers)",
        choices=(
            *("auto", "accuracy", "f1", "matthews", "pearson", "spearman", "mse"),
            *("precision", "recall", "exact_match"),
        ),
    )
    seed: int = option(0, "of the head's weights, dropout and order", at_least=0, at_most=2**31 - 1)


@dataclass(frozen=True)
class Config:
    """Everything that defines a run but for where it runs and where it writes."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()

    def to_json(self) -> Dict[str, Any]:
        """The three groups as plain values; the inverse of `from_json`."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, groups: Mapping[str, Any], where: str = "config") -> Config:
        """The configuration that `to_json` gave; InputError names an unknown or ill-typed key."""
        fields: Dict[str, Dict[str, Any]] = {name: {} for name in GROUPS}
        for group, values in groups.items():
            if group not in GROUPS or not isinstance(values, Mapping):
                raise InputError(f"{where}: {group!r} is no group; the groups are {', '.join(GROUPS)}")
            for name, value in values.items():
                hint = get_type_hints(GROUPS[group]).get(name)
                if hint is None:
                    raise InputError(f"{where}: unknown key {group}.{name}")
                fields[group][name] = _typed(value, hint, f"{where}: {group}.{name}")
        return cls(**{name: group(**fields[name]) for name, group in GROUPS.items()})

    def replace(self, **values: Any) -> Config:
        """A copy with fields changed by their own names, whichever group they stand in.

        `max_minutes` without `num_steps` removes the limit on steps, and the reverse: half an hour does not mean
        the 50 steps of a preset, and 5,000 steps do not mean its minutes.

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
                name: _typed(values.pop(name), hints[name], flag_name(name))
                for name in hints.keys() & values.keys()
            }
            groups[group_name] = dataclasses.replace(getattr(self, group_name), **changes)
        if values:
            raise InputError(f"unknown option {', '.join(sorted(values))}")
        return Config(**groups)

    def check(self) -> None:
        """Raise one InputError that tells everything that is wrong, a line a problem, naming the flags."""
        problems = [problem for group in GROUPS for problem in problems_of(getattr(self, group))]
        if self.data.max_seq_length > self.model.max_positions:
            problems.append(
                f"--max-seq-length {self.data.max_seq_length}: must not exceed --max-positions {self.model.max_positions}"
            )
        if self.data.extend_vocab and not self.data.vocab_file and self.model.init in RANDOM_INITS:
            problems.append(
                f"--extend-vocab {self.data.extend_vocab}: has no effect, it needs --vocab-file or --init RUN"
            )
        if self.train.lr == 0:
            problems.append("--lr 0.0: must be above 0")
        if problems:
            raise InputError("\n".join(problems))


# Ways to draw the first weights; any other --init names a run.
RANDOM_INITS = ("xavier", "normal")

GROUPS: Dict[str, Any] = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}


def flag_name(name: str) -> str:
    """The flag of a field: `max_seq_length` -> `--max-seq-length`."""
    return "--" + name.replace("_", "-")


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
    kind = "list of strings" if hint == Tuple[str, ...] else hint.__name__
    raise InputError(f"{where} is {value!r}, which is no {kind}")


def changeable() -> List[str]:
    """The flags that may change when a run is resumed."""
    fields = (f for group in GROUPS.values() for f in dataclasses.fields(group))
    return [flag_name(f.name) for f in fields if f.metadata["may_change"]]


def check_changes(before: Config, after: Config, where: str) -> None:
    """Raise InputError where a resumed run would be another one; names everything that may not change."""
    problems = []
    for group in GROUPS:
        for f in dataclasses.fields(getattr(before, group)):
            old, new = (getattr(getattr(config, group), f.name) for config in (before, after))
            if old != new and not f.metadata["may_change"]:
                problems.append(
                    f"{flag_name(f.name)} {new}: {where} was begun with {old}, which cannot change when it goes on"
                )
    if problems:
        may = f"what may change: {', '.join(changeable())}; another run begins with --config"
        raise InputError("\n".join([*problems, may]))


def check_group(group: Any) -> None:
    """Raise InputError where one group of the configuration cannot be used, whatever the others are."""
    problems = problems_of(group)
    if problems:
        raise InputError("\n".join(problems))


def problems_of(group: Any) -> List[str]:
    """A sentence for everything that is wrong in one group of the configuration."""
    problems = []
    for f in dataclasses.fields(group):
        value, meta = getattr(group, f.name), f.metadata
        low, high, choices = meta["at_least"], meta["at_most"], meta["choices"]
        # "not above" rather than "below", so that a NaN is refused too.
        if low is not None and not value >= low:
            problems.append(f"{flag_name(f.name)} {value}: must be at least {low}")
        elif high is not None and not value <= high:
            problems.append(f"{flag_name(f.name)} {value}: must be at most {high}")
        elif choices and value not in choices:
            problems.append(f"{flag_name(f.name)} {value}: must be one of {', '.join(choices)}")
    return problems + _CONTRADICTIONS[type(group)](group)


def _model_contradictions(model: ModelConfig) -> List[str]:
    if model.num_heads > 0 and model.units % model.num_heads:
        return [f"--num-heads {model.num_heads}: must divide --units {model.units}"]
    if not model.init:
        return [f"--init: must be {', '.join(RANDOM_INITS)} or the folder of a run"]
    if model.init in RANDOM_INITS and model.init_checkpoint != "latest":
        return [f"--init-checkpoint {model.init_checkpoint}: has no effect, it needs --init RUN"]
    if model.init not in RANDOM_INITS and model.init_embeddings != "random":
        return ["--init-embeddings cooccurrence: has no effect, the vectors come from --init RUN"]
    return []


def _data_contradictions(data: DataConfig) -> List[str]:
    problems = []
    if data.mask_token_rate + data.random_token_rate > 1 + 1e-9:
        problems.append(
            f"--mask-token-rate {data.mask_token_rate} and --random-token-rate {data.random_token_rate}: "
            "must not exceed 1 together"
        )
    if data.num_buckets > data.max_seq_length:
        problems.append(
            f"--num-buckets {data.num_buckets}: must not exceed --max-seq-length {data.max_seq_length}"
        )
    if data.masking == "ngrams" and data.max_ngram == 1:
        problems.append("--max-ngram 1: must be at least 2 for --masking ngrams; one word is --masking words")
    if data.pairs == "packed" and data.preparation == "d2l":
        problems.append("--preparation d2l: has no packed pairs; add --preparation bert")
    return problems + _without_effect(data)


def _without_effect(data: DataConfig) -> List[str]:
    """A sentence for everything that was changed and would change nothing, as another option is not set."""
    makes_pieces = data.tokenizer == "wordpiece" and not data.vocab_file
    used = {
        "vocab_file": (
            data.tokenizer == "wordpiece" or data.vocab_file.endswith(".json"),
            "needs --tokenizer wordpiece; a vocabulary of words is the vocab.json of a run",
        ),
        **dict.fromkeys(
            ("strip_accents", "tokenize_chinese_chars", "added_tokens", "additional_special_tokens"),
            (data.tokenizer == "wordpiece", "needs --tokenizer wordpiece"),
        ),
        "vocab_size": (makes_pieces, "needs --tokenizer wordpiece, and no --vocab-file, which has its size"),
        "short_seq_prob": (data.pairs == "packed", "needs --pairs packed"),
        "max_ngram": (data.masking == "ngrams", "needs --masking ngrams"),
        "random_next_prob": (data.objective != "mlm", "needs --objective mlm+nsp or mlm+sop"),
    }
    defaults = DataConfig()
    return [
        f"{flag_name(name)} {getattr(data, name)}: has no effect, it {needs}"
        for name, (is_used, needs) in used.items()
        if not is_used and getattr(data, name) != getattr(defaults, name)
    ]


def _train_contradictions(train: TrainConfig) -> List[str]:
    problems = []
    if train.optimizer == "adam" and train.weight_decay:
        problems.append(
            f"--weight-decay {train.weight_decay}: must be 0 with --optimizer adam; adamw, bertadam, lamb and "
            "muon have weight decay"
        )
    if train.optimizer != "muon" and train.momentum != TrainConfig().momentum:
        problems.append(f"--momentum {train.momentum}: has no effect, it needs --optimizer muon")
    if train.num_steps == 0 and train.max_minutes == 0:
        problems.append("--num-steps 0: must be at least 1, or --max-minutes must end the run")
    if train.warmup_ratio == 1 and train.schedule != "constant":
        problems.append(
            f"--warmup-ratio 1.0: leaves nothing of the run for --schedule {train.schedule} to fall in; a smaller "
            "share, or --schedule constant"
        )
    if train.patience and not train.eval_every:
        problems.append(f"--patience {train.patience}: counts evaluations; ask for some with --eval-every")
    return problems


_CONTRADICTIONS: Dict[Any, Any] = {
    ModelConfig: _model_contradictions,
    DataConfig: _data_contradictions,
    TrainConfig: _train_contradictions,
    FineTuneConfig: lambda tuning: [] if tuning.lr else ["--lr 0.0: must be above 0"],
}
