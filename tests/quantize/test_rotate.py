"""Rotation: orthogonal, without effect on the network, shared by readers and folded into the layer before."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from octoc.errors import UsageError
from octoc.load import load_model
from octoc.model import aten
from octoc.quantize.rotate import hadamard, rewrite, rotatable, rotation


class Branches(nn.Module):
    """Two layers read one value, and a chain of two has nothing between them."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(width, 7), nn.Linear(width, 16, bias=False)
        self.wide, self.narrow = nn.Linear(16, 24), nn.Linear(24, 5)
        self.odd = nn.Linear(7, 5)

    def forward(self, x):
        return self.odd(F.relu(self.left(x))) + self.narrow(self.wide(F.silu(self.right(x))))


def loaded(network, *shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    return load_model(network.eval(), examples=(x,)), x


@pytest.mark.parametrize("size", [1, 2, 4, 16, 64])
def test_hadamard_matrices_are_orthogonal_of_entries_of_one_size(size):
    matrix = hadamard(size)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5))


@given(width=st.integers(1, 200), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_a_rotation_is_the_kronecker_product_of_its_factors_and_orthogonal(width, seed):
    turn = rotation(width, seed)
    power = len(turn.first) * len(turn.second)
    assert power == width & -width
    assert len(turn.first) in (len(turn.second), 2 * len(turn.second))
    whole = np.kron(np.kron(turn.first.numpy(), turn.second.numpy()), np.eye(width // power))
    np.testing.assert_allclose(whole @ whole.T, np.eye(width), atol=1e-12)
    values = torch.from_numpy(np.random.default_rng(seed).standard_normal((2, 3, width)))
    np.testing.assert_allclose(turn(values).numpy(), values.numpy() @ whole.T, atol=1e-10)


def test_seeds_change_signs_and_the_same_seed_does_not():
    assert torch.equal(rotation(64, 3).first, rotation(64, 3).first)
    assert not torch.equal(rotation(64, 3).first, rotation(64, 4).first)


@pytest.mark.parametrize("shape", [(3, 12), (3, 5, 12), (2, 4, 5, 12)])
def test_the_network_computes_the_same_after_rotation(shape):
    model, x = loaded(Branches(), *shape)
    turned = rewrite(model, rotatable(model), seed=1)
    for batch in (x, torch.cat([x, x])):
        assert torch.allclose(turned.run(batch)[0], model.run(batch)[0], atol=1e-5)
    assert not torch.equal(turned.tensors["left.weight"], model.tensors["left.weight"])


def test_readers_of_one_value_share_its_rotation_and_a_chain_needs_none():
    model, _ = loaded(Branches(), 3, 12)
    assert rotatable(model) == ("left.weight", "right.weight", "wide.weight", "narrow.weight")
    turned = rewrite(model, rotatable(model))
    products = [node for node in turned.graph.nodes if node.target is aten.matmul.default]
    assert len(products) == 4  # two for the input, two for what `wide` reads
    assert not torch.equal(turned.tensors["wide.bias"], model.tensors["wide.bias"])
    assert {layer.name for layer in turned.layers()} == {layer.name for layer in model.layers()}
    turned.graph.lint()


def test_a_layer_with_other_readers_is_not_folded_into():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            y = self.first(x)
            return y + self.second(y)

    model, x = loaded(Shared(), 4, 8)
    turned = rewrite(model, ["second.weight"])
    assert torch.equal(turned.tensors["first.weight"], model.tensors["first.weight"])
    assert torch.allclose(turned.run(x)[0], model.run(x)[0], atol=1e-5)


def test_an_outlier_is_spread_over_its_block():
    model, x = loaded(nn.Sequential(nn.Linear(64, 4)), 2, 64)
    spiked = model.with_tensors({"0.weight": torch.zeros(4, 64).index_fill(1, torch.tensor(5), 8.0)})
    turned = rewrite(spiked, ["0.weight"])
    assert torch.allclose(turned.tensors["0.weight"].abs(), torch.ones(4, 64), atol=1e-6)
    assert torch.allclose(turned.run(x)[0], spiked.run(x)[0], atol=1e-5)


def test_what_cannot_be_rotated_is_refused_by_name():
    model, _ = loaded(Branches(), 3, 12)
    with pytest.raises(UsageError, match="odd"):
        rewrite(model, ["left.weight", "odd.weight"])
