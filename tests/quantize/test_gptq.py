"""GPTQ against the naive optimal brain quantizer, and its error against rounding's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octoc.errors import DataError, UsageError
from octoc.hessian import Hessian
from octoc.qtensor import Affine, Scheme, difference
from octoc.quantize import encode, gptq, quadratic
from octoc.quantize.gptq import DAMPING
from octoc.quantize.quadratic import Steps, Tables, factor, refit, relaxation, solve, succession, sweep

NOTHING = np.zeros((1, 1))  # on the diagonal
SCHEMES = [
    "int2-group4",
    "int3-channel",
    "int4-tensor",
    "int8-group4",
    "palette1-tensor",
    "palette2-group2",
    "palette3-channel",
]


def correlated(seed, width, rows=6, groups=1, count=400):
    """A weight [groups * rows, width] and sums over inputs that depend on one another."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((groups, count, width)) @ (np.eye(width) + rng.standard_normal((groups, width, width)))
    hessian = Hessian(groups, rows, width)
    hessian.update(mixed.astype(np.float32))
    return rng.standard_normal((groups * rows, width)).astype(np.float32), hessian


def damped(hessian):
    mean = np.einsum("gnn->g", hessian.matrix) / hessian.matrix.shape[1]
    return hessian.matrix + DAMPING * mean[:, None, None] * np.eye(hessian.matrix.shape[1])


def weighed(weight, stored, hessian):
    rest = hessian.rows(weight, 0) - hessian.rows(stored.dequantize(), 0)
    return float(np.einsum("grn,gnm,grm->", rest, damped(hessian), rest))


def brain_quantizer(row, matrix, order, nearest):
    """Frantar and Alistarh, arXiv 2208.11580: round a weight, spread its error by the inverse Hessian of those left."""
    row, left, result = row.astype(np.float64).copy(), list(order), np.zeros(len(row))
    for i in order:
        inverse = np.linalg.inv(matrix[np.ix_(left, left)])
        at = left.index(i)
        result[i] = nearest(row[i])
        row[left] -= (row[i] - result[i]) / inverse[at, at] * inverse[at]
        left.remove(i)
    return result


def whole(rows, scale=0.3, groups=1):
    return Steps(np.array([scale], np.float32), np.zeros((groups, 1, rows), np.int64), -8, 7)


@given(seed=st.integers(0, 999), width=st.integers(1, 9), shuffled=st.booleans())
@settings(max_examples=40, deadline=None)
def test_codes_are_those_of_the_naive_optimal_brain_quantizer(seed, width, shuffled):
    weight, hessian = correlated(seed, width)
    matrix = damped(hessian)
    order = np.arange(width) if not shuffled else np.random.default_rng(seed).permutation(width)
    state = sweep(weight.T[None], succession(factor(matrix, NOTHING, order[None])), whole(6), order[None])
    for row, codes in zip(weight, state.codes[0].T, strict=True):
        values = brain_quantizer(
            row, matrix[0], order, lambda w: np.float32(0.3) * np.clip(np.rint(w / np.float32(0.3)), -8, 7)
        )
        np.testing.assert_allclose(codes * np.float32(0.3), values, atol=1e-5)


def test_the_factor_solves_for_what_is_missing():
    _, hessian = correlated(12, 9, groups=2)
    order = np.stack([np.random.default_rng(i).permutation(9) for i in range(2)])
    more = np.array([[1.0], [2.0]])
    right = np.random.default_rng(12).standard_normal((2, 6, 9))
    found = solve(factor(hessian.matrix, more, order), order, right)
    np.testing.assert_allclose(found @ (hessian.matrix + more[:, None] * np.eye(9)), right, atol=1e-9)


def test_blocks_and_strips_change_nothing(monkeypatch):
    weight, hessian = correlated(0, 70)
    order = np.random.default_rng(0).permutation(70)[None]
    matrix = damped(hessian)
    found = []
    for block, strip in ((1, 1), (128, 128), (24, 5)):
        monkeypatch.setattr(quadratic, "_BLOCK", block)
        monkeypatch.setattr(quadratic, "_STRIP", strip)
        state = sweep(weight.T[None], succession(factor(matrix, NOTHING, order)), whole(6), order)
        scaled = (matrix / np.einsum("gnn->g", matrix)).astype(np.float32)
        found.append(sweep(weight.T[None], relaxation(scaled, order), whole(6), order, state.rest).codes)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_uncorrelated_inputs_leave_rounding():
    weight, _ = correlated(1, 12)
    order = np.arange(12)[None]
    codes = sweep(weight.T[None], succession(factor(np.eye(12)[None], NOTHING, order)), whole(6), order).codes
    np.testing.assert_array_equal(codes[0].T, np.clip(np.rint(weight / np.float32(0.3)), -8, 7))


