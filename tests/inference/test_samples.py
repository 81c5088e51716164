"""Masked sentences of the validation text: their choice, and a network's guesses."""

import numpy as np
import pytest

from gluon_bert.data.document_arrays import Documents
from gluon_bert.data.vocab import Vocabulary
from gluon_bert.inference.samples import (
    SKIPPED_WORDS,
    MaskedSentence,
    best_words,
    format_samples,
    markdown_samples,
    masked_sentences,
)
from gluon_bert.model.bert import BERTModel
from gluon_bert.presets import preset
from gluon_bert.runtime import mx

VOCAB = Vocabulary([f"word{i}" for i in range(200)])


@pytest.fixture(scope="module")
def text():
    """Return 300 sentences of 3 to 20 words, some of which are unknown."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(3, 21, 300)
    tokens = rng.choice([VOCAB.unk, *VOCAB.ordinary_ids], sizes.sum()).astype(np.uint16)
    sentences = np.concatenate([[0], np.cumsum(sizes)])
    return Documents(tokens, sentences, np.array([0, 300]))


def test_sentences_are_whole_known_and_have_one_mask(text):
    sentences = masked_sentences(text, VOCAB, count=20)
    originals = {
        tuple(text.tokens[a:b].tolist()) for a, b in zip(text.sentences.tolist(), text.sentences[1:].tolist())
    }
    assert len(sentences) == 20
    for each in sentences:
        assert each.ids[each.position] == VOCAB.mask and (each.ids == VOCAB.mask).sum() == 1
        restored = each.ids.copy()
        restored[each.position] = each.answer
        assert restored[0] == VOCAB.cls and restored[-1] == VOCAB.sep
        assert tuple(restored[1:-1].tolist()) in originals and VOCAB.unk not in restored
        assert each.answer >= VOCAB.ordinary_ids[SKIPPED_WORDS]
    assert len({each.answer for each in sentences}) == 20


def test_a_seed_repeats_its_sentences_another_does_not(text):
    first, again, other = (masked_sentences(text, VOCAB, seed=seed) for seed in (1, 1, 2))
    assert [each.ids.tolist() for each in first] == [each.ids.tolist() for each in again]
    assert [each.ids.tolist() for each in first] != [each.ids.tolist() for each in other]


def test_sentences_longer_than_the_network_are_left_out(text):
    assert max(len(each.ids) for each in masked_sentences(text, VOCAB, 50, max_seq_length=8)) <= 8


def test_best_words_are_those_of_each_sentence_alone(text):
    net = BERTModel(len(VOCAB), preset("d2l").model)
    net.initialize(ctx=mx.cpu())
    net.hybridize()
    sentences = masked_sentences(text, VOCAB)
    together = best_words(net, VOCAB, sentences, mx.cpu())
    assert together == [best_words(net, VOCAB, [each], mx.cpu())[0] for each in sentences]
    assert all(len(set(words)) == 3 and not VOCAB.special[words].any() for words in together)


def test_the_table_marks_the_right_word(text):
    (sentence,) = masked_sentences(text, VOCAB, count=1)
    answer, other = sentence.answer, int(VOCAB.ordinary_ids[0])
    shown = format_samples(VOCAB, [sentence], [[other]], [[answer, other]])
    assert f"{VOCAB.tokens[answer]}: before word0; after [{VOCAB.tokens[answer]}] word0" in shown
    assert shown.splitlines()[1].split()[sentence.position - 1] == "____"
    assert shown.endswith("the right word is among the three: before in 0 of 1, after in 1")


def test_markdown_samples_escape_words_and_mark_the_right():
    vocab = Vocabulary(["in", "*star*", "a|b", "fog"])
    star, bar, fog = vocab.to_indices(["*star*", "a|b", "fog"])
    sentence = MaskedSentence(np.array([vocab.cls, star, vocab.mask, bar, vocab.sep]), 2, fog)
    assert markdown_samples(vocab, [sentence], [[star, fog]]).splitlines()[2:] == [
        r"| \*star\* \_\_\_\_ a\|b | fog | \*star\* **fog** |"
    ]
