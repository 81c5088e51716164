"""Settings in the files of a BERT tokenizer. Other tokenizers are refused by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Mapping, NamedTuple

from ..data.wordpiece import SPECIAL_TOKENS
from ..errors import InputError
from ..fileio import read_json
from .weight_files import check_downloaded

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
ADDED_TOKENS, SPECIAL_TOKENS_MAP = "added_tokens.json", "special_tokens_map.json"

# Classes that split text as BERT's does. True: the class takes all settings from tokenizer.json.
_CLASSES = {
    "BertTokenizer": False,
    "BertTokenizerFast": False,
    "DistilBertTokenizer": False,
    "DistilBertTokenizerFast": False,
    "ElectraTokenizer": False,
    "ElectraTokenizerFast": False,
    "PreTrainedTokenizerFast": True,
    "TokenizersBackend": True,
}
# Defaults of BERT's tokenizer for parts of tokenizer.json.
_BERT_MODEL = {
    "type": "WordPiece",
    "unk_token": "[UNK]",
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 100,
}
_SPECIAL_NAMES = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Above this, model_max_length means that nothing limits the length.
_NO_LIMIT = 1_000_000


class AddedToken(NamedTuple):
    """A token that is cut out of the text before the rest is split.

    id: its row, None if no file has it. normalized: search it in the normalized text instead of the original
    text. single_word: only between spaces and punctuation. lstrip, rstrip: with the spaces beside it.
    """

    content: str
    id: int | None
    normalized: bool = True
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False


@dataclass(frozen=True)
class TokenizerFiles:
    """The settings of a BERT tokenizer; None: no file has the setting."""

    lowercase: bool | None = None
    strip_accents: bool | None = None
    tokenize_chinese_chars: bool = True
    max_length: int | None = None
    added_tokens: tuple[AddedToken, ...] = ()
    problems: list[str] = field(default_factory=list)


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Return the settings of the tokenizer's files in a folder; raise InputError for another tokenizer.

    tokenizer_config.json overrides tokenizer.json, as in transformers.
    """
    config, tokenizer = (_optional(folder / name) for name in (TOKENIZER_CONFIG, TOKENIZER))
    # Without a class it is BERT's, because config.json says that the model is a BERT.
    name = config.get("tokenizer_class") or "BertTokenizer"
    problems = _config_problems(config, folder / TOKENIZER_CONFIG)
    all_in_tokenizer = _CLASSES.get(name, False)
    if tokenizer:
        problems += _tokenizer_problems(tokenizer, folder / TOKENIZER, all_in_tokenizer)
    elif all_in_tokenizer:
        problems.append(f"{folder}: {TOKENIZER} must be there for tokenizer_class {name}")
    if problems:
        raise InputError("\n".join(problems))
    normalizer = tokenizer.get("normalizer")
    from_tokenizer = normalizer if isinstance(normalizer, dict) else {}
    sources = [from_tokenizer] if all_in_tokenizer else [config, from_tokenizer]
    return TokenizerFiles(
        lowercase=_first(sources, ("do_lower_case", "lowercase"), folder),
        strip_accents=_first(sources, ("strip_accents",), folder),
        tokenize_chinese_chars=_first(sources, ("tokenize_chinese_chars", "handle_chinese_chars"), folder)
        is not False,
        max_length=_max_length(config, folder / TOKENIZER_CONFIG),
        added_tokens=_added_tokens(folder, config, tokenizer),
    )


