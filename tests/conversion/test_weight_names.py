"""The tables of names are one to one, there and back."""

from __future__ import annotations

import pytest
from support.conversion import (
    LAYOUTS,
    assert_bits,
    configured,
    randomised,
)

from gluon_bert.conversion.converter import network, to_foreign_names, to_own_names
from gluon_bert.model.parameters import weights_of


@pytest.mark.parametrize("name", LAYOUTS)
def test_weight_names_to_foreign_and_back_are_equal(name):
    like = "d2l" if name == "d2l" else "bert-tiny"
    net = randomised(configured("small", like))
    arrays = to_foreign_names(weights_of(net), LAYOUTS[name])
    assert len(arrays) == len(weights_of(net))
    back, untrained = to_own_names(arrays, LAYOUTS[name], net.vocab_size, net.config, "here")
    assert untrained == ()
    assert_bits(net, network(back, net.vocab_size, net.config))
