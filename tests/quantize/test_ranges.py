"""Each method takes the range that its paper says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from octoc.errors import UsageError
from octoc.quantize.ranges import HIGH, LOW, METHODS, TAIL, Range, choose_range
from octoc.stats import Histogram

Floats = NDArray[np.float64]


def filled(values: object) -> Histogram:
    histogram = Histogram()
    histogram.update(np.asarray(values, np.float32))
    return histogram


def ends(found: Range) -> tuple[float, float]:
    return (LOW - found.zero_point) * found.scale, (HIGH - found.zero_point) * found.scale


@pytest.mark.parametrize("method", METHODS)
@given(values=st.lists(st.floats(-8, 8, width=32), max_size=30))
def test_every_method_keeps_zero_and_reaches_no_further_than_the_values(method: str, values: list[float]) -> None:
    found = choose_range(filled(values), steps=8, method=method)
    assert found.scale > 0
    assert LOW <= found.zero_point <= HIGH
    low, high = min([0.0, *values]), max([0.0, *values])
    if high - low > 1e-29:
        assert ends(found)[0] >= low - found.scale
        assert ends(found)[1] <= high + found.scale


def test_minmax_reaches_all_values() -> None:
    low, high = ends(choose_range(filled(np.append(np.random.default_rng(0).normal(size=1000), 50)), method="minmax"))
    assert high == pytest.approx(50, rel=0.01)
    assert low < -2.5


def test_percentile_leaves_the_tails_out() -> None:
    values = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    found = ends(choose_range(filled(values), method="percentile"))
    np.testing.assert_allclose(found, np.quantile(values, [TAIL, 1 - TAIL]), rtol=0.02)


def divergence(histogram: Histogram, found: Range) -> float:
    """Of the values, the clipped ones at the ends, from what the codes say of them; code by code."""
    total = histogram.counts.sum()
    held: dict[int, list[int]] = {}
    for i, (centre, count) in enumerate(zip(histogram.centres, histogram.counts, strict=True)):
        value = min(max(centre, min(histogram.lowest, 0.0)), max(histogram.highest, 0.0))
        code = round(value / found.scale) + found.zero_point
        inside = abs((min(max(code, LOW), HIGH) - found.zero_point) * found.scale - value) <= found.scale / 2
        if count and inside:
            held.setdefault(code, []).append(i)
    bins = sorted(i for group in held.values() for i in group)
    kept = sum(histogram.counts[i] for i in bins)
    wanted = {i: histogram.counts[i] for i in bins}
    wanted[bins[0]] += histogram.counts[: bins[0]].sum()
    wanted[bins[-1]] += histogram.counts[bins[-1] + 1 :].sum()
    cost = 0.0
    for group in held.values():
        said = sum(histogram.counts[i] for i in group) / len(group) / kept
        cost += sum(wanted[i] / total * math.log(wanted[i] / total / said) for i in group)
    return cost


@pytest.mark.parametrize("seed", range(4))
def test_entropy_takes_a_range_of_less_divergence_than_all_values_and_than_the_least_squared_error(seed: int) -> None:
    histogram = filled(np.random.default_rng(seed).standard_t(3, size=20_000))
    costs = {name: divergence(histogram, choose_range(histogram, steps=50, method=name)) for name in METHODS}
    assert costs["entropy"] == min(costs.values())
    assert costs["entropy"] < costs["minmax"]


def test_another_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match="mse, minmax, percentile, entropy"):
        choose_range(filled([1.0]), method="median")
