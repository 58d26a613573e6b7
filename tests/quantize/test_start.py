"""A start stays in floats where int8 there costs most of what int8 costs at all, and hardly any arithmetic is in it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octoc.load.module import from_module
from octoc.model import Model
from octoc.quantize.activations import calibrate, rewrite
from octoc.quantize.start import MOST_MACS, cuts, float_start, layers_of


class Net(nn.Module):
    """Two narrow layers, the second depthwise, before wide ones with a shortcut."""

    def __init__(self, spread: float) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.three, self.four = nn.Conv2d(8, 64, 1), nn.Conv2d(64, 64, 3, padding=1)
        self.head = nn.Linear(64, 5)
        with torch.no_grad():  # channels of very different size, evened out again by the layer that reads them
            size = torch.logspace(0, spread, 8)
            self.one.weight.mul_(size.reshape(-1, 1, 1, 1))
            self.one.bias.mul_(size)
            self.two.weight.div_(size.reshape(-1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.two(F.leaky_relu(self.one(x), 0.1)), 0.1)
        y = F.relu(self.three(y))
        y = F.relu(y + self.four(y))
        return self.head(y.mean((2, 3)))


def squared(reference: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    return sum(float((a - b).square().mean()) for a, b in zip(reference, outputs, strict=True))


def made(spread: float) -> tuple[Model, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    return from_module(Net(spread).eval(), [x[:1]]), x


def test_cuts_are_where_one_value_alone_goes_on_to_a_layer() -> None:
    model, x = made(0.0)
    found = dict(cuts(model, calibrate(model, [(x,)], steps=5)))
    shares = list(found.values())
    assert list(found) == ["leaky_relu", "leaky_relu_1", "relu", "mean"]  # neither relu_1 nor what the shortcut passes
    total = 64 * (3 * 8 + 9 * 8 + 8 * 64 + 9 * 64 * 64) + 64 * 5
    assert shares[0] == pytest.approx(64 * 3 * 8 / total)
    assert shares[1] == pytest.approx(64 * (3 * 8 + 9 * 8) / total)
    assert shares == sorted(shares)


def test_a_start_whose_channels_share_no_scale_stays_in_floats() -> None:
    model, x = made(3.0)
    ranges = calibrate(model, [(x,)], steps=20)
    spared = float_start(model, ranges, [(x,)], squared)
    assert {"x", "conv2d", "leaky_relu"} <= set(spared)
    kept = {name: found for name, found in ranges.items() if name not in spared}
    assert {"conv2d_3", "linear"} <= set(kept)
    assert layers_of(model, spared)[0] == "one.weight"
    assert "head.weight" not in layers_of(model, spared)
    reference = model.run(x)
    assert squared(reference, rewrite(model, kept).run(x)) < squared(reference, rewrite(model, ranges).run(x)) / 2
    assert max(share for cut, share in cuts(model, ranges) if cut not in kept or cut == next(iter(kept))) <= MOST_MACS


def test_a_start_that_costs_its_share_runs_in_integers() -> None:
    model, x = made(0.0)
    assert float_start(model, calibrate(model, [(x,)], steps=20), [(x,)], squared) == ()


def test_calls_of_a_fixed_batch_count_together() -> None:
    model, x = made(3.0)
    ranges = calibrate(model, [(x,)], steps=20)
    assert float_start(model, ranges, [(part,) for part in x.split(4)], squared) == float_start(
        model, ranges, [(x,)], squared
    )


def test_nothing_is_spared_where_int8_changes_nothing_or_no_cut_is_cheap() -> None:
    model, x = made(3.0)
    ranges = calibrate(model, [(x,)], steps=5)
    assert float_start(model, ranges, [(x,)], lambda a, b: 0.0) == ()
    heavy = from_module(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval(), [torch.zeros(1, 4)])
    few = torch.randn(8, 4)
    assert float_start(heavy, calibrate(heavy, [(few,)], steps=5), [(few,)], squared) == ()
