"""Tokenizer files: transformers' ids for everything that BERT has, a named error for everything else."""

from __future__ import annotations

import json

import pytest
import tokenizers
from conftest import ROOT
from support.conversion import converted, huggingface_folder

from gluon_bert.conversion.huggingface import read_huggingface
from gluon_bert.conversion.tokenizer_files import read_tokenizer_files
from gluon_bert.errors import InputError
from gluon_bert.run import load_run

CASES = ROOT.parent / "shared" / "cases"
FOLDERS = [
    "06-strip-accents/cased_strip",
    "06-strip-accents/strip_false",
    "07-chinese-chars/chinese_false",
    "09-added-tokens/added",
    "16-vocab-lines/crlf",
    "16-vocab-lines/vocab_dup",
    "16-vocab-lines/vocab_mid_blank",
    "16-vocab-lines/vocab_space",
    "16-vocab-lines/vocab_trailing_blank",
    "16-vocab-lines/vocab_trailing_spaces",
]
TEXTS = [
    "Möchte er schön schon café? CAFÉ W1 w2",
    "北京是中国 hello w3的w4",
    "the [ent] is covid19 crane COVID19 xcovid19y",
    "hello-world a_b <b> [x] (y)\u2028world\u3000hello",
]


def theirs(folder, text):
    transformers = pytest.importorskip("transformers", reason="needs the extra test-others")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    return tokenizer(text)["input_ids"]


@pytest.mark.parametrize("name", FOLDERS)
def test_case_converted_gives_ids_of_transformers(name, tmp_path):
    if not CASES.is_dir():
        pytest.skip(f"the cases are not at {CASES}")
    converted("--from", "huggingface", CASES / name, "--to", tmp_path / "run")
    reader = load_run(tmp_path / "run").reader
    texts = [*json.loads((CASES / "06-strip-accents" / "texts.json").read_text("utf-8")), *TEXTS]
    for text in texts:
        assert reader.text(text).ids.tolist() == theirs(CASES / name, text), text


def a_folder(tmp_path, **files):
    """A folder of transformers whose tokenizer's files say more."""
    _, folder = huggingface_folder(tmp_path)
    for name, content in files.items():
        path = folder / f"{name}.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**before, **content}))
    return folder


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("where", ["added_tokens_decoder", "special_tokens_map", "added_tokens"])
def test_added_token_in_any_file_gives_ids_of_transformers(where, normalized, tmp_path):
    token = {"content": "W5X", "normalized": normalized, "special": not normalized,
             "single_word": False, "lstrip": False, "rstrip": False}  # fmt: skip
    files = {
        "added_tokens_decoder": {"tokenizer_config": {"added_tokens_decoder": {"100": token}}},
        "special_tokens_map": {"special_tokens_map": {"additional_special_tokens": ["W5X"]}},
        "added_tokens": {"added_tokens": {"W5X": 100}},
    }[where]
    folder = a_folder(tmp_path, **files)
    tokens = (folder / "vocab.txt").read_text().split()[:100]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    converted("--from", "huggingface", folder, "--to", tmp_path / "run")
    reader = load_run(tmp_path / "run").reader
    assert 100 in reader.text("w1 W5X").ids
    if where == "special_tokens_map" and normalized:
        return  # as without: such a token is special
    for text in ("w1 W5X w2", "w1 w5x w2", "w1W5Xw2 [MASK]"):
        assert reader.text(text).ids.tolist() == theirs(folder, text), text


def test_tokenizer_settings_come_back_from_huggingface(tmp_path):
    token = {"content": "[ENT]", "normalized": False, "special": True}
    other = {"content": "covid19", "normalized": True, "special": False}
    folder = a_folder(
        tmp_path,
        tokenizer_config={
            "strip_accents": False,
            "tokenize_chinese_chars": False,
            "model_max_length": 11,
            "added_tokens_decoder": {"99": other, "100": token},
        },
    )
    tokens = (folder / "vocab.txt").read_text().split()[:99]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    converted("--from", "huggingface", folder, "--to", tmp_path / "run")
    converted("--from", tmp_path / "run", "--to", "huggingface", tmp_path / "again")
    converted("--from", "huggingface", tmp_path / "again", "--to", tmp_path / "back")
    one, other = (load_run(tmp_path / name) for name in ("run", "back"))
    assert one.config.data == other.config.data
    data = one.config.data
    assert (data.strip_accents, data.tokenize_chinese_chars, data.max_seq_length) == ("no", False, 11)
    assert (data.added_tokens, data.additional_special_tokens) == (("covid19",), ("[ENT]",))
    assert one.vocab.tokens == other.vocab.tokens
    text = "w1 [ENT] COVID19 的 Café"
    assert one.reader.text(text).ids.tolist() == theirs(tmp_path / "again", text)


