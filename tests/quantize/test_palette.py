"""Exact one-dimensional k-means: equal to a naive dynamic program, whatever the weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from octoc.qtensor import Scheme
from octoc.quantize import encode, palette
from octoc.quantize.palette import cluster, nearest

FLOATS = st.floats(-100, 100, width=32) | st.sampled_from([0.0, 1.0, 1.5, -1.0, 1e-30])


def naive(values, clusters, counts=None):
    """Least cost by the O(k n^2) dynamic program of the textbook, in extended precision."""
    counts = np.ones(len(values)) if counts is None else counts
    order = np.argsort(values)
    x, w = values[order].astype(np.longdouble), counts[order].astype(np.longdouble)
    n = len(x)
    cost = np.full((n + 1, n + 1), np.inf, np.longdouble)
    for start in range(n + 1):
        cost[start, start] = 0
        mass, mean, total = np.longdouble(0), np.longdouble(0), np.longdouble(0)
        for stop in range(start, n):  # Welford's update: no cancellation
            mass += w[stop]
            delta = x[stop] - mean
            mean += delta * w[stop] / mass if mass > 0 else 0
            total += w[stop] * delta * (x[stop] - mean)
            cost[start, stop + 1] = total
    best = cost[0]
    for _ in range(clusters - 1):
        best = (best[:, None] + cost).min(axis=0)
    return float(best[n])


def spent(values, centres, counts=None):
    squared = np.square(values.astype(np.float64)[:, None] - centres).min(axis=1)
    return float(squared.sum() if counts is None else (squared * counts).sum())


def samples(kind, n, seed=0):
    rng = np.random.default_rng(seed)
    made = {
        "normal": lambda: rng.standard_normal(n),
        "heavy": lambda: rng.standard_t(2, n),
        "two humps": lambda: rng.choice([-1, 1], n) + 0.02 * rng.standard_normal(n),
        "rounded": lambda: np.round(rng.standard_normal(n), 1),
        "uniform": lambda: rng.uniform(size=n),
        "even": lambda: np.arange(n) / n,
    }
    return made[kind]().astype(np.float32)


KINDS = ["normal", "heavy", "two humps", "rounded", "uniform", "even"]


@given(values=hnp.arrays(np.float32, st.integers(1, 40), elements=FLOATS), clusters=st.integers(1, 9))
@example(values=np.zeros(3, np.float32), clusters=2)
@settings(max_examples=150, deadline=None)
def test_the_clustering_is_the_best_for_any_values(values, clusters):
    best = naive(values, clusters)
    assert spent(values, cluster(values, clusters)) <= best * (1 + 1e-6) + 1e-9 * np.square(values).sum() + 1e-300


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_the_clustering_is_the_best_for_any_importance(data):
    values = data.draw(hnp.arrays(np.float32, st.integers(1, 30), elements=FLOATS))
    counts = data.draw(hnp.arrays(np.float32, len(values), elements=st.floats(0, 1, width=16)))
    counts[0] = 1
    clusters = data.draw(st.integers(1, 6))
    best = naive(values, clusters, counts)
    found = spent(values, cluster(values, clusters, counts), counts)
    assert found <= best * (1 + 1e-6) + 1e-9 * np.square(values).sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clusters", [2, 4, 16, 64])
def test_dropping_bins_by_bounds_loses_nothing(kind, clusters, monkeypatch):
    values = samples(kind, 1600)
    whole = spent(values, cluster(values, clusters))
    monkeypatch.setattr(palette, "_WHOLE", 8)  # many levels
    levels = []
    refine = palette._refine
    monkeypatch.setattr(palette, "_refine", lambda *given: levels.append(1) or refine(*given))
    found = spent(values, cluster(values, clusters))
    assert levels or len(np.unique(values)) <= 2 * 8 * clusters
    assert found == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("clusters", [2, 8, 16])
@pytest.mark.parametrize("kind", ["normal", "heavy", "two humps"])
def test_medium_sizes_equal_the_naive_program(kind, clusters):
    values = samples(kind, 160, seed=5)
    assert spent(values, cluster(values, clusters)) == pytest.approx(naive(values, clusters), rel=1e-9)


def test_two_clusters_of_many_values_equal_trying_every_boundary():
    values = np.sort(samples("heavy", 30000).astype(np.float64))
    n = np.arange(1, len(values))
    left, right = np.cumsum(values)[:-1], values.sum() - np.cumsum(values)[:-1]
    best = (np.square(values).sum() - left**2 / n - right**2 / n[::-1]).min()
    found = spent(values, cluster(values.astype(np.float32), 2))
    assert found == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize(("kind", "clusters"), [("normal", 256), ("heavy", 64), ("two humps", 64), ("uniform", 64)])
def test_many_clusters_of_many_values_are_within_one_in_ten_thousand_of_the_best(kind, clusters, monkeypatch):
    values = samples(kind, 4000, seed=1)
    found = spent(values, cluster(values, clusters))
    monkeypatch.setattr(palette, "_PROVEN", clusters)
    assert found <= spent(values, cluster(values, clusters)) * (1 + 1e-4)


def test_importance_of_whole_numbers_equals_repeating_values():
    values = samples("normal", 700)
    times = np.random.default_rng(1).integers(0, 4, 700)
    repeated = cluster(np.repeat(values, times), 16)
    np.testing.assert_allclose(cluster(values, 16, times.astype(np.float32)), repeated, rtol=1e-9)


@given(
    table=hnp.arrays(np.float16, st.integers(1, 16), elements=st.floats(-8, 8, width=16)),
    values=hnp.arrays(np.float32, 20, elements=FLOATS),
)
@settings(max_examples=100, deadline=None)
def test_each_value_takes_the_lowest_index_of_the_nearest_entry(table, values):
    table = np.sort(table)
    distance = np.abs(values.astype(np.float64)[:, None] - table.astype(np.float64))
    codes = nearest(values, table)
    chosen = distance[np.arange(len(values)), codes]
    np.testing.assert_allclose(chosen, distance.min(axis=1), rtol=1e-12, atol=1e-300)
    assert all(code == 0 or table[code - 1] != table[code] for code in codes)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("text", ["palette4-tensor", "palette3-group2", "palette2-channel", "palette6-channel"])
def test_tables_ascend_and_the_last_entry_repeats(text, dtype):
    weight = samples("normal", 8 * 5 * 4).reshape(8, 5, 4)
    weight[2] = 0
    weight[3] = 0.25
    scheme = Scheme.parse(text)
    stored = encode(weight, scheme, 0, dtype=dtype)
    assert stored.table.shape == (*scheme.grid(weight.shape, 0), 2**scheme.bits)
    assert stored.table.dtype == dtype
    assert (np.diff(stored.table.astype(np.float64), axis=-1) >= 0).all()
    if text.endswith("channel"):
        assert not stored.table[2].any()
        assert (stored.table[3] == 0.25).all()


def test_few_distinct_values_are_stored_exactly():
    weight = np.random.default_rng(2).choice(np.float32([-1, -0.5, 0, 0.125, 3]), (16, 16))
    np.testing.assert_array_equal(encode(weight, Scheme.parse("palette3-tensor"), 0).dequantize(), weight)


@pytest.mark.parametrize("importance", [None, np.float32(0.5)])
def test_zeros_have_no_say_in_a_sparse_table(importance):
    weight = samples("normal", 4096).reshape(64, 64) + np.float32(3)
    pruned = np.where(np.random.default_rng(3).uniform(size=weight.shape) < 0.6, np.float32(0), weight)
    stored = encode(pruned, Scheme.parse("palette2-tensor-sparse"), 0, importance=importance)
    kept = pruned[pruned != 0]
    np.testing.assert_allclose(stored.dense.table.ravel(), cluster(kept, 4), rtol=1e-6)
    np.testing.assert_array_equal(stored.mask, pruned != 0)
    assert not stored.dense.codes[~stored.mask].any()
