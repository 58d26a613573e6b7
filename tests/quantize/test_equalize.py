"""Rescaled channels leave the function as it is to the last bit and make the ranges of channels more even."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octoc.load.module import from_module
from octoc.model import KINDS, Model
from octoc.quantize.equalize import exponents, pairs, rewrite


class Calls(nn.Module):
    """A network given as a function of its parts and its input."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def uneven(layer: Any, axis: int = 0) -> Any:
    """The layer with output channels of very different magnitudes."""
    factors = torch.logspace(0, 2.5, layer.weight.shape[axis]).flip(0)
    layer.weight.data *= factors.reshape([-1 if i == axis else 1 for i in range(layer.weight.dim())]) / 20
    if layer.bias is not None:
        layer.bias.data *= factors / 20
    return layer


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions": (lambda: nn.Sequential(uneven(nn.Conv2d(3, 8, 3)), nn.ReLU(), nn.Conv2d(8, 4, 3)), (3, 8, 8)),
    "no activation": (lambda: nn.Sequential(uneven(nn.Conv2d(3, 8, 3)), nn.Conv2d(8, 4, 3)), (3, 8, 8)),
    "leaky": (lambda: nn.Sequential(uneven(nn.Conv2d(3, 8, 3)), nn.LeakyReLU(0.1), nn.Conv2d(8, 4, 1)), (3, 8, 8)),
    "no bias": (
        lambda: nn.Sequential(uneven(nn.Conv2d(3, 8, 3, bias=False)), nn.ReLU(), nn.Conv2d(8, 4, 3)),
        (3, 8, 8),
    ),
    "depthwise": (
        lambda: nn.Sequential(
            uneven(nn.Conv2d(3, 8, 1)), nn.ReLU(), uneven(nn.Conv2d(8, 8, 3, groups=8)), nn.ReLU(), nn.Conv2d(8, 4, 1)
        ),
        (3, 8, 8),
    ),
    "several outputs a channel": (
        lambda: nn.Sequential(uneven(nn.Conv2d(3, 8, 1)), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=8)),
        (3, 8, 8),
    ),
    "grouped, then dense": (
        lambda: nn.Sequential(uneven(nn.Conv2d(4, 8, 3, groups=2)), nn.ReLU(), nn.Conv2d(8, 4, 3)),
        (4, 8, 8),
    ),
    "one dimension": (lambda: nn.Sequential(uneven(nn.Conv1d(3, 8, 3)), nn.ReLU(), nn.Conv1d(8, 4, 3)), (3, 9)),
    "linear": (lambda: nn.Sequential(uneven(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 4)), (6,)),
    "linear on tokens": (lambda: nn.Sequential(uneven(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 4)), (5, 6)),
}


def network(name: str) -> tuple[Model, list[tuple[Tensor]]]:
    torch.manual_seed(0)
    module, shape = NETWORKS[name]
    return from_module(module(), [torch.zeros(1, *shape)]), [(torch.randn(8, *shape),) for _ in range(3)]


def peaks(model: Model, batches: list[tuple[Tensor]]) -> dict[str, Tensor]:
    """Largest magnitude of each channel of each layer's result."""
    found: dict[str, Tensor] = {}

    def note(node: Any, value: Any) -> None:
        if node.target in KINDS:
            channel = value.dim() - 1 if KINDS[node.target].name == "linear" else 1
            peak = value.abs().transpose(0, channel).flatten(1).amax(1)
            found[node.name] = torch.maximum(found[node.name], peak) if node.name in found else peak

    for batch in batches:
        model.run(*batch, observe=note)
    return found


def spread(peak: Tensor) -> float:
    """How many times the largest channel is larger than the middle one."""
    return float(peak.max() / peak.median())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_equalised_network_is_the_same_to_the_last_bit(name: str) -> None:
    model, batches = network(name)
    changed = rewrite(model, exponents(model, batches))
    for batch in batches:
        assert torch.equal(model.run(*batch)[0], changed.run(*batch)[0])
    assert [node.name for node in changed.graph.nodes] == [node.name for node in model.graph.nodes]


@pytest.mark.parametrize("name", NETWORKS)
def test_any_powers_leave_the_function_as_it_is(name: str) -> None:
    model, batches = network(name)
    generator = torch.Generator().manual_seed(1)
    powers = {
        pair.first: tuple(torch.randint(-6, 7, (pair.channels,), generator=generator).tolist()) for pair in pairs(model)
    }
    changed = rewrite(model, powers)
    assert any(not torch.equal(tensor, changed.tensors[key]) for key, tensor in model.tensors.items()) or not powers
    assert torch.equal(model.run(*batches[0])[0], changed.run(*batches[0])[0])


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"several outputs a channel"}))
def test_ranges_of_channels_are_more_even_afterwards(name: str) -> None:
    model, batches = network(name)
    powers = exponents(model, batches)
    assert powers
    before, after = peaks(model, batches), peaks(rewrite(model, powers), batches)
    for first in powers:
        assert spread(after[first]) < 0.5 * spread(before[first])