@pytest.mark.parametrize(
    "files, message",
    [
        ({"tokenizer_class": "BertJapaneseTokenizer"}, "must be BertTokenizer, got 'BertJapaneseTokenizer'"),
        ({"tokenizer_class": "XLMRobertaTokenizer"}, "must be BertTokenizer, got 'XLMRobertaTokenizer'"),
        ({"word_tokenizer_type": "mecab"}, "word_tokenizer_type 'mecab' is not BERT's way"),
        ({"never_split": ["a"]}, r"never_split must be empty, got \['a'\]"),
        ({"do_basic_tokenize": False}, "do_basic_tokenize must be true"),
        ({"unk_token": "<unk>"}, r"unk_token must be \[UNK\], got '<unk>'"),
        ({"mask_token": {"content": "<mask>"}}, r"mask_token must be \[MASK\], got '<mask>'"),
        ({"do_lower_case": "yes"}, "do_lower_case must be true, false or null, got 'yes'"),
        ({"model_max_length": -1}, "model_max_length must be a whole number above 0, got -1"),
        ({"added_tokens_decoder": {"7": {"content": ""}}}, "an added token must have a text"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "an added token must have a text"),
        ({"added_tokens_decoder": {"7": {"content": "a\ud83d"}}}, "must be valid Unicode"),
    ],
)
def test_tokenizer_config_that_is_not_berts_is_refused(files, message, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(files))
    with pytest.raises(InputError, match=message):
        read_tokenizer_files(tmp_path)


@pytest.mark.parametrize("flag", ["single_word", "lstrip", "rstrip"])
def test_added_token_with_a_flag_is_refused(flag, tmp_path):
    token = {"content": "w5", flag: True}
    folder = a_folder(tmp_path, tokenizer_config={"added_tokens_decoder": {"10": token}})
    with pytest.raises(InputError, match=f"the added token 'w5' must have {flag} false"):
        read_huggingface(folder)


@pytest.mark.parametrize(
    "row, token, message",
    [
        (3, "new", r"row 3 must be 'new', as an added token says, got '\[SEP\]'"),
        (101, "new", "must have at most 101 tokens, a row of the weights each, got 102"),
        (10**12, "new", "must have at most 101 tokens"),
    ],
)
def test_added_token_in_a_wrong_row_is_refused(row, token, message, tmp_path):
    folder = a_folder(tmp_path, added_tokens={token: row})
    with pytest.raises(InputError, match=message):
        read_huggingface(folder)


def change(content, path, value):
    *parts, last = path.split(".")
    for part in parts:
        content = content[part]
    content[last] = value


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
        r"BertNormalizer, got Sequence \(NFC\)"), ("normalizer.clean_text", False,
        "normalizer.clean_text must be true"), ("pre_tokenizer", {"type": "Whitespace"},
        "pre_tokenizer must be BertPreTokenizer, got Whitespace"), ("model.type", "BPE",
        "model.type must be 'WordPiece', got 'BPE'"), ("model.continuing_subword_prefix", "@@",
        "continuing_subword_prefix must be '##', got '@@'"), ("model.max_input_chars_per_word", 7,
        "max_input_chars_per_word must be 100, got 7"), ("model.unk_token", "<unk>",
        r"model.unk_token must be '\[UNK\]', got '<unk>'"), ("post_processor", {"type": "RobertaProcessing"},
        "post_processor must give"),
    ],
)  # fmt: skip
def test_tokenizer_json_that_is_not_berts_is_refused(path, value, message, tmp_path):
    words = {token: i for i, token in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"))}
    tokenizers.BertWordPieceTokenizer(words).save(str(tmp_path / "tokenizer.json"))
    read_tokenizer_files(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    change(content, path, value)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        read_tokenizer_files(tmp_path)


def test_case_of_hangul_vocabulary_is_cased(tmp_path):
    folder = a_folder(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    tokens = (folder / "vocab.txt").read_text().split()[:5]
    tokens += [chr(0xAC00 + 28 * i) for i in range(96)]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", "utf-8")
    found = read_huggingface(folder)
    assert not found.tokenizer["lowercase"]
    assert any("the vocabulary looks cased" in note for note in found.notes)


def test_vocabulary_files_that_differ_are_refused(tmp_path):
    folder = a_folder(tmp_path)
    tokens = (folder / "vocab.txt").read_text().split()
    ids = {token: i for i, token in enumerate([*tokens[:-1], "other"])}
    tokenizers.BertWordPieceTokenizer(ids).save(str(folder / "tokenizer.json"))
    with pytest.raises(InputError, match=r"must agree, got 'w95' and 'other' in row 100"):
        read_huggingface(folder)
