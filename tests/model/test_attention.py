"""Self-attention over padded rows: padding has no weight and gets no gradient."""

import numpy as np
import pytest
from support import reference_bert as reference

from gluon_bert.config import ModelConfig
from gluon_bert.model.attention import SelfAttention, padding_scores
from gluon_bert.runtime import mx


@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_attention_to_padding_is_exactly_zero(num_heads):
    lengths = np.array([3, 8, 5])
    scores = padding_scores(mx.nd, mx.nd.zeros((3, 8)), mx.nd.array(lengths), num_heads)
    real = np.repeat(np.arange(8) < lengths[:, None], num_heads, axis=0)  # (B * H, T)
    # Scores of any size that training reaches, and the same ones everywhere.
    for size in (0, 100):
        x = mx.nd.random.normal(0, size, scores.shape) if size else mx.nd.zeros(scores.shape)
        weights = mx.nd.softmax(x + scores, axis=-1).asnumpy()
        hidden = np.broadcast_to(~real[:, None, :], weights.shape)
        assert (weights[hidden] == 0).all()
        np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
        alone = np.exp(reference.log_softmax(x.asnumpy()[0, :, : lengths[0]].astype(np.float64)))
        np.testing.assert_allclose(weights[0, :, : lengths[0]], alone, rtol=1e-5, atol=1e-5)


def test_padding_gets_no_gradient_from_real_positions():
    lengths = np.array([3, 8, 5])
    attend = SelfAttention(ModelConfig(units=8, num_heads=2, dropout=0.0))
    attend.initialize(mx.init.Normal(1))
    x = mx.nd.random.normal(shape=(3, 8, 8))
    x.attach_grad()
    real = (np.arange(8) < lengths[:, None])[:, :, None]
    with mx.autograd.record():
        padding = padding_scores(mx.nd, mx.nd.zeros((3, 8)), mx.nd.array(lengths), 2)
        loss = (attend(x, padding) ** 2 * mx.nd.array(real)).sum()
    loss.backward()
    moved = np.abs(x.grad.asnumpy()).max(axis=-1, keepdims=True) > 0
    np.testing.assert_array_equal(moved, real)
