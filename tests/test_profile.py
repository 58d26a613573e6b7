"""Sensitivities are what changing the weights and evaluating the whole network says they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from octoc.graph import fold_batch_norm
from octoc.load.module import from_module
from octoc.model import Model
from octoc.profile import DRAWS, NOISE, divergence, measure


class Branches(nn.Module):
    """Convolutions, a residual, batch norm, an activation that works in place, and a weight that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.twice = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x)))
        y = x + self.twice(F.relu(self.twice(x)))
        return self.head(y.mean((2, 3)))


class Tied(nn.Module):
    """An embedding whose weight is the last layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.inner = nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.inner(self.embedding(tokens))), self.embedding.weight)


def branches() -> tuple[Model, list[Tensor]]:
    torch.manual_seed(0)
    return fold_batch_norm(from_module(Branches(), [torch.zeros(1, 3, 6, 6)])), [torch.randn(8, 3, 6, 6)]


def tied() -> tuple[Model, list[Tensor]]:
    torch.manual_seed(0)
    return from_module(Tied(), [torch.zeros(1, 4, dtype=torch.int64)]), [torch.randint(0, 11, (8, 4))]


def whole(model: Model, inputs: Sequence[Tensor], classes: bool, seed: int) -> dict[str, float]:
    """The same measure, every evaluation from the inputs on."""
    generator = torch.Generator().manual_seed(seed)
    original = model.run(*inputs)
    found = {}
    for layer in model.layers():
        weight, total = model.tensors[layer.name], 0.0
        for _ in range(DRAWS):
            noise = torch.randn(weight.shape, generator=generator)
            noise *= NOISE * weight.norm() / noise.norm()
            total += divergence(original, model.with_tensors({layer.name: weight + noise}).run(*inputs), classes)
        found[layer.name] = total / DRAWS / NOISE**2
    return found


@pytest.mark.parametrize("classes", [True, False])
@pytest.mark.parametrize("network", [branches, tied])
def test_evaluating_only_what_depends_on_a_weight_equals_evaluating_everything(
    network: Callable[[], tuple[Model, list[Tensor]]], classes: bool
) -> None:
    model, inputs = network()
    profile = measure(model, inputs, classes, seed=5)
    assert profile.sensitivity == whole(model, inputs, classes, seed=5)
    assert profile.divergence == ("kl" if classes else "relative")
    assert profile.samples == 8
    assert all(value > 0 for value in profile.sensitivity.values())


def test_a_linear_network_has_the_sensitivity_that_algebra_gives() -> None:
    """Noise spread evenly over W [out, in] puts |noise|^2 |X|^2 / in into the outputs X W^T."""
    torch.manual_seed(1)
    model = from_module(nn.Linear(96, 80, bias=False), [torch.zeros(1, 96)])
    x = torch.randn(256, 96) * torch.linspace(0.2, 3, 96)
    (weight,) = model.tensors.values()
    expected = float(weight.square().sum() * x.square().sum() / 96 / (x @ weight.T).square().sum())
    found = [next(iter(measure(model, [x], False, seed).sensitivity.values())) for seed in range(8)]
    spread = np.std(found) / math.sqrt(len(found))
    assert np.mean(found) == pytest.approx(expected, abs=max(4 * spread, 0.005 * expected))
    assert found == pytest.approx([expected] * 8, rel=0.3)


def test_in_a_chain_of_orthogonal_layers_every_layer_counts_alike() -> None:
    """An error of relative size r in one of them is an error of relative size r in the outputs."""
    torch.manual_seed(2)
    layers = [nn.Linear(64, 64, bias=False) for _ in range(3)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight)
    model = from_module(nn.Sequential(*layers), [torch.zeros(1, 64)])
    profile = measure(model, [torch.randn(128, 64)], False, seed=0)
    assert list(profile.sensitivity.values()) == pytest.approx([1.0] * 3, rel=0.1)


def test_the_measure_is_quadratic_in_the_size_of_an_error() -> None:
    """A smaller error of another kind costs what its squared relative size times the sensitivity says."""
    model, inputs = branches()
    profile = measure(model, inputs, True, seed=0)
    original = model.run(*inputs)
    generator = torch.Generator().manual_seed(9)
    for name, sensitivity in profile.sensitivity.items():
        weight = model.tensors[name]
        costs = []
        for _ in range(8):
            noise = torch.rand(weight.shape, generator=generator) - 0.5
            noise *= 0.03 * weight.norm() / noise.norm()
            costs.append(divergence(original, model.run(*inputs, overrides={name: weight + noise}), True) / 0.03**2)
        assert sensitivity == pytest.approx(float(np.mean(costs)), rel=1.0)


def test_a_weight_that_several_operations_share_is_measured_once_with_all_its_uses() -> None:
    model, inputs = tied()
    profile = measure(model, inputs, True, seed=0)
    assert len(profile.sensitivity) == len(profile.layers) == 2
    shared = next(layer for layer in profile.layers if len(layer.nodes) == 2)
    assert shared.kind == "shared"
    assert profile.sensitivity[shared.name] > 0


def test_the_same_seed_gives_the_same_numbers_and_another_gives_others() -> None:
    model, inputs = branches()
    first, again, other = (measure(model, inputs, True, seed).sensitivity for seed in (3, 3, 4))
    assert first == again
    assert all(first[name] != other[name] for name in first)


def test_measuring_changes_neither_the_network_nor_its_weights() -> None:
    model, inputs = branches()
    before = {name: tensor.clone() for name, tensor in model.tensors.items()}
    outputs = model.run(*inputs)[0]
    measure(model, inputs, True, seed=0)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.tensors.items())
    assert torch.equal(model.run(*inputs)[0], outputs)


def test_each_layer_is_told_once() -> None:
    model, inputs = branches()
    told: list[int] = []
    profile = measure(model, inputs, True, 0, lambda: told.append(1))
    assert len(told) == len(profile.layers) == len(model.layers())


def test_a_weight_of_zeros_costs_nothing() -> None:
    linear = nn.Linear(4, 3)
    nn.init.zeros_(linear.weight)
    model = from_module(linear, [torch.zeros(1, 4)])
    assert list(measure(model, [torch.randn(5, 4)], False, 0).sensitivity.values()) == [0.0]


values = st.floats(-20, 20, width=32)
tables = st.integers(1, 4).flatmap(
    lambda n: st.tuples(*[st.lists(st.lists(values, min_size=3, max_size=3), min_size=n, max_size=n)] * 2)
)


@given(tables, st.booleans())
def test_a_divergence_is_never_negative_and_zero_for_equals(tables: Any, classes: bool) -> None:
    a, b = (torch.tensor(table) for table in tables)
    assert divergence([a], [b], classes) >= 0
    assert divergence([a], [a], classes) == 0
    assert divergence([a, a], [a, b], classes) == divergence([a], [b], classes)


@given(tables)
def test_the_divergences_are_kl_of_the_softmax_and_relative_squared_error(tables: Any) -> None:
    a, b = (np.array(table, np.float64) for table in tables)
    p, q = (np.exp(t) / np.exp(t).sum(1, keepdims=True) for t in (a, b))
    kl = float((p * np.log(p / q)).sum(1).mean())
    first, second = torch.from_numpy(a), torch.from_numpy(b)
    assert divergence([first], [second], True) == pytest.approx(kl, abs=1e-9)
    if np.abs(a).max() > 1e-9:
        assert divergence([first], [second], False) == pytest.approx(((a - b) ** 2).sum() / (a**2).sum(), rel=1e-9)


def test_outputs_that_are_masked_with_minus_infinity_in_both_are_equal() -> None:
    masked = torch.tensor([[1.0, -torch.inf, 2.0]])
    moved = torch.tensor([[1.5, -torch.inf, 2.0]])
    for classes in (True, False):
        assert divergence([masked], [masked], classes) == 0
        assert math.isfinite(divergence([masked], [moved], classes))
        assert divergence([masked], [moved], classes) > 0


def test_whole_numbers_among_the_outputs_are_left_out() -> None:
    assert divergence([torch.tensor([1, 2])], [torch.tensor([3, 4])], True) == 0
