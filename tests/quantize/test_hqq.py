"""HQQ: every step lowers the objective, the prox is the exact one, and outliers cost less than in rounding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from octoc.qtensor import Scheme
from octoc.quantize import encode
from octoc.quantize.hqq import POWER, shrink, solve_scale, solve_zero, split

ROWS = hnp.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 12)), elements=st.floats(-20, 20))


def objective(ratio, codes, zero, rest, beta, counts, factor=1.0):
    """F of the module's docstring, one number a row."""
    apart = ratio - factor * (codes - zero[:, None]) - rest
    return (counts * (np.abs(rest) ** POWER + beta / 2 * np.square(apart))).sum(axis=1)


def left(weight, stored):
    """What the splitting lowers without its constraint: the sum of |error|^p."""
    return float((np.abs(stored.dequantize().astype(np.float64) - weight) ** POWER).sum())


@pytest.mark.parametrize("power", [0.4, POWER, 0.9])
@given(x=st.floats(-30, 30), beta=st.floats(0.5, 50))
@settings(max_examples=80, deadline=None)
def test_the_prox_is_the_minimum_on_a_fine_grid(x, beta, power):
    e = float(shrink(np.array([x]), beta, power)[0])

    def value(at):
        return np.abs(at) ** power + beta / 2 * np.square(x - at)

    tried = np.linspace(min(x, 0), max(x, 0), 4001)
    assert value(e) <= value(tried).min() + 1e-3 * max(1.0, value(0.0))


@given(ratio=ROWS, bits=st.integers(2, 8), seed=st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_every_step_lowers_the_objective(ratio, bits, seed):
    rng = np.random.default_rng(seed)
    high, beta = 2**bits - 1, 10.0
    counts = rng.uniform(0.1, 1, ratio.shape)
    zero = rng.uniform(0, high, len(ratio))
    before = np.full(len(ratio), np.inf)
    for _ in range(6):
        codes, rest = split(ratio, zero, high, beta)
        reached = objective(ratio, codes, zero, rest, beta, counts)
        assert (reached <= before * (1 + 1e-3) + 1e-6).all()  # the prox is found to three digits
        zero = solve_zero(ratio, counts, zero, high, rounds=1, growth=1.0)
        before = objective(ratio, codes, zero, rest, beta, counts)
        assert (before <= reached + 1e-9 * (1 + reached)).all()


@given(ratio=ROWS, bits=st.integers(2, 8), seed=st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_the_scale_step_lowers_the_objective(ratio, bits, seed):
    rng = np.random.default_rng(seed)
    high = 2**bits - 1
    counts = rng.uniform(0.1, 1, ratio.shape)
    zero = rng.integers(0, high + 1, len(ratio)).astype(np.float64)
    codes, rest = split(ratio, zero, high, 10.0)
    factor = solve_scale(ratio, counts, zero, high, rounds=1)
    before = objective(ratio, codes, zero, rest, 10.0, counts)
    after = objective(ratio, codes, zero, rest, 10.0, counts, factor[:, None])
    assert (after <= before + 1e-9 * (1 + before)).all()


def test_codes_and_split_errors_are_those_of_a_search_over_all_codes():
    ratio = np.random.default_rng(0).uniform(-3, 6, (5, 40))
    zero, beta = np.array([0.0, 1.2, 1.5, 2.0, 3.0]), 10.0
    codes, rest = split(ratio, zero, 3, beta)
    found = np.abs(rest) ** POWER + beta / 2 * np.square(ratio - (codes - zero[:, None]) - rest)
    every = []
    for code in range(4):
        apart = ratio - (code - zero[:, None])
        tried = apart[..., None] * np.linspace(0, 1, 2001)
        every.append((np.abs(tried) ** POWER + beta / 2 * np.square(apart[..., None] - tried)).min(axis=-1))
    np.testing.assert_allclose(found, np.min(every, axis=0), atol=2e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_error_is_below_that_of_rounding_in_both_norms_on_skewed_weights(bits):
    weight = np.random.default_rng(1).gamma(2.0, size=(32, 64)).astype(np.float32) - 1
    weight[::4, 5] *= 4
    ours = encode(weight, Scheme.parse(f"uint{bits}-group32"), 0, dtype="float16")
    for method in ("rtn", "minmax"):
        theirs = encode(weight, Scheme.parse(f"int{bits}-group32"), 0, dtype="float16", method=method)
        assert left(weight, ours) < left(weight, theirs)
        assert np.square(ours.dequantize() - weight).sum() < np.square(theirs.dequantize() - weight).sum()


def test_weights_that_lie_on_a_shifted_grid_are_stored_exactly():
    codes = np.random.default_rng(2).integers(0, 16, (6, 32))
    codes[:, :2] = [0, 15]
    zero = np.array([0, 3, 7, 8, 12, 15])[:, None]
    weight = ((codes - zero) * 0.25).astype(np.float32)
    stored = encode(weight, Scheme.parse("uint4-channel"), 0)
    np.testing.assert_array_equal(stored.zero_point, zero)
    np.testing.assert_array_equal(stored.dequantize(), weight)


def test_importance_moves_the_error_to_where_it_counts_less():
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((16, 32)).astype(np.float32)
    importance = np.exp(2 * rng.standard_normal((16, 32)))
    scheme = Scheme.parse("uint3-channel")
    plain, weighted = (encode(weight, scheme, 0, importance=given) for given in (None, importance))

    def counted(stored):
        return float((importance * np.square(stored.dequantize() - weight)).sum())

    assert counted(weighted) < 0.95 * counted(plain)
