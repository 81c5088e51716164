"""Texts to vectors, masked words and next-sentence probabilities. Trains nothing, reads no files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Iterable, Iterator, NamedTuple, Protocol, Sequence

import numpy as np

from ..data.tokenizer import EncodedText, PaddedBatch, Tokenizer, bucket_by_length, chunks, pad
from ..data.vocab import Vocabulary
from ..errors import InputError
from ..model.classifier import task_of
from ..model.head_names import check_trained
from ..model.pooling import Pooling
from ..model.task import Task
from ..runtime import mx

# Tokens per batch, with padding: enough for a CPU's matrix products at full speed.
BATCH_TOKENS = 4096
# Maximum number of masks per batch: each has a score for every word of the vocabulary.
BATCH_MASKS = 256
# Tokens to read ahead and sort by length: with 16 batches a few percent are padding.
CHUNK_TOKENS = 16 * BATCH_TOKENS

_TASK = "its task"
NOT_FINE_TUNED = "the network was pretrained, not fine-tuned: it knows no labels and no scores"


class Outputs(NamedTuple):
    """The outputs of a network for padded texts, float32 on the host.

    encoded (B, T, C); pooled (B, C); mask_scores (M, V) for the M masks; next_scores (B, 2) for "does not
    follow" and "follows"; task_scores (B, K) of a fine-tuned network, or token_scores (B, T, K). None: an
    output that the network or the export does not have.
    """

    encoded: np.ndarray
    pooled: np.ndarray | None = None
    mask_scores: np.ndarray | None = None
    next_scores: np.ndarray | None = None
    task_scores: np.ndarray | None = None
    token_scores: np.ndarray | None = None


class Backend(Protocol):
    """Computes the outputs: the Gluon network itself, or an export."""

    def __call__(self, texts: PaddedBatch) -> Outputs:
        """Return the outputs for a padded batch."""


class GluonNetwork:
    """A BERTModel or a BERTForTask as a Network, on its first context, with dropout off."""

    def __init__(self, net: Any) -> None:
        self.net = net
        self._context = net.encoder.embeddings.tokens.weight.list_ctx()[0]

    def __call__(self, texts: PaddedBatch) -> Outputs:
        """Return the outputs on the host."""
        encoded = self.net.encoder(*map(self._load, (texts.tokens, texts.token_types, texts.valid_length)))
        task = task_of(self.net)
        if task and task.scores_tokens:
            return Outputs(encoded.asnumpy(), token_scores=self.net.scores(encoded).asnumpy())
        pooled = self.net.pooler(encoded)
        if task:
            task_scores = self.net.head(pooled).asnumpy()
            return Outputs(encoded.asnumpy(), pooled.asnumpy(), task_scores=task_scores)
        mask_scores = None
        if texts.masked_positions.size:
            mask_scores = self.net.mlm(encoded, self._load(texts.masked_positions)).asnumpy()
        return Outputs(encoded.asnumpy(), pooled.asnumpy(), mask_scores, self.net.nsp(pooled).asnumpy())

    def _load(self, array: np.ndarray) -> Any:
        return mx.nd.array(array, ctx=self._context, dtype=np.float32)


@dataclass(frozen=True)
class Prediction:
    """The prediction for one text of T tokens.

    vectors: (T, C), one per token, with <cls> and <sep>. pooled: (C,). mask_scores: (K, V) for its K masks.
    next_scores: (2,). task_scores: (K,), or token_scores: (T, K), as `task` describes. All float32. None: the
    network or the export does not have it.
    """

    text: EncodedText
    vectors: np.ndarray
    pooled: np.ndarray | None
    mask_scores: np.ndarray | None
    next_scores: np.ndarray | None
    task_scores: np.ndarray | None = None
    token_scores: np.ndarray | None = None
    task: Task | None = None
    untrained: tuple[str, ...] = ()
    pooling: Pooling | None = None

    @property
    def embedding(self) -> np.ndarray | None:
        """Return the one vector of the text, (C,); None without a pooling."""
        return None if self.pooling is None else self.pooling(self.vectors)

    @property
    def cls(self) -> np.ndarray:
        """Return the vector of <cls>, (C,)."""
        return self.vectors[0]

    @property
    def mean(self) -> np.ndarray:
        """Return the mean of all T vectors, (C,)."""
        return self.vectors.mean(axis=0)

    @property
    def max(self) -> np.ndarray:
        """Return the largest value of each column over all T vectors, (C,)."""
        return self.vectors.max(axis=0)

    def fill_masks(self, vocab: Vocabulary, top: int = 5) -> list[list[tuple[str, float]]]:
        """Return the likeliest tokens of each <mask> with their probabilities."""
        if not len(self.text.masks):
            raise InputError("the text must have a <mask>. Put one in place of a word.")
        check_trained(self.untrained, "mlm")
        return [_likeliest(vocab, row, top) for row in softmax(self._given(self.mask_scores, "masked words"))]

    def mask_log_probabilities(self) -> np.ndarray:
        """Return the log-probabilities of all tokens for each <mask>, (K, V) float64."""
        check_trained(self.untrained, "mlm")
        scores = self._given(self.mask_scores, "masked words").astype(np.float64)
        scores = scores - scores.max(axis=-1, keepdims=True)
        return scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))

    @property
    def next_sentence_probability(self) -> float:
        """Return the probability that the second text follows the first."""
        if not self.text.is_pair:
            raise InputError("the text must be a pair to score the next sentence, got a single text.")
        check_trained(self.untrained, "nsp", "pooler")
        return float(softmax(self._given(self.next_scores, "the next sentence"))[1])

    @property
    def task_prediction(self) -> dict[str, Any]:
        """Return the prediction of a fine-tuned network: {"label", "probabilities"} or {"score"}."""
        if self.task is None:
            raise InputError(NOT_FINE_TUNED)
        if self.task.scores_tokens:
            raise InputError(f"the network was fine-tuned for {self.task.kind}. Use Run.predict.")
        if self.task.pairs is not None and self.text.is_pair != self.task.pairs:
            wanted = "pairs of texts: give two" if self.task.pairs else "single texts: give one"
            raise InputError(f"the network was fine-tuned on {wanted}")
        scores = self._given(self.task_scores, _TASK)
        if self.task.kind == "regression":
            return {"score": float(scores[0])}
        probabilities = dict(zip(self.task.labels, softmax(scores.astype(np.float64)).tolist()))
        return {"label": self.task.labels[int(scores.argmax())], "probabilities": probabilities}

    def scores_of_tokens(self) -> np.ndarray:
        """Return the task's scores of the tokens, (T, K) float64."""
        return self._given(self.token_scores, _TASK).astype(np.float64)

    def _given(self, scores: np.ndarray | None, what: str) -> np.ndarray:
        if scores is None and self.task and what != _TASK:
            raise InputError(f"the network must have a head for {what}. Use the run before fine-tuning.")
        if scores is None:
            raise InputError(f"the export must have outputs for {what}. Export again with outputs=all.")
        return scores


