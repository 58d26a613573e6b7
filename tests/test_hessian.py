"""Sums over batches are the sums over all samples, and give the least error there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octoc.errors import DataError
from octoc.hessian import Hessian


def samples(seed, groups=2, count=60, width=5, rows=3):
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((groups, count, width)) @ rng.standard_normal((width, width)) + 1
    return inputs.astype(np.float32), rng.standard_normal((groups, count, rows)).astype(np.float32)


@given(seed=st.integers(0, 99), cuts=st.lists(st.integers(0, 60), max_size=4))
@settings(deadline=None)
def test_sums_over_batches_are_those_of_one_batch(seed, cuts):
    inputs, missing = samples(seed)
    whole, parts = Hessian(2, 3, 5), Hessian(2, 3, 5)
    whole.update(inputs, missing)
    edges = [0, *sorted(cuts), 60]
    for start, stop in itertools.pairwise(edges):
        parts.update(inputs[:, start:stop], missing[:, start:stop])
    assert parts.count == whole.count == 60
    for name in ("matrix", "cross", "inputs", "missing"):
        one, other = getattr(whole, name), getattr(parts, name)
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5 * np.abs(one).max())


def test_the_sums_are_those_of_the_definition():
    inputs, missing = samples(1)
    hessian = Hessian(2, 3, 5)
    hessian.update(inputs, missing)
    exact = inputs.astype(np.float64)
    np.testing.assert_allclose(hessian.matrix, np.einsum("gsi,gsj->gij", exact, exact), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(hessian.cross, np.einsum("gsr,gsj->grj", missing, exact), rtol=1e-5, atol=1e-4)


def test_centred_sums_are_the_sums_over_samples_less_their_mean():
    inputs, missing = samples(2)
    plain, centred = Hessian(2, 3, 5), Hessian(2, 3, 5)
    plain.update(inputs, missing)
    centred.update(inputs - inputs.mean(1, keepdims=True), missing - missing.mean(1, keepdims=True))
    np.testing.assert_allclose(plain.centred().matrix, centred.matrix, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(plain.centred().cross, centred.cross, rtol=1e-4, atol=1e-3)


def test_the_shift_makes_the_mean_of_the_outputs_what_is_wanted():
    inputs, missing = samples(3)
    rng = np.random.default_rng(3)
    weight, decoded = rng.standard_normal((2, 6, 5)).astype(np.float32)
    hessian = Hessian(2, 3, 5)
    hessian.update(inputs, missing)
    change = (weight - decoded).reshape(2, 3, 5)
    expected = (np.einsum("grn,gsn->gsr", change, inputs) + missing).mean(1).ravel()
    np.testing.assert_allclose(hessian.shift(weight, decoded, 0), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(hessian.shift(weight.T, decoded.T, 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_values_that_cannot_be_summed_are_refused(bad):
    inputs, _ = samples(4)
    inputs[0, 7, 1] = bad
    with pytest.raises(DataError, match="NaN"):
        Hessian(2, 3, 5).update(inputs)


def test_a_weight_of_another_shape_is_refused():
    with pytest.raises(DataError, match="shape"):
        Hessian(1, 3, 5).rows(np.zeros((3, 4), np.float32), 0)
