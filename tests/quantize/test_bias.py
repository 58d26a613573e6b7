"""After bias correction every layer's channels have the means they have in floats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octoc.graph import bias_of, fold_batch_norm
from octoc.load.module import from_module
from octoc.model import KINDS, Model
from octoc.quantize.activations import Range, calibrate
from octoc.quantize.activations import rewrite as quantize
from octoc.quantize.bias import channel_means, corrections, rewrite


class Net(nn.Module):
    """Convolutions of every kind that has a bias, a residual, and linear layers on vectors and on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.deep = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.tokens = nn.Linear(4, 7)
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        x = F.relu(self.up(x + self.deep(x)))
        x = torch.tanh(self.tokens(x.flatten(2).transpose(1, 2)))
        return self.head(x.mean(1))


def coarse(model: Model) -> Model:
    """Weights as 3 bits leave them, always rounded down, which moves the means."""
    changed = {}
    for layer in model.layers():
        weight = model.tensors[layer.name]
        step = weight.abs().max() / 4
        changed[layer.name] = torch.floor(weight / step) * step
    return model.with_tensors(changed)


@pytest.fixture(scope="module")
def case() -> tuple[Model, Tensor]:
    torch.manual_seed(0)
    model = fold_batch_norm(from_module(Net(), [torch.zeros(1, 3, 6, 6)]))
    return model, torch.randn(16, 3, 6, 6)


def naive_means(model: Model, x: Tensor) -> dict[str, np.ndarray]:
    """Mean over samples and places of each channel, with numpy, channel by channel."""
    found: dict[str, np.ndarray] = {}

    def note(node: Any, value: Any) -> None:
        if node.target in KINDS and bias_of(node) is not None:
            array = value.double().numpy()
            axis = array.ndim - 1 if KINDS[node.target].name == "linear" else 1
            found[node.name] = np.array([array.take(c, axis).mean() for c in range(array.shape[axis])])

    model.run(x, observe=note)
    return found


def assert_corrected(reference: Model, small: Model, x: Tensor, atol: float = 1e-4) -> None:
    wanted, before = naive_means(reference, x), naive_means(small, x)
    shifts = corrections(channel_means(reference, [[x]]), small, [[x]])
    after = naive_means(rewrite(small, {name: tuple(map(float, s)) for name, s in shifts.items()}), x)
    assert wanted.keys() == after.keys()
    assert any(np.abs(before[name] - wanted[name]).max() > 10 * atol for name in wanted)
    for name in wanted:
        np.testing.assert_allclose(after[name], wanted[name], atol=atol)


def test_the_means_are_those_that_numpy_gives(case: tuple[Model, Tensor]) -> None:
    model, x = case
    means, naive = channel_means(model, [[x]]), naive_means(model, x)
    assert means.keys() == naive.keys()
    assert len(means) == 5
    for name, mean in means.items():
        np.testing.assert_allclose(mean.numpy(), naive[name], rtol=1e-9, atol=1e-9)


def test_with_coarse_weights_every_layer_has_the_float_means_after_correction(case: tuple[Model, Tensor]) -> None:
    model, x = case
    assert_corrected(model, coarse(model), x)


def test_with_int8_activations_every_layer_has_the_float_means_after_correction(case: tuple[Model, Tensor]) -> None:
    """A value on the edge of two codes may fall either way once biases are floats again, hence the tolerance."""
    model, x = case
    ranges = calibrate(model, [(x,)], steps=10)
    wide = {name: Range(found.scale * 4, found.zero_point // 4) for name, found in ranges.items()}
    assert_corrected(model, quantize(coarse(model), wide), x, atol=2e-3)


def test_the_samples_of_several_calls_count_as_those_of_one(case: tuple[Model, Tensor]) -> None:
    model, x = case
    small, means = coarse(model), channel_means(model, [[x]])
    for name, mean in channel_means(model, [[part] for part in x.split(4)]).items():
        torch.testing.assert_close(mean, means[name])
    whole, parts = (corrections(means, small, calls) for calls in ([[x]], [[part] for part in x.split(4)]))
    assert whole.keys() == parts.keys()
    for name, shift in whole.items():
        np.testing.assert_allclose(parts[name], shift, atol=1e-5)


def test_a_network_that_is_not_compressed_needs_no_correction(case: tuple[Model, Tensor]) -> None:
    model, x = case
    shifts = corrections(channel_means(model, [[x]]), model, [[x]])
    assert all(np.abs(shift).max() < 1e-6 for shift in shifts.values())


def test_correcting_does_not_touch_the_networks_it_reads(case: tuple[Model, Tensor]) -> None:
    model, x = case
    small = coarse(model)
    outputs, kept = small.run(x)[0], x.clone()
    tensors = {name: tensor.clone() for name, tensor in small.tensors.items()}
    corrections(channel_means(model, [[x]]), small, [[x]])
    assert torch.equal(x, kept)
    assert torch.equal(small.run(x)[0], outputs)
    assert all(torch.equal(tensor, small.tensors[name]) for name, tensor in tensors.items())


class Calls(nn.Module):
    """A network given as a function of its parts and its input."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def test_a_bias_that_several_layers_read_is_left_alone_and_the_others_are_corrected() -> None:
    torch.manual_seed(0)
    model = from_module(
        Calls(lambda m, x: m.two(torch.tanh(m.one(m.one(x)))), one=nn.Linear(6, 6), two=nn.Linear(6, 3)),
        [torch.zeros(1, 6)],
    )
    x = torch.randn(32, 6)
    small = coarse(model)
    shifts = corrections(channel_means(model, [[x]]), small, [[x]])
    assert set(shifts) == {"two.bias"}
    after = naive_means(rewrite(small, {n: tuple(map(float, s)) for n, s in shifts.items()}), x)
    np.testing.assert_allclose(after["linear_2"], naive_means(model, x)["linear_2"], atol=1e-5)


def test_a_layer_without_bias_is_left_out() -> None:
    model = from_module(nn.Linear(4, 3, bias=False), [torch.zeros(1, 4)])
    assert channel_means(model, [[torch.randn(5, 4)]]) == {}


def test_a_linear_layer_on_a_single_vector_has_a_mean_for_each_of_its_elements() -> None:
    torch.manual_seed(0)
    model = from_module(
        Calls(lambda m, x: x * m.one(torch.tanh(x).sum((0, 1))), one=nn.Linear(4, 4)), [torch.zeros(2, 3, 4)]
    )
    x = torch.randn(model.inputs[0].shape)
    small = coarse(model)
    shifts = corrections(channel_means(model, [[x]]), small, [[x]])
    corrected = rewrite(small, {name: tuple(map(float, shift)) for name, shift in shifts.items()})
    torch.testing.assert_close(corrected.run(x)[0], model.run(x)[0], rtol=1e-5, atol=1e-5)
