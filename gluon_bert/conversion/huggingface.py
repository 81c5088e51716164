"""Folders of PyTorch transformers' BERT, read and written without PyTorch or transformers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Mapping

import numpy as np

from ..config import ModelConfig, check_group
from ..data.vocab import Vocabulary
from ..data.wordpiece import WordPieceVocabulary
from ..errors import InputError
from ..fileio import atomic_folder, atomic_write, read_json, write_json
from ..model.parameters import weights_of
from ..model.task import Task
from ..run import Run
from .converter import ConvertedModel, to_foreign_names, to_own_names, untrained_note
from .sentence_transformers import SentenceFolder, pooling_files, read_sentence_folder
from .tokenizer_files import (
    ADDED_TOKENS,
    TOKENIZER_CONFIG,
    AddedToken,
    TokenizerFiles,
    read_tokenizer_files,
)
from .vocabularies import VOCAB, looks_cased, read_vocabulary, vocabulary_file
from .weight_files import SAFETENSORS, check_downloaded, read_weights, safetensors_package
from .weight_names import HUGGINGFACE, HUGGINGFACE_SPANS, WeightNames

CONFIG = "config.json"

# transformers' names of activations -> ours. Its three forms of the tanh approximation differ in the last
# digits of their constants.
_ACTIVATIONS = {
    "gelu": "gelu",
    "relu": "relu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
# Defaults of its BertConfig.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "tie_word_embeddings": True,
}
# Settings for which this network allows one value, and the meaning of other values.
_FIXED = {
    "model_type": ("bert", "another network"),
    "type_vocab_size": (2, "another number of segments"),
    "position_embedding_type": ("absolute", "other position embeddings"),
    "is_decoder": (False, "a decoder"),
    "add_cross_attention": (False, "attention to another network"),
    "pruned_heads": ({}, "a network without some heads"),
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
# Constants that older versions saved with the weights.
_BUFFERS = ("bert.embeddings.position_ids", "bert.embeddings.token_type_ids")
_BIAS, _BIAS_COPY = "cls.predictions.bias", "cls.predictions.decoder.bias"
_DECODER, _EMBEDDING = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"
# How the names of a BertModel's parts begin, after any prefix.
_PARTS = ("embeddings.", "encoder.", "pooler.")
_WORDS = "embeddings.word_embeddings.weight"
_CLASSIFIER, _SPANS = "classifier.weight", "qa_outputs.weight"
_POOLER = "bert.pooler."
# The setting of its pipelines that says whether a question may have no answer.
_NO_ANSWER = "handle_impossible_answer"


def read_huggingface(
    folder: Path, lowercase: bool | None = None, pairs: bool | None = None
) -> ConvertedModel:
    """Return the network in a folder with config.json, a tokenizer's files and weights.

    The folder may also be one of sentence-transformers. lowercase: whether text is lower-cased, if no file
    says so. pairs: whether a classifier takes pairs of texts; None: both. Raise InputError for everything
    that cannot be used.
    """
    sentences = read_sentence_folder(Path(folder))
    folder = sentences.bert
    notes: list[str] = []
    path = folder / CONFIG
    check_downloaded(path)
    settings = read_json(path)
    model = model_config(settings, path, notes)
    vocab_size = settings.get("vocab_size", _DEFAULTS["vocab_size"])
    files = read_tokenizer_files(folder)
    arrays = _renamed(read_weights(folder), model, folder, notes)
    task = _task(settings, arrays, path, pairs, notes)
    if task and task.scores_tokens:
        arrays = {name: array for name, array in arrays.items() if not name.startswith(_POOLER)}
    weights, untrained = to_own_names(arrays, _layout(task), vocab_size, model, folder, notes, task)
    added = {token.content: token.id for token in files.added_tokens}
    vocab = read_vocabulary(vocabulary_file(folder), vocab_size, notes, added)
    tokenizer = _tokenizer(folder, files, sentences, vocab, lowercase, notes)
    notes += untrained_note(untrained)
    notes += [f"texts do not get the prompt {prompt!r} by themselves" for prompt in sentences.prompts]
    longest = sentences.max_seq_length or files.max_length
    return ConvertedModel(
        weights, model, vocab, tokenizer, longest, untrained, sentences.pooling, task, notes
    )


def _tokenizer(
    folder: Path,
    files: TokenizerFiles,
    sentences: SentenceFolder,
    vocab: Vocabulary,
    asked: bool | None,
    notes: list[str],
) -> dict[str, Any]:
    """Return the fields of DataConfig that say how text is split."""
    lowercase = _lowercase(folder, files.lowercase, vocab, asked, notes)
    strip_accents = files.strip_accents
    if sentences.lowercase and not lowercase:
        # sentence-transformers lower-cases before the tokenizer, which then keeps the accents.
        lowercase, strip_accents = True, bool(strip_accents)
    problems = [
        f"{folder}: the added token {token.content!r} must have {name} false, got true"
        for token in files.added_tokens
        for name in ("single_word", "lstrip", "rstrip")
        if getattr(token, name)
    ]
    problems += [
        f"{folder}: the added token {token.content!r} must not hold white space"
        for token in files.added_tokens
        if token.content.split() != [token.content]
    ]
    if problems:
        raise InputError("\n".join(problems))
    return {
        "lowercase": lowercase,
        "strip_accents": "auto" if strip_accents is None else "yes" if strip_accents else "no",
        "tokenize_chinese_chars": files.tokenize_chinese_chars,
        "added_tokens": tuple(t.content for t in files.added_tokens if t.normalized),
        "additional_special_tokens": tuple(t.content for t in files.added_tokens if not t.normalized),
    }


def _lowercase(
    folder: Path, said: bool | None, vocab: Vocabulary, asked: bool | None, notes: list[str]
) -> bool:
    if asked is not None:
        if said is not None and said != asked:
            raise InputError(
                f"lowercase must be {said} or omitted, as the tokenizer in {folder}, got {asked}."
            )
        return asked
    if said is not None:
        return said
    found = not looks_cased(vocab)
    kind = "lower-cased" if found else "cased"
    notes.append(f"the vocabulary looks {kind}, which no file says (lowercase={not found} changes that)")
    return found


def model_config(settings: Mapping[str, Any], path: Path, notes: list[str]) -> ModelConfig:
    """Return the configuration in a config.json; raise InputError for all that this network cannot be."""
    if not {"model_type", *_SIZES} & settings.keys():
        raise InputError(
            f"{path}: must be the configuration of a BERT, with hidden_size and so on; it has none"
        )
    if settings.get("model_type", "bert") != "bert":
        raise InputError(f"{path}: model_type must be 'bert', got {settings['model_type']!r}")
    problems = [
        f"{name} must be {value!r}, got {settings[name]!r}, which is {meaning}"
        for name, (value, meaning) in _FIXED.items()
        if name in settings and settings[name] != value
    ]
    s = {**_DEFAULTS, **settings}
    problems += [
        f"{name} must be a whole number above 0, got {s[name]!r}"
        for name in _SIZES
        if type(s[name]) is not int or s[name] < 1
    ]
    problems += [
        f"{name} must be a number, got {s[name]!r}"
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps")
        if type(s[name]) not in (int, float) or not math.isfinite(s[name])
    ]
    if not isinstance(s["hidden_act"], str) or s["hidden_act"] not in _ACTIVATIONS:
        problems.append(f"hidden_act must be one of {', '.join(_ACTIVATIONS)}, got {s['hidden_act']!r}")
    if problems:
        raise InputError("\n".join(f"{path}: {problem}" for problem in problems))
    if s["hidden_dropout_prob"] != s["attention_probs_dropout_prob"]:
        notes.append(
            f"attention's dropout of {s['attention_probs_dropout_prob']} becomes "
            f"{s['hidden_dropout_prob']}, as one rate serves the whole network"
        )
    config = ModelConfig(
        num_layers=s["num_hidden_layers"],
        units=s["hidden_size"],
        ffn_units=s["intermediate_size"],
        num_heads=s["num_attention_heads"],
        dropout=float(s["hidden_dropout_prob"]),
        max_positions=s["max_position_embeddings"],
        activation=_ACTIVATIONS[s["hidden_act"]],
        norm_epsilon=float(s["layer_norm_eps"]),
        embedding_norm=True,
        tied_decoder=bool(s["tie_word_embeddings"]),
        init="normal",
    )
    check_group(config)
    return config


def _renamed(
    arrays: dict[str, np.ndarray], model: ModelConfig, folder: Path, notes: list[str]
) -> dict[str, np.ndarray]:
    """Return the arrays under the names that BertForPreTraining has for them today, each once."""
    prefix = _prefix(arrays, folder)
    outer = prefix[: -len("bert.")] if prefix.endswith("bert.") else ""
    if outer:
        notes.append(f"names without their prefix {outer!r}")
    arrays = {_without_prefix(name, prefix, outer): array for name, array in arrays.items()}
    old = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    for before, now in old.items():
        arrays = {name.replace(before, now): array for name, array in arrays.items()}
    arrays = {name: array for name, array in arrays.items() if name not in _BUFFERS}
    halves = sorted({str(array.dtype) for array in arrays.values()} - {"float32"})
    if halves:
        notes.append(f"weights in {' and '.join(halves)} became float32")
    copy = arrays.pop(_BIAS_COPY, None)
    if copy is not None and not (model.tied_decoder and _BIAS in arrays):
        arrays[_BIAS] = copy
    if model.tied_decoder:
        decoder = arrays.pop(_DECODER, None)
        if decoder is not None and not np.array_equal(decoder, arrays.get(_EMBEDDING, decoder)):
            notes.append(
                "the decoder's own weights are left out, as config.json ties it to the embeddings, and as "
                "transformers does"
            )
    return arrays


def _prefix(arrays: Mapping[str, np.ndarray], folder: Path) -> str:
    """Return the prefix of the BertModel's names; raise InputError unless there is exactly one."""
    found = sorted(name[: -len(_WORDS)] for name in arrays if name.endswith(_WORDS))
    if len(found) == 1:
        return found[0]
    if found:
        shown = " and ".join(repr(prefix) for prefix in found)
        raise InputError(f"{folder}: the weights must be one BERT's, got those of several, named {shown}...")
    shown = " ".join(sorted(arrays)[:3])
    raise InputError(f"{folder}: the weights must have {_WORDS}. It has {shown} ...: another network.")


