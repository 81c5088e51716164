"""Requests and their replies: good and bad, alone and in batches, without a server."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from gluon_bert.data.vocab import Vocabulary
from gluon_bert.inference.predictor import Predictor
from gluon_bert.model.bert import BERTModel
from gluon_bert.model.pooling import Pooling
from gluon_bert.presets import preset
from gluon_bert.run import Run
from gluon_bert.runtime import mx
from gluon_bert.serving.handler import _replies
from gluon_bert.serving.request_json import MAX_BODY, answer

VOCAB = Vocabulary(["a", "crane", "is", "flying", "driver", "came", "he", "just", "left"])
CRANE, IS = 6, 7
GOOD = b'{"text": "a crane is flying"}'


@pytest.fixture(scope="module")
def predictor():
    config = preset("d2l").replace(
        max_seq_length=12, max_positions=12, units=8, ffn_units=8, num_heads=2, num_layers=1
    )
    net = BERTModel(len(VOCAB), config.model)
    net.initialize(ctx=[mx.cpu()], seed=0)
    net.hybridize()
    return Predictor.of(Run(net, VOCAB, config, step=0))


def asked(predictor, **request):
    """The answer to one good request."""
    ((status, content),) = answer(predictor, [json.dumps(request).encode()])
    assert status == 200, content
    return content


def reason(predictor, body):
    """Why one bad request is refused."""
    ((status, content),) = answer(predictor, [body if isinstance(body, bytes) else json.dumps(body).encode()])
    assert status == 400, content
    assert list(content) == ["error"]
    return content["error"]


def test_request_text_gives_its_vectors(predictor):
    content = asked(predictor, text="A crane is purple")
    (expected,) = predictor.predict([predictor.reader.text("A crane is purple")])
    assert list(content) == ["text", "tokens", "unknown", "truncated", "cls", "mean", "pooled"]
    assert content["text"] == "A crane is purple"
    assert content["tokens"] == ["<cls>", "a", "crane", "is", "purple", "<sep>"]
    assert content["unknown"] == ["purple"]
    for name in ("cls", "mean", "pooled"):
        np.testing.assert_array_equal(np.float32(content[name]), getattr(expected, name))


def test_request_pair_and_ids_give_the_same_vectors(predictor):
    pair = asked(predictor, text="a crane", pair="he left")
    assert (pair["text"], pair["pair"]) == ("a crane", "he left")
    same = asked(predictor, ids=[5, CRANE], pair_ids=[11, 13])
    assert same["tokens"] == pair["tokens"] == ["<cls>", "a", "crane", "<sep>", "he", "left", "<sep>"]
    assert same["mean"] == pair["mean"]
    assert "text" not in same
    assert (
        asked(predictor, ids=[5, CRANE])["mean"] == asked(predictor, text="a crane")["mean"] != pair["mean"]
    )


def test_request_masks_gives_the_likeliest_words(predictor):
    content = asked(predictor, text="a <mask> is <mask>", ask="masks", top=3)
    (expected,) = predictor.predict([predictor.reader.text("a <mask> is <mask>")])
    found = [[(word["token"], word["probability"]) for word in mask] for mask in content["predictions"]]
    assert found == expected.fill_masks(VOCAB, 3)
    assert len(found) == 2
    assert "cls" not in content


def test_request_several_asks_are_answered_together(predictor):
    content = asked(
        predictor, text="a <mask>", pair="he left", ask=["vectors", "masks", "next"], token_vectors=True
    )
    assert {"cls", "predictions", "next_sentence_probability", "token_vectors"} <= set(content)
    assert np.shape(content["token_vectors"]) == (len(content["tokens"]), 8)
    assert 0 < content["next_sentence_probability"] < 1
    assert len(content["predictions"][0]) == 5


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b'{"text": "\xff"}', "not UTF-8 \\(byte 10\\)"),
        ('{"text": "a"}'.encode("utf-16"), "not UTF-8"),
        (b"a crane", "not JSON: Expecting value"),
        (b'{"text": "a"', "not JSON"),
        (b'{"text": "a"} {}', "not JSON: Extra data"),
        (b"[" * 100_000, "brackets"),
        (b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "brackets"),
        (b'{"text": "a", "top": NaN}', "NaN must be a finite number"),
        (b'{"text": "a", "top": -Infinity}', "-Infinity must be a finite number"),
        (b'{"text": "a", "text": "b"}', "'text' is given twice"),
        (b'["a"]', "must be a JSON object"),
        (b"null", "must be a JSON object"),
        ({}, 'either "text" or "ids"'),
        ({"text": "a", "ids": [5]}, 'either "text" or "ids"'),
        ({"txt": "a"}, "'txt' is unknown: a request has text, pair, .* and normalize"),
        ({"text": "a", "\ud800": 1}, r"'\\ud800' is unknown"),
        ({"text": "a", "x" * 9000: 1}, r"'x{40}\.\.\.' is unknown"),
        ({"text": 5}, '"text" must be a string'),
        ({"text": None}, '"text" must be a string'),
        ({"text": "a", "pair": ["b"]}, '"pair" must be a string'),
        ({"text": "a \ud800"}, '"text" has half of a surrogate pair at character 2'),
        ({"text": ""}, "the text must have at least one word"),
        ({"text": "a", "pair": "  "}, "one text of the pair must have at least one word"),
        ({"text": "a " * 11}, "13 tokens .* takes 12"),
        ({"text": "a " * 5, "pair": "a " * 5}, "13 tokens .* takes 12"),
        ({"text": "a", "pair_ids": [5]}, '"pair_ids" with "ids"'),
        ({"ids": [5], "pair": "a"}, '"pair_ids" with "ids"'),
        ({"ids": 5}, '"ids" must be a list of whole numbers'),
        ({"ids": [True]}, '"ids" must be a list of whole numbers'),
        ({"ids": [5.0]}, '"ids" must be a list of whole numbers'),
        ({"ids": [5], "pair_ids": ["6"]}, '"pair_ids" must be a list of whole numbers'),
        ({"ids": []}, "the text must have at least one word"),
        ({"ids": [14]}, "ids must be from 0 to 13, got 14"),
        ({"ids": [-1]}, "ids must be from 0 to 13, got -1"),
        ({"ids": [10**30]}, "ids must be "),
        ({"ids": [Vocabulary.cls]}, "which no text holds"),
        (b'{"ids": [1' + b"0" * 100_000 + b"]}", "ids must be |a number of more digits than can be read"),
        (
            {"text": "a", "ask": "all"},
            '"ask" must be one of "vectors", "masks", "next", "task", "score" and "similarity"',
        ),
        ({"text": "a", "ask": []}, '"ask" must be'),
        ({"text": "a", "ask": [["vectors"]]}, '"ask" must be'),
        ({"text": "a", "ask": {"vectors": 1}}, '"ask" must be'),
        ({"text": "a", "ask": "masks"}, "must have a <mask>"),
        ({"text": "a", "ask": "next"}, "must be a pair"),
        ({"text": "a", "top": 3}, '"top" is for'),
        ({"text": "a <mask>", "ask": "masks", "top": 0}, '"top" must be a whole number from 1 to 1000'),
        ({"text": "a <mask>", "ask": "masks", "top": 1001}, '"top" must be'),
        ({"text": "a <mask>", "ask": "masks", "top": True}, '"top" must be'),
        ({"text": "a", "token_vectors": 1}, '"token_vectors" must be true or false'),
        ({"text": "a", "truncate": "yes"}, '"truncate" must be true or false'),
        ({"text": "a", "normalize": 1}, '"normalize" must be true or false'),
        ({"text": "a", "pooling": "last"}, '"pooling" must be one of "mean", "cls" and "max"'),
        ({"text": "a", "pooling": ["mean"]}, '"pooling" must be one of'),
        ({"text": "a", "ask": "similarity"}, '"ask": "similarity" needs "text" and "pair"'),
        ({"ids": [5], "pair_ids": [6], "ask": "similarity"}, '"ask": "similarity" needs'),
        (b'{"text": "' + b"a" * MAX_BODY + b'"}', "1,048,588 bytes, where 1,048,576 are allowed"),
    ],
)
def test_request_that_is_wrong_is_refused(predictor, body, why):
    found = reason(predictor, body)
    assert re.search(why, found), found
    assert len(found) < 300


def test_request_for_a_missing_output_is_refused(predictor):
    bare = Predictor(lambda texts: predictor.network(texts)._replace(mask_scores=None), predictor.reader)
    assert "outputs for masked words" in reason(bare, {"text": "a <mask>", "ask": "masks"})


def test_request_with_non_finite_vectors_is_refused(predictor):
    broken = Predictor(
        lambda texts: predictor.network(texts)._replace(encoded=np.full((1, 8, 8), np.nan)), predictor.reader
    )
    assert "must return finite numbers" in reason(broken, GOOD)


def test_answer_of_a_batch_runs_the_network_once(predictor):
    calls = []

    def network(texts):
        calls.append(texts.tokens.shape)
        return predictor.network(texts)

    bodies = [GOOD, b"{", b'{"text": "a"}', b'{"text": "he came"}']
    replies = answer(Predictor(network, predictor.reader), bodies)
    assert [status for status, _ in replies] == [200, 400, 200, 200]
    assert calls == [(3, 8)]


def test_request_pooling_gives_the_embedding(predictor):
    (found,) = predictor.predict([predictor.reader.text("a crane is flying")])
    content = asked(predictor, text="a crane is flying", pooling="max", normalize=True)
    expected = found.vectors.max(axis=0)
    np.testing.assert_allclose(content["embedding"], expected / np.linalg.norm(expected), atol=1e-6)
    assert "embedding" not in asked(predictor, text="a crane is flying")
    own = Predictor(predictor.network, predictor.reader, pooling=Pooling("cls"))
    np.testing.assert_allclose(asked(own, text="a crane is flying")["embedding"], found.cls, atol=1e-6)


def test_request_similarity_reads_both_texts_alone(predictor):
    texts = ("a crane is flying", "he left")
    content = asked(predictor, text=texts[0], pair=texts[1], ask="similarity")
    one, other = (each.mean for each in predictor.predict(predictor.reader.text(text) for text in texts))
    expected = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    assert content["similarity"] == pytest.approx(expected, abs=1e-5)
    assert "cls" not in content
    same = asked(predictor, text=texts[0], pair=texts[0], ask=["similarity", "vectors"])
    assert same["similarity"] == pytest.approx(1, abs=1e-6)


def test_request_truncate_cuts_a_long_text(predictor):
    content = asked(predictor, text="a crane " * 20, truncate=True)
    assert (len(content["tokens"]), content["truncated"]) == (12, 30)
    (_, long), (_, short) = answer(predictor, [
        json.dumps({"text": "a crane " * 20, "pair": "he", "truncate": True, "ask": "similarity"}).encode(),
        json.dumps({"text": "a crane " * 5, "pair": "he", "truncate": True, "ask": "similarity"}).encode(),
    ])  # fmt: skip
    assert long["similarity"] == pytest.approx(short["similarity"], abs=1e-5)


@pytest.mark.parametrize("head, ask", [("mlm", "masks"), ("nsp", "next"), ("mlm", "score")])
def test_request_for_an_untrained_head_is_refused(head, ask, predictor):
    marked = Predictor(predictor.network, predictor.reader, untrained=(head,))
    text = "a crane" if ask == "score" else "a <mask>"
    why = reason(marked, {"text": text, "pair": "he left", "ask": ask})
    assert "must be trained first" in why


BODIES = st.one_of(
    st.binary(max_size=40),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    ).map(lambda value: json.dumps(value).encode()),
    st.fixed_dictionaries(
        {"text": st.text(st.sampled_from("a crane <mask>\x00\u0301\ud83d"), max_size=12)},
        optional={
            "pair": st.text(max_size=8),
            "ask": st.sampled_from(["vectors", "masks", "next", "none", ["masks", "next"]]),
            "top": st.integers(-1, 3),
            "token_vectors": st.booleans(),
        },
    ).map(lambda value: json.dumps(value).encode()),
    st.fixed_dictionaries({"ids": st.lists(st.integers(-1, 15), max_size=4)}).map(
        lambda value: json.dumps(value).encode()
    ),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(BODIES, max_size=4), st.integers(0, 4))
def test_answer_with_any_bytes_keeps_the_neighbours(predictor, bodies, place):
    (alone,) = answer(predictor, [GOOD])
    bodies.insert(place, GOOD)
    replies = answer(predictor, bodies)
    assert len(replies) == len(bodies)
    for status, content in replies:
        assert status in (200, 400)
        json.dumps(content, allow_nan=False).encode("utf-8")
        assert status == 200 or content["error"]
    status, mine = replies[min(place, len(bodies) - 1)]
    assert status == 200
    np.testing.assert_allclose(mine["mean"], alone[1]["mean"], atol=1e-6)


class TestHandler:
    """The handler with a batch as the server gives it; loading is tested in test_serving."""

    def test_handler_without_requests_answers_nothing(self, predictor):
        assert _replies(predictor, []) == []

    def test_handler_form_is_refused_alone(self, predictor):
        form = {'{"text": "a"}': b""}
        (first, why), (second, _) = _replies(predictor, [form, {"body": bytearray(GOOD)}])
        assert (first, second) == (400, 200)
        assert "Content-Type: application/json" in why["error"]

    def test_handler_failing_network_is_logged(self, predictor, caplog):
        def network(texts):
            raise MemoryError("no room")

        broken = Predictor(network, predictor.reader)
        (first, why), (second, _) = _replies(broken, [{"body": GOOD}, {}])
        assert (first, second) == (500, 400)
        assert "log" in why["error"]
        assert "no room" in caplog.text


def test_handler_imports_no_server():
    code = "import sys, gluon_bert.serving.handler; sys.exit('mms' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