def _optional(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    check_downloaded(path)
    return read_json(path)


def _first(sources: list[dict[str, Any]], names: tuple[str, ...], folder: Path) -> bool | None:
    """Return the first value that is set, under any of its names. null is a value, too."""
    for source in sources:
        for name in names:
            if name in source:
                value = source[name]
                if value is not None and not isinstance(value, bool):
                    raise InputError(f"{folder}: {name} must be true, false or null, got {value!r}")
                return value
    return None


def _max_length(config: Mapping[str, Any], path: Path) -> int | None:
    value = config.get("model_max_length")
    if value is None or (isinstance(value, (int, float)) and value > _NO_LIMIT):
        return None
    if type(value) is not int or value < 1:
        raise InputError(f"{path}: model_max_length must be a whole number above 0, got {value!r}")
    return value


def _config_problems(config: Mapping[str, Any], path: Path) -> list[str]:
    problems = []
    name = config.get("tokenizer_class")
    if name is not None and name not in _CLASSES:
        problems.append(f"{path}: tokenizer_class must be BertTokenizer, got {name!r}")
    if config.get("never_split"):
        problems.append(f"{path}: never_split must be empty, got {config['never_split']!r}")
    if config.get("do_basic_tokenize") is False:
        problems.append(f"{path}: do_basic_tokenize must be true, got false")
    for key in ("word_tokenizer_type", "subword_tokenizer_type"):
        if key in config:
            problems.append(f"{path}: {key} {config[key]!r} is not BERT's way to split text")
    own = dict(zip(_SPECIAL_NAMES, ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")))
    for key, expected in own.items():
        found = _content(config.get(key))
        if found is not None and found != expected:
            problems.append(f"{path}: {key} must be {expected}, got {found!r}")
    return problems


def _content(token: Any) -> Any:
    """Return the text of a token that is a string or an object with one."""
    return token.get("content") if isinstance(token, dict) else token


def _tokenizer_problems(tokenizer: Mapping[str, Any], path: Path, strict: bool) -> list[str]:
    """Return a sentence for each part of a tokenizer.json that is not BERT's.

    strict: check the normalizer too. Otherwise transformers ignores it and builds a new one.
    """
    problems = []
    model = tokenizer.get("model")
    if not isinstance(model, dict):
        return [f"{path}: 'model' must be an object"]
    for key, expected in _BERT_MODEL.items():
        if model.get(key, expected) != expected:
            problems.append(f"{path}: model.{key} must be {expected!r}, got {model[key]!r}")
    types = {"normalizer": "BertNormalizer", "pre_tokenizer": "BertPreTokenizer"}
    for part, expected in types.items():
        found = tokenizer.get(part)
        kind = found.get("type") if isinstance(found, dict) else found
        if kind != expected and (strict or found is not None):
            problems.append(f"{path}: {part} must be {expected}, got {_type_names(found)}")
    normalizer = tokenizer.get("normalizer")
    if isinstance(normalizer, dict) and normalizer.get("clean_text") is False:
        problems.append(f"{path}: normalizer.clean_text must be true, got false")
    if not _is_berts_template(tokenizer.get("post_processor")):
        problems.append(f"{path}: post_processor must give [CLS] A [SEP] and [CLS] A [SEP] B [SEP]")
    return problems


def _type_names(part: Any) -> str:
    """Return the types of a part and of the parts in it: 'Sequence (NFC, Lowercase)'."""
    if not isinstance(part, dict):
        return repr(part)
    inner: Any = next((part[key] for key in ("normalizers", "pretokenizers") if key in part), [])
    names = ", ".join(str(each.get("type")) for each in inner if isinstance(each, dict))
    return f"{part.get('type')} ({names})" if names else str(part.get("type"))


def _is_berts_template(part: Any) -> bool:
    if part is None or (isinstance(part, dict) and part.get("type") == "BertProcessing"):
        return True
    if not isinstance(part, dict) or part.get("type") != "TemplateProcessing":
        return False
    cls, a, b = ("[CLS]", 0), ("A", 0), ("B", 1)
    expected = {"single": [cls, a, ("[SEP]", 0)], "pair": [cls, a, ("[SEP]", 0), b, ("[SEP]", 1)]}
    try:
        found = {
            name: [(each["id"], each["type_id"]) for item in part[name] for each in item.values()]
            for name in expected
        }
    except (KeyError, TypeError, AttributeError):
        return False
    return found == expected


def _added_tokens(
    folder: Path, config: Mapping[str, Any], tokenizer: Mapping[str, Any]
) -> tuple[AddedToken, ...]:
    """Return the tokens beside the five special ones, from all files that may name them."""
    found: dict[str, AddedToken] = {}
    for each in tokenizer.get("added_tokens") or []:
        _add(found, each, each.get("id") if isinstance(each, dict) else None, folder / TOKENIZER)
    for token, row in _optional(folder / ADDED_TOKENS).items():
        if token not in found:
            _add(found, token, row, folder / ADDED_TOKENS)
    decoder = config.get("added_tokens_decoder") or {}
    for row, each in decoder.items():
        _add(found, each, int(row) if str(row).isdecimal() else row, folder / TOKENIZER_CONFIG)
    for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP):
        for each in _optional(folder / name).get("additional_special_tokens") or []:
            if _content(each) not in found:
                _add(found, each, None, folder / name, special=True)
    return tuple(token for token in found.values() if token.content not in SPECIAL_TOKENS)


def _add(found: dict[str, AddedToken], each: Any, row: Any, path: Path, special: bool = False) -> None:
    content = _content(each)
    if not isinstance(content, str) or not content or not (row is None or (type(row) is int and row >= 0)):
        raise InputError(f"{path}: an added token must have a text and a number, got {each!r} and {row!r}")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{path}: the added token {content!a} must be valid Unicode. It holds half of a surrogate pair."
        ) from error
    settings = each if isinstance(each, dict) else {}
    special = bool(settings.get("special", special))
    found[content] = AddedToken(
        content,
        row,
        bool(settings.get("normalized", not special)),
        *(bool(settings.get(name, False)) for name in ("single_word", "lstrip", "rstrip")),
    )