def _without_prefix(name: str, prefix: str, outer: str) -> str:
    rest = name[len(prefix) :]
    if name.startswith(prefix) and rest.startswith(_PARTS):
        return f"bert.{rest}"
    return name[len(outer) :] if name.startswith(outer) else name


def _task(
    settings: Mapping[str, Any],
    arrays: dict[str, np.ndarray],
    path: Path,
    pairs: bool | None,
    notes: list[str],
) -> Task | None:
    """Return the task of a fine-tuned network, None for other networks."""
    architectures = settings.get("architectures")
    named = architectures if isinstance(architectures, list) else []
    if named != ["BertForSequenceClassification"] or _CLASSIFIER not in arrays:
        if pairs is None and named == ["BertForTokenClassification"] and _CLASSIFIER in arrays:
            return _tagging_task(settings, len(arrays[_CLASSIFIER]), path, notes)
        if pairs is None and named == ["BertForQuestionAnswering"] and _SPANS in arrays:
            return Task("question-answering", pairs=True, no_answer=_may_lack_answers(settings))
        if pairs is not None:
            raise InputError(
                f"pairs must be omitted for other networks than BertForSequenceClassification, got "
                f"{' '.join(map(str, named)) or 'none'}."
            )
        return None
    kind = settings.get("problem_type")
    outputs = len(arrays[_CLASSIFIER])
    if kind is None:
        kind = "regression" if outputs == 1 else "single_label_classification"
    if kind == "regression" and outputs == 1:
        return Task("regression", pairs)
    if kind != "single_label_classification" or outputs < 2:
        raise InputError(
            f"{path}: problem_type must be single_label_classification, or regression with one output, "
            f"got {kind!r} with {outputs}"
        )
    return Task("classification", pairs, _labels(settings, outputs, path))