def test_even_channels_are_left_as_they_are() -> None:
    layer = nn.Linear(4, 4, bias=False)
    layer.weight.data = torch.eye(4)
    model = from_module(nn.Sequential(layer, nn.ReLU(), nn.Linear(4, 2)), [torch.zeros(1, 4)])
    assert exponents(model, [(torch.ones(3, 4),)]) == {}
    assert rewrite(model, {}).tensors == model.tensors


def test_a_dead_channel_and_dead_samples_give_finite_powers() -> None:
    model, batches = network("convolutions")
    weight = next(name for name, tensor in model.tensors.items() if tensor.shape == (8, 3, 3, 3))
    model.tensors[weight][3] = 0  # type: ignore[index]
    model.tensors[weight.replace("weight", "bias")][3] = 0  # type: ignore[index]
    for given in (batches, [(torch.zeros(2, 3, 8, 8),)]):
        powers = exponents(model, given)
        assert all(abs(power) <= 32 for channel in powers.values() for power in channel)
        assert torch.equal(model.run(*batches[0])[0], rewrite(model, powers).run(*batches[0])[0])


def test_powers_do_not_depend_on_how_samples_are_cut_into_batches() -> None:
    model, batches = network("depthwise")
    whole = (torch.cat([batch[0] for batch in batches]),)
    assert exponents(model, [whole]) == exponents(model, batches)


def linears(*names: str) -> dict[str, nn.Module]:
    return {name: uneven(nn.Linear(6, 6)) for name in names}


NO_PAIR: dict[str, Callable[[], nn.Module]] = {
    "a residual reads the first layer": lambda: Calls(lambda m, x: (y := m.a(x)) + m.b(F.relu(y)), **linears("a", "b")),
    "a residual reads the activation": lambda: Calls(lambda m, x: (y := F.relu(m.a(x))) + m.b(y), **linears("a", "b")),
    "two layers read it": lambda: Calls(lambda m, x: m.b(y := m.a(x)) + m.c(y), **linears("a", "b", "c")),
    "it is an output": lambda: Calls(lambda m, x: ((y := m.a(x)), m.b(y)), **linears("a", "b")),
    "the second is used twice": lambda: Calls(lambda m, x: m.b(m.b(x + 1)), **linears("b")),
    "the activation does not commute with a factor": lambda: Calls(
        lambda m, x: m.b(F.relu6(m.a(x))), **linears("a", "b")
    ),
    "a smooth activation stands between": lambda: Calls(lambda m, x: m.b(F.gelu(m.a(x))), **linears("a", "b")),
    "something is added between": lambda: Calls(lambda m, x: m.b(m.a(x) + 1), **linears("a", "b")),
}


@pytest.mark.parametrize("name", NO_PAIR)
def test_there_is_no_pair_where(name: str) -> None:
    torch.manual_seed(0)
    model = from_module(NO_PAIR[name](), [torch.zeros(1, 6)])
    assert pairs(model) == []
    assert exponents(model, [(torch.randn(4, 6),)]) == {}


def test_a_grouped_convolution_that_is_not_depthwise_is_no_second_layer() -> None:
    module = nn.Sequential(uneven(nn.Conv2d(3, 8, 1)), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2))
    assert pairs(from_module(module, [torch.zeros(1, 3, 8, 8)])) == []


def test_a_bias_that_two_layers_share_is_not_rescaled_for_both() -> None:
    torch.manual_seed(0)
    a, b, c = uneven(nn.Linear(6, 6)), nn.Linear(6, 6), nn.Linear(6, 6)
    c.bias = a.bias
    model = from_module(Calls(lambda m, x: m.b(F.relu(m.a(x))) + m.c(x), a=a, b=b, c=c), [torch.zeros(1, 6)])
    x = torch.randn(8, 6)
    changed = rewrite(model, exponents(model, [(x,)]))
    torch.testing.assert_close(changed.run(x)[0], model.run(x)[0], rtol=1e-6, atol=1e-6)


def test_a_layer_in_the_middle_of_a_chain_is_second_of_one_pair_and_first_of_the_next() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(*[layer for _ in range(3) for layer in (uneven(nn.Linear(6, 6)), nn.ReLU())])
    model = from_module(module, [torch.zeros(1, 6)])
    found = pairs(model)
    assert [(p.first, p.second) for p in found] == [("linear", "linear_1"), ("linear_1", "linear_2")]
    x = torch.randn(8, 6)
    powers = {pair.first: (3, -2, 1, 0, 5, -4) for pair in found}
    assert torch.equal(rewrite(model, powers).run(x)[0], model.run(x)[0])