class Predictor:
    """Computes predictions for texts in batches of similar length.

    >>> run = gb.load_run("runs/d2l-1")                                         # doctest: +SKIP
    >>> predictor = Predictor.of(run)
    >>> for answer in predictor.predict([predictor.reader.text("the <mask> is flying")]):
    ...     print(answer.mean, answer.fill_masks(run.vocab))
    """

    def __init__(
        self,
        network: Backend,
        reader: Tokenizer,
        task: Task | None = None,
        untrained: Sequence[str] = (),
        pooling: Pooling | None = None,
    ) -> None:
        self.network, self.reader, self.task = network, reader, task
        self.untrained, self.pooling = tuple(untrained), pooling

    @classmethod
    def of(cls, run: Any) -> Predictor:
        """Return a predictor for a run of `load_run`."""
        return cls(GluonNetwork(run.net), run.reader, run.task, run.untrained, run.pooling)

    def predict(self, texts: Iterable[EncodedText]) -> Iterator[Prediction]:
        """Yield a prediction for each text, in order. Reads at most one chunk ahead."""
        for chunk in chunks(texts, CHUNK_TOKENS, 2 * BATCH_MASKS):
            answers: dict[int, Prediction] = {}
            for members in bucket_by_length(chunk, BATCH_TOKENS, BATCH_MASKS):
                answers.update(zip(members, self._predict_batch([chunk[i] for i in members])))
            for i in range(len(chunk)):
                yield answers.pop(i)

    def _predict_batch(self, texts: list[EncodedText]) -> Iterator[Prediction]:
        batch = pad(texts, self.reader.max_seq_length)
        encoded, pooled, mask_scores, next_scores, task_scores, token_scores = self.network(batch)
        for row, text in enumerate(texts):
            mine = batch.masked_positions[0] == row
            yield Prediction(
                text,
                encoded[row, : len(text)],
                None if pooled is None or "pooler" in self.untrained else pooled[row],
                None if mask_scores is None else mask_scores[mine],
                None if next_scores is None else next_scores[row],
                None if task_scores is None else task_scores[row],
                None if token_scores is None else token_scores[row, : len(text)],
                self.task,
                self.untrained,
                self.pooling,
            )


def softmax(scores: np.ndarray) -> np.ndarray:
    """Return the probabilities of scores, along the last axis."""
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _likeliest(vocab: Vocabulary, probabilities: np.ndarray, top: int) -> list[tuple[str, float]]:
    best = np.argsort(-probabilities, kind="stable")[:top]
    return list(zip(vocab.to_tokens(best), probabilities[best].tolist()))