def _labels(settings: Mapping[str, Any], outputs: int, path: Path) -> tuple[str, ...]:
    labels = settings.get("id2label")
    labels = labels if isinstance(labels, dict) else {str(i): f"LABEL_{i}" for i in range(outputs)}
    if set(labels) != {str(i) for i in range(outputs)} or len(set(map(str, labels.values()))) != outputs:
        raise InputError(f"{path}: id2label must have another label for each of 0 to {outputs - 1}")
    return tuple(str(labels[str(i)]) for i in range(outputs))


def _tagging_task(settings: Mapping[str, Any], outputs: int, path: Path, notes: list[str]) -> Task:
    labels = _labels(settings, outputs, path)
    if outputs < 2:
        raise InputError(f"{path}: id2label must have two labels at least, got {' '.join(labels)}")
    task = Task("tagging", pairs=False, labels=labels)
    if not task.has_entities:
        notes.append("the labels are not BIO tags: every word gets one of them, without entities")
    return task


def _may_lack_answers(settings: Mapping[str, Any]) -> bool:
    parameters = settings.get("task_specific_params")
    own = parameters.get("question-answering") if isinstance(parameters, dict) else None
    return isinstance(own, dict) and own.get(_NO_ANSWER) is True


def _layout(task: Task | None) -> WeightNames:
    return HUGGINGFACE_SPANS if task and task.kind == "question-answering" else HUGGINGFACE


