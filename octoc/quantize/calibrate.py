"""Ranges of int8 activations: least expected error over streaming histograms, each value weighted by what it does.

Weights are the diagonal of the Fisher information (see `octoc.fisher`): an error of a value counts with the squared
gradient of the outputs' likelihood, as in Choi et al., "Towards the Limit of Network Quantization", 2017, for weights.

1. The network runs batch by batch, forward and backward; one histogram a point is kept, never an activation.
2. `choose_range` takes the range of least expected squared error, clipping against rounding.
3. A leaky ReLU has a point before and one behind it. Their roundings add up, so that `choose_leaky_ranges` takes both
   ranges together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from octoc.errors import DataError
from octoc.fisher import sampled_gradients
from octoc.model import Model, argument, aten
from octoc.quantize.activations import HIGH, LOW, Range, quantization_points
from octoc.stats import Histogram

_LEAST_SPAN = 1e-30  # values within less are zero; the scale of a clipped range stays a normal float32
_ZERO = Range(1.0, 0)  # of values that are zero
_LEAST_SHARE = 0.02  # of the largest value, to which a range is clipped at most

Floats = NDArray[np.float64]


def calibrate(
    model: Model,
    batches: Iterable[tuple[Tensor, ...]],
    steps: int = 100,
    classes: bool | None = None,
    seed: int = 0,
) -> dict[str, Range]:
    """Ranges of all quantization points.

    Args:
        model: batch norm folded.
        batches: inputs of the network, samples first.
        steps: clipping ratios tried on each side.
        classes: as in `octoc.fisher`, whose estimate says what an error of each value counts; None: all count alike.
        seed: of the draws of that estimate.

    Returns:
        name of a node -> its range.
    """
    points = quantization_points(model)
    leaky = _leaky_relus(model, points)
    after = {relu: first for first, (relu, _) in leaky.items()}
    # The value before a leaky ReLU says all of the one after it, whose gradient says what both errors count.
    weighing = {name: leaky[name][0] if name in leaky else name for name in points.values() if name not in after}
    histograms = {name: Histogram() for name in weighing}
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        if classes is None:
            _count(model, batch, histograms)
            continue
        found = sampled_gradients(model, batch, {*weighing, *weighing.values()}, classes, generator)
        for name, histogram in histograms.items():
            gradient = found[weighing[name]][1]
            weights = None if gradient is None else gradient.double().square().numpy()
            histogram.update(found[name][0].float().numpy(), weights)
    _require_values(histograms)
    chosen: dict[str, Range] = {}
    for name, histogram in histograms.items():
        if name in leaky:
            relu, slope = leaky[name]
            chosen[name], chosen[relu] = choose_leaky_ranges(histogram, slope, steps)
        else:
            chosen[name] = choose_range(histogram, steps=steps)
    return {name: chosen[source] for name, source in points.items()}


def _count(model: Model, batch: tuple[Tensor, ...], histograms: Mapping[str, Histogram]) -> None:
    def note(node: fx.Node, value: Any) -> None:
        if node.name in histograms:
            histograms[node.name].update(value.detach().float().numpy())

    for node, values in zip(model.placeholders, batch, strict=True):
        note(node, values)
    model.run(*batch, observe=note)


def _require_values(histograms: Mapping[str, Histogram]) -> None:
    unseen = [name for name, histogram in histograms.items() if histogram.lowest > histogram.highest]
    if unseen:
        raise DataError(
            f"calibration saw no finite value of {unseen[0]} (and {len(unseen) - 1} more); give more samples"
        )


def _leaky_relus(model: Model, points: Mapping[str, str]) -> dict[str, tuple[str, float]]:
    """Points that one leaky ReLU alone reads, which is a point too -> its name and its slope below zero."""
    found = {}
    nodes = model.nodes()
    for name, source in points.items():
        users = list(nodes[name].users)
        if name == source and len(users) == 1 and users[0].target is aten.leaky_relu.default:
            slope = float(argument(users[0], "negative_slope", 1, 0.01))
            if 0 < slope < 1 and points.get(users[0].name) == users[0].name:
                found[name] = (users[0].name, slope)
    return found


def choose_range(histogram: Histogram, slope: float = 1.0, steps: int = 100) -> Range:
    """The int8 range of least expected squared error.

    Args:
        histogram: of the values.
        slope: what a negative value is multiplied by afterwards; its error counts with the square.
        steps: clipping ratios tried on each side.
    """
    low, high = min(histogram.lowest, 0.0), max(histogram.highest, 0.0)
    if not np.isfinite(low) or not np.isfinite(high) or high - low < _LEAST_SPAN:
        return _ZERO
    values, weights = _weighted(histogram)
    weights = weights * np.where(values < 0, slope * slope, 1.0)

    def error(ends: Sequence[float]) -> float:
        return float(weights @ np.square(_decoded(values, _to_range(*ends)) - values))

    return _to_range(*_descend([low, high], [low, high], error, steps)[0])


def choose_leaky_ranges(histogram: Histogram, slope: float, steps: int = 100) -> tuple[Range, Range]:
    """The int8 ranges before and behind a leaky ReLU whose roundings together have the least expected squared error.

    With one scale for both, a positive value is rounded once; with a finer scale behind, where much is negative, twice
    but by less. Both are searched.

    Args:
        histogram: of the values before, weighted by what an error behind counts.
        slope: of the leaky ReLU below zero, in (0, 1).
        steps: clipping ratios tried on each side.
    """
    before = choose_range(histogram, slope, steps)
    if before == _ZERO:
        return _ZERO, _ZERO
    values, weights = _weighted(histogram)
    wanted = _leaky(values, slope)

    def one_scale(ends: Sequence[float]) -> tuple[Range, Range]:
        first = _to_range(*ends[:2])
        return first, Range(first.scale, _zero_point(ends[2], first.scale))

    def two_scales(ends: Sequence[float]) -> tuple[Range, Range]:
        return _to_range(*ends[:2]), _to_range(*ends[2:])

    low, high = min(histogram.lowest, 0.0), max(histogram.highest, 0.0)
    start = [(code - before.zero_point) * before.scale for code in (LOW, HIGH)]
    found = []
    for ranges, free in ((one_scale, 3), (two_scales, 4)):

        def error(ends: Sequence[float], ranges: Callable[..., tuple[Range, Range]] = ranges) -> float:
            first, second = ranges(ends)
            return float(weights @ np.square(_decoded(_leaky(_decoded(values, first), slope), second) - wanted))

        ends = [*start, slope * start[0], start[1]][:free]
        ends, least = _descend(ends, [low, high, slope * low, high][:free], error, steps)
        found.append((least, ranges(ends)))
    return min(found, key=lambda pair: pair[0])[1]


def _descend(
    ends: list[float], extremes: Sequence[float], error: Callable[[Sequence[float]], float], steps: int
) -> tuple[list[float], float]:
    """Coordinate descent: the error is nearly separable in the ends of ranges, which only share their steps.

    Returns:
        The best ends, each a share of its extreme, and their error.
    """
    least = error(ends)
    for _ in range(2):
        for i, extreme in enumerate(extremes):
            if extreme == 0:
                continue
            for share in np.linspace(1.0, _LEAST_SHARE, steps):
                tried = [*ends[:i], extreme * float(share), *ends[i + 1 :]]
                found = error(tried)
                if found < least:
                    ends, least = tried, found
    return ends, least


def _weighted(histogram: Histogram) -> tuple[Floats, Floats]:
    """Values that were counted and what they count, both [used bins]."""
    used = histogram.counts > 0
    low, high = min(histogram.lowest, 0.0), max(histogram.highest, 0.0)
    return np.clip(histogram.centres[used], low, high), histogram.counts[used]


def _to_range(low: float, high: float) -> Range:
    scale = float(np.float32((high - low) / (HIGH - LOW)))
    return Range(scale, _zero_point(low, scale))


def _zero_point(low: float, scale: float) -> int:
    return int(np.clip(round(LOW - low / scale), LOW, HIGH))


def _decoded(values: Floats, found: Range) -> Floats:
    codes = np.clip(np.round(values / found.scale) + found.zero_point, LOW, HIGH)
    return (codes - found.zero_point) * found.scale


def _leaky(values: Floats, slope: float) -> Floats:
    return np.where(values < 0, values * slope, values)
