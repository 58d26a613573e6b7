"""A histogram that was filled batch by batch is the histogram of all values."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from octoc.stats import BINS, Histogram

# On this grid every edge of a bin is exact in float32, so that no value falls on either side of one by rounding.
grid = st.integers(-4096, 4096).map(lambda k: k / 4096)
between = st.integers(-4096, 4095).map(lambda k: (k + 0.5) / 4096)  # never a limit, which belongs to the bin below it


def filled(*batches: Any) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.update(np.asarray(batch, np.float32))
    return histogram


def naive(values: NDArray[np.float32], limit: float) -> NDArray[np.float64]:
    """numpy's histogram over [-limit, limit]."""
    return np.histogram(values.astype(np.float64), bins=BINS, range=(-limit, limit))[0].astype(np.float64)


@given(st.lists(st.lists(grid, min_size=1, max_size=8), min_size=1, max_size=6))
def test_streaming_batches_give_the_histogram_of_one_batch(batches: list[list[float]]) -> None:
    whole = np.array([1.0, *(value for batch in batches for value in batch)], np.float32)
    streamed, once = filled([1.0], *batches), filled(whole)
    assert streamed.limit == once.limit == 1.0
    np.testing.assert_array_equal(streamed.counts, once.counts)
    np.testing.assert_array_equal(streamed.counts, naive(whole, 1.0))
    assert (streamed.lowest, streamed.highest) == (once.lowest, once.highest) == (whole.min(), whole.max())


@given(st.lists(st.lists(between, min_size=1, max_size=8), min_size=1, max_size=6), st.integers(0, 12))
def test_a_range_that_grew_holds_what_it_would_have_held_from_the_start(
    batches: list[list[float]], halvings: int
) -> None:
    first = 2.0**-halvings
    streamed, whole = filled([-first], *batches), np.array([-first, *itertools.chain(*batches)], np.float32)
    assert streamed.limit in {first * 2.0**k for k in range(halvings + 1)}
    assert streamed.limit >= np.abs(whole).max()
    assert streamed.limit == first or streamed.limit / 2 < np.abs(whole).max()
    # An edge of the fine bins is an edge of the coarse ones, so that merging in pairs loses nothing.
    np.testing.assert_array_equal(streamed.counts, naive(whole, streamed.limit))


@given(st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), max_size=20))
def test_every_finite_value_is_counted_once_and_none_else(values: list[float]) -> None:
    array = np.array(values, np.float32)
    finite = array[np.isfinite(array)]
    histogram = filled(array[:3], array[3:])
    assert histogram.counts.sum() == finite.size
    if finite.size:
        assert (histogram.lowest, histogram.highest) == (finite.min(), finite.max())
        assert histogram.limit >= float(np.abs(finite).max())
    else:
        assert histogram.lowest > histogram.highest


@given(st.lists(st.floats(-1e4, 1e4, width=32).filter(lambda v: v == 0 or abs(v) > 1e-4), min_size=1, max_size=30))
def test_the_centre_of_a_value_s_bin_is_within_half_a_bin_of_it(values: list[float]) -> None:
    array = np.array(values, np.float32)
    histogram = filled(array)
    width = 2 * histogram.limit / BINS
    for value in array:
        counted = histogram.centres[filled([histogram.limit], [value]).counts > 0] if value else histogram.centres
        assert np.abs(counted - value).min() <= width / 2 * (1 + 1e-3)


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-20, 1e20, 3e38])
def test_magnitudes_at_the_ends_of_float32_are_counted(scale: float) -> None:
    values = np.array([0.0, 0.5, -1.0, 0.25], np.float32) * np.float32(scale)
    histogram = filled(values, 2.0**-3 * values, values)
    assert histogram.counts.sum() == 12
    assert np.isfinite(histogram.centres).all()
    expected = np.concatenate([values, 2.0**-3 * values, values]).astype(np.float64)
    width = 2 * histogram.limit / BINS
    assert abs((histogram.counts * histogram.centres).sum() - expected.sum()) <= 12 * width / 2 * 1.001


def test_zeros_before_the_first_value_stay_zeros() -> None:
    histogram = filled(np.zeros(5), [3.0], [100.0])
    middle = histogram.counts[BINS // 2 - 1 : BINS // 2 + 1].sum()
    assert middle == 5
    assert histogram.counts.sum() == 7


def test_a_histogram_of_nothing_is_empty() -> None:
    histogram = filled([], [np.nan, -np.inf], np.zeros((0, 3)))
    assert histogram.counts.sum() == 0
    assert histogram.limit == 0