def write_huggingface(run: Run, folder: Path) -> list[str]:
    """Write a run for transformers, the inverse of `read_huggingface`; return notes for the user.

    Untrained heads are left out. Raise InputError if its BERT cannot represent the network, or if the folder
    is not empty.
    """
    safetensors = safetensors_package()
    config = run.net.config
    _check_has_place(config)
    arrays, architecture = _arrays(run), _architecture(run)
    with atomic_folder(folder) as aside:
        settings = bert_config(config, len(run.vocab), run.vocab.pad, architecture)
        write_json(aside / CONFIG, {**settings, **_task_settings(run.task)})
        _write_tokenizer(run, aside)
        safetensors.numpy.save_file(arrays, str(aside / SAFETENSORS), metadata={"format": "pt"})
        if run.pooling:
            for name, content in pooling_files(
                run.pooling, config.units, run.config.data.max_seq_length
            ).items():
                (aside / name).parent.mkdir(exist_ok=True)
                write_json(aside / name, content)
    notes = [f"{folder}: a {architecture}"]
    if run.untrained:
        notes.append(f"left out, as untrained: {' '.join(run.untrained)}")
    if not isinstance(run.vocab, WordPieceVocabulary):
        notes.append(
            "vocab.txt holds whole words. BertTokenizer splits text at hyphens and apostrophes inside words, "
            "and gluon_bert does not; pass it ids of gluon_bert.Vocabulary."
        )
    return notes


def _arrays(run: Run) -> dict[str, np.ndarray]:
    weights = weights_of(run.net)
    task = run.task
    if task and task.kind == "regression":
        # Here a score is mean + scale * output; there it is the output itself.
        weights["head.dense.weight"] = weights["head.dense.weight"] * np.float32(task.scale)
        weights["head.dense.bias"] = weights["head.dense.bias"] * np.float32(task.scale) + np.float32(
            task.mean
        )
    arrays = to_foreign_names(weights, _layout(task), run.untrained)
    if _BIAS in arrays and not run.net.config.tied_decoder:
        arrays[_BIAS_COPY] = arrays[_BIAS].copy()
    return arrays


_ARCHITECTURES = {
    "classification": "BertForSequenceClassification",
    "regression": "BertForSequenceClassification",
    "tagging": "BertForTokenClassification",
    "question-answering": "BertForQuestionAnswering",
}