def test_each_sweep_of_descent_takes_the_best_code_while_the_others_stand():
    weight, hessian = correlated(2, 8)
    matrix = (damped(hessian) / 1000).astype(np.float32)
    order = np.argsort(-np.einsum("gnn->gn", matrix), axis=1)
    state = sweep(weight.T[None], succession(factor(matrix.astype(np.float64), NOTHING, order)), whole(6), order)
    for _ in range(30):
        state = sweep(weight.T[None], relaxation(matrix, order), whole(6), order, state.rest)
    least = quadratic.error(state.rest, matrix)
    for i, j in np.ndindex(8, 6):
        for step in (-0.3, 0.3):
            rest = state.rest.copy()
            rest[0, i, j] += step
            if -8 <= state.codes[0, i, j] - np.sign(step) <= 7:
                assert quadratic.error(rest, matrix) >= least * (1 - 1e-5)


@pytest.mark.parametrize("kind", ["steps", "tables"])
def test_fitted_values_are_those_of_least_squares(kind):
    weight, hessian = correlated(3, 8)
    matrix = damped(hessian)
    target = weight.T[None].copy()
    if kind == "steps":
        grid = Steps(np.full(12, 0.5, np.float32), np.arange(12).reshape(1, 2, 6), -8, 7)
    else:
        grid = Tables(np.tile(np.linspace(-2, 2, 4, dtype=np.float32), 2), np.arange(6)[None] // 3, 4)
    order = np.arange(8)[None]
    state = sweep(target, succession(factor(matrix, NOTHING, order)), grid, order)
    for _ in range(4):  # conjugate gradients begin anew
        state = refit(target, matrix.astype(np.float32), state, lambda p: p.astype(np.float32))
    basis = np.stack([grid.spread(one, state.codes).ravel() for one in np.eye(len(grid.parameters))], 1)
    full = np.kron(matrix[0], np.eye(6))  # of the elements [width, rows]
    best = np.linalg.lstsq(basis.T @ full @ basis, basis.T @ full @ target.ravel(), rcond=None)[0]
    rest = target.ravel() - basis @ best
    assert quadratic.error(state.rest, matrix.astype(np.float32)) == pytest.approx(rest @ full @ rest, rel=1e-3)


@pytest.mark.parametrize("text", SCHEMES)
@given(seed=st.integers(0, 999))
@settings(max_examples=15, deadline=None)
def test_the_error_is_at_most_that_of_rounding(text, seed):
    weight, hessian = correlated(seed, 8)
    for dtype in ("float32", "float16"):
        ours = encode(weight, Scheme.parse(text), 0, dtype=dtype, method="gptq", hessian=hessian)
        plain = encode(weight, Scheme.parse(text), 0, dtype=dtype)
        assert weighed(weight, ours, hessian) <= weighed(weight, plain, hessian) * (1 + 1e-5)


@pytest.mark.parametrize("text", ["int4-channel", "int3-channel", "int4-group64", "int4-tensor", "palette3-tensor"])
@pytest.mark.parametrize("tail", [False, True])
def test_a_sample_of_a_wide_layer_is_nearly_as_good(text, tail, monkeypatch):
    weight, hessian = correlated(13, 512, rows=32, count=2000)
    if tail:
        weight[::3, ::97] *= 20  # few weights decide the scale
    scheme, errors = Scheme.parse(text), []
    monkeypatch.setattr(gptq, "_WORK", 0)
    for fitted, fewest, compared in ((1 << 21, 512, 1 << 33), (4096, 64, 1 << 21)):
        monkeypatch.setattr(gptq, "_FITTED", fitted)
        monkeypatch.setattr(gptq, "_FEWEST", fewest)
        monkeypatch.setattr(gptq, "_COMPARED", compared)
        errors.append(weighed(weight, encode(weight, scheme, 0, method="gptq", hessian=hessian), hessian))
    assert errors[1] < 1.1 * errors[0]
    assert errors[1] < weighed(weight, encode(weight, scheme, 0), hessian)


@pytest.mark.parametrize("text", ["int4-channel", "palette2-tensor"])
def test_a_wide_layer_is_rounded_in_whole_where_rounding_is_better(text, monkeypatch):
    weight, hessian = correlated(14, 16, rows=8)
    scheme = Scheme.parse(text)
    monkeypatch.setattr(gptq, "_COMPARED", 16 * 16 * 2)  # every fourth row
    monkeypatch.setattr(gptq._Problem, "error", lambda self, decoded: 0.0)
    stored = encode(weight, scheme, 0, method="gptq", hessian=hessian)
    assert difference(stored, encode(weight, scheme, 0)) is None


@pytest.mark.parametrize(("text", "most"), [("int4-group16", 0.7), ("int2-channel", 0.8), ("palette2-tensor", 0.7)])
def test_correlated_inputs_lower_the_error_far_below_that_of_rounding(text, most):
    weight, hessian = correlated(4, 64, rows=32, count=2000)
    ours = encode(weight, Scheme.parse(text), 0, method="gptq", hessian=hessian)
    plain = encode(weight, Scheme.parse(text), 0)
    assert weighed(weight, ours, hessian) < most * weighed(weight, plain, hessian)


@pytest.mark.parametrize("text", ["int3-channel", "int4-group4", "palette2-channel"])
def test_groups_of_a_convolution_are_layers_of_their_own(text):
    weight, hessian = correlated(5, 8, rows=3, groups=4)
    hessian.matrix /= np.einsum("gnn->g", hessian.matrix)[:, None, None]
    together = encode(weight, Scheme.parse(text), 0, method="gptq", hessian=hessian).dequantize()
    apart = np.empty_like(weight)
    for g in range(4):
        one = Hessian(1, 3, 8)
        one.matrix = hessian.matrix[g : g + 1]
        rows = slice(3 * g, 3 * g + 3)
        apart[rows] = encode(weight[rows], Scheme.parse(text), 0, method="gptq", hessian=one).dequantize()
    np.testing.assert_allclose(
        weighed(weight, Stored(together), hessian), weighed(weight, Stored(apart), hessian), rtol=0.05
    )


class Stored:
    def __init__(self, values):
        self.values = values

    def dequantize(self):
        return self.values


def test_the_output_axis_may_be_the_second():
    weight, hessian = correlated(6, 8)
    scheme = Scheme.parse("int4-group4")
    first = encode(weight, scheme, 0, method="gptq", hessian=hessian)
    second = encode(np.ascontiguousarray(weight.T), scheme, 1, method="gptq", hessian=hessian)
    np.testing.assert_array_equal(first.dequantize(), second.dequantize().T)


@pytest.mark.parametrize("text", SCHEMES)
def test_singular_hessians_and_dead_channels_leave_finite_codes(text):
    weight, hessian = correlated(7, 8, count=3)
    hessian.matrix[:, 2] = hessian.matrix[:, :, 2] = 0
    stored = encode(weight, Scheme.parse(text), 0, method="gptq", hessian=hessian)
    assert np.isfinite(stored.dequantize()).all()
    zero = encode(weight * 0, Scheme.parse(text), 0, method="gptq", hessian=hessian)
    assert np.isfinite(zero.dequantize()).all()


def test_an_input_that_was_never_seen_is_rounded_to_nearest():
    weight, hessian = correlated(8, 8)
    hessian.matrix[:, 2] = hessian.matrix[:, :, 2] = 0
    stored = encode(weight, Scheme.parse("int4-channel"), 0, method="gptq", hessian=hessian)
    assert isinstance(stored, Affine)
    nearest = np.clip(np.rint(weight[:, 2] / stored.scale[:, 0]), -8, 7)
    np.testing.assert_array_equal(stored.codes[:, 2], nearest)


def test_where_no_input_was_seen_all_count_alike():
    weight, _ = correlated(9, 8)
    nothing, alike = Hessian(1, 6, 8), Hessian(1, 6, 8)
    alike.matrix[:] = np.eye(8)
    scheme = Scheme.parse("int3-channel")
    found = [encode(weight, scheme, 0, method="gptq", hessian=h) for h in (nothing, alike)]
    assert difference(*found) is None


def test_what_is_missing_in_the_outputs_is_made_up_for():
    rng = np.random.default_rng(10)
    inputs = rng.standard_normal((1, 500, 8)).astype(np.float32)
    weight, change = rng.standard_normal((2, 6, 8)).astype(np.float32)
    missing = inputs @ change.T
    hessian = Hessian(1, 6, 8)
    hessian.update(inputs, missing)
    stored = encode(weight, Scheme.parse("int8-channel"), 0, method="gptq", hessian=hessian).dequantize()
    left = inputs @ (weight + change - stored).T
    assert np.square(left).mean() < 0.15 * np.square(missing).mean()


def test_what_gptq_cannot_take_is_refused():
    weight, hessian = correlated(11, 8)
    scheme = Scheme.parse("int4-channel")
    with pytest.raises(UsageError, match="needs the Hessian"):
        encode(weight, scheme, 0, method="gptq")
    with pytest.raises(UsageError, match="float16"):
        encode(weight, Scheme.parse("float16"), 0, method="gptq", hessian=hessian)
    with pytest.raises(UsageError, match="mask"):
        encode(weight, Scheme.parse("int4-channel-sparse"), 0, method="gptq", hessian=hessian)
    with pytest.raises(UsageError, match="groups of 5"):
        encode(weight, Scheme.parse("int4-group5"), 0, method="gptq", hessian=hessian)
    with pytest.raises(DataError, match="shape"):
        encode(weight[:, :4], scheme, 0, method="gptq", hessian=hessian)
    hessian.matrix[0, 0, 1:] = hessian.matrix[0, 1:, 0] = 1e6
    with pytest.raises(DataError, match="semidefinite"):
        encode(weight, scheme, 0, method="gptq", hessian=hessian)
    hessian.matrix[0, 0, 0] = np.nan
    with pytest.raises(DataError, match="NaN"):
        encode(weight, scheme, 0, method="gptq", hessian=hessian)