def _architecture(run: Run) -> str:
    """Return the class of transformers with exactly the trained heads of a run."""
    if run.task:
        return _ARCHITECTURES[run.task.kind]
    heads = "mlm" in run.untrained, "nsp" in run.untrained
    return {
        (False, False): "BertForPreTraining",
        (False, True): "BertForMaskedLM",
        (True, False): "BertForNextSentencePrediction",
        (True, True): "BertModel",
    }[heads]


def _task_settings(task: Task | None) -> dict[str, Any]:
    if task is None:
        return {}
    if task.kind == "regression":
        return {"problem_type": "regression", "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    if task.kind == "question-answering":
        own = {"question-answering": {_NO_ANSWER: True}}
        return {"task_specific_params": own} if task.no_answer else {}
    labels = {
        "id2label": {str(i): label for i, label in enumerate(task.labels)},
        "label2id": {label: i for i, label in enumerate(task.labels)},
    }
    return labels if task.kind == "tagging" else {"problem_type": "single_label_classification", **labels}


def _write_tokenizer(run: Run, folder: Path) -> None:
    data, vocab = run.config.data, run.vocab
    strip_accents = {"auto": None, "yes": True, "no": False}[data.strip_accents]
    specials = {f"{name}_token": vocab.tokens[getattr(vocab, name)] for name in _SPECIALS}
    normalized = [AddedToken(token, None) for token in data.added_tokens]
    raw = [AddedToken(token, None, normalized=False) for token in data.additional_special_tokens]
    ids = {token: row for row, token in enumerate(vocab.tokens)}
    content = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": data.lowercase,
        "strip_accents": strip_accents,
        "tokenize_chinese_chars": data.tokenize_chinese_chars,
        "model_max_length": data.max_seq_length,
        **specials,
    }
    decoder = {str(ids[token.content]): _decoded(token) for token in (*normalized, *raw)}
    if decoder:
        decoder.update(
            {str(ids[token]): _decoded(AddedToken(token, None, False)) for token in specials.values()}
        )
        content["added_tokens_decoder"] = dict(sorted(decoder.items(), key=lambda each: int(each[0])))
        added = [*data.added_tokens, *data.additional_special_tokens]
        write_json(folder / ADDED_TOKENS, {token: ids[token] for token in added})
    if raw:
        content["additional_special_tokens"] = [token.content for token in raw]
    write_json(folder / TOKENIZER_CONFIG, content)
    with atomic_write(folder / VOCAB) as file:
        file.writelines(token + "\n" for token in vocab.tokens)


def _decoded(token: AddedToken) -> dict[str, Any]:
    flags = {name: getattr(token, name) for name in ("normalized", "single_word", "lstrip", "rstrip")}
    return {"content": token.content, **flags, "special": not token.normalized}


_SPECIALS = ("unk", "pad", "mask", "cls", "sep")


def bert_config(
    config: ModelConfig, vocab_size: int, pad: int = 0, architecture: str = "BertForPreTraining"
) -> dict[str, Any]:
    """Return the arguments of transformers.BertConfig for a network, as in config.json."""
    activations = {ours: theirs for theirs, ours in reversed(list(_ACTIVATIONS.items()))}
    return {
        "architectures": [architecture],
        "model_type": "bert",
        "vocab_size": vocab_size,
        "hidden_size": config.units,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.ffn_units,
        "hidden_act": activations[config.activation],
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": 2,
        "layer_norm_eps": config.norm_epsilon,
        "pad_token_id": pad,
        "tie_word_embeddings": config.tied_decoder,
    }


def _check_has_place(config: ModelConfig) -> None:
    problems = []
    if config.norm != "post":
        problems.append("huggingface needs a run trained with norm=post, got norm=pre.")
    if not config.embedding_norm:
        problems.append(
            "huggingface needs a run trained with embedding_norm=True, got embedding_norm=False, as in d2l."
        )
    if config.position != "absolute":
        problems.append(
            f"huggingface needs a run trained with position=absolute, got position={config.position}."
        )
    if problems:
        raise InputError("\n".join(problems))
