"""GPTQ: each weight is rounded to where it makes up for the errors of those before it, as inputs are correlated.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323,
for scales and for look-up tables; then coordinate descent on the codes as in Behdin et al., "QuantEase", arXiv
2309.01885, with scales or tables fitted in between. The error is that of `octoc.hessian`.

1. H is damped: a hundredth of the mean of its diagonal is added to the diagonal. So a singular Hessian has a Cholesky
   factor, and an input that was never seen (a dead channel) is rounded to nearest. Where no input was seen, H is the
   identity.
2. The target is V, with `TRUST` of the cross terms: what a few samples say is missing is partly their noise.
3. Scales or tables are those of the usual method for V, importance the diagonal of H. There is one code more below 0
   than above; with 2 or 3 bits that is much, and a scale may be negative to have it above.
4. Inputs are rounded in the order of their diagonal, the largest first, in blocks (`quadratic.sweep`).
5. Scales or tables are fitted to the codes by least squares, then each code is changed to its best while the others
   stand: again and again until the error falls by less than a thousandth, for a dozen rounds at most and
   for large layers fewer.
6. The codes of the usual method are taken where their error is less, as stored.

Zeros that a mask stores are not held at 0, so that sparse schemes are refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from octoc.errors import DataError, UsageError
from octoc.hessian import Hessian
from octoc.qtensor import Affine, Array, Palette, Scheme
from octoc.quantize import quadratic, require, to_rows
from octoc.quantize.palette import encode as cluster
from octoc.quantize.quadratic import Floats, Grid, State, Steps, Store, Tables
from octoc.quantize.rtn import code_range
from octoc.quantize.rtn import encode as round_to_nearest

KIND = "encode"
ENCODES = ("affine", "palette")
NEEDS = ("hessian",)

DAMPING = 0.01
TRUST = 0.7
_TURNED = 3  # bits
_ROUNDS = 12
_WORK = 1 << 35  # products in all rounds of one layer, counted as one product with H a round
_ENOUGH = 1e-3


@dataclass(frozen=True)
class _Problem:
    """Steps 1 and 2, in units of 2**exponent.

    Args:
        target: float64 [groups, rows, width].
        hessian: float64 [groups, width, width], positive definite, mean of the diagonal 1.
        exponent: so that the target is at most about 1.
    """

    target: NDArray[np.float64]
    hessian: NDArray[np.float64]
    exponent: int

    def wanted(self, weight: Array, axis: int, dtype: str) -> Array:
        """The target as a weight, within what `dtype` holds."""
        moved = np.moveaxis(weight, axis, 0).shape
        largest = float(np.finfo(dtype).max)
        rows = np.clip(np.ldexp(self.target, self.exponent), -largest, largest).reshape(moved)
        return np.ascontiguousarray(np.moveaxis(rows, 0, axis), dtype=np.float32)

    def importance(self, weight: Array, axis: int) -> Array:
        """The diagonal for each element, at most 1."""
        diagonal = np.einsum("gnn->gn", self.hessian)[:, None] / np.einsum("gnn->gn", self.hessian).max()
        rows = np.broadcast_to(diagonal, self.target.shape).reshape(np.moveaxis(weight, axis, 0).shape)
        return np.ascontiguousarray(np.moveaxis(rows, 0, axis), dtype=np.float32)

    def error(self, stored: Affine | Palette, axis: int) -> float:
        """Of what is stored."""
        rows = np.moveaxis(stored.dequantize(), axis, 0).reshape(self.target.shape)
        rest = (np.ldexp(rows.astype(np.float64), -self.exponent) - self.target).astype(np.float32)
        return float(np.einsum("grn,grn->", rest @ self.hessian.astype(np.float32), rest, dtype=np.float64))


def encode(
    weight: Array, scheme: Scheme, axis: int, *, dtype: str, importance: Array | None = None, hessian: Hessian
) -> Affine | Palette:
    """Encodes a weight for the least error on the samples that the Hessian has seen.

    Args:
        weight: float32, any shape, finite.
        scheme: of kind "affine" or "palette".
        axis: output-channel axis of the weight.
        dtype: of scales or tables.
        importance: must be None.
        hessian: of the layer.

    Raises:
        ModelError: weights beyond the range of `dtype`.
        UsageError: the scheme does not fit, or an importance is given.
        DataError: the Hessian is of another shape, or is none.
    """
    require(scheme, ENCODES, weight, dtype)
    if importance is not None:
        raise UsageError("gptq takes what counts from the Hessian: no importance beside it, and no mask of zeros")
    problem = _problem(weight, axis, hessian)
    usual = round_to_nearest if scheme.kind == "affine" else cluster
    plain = usual(weight, scheme, axis, dtype=dtype)
    target, importance = problem.wanted(weight, axis, dtype), problem.importance(weight, axis)
    first = usual(target, scheme, axis, dtype=dtype, importance=importance)
    if isinstance(first, Affine) and first.bits <= _TURNED:
        first = _turned(
            target, first, importance, round_to_nearest(-target, scheme, axis, dtype=dtype, importance=importance)
        )
    state = _descend(problem, *_grid(problem, first, axis, dtype))
    found = _stored(problem, state, first, axis)
    return found if problem.error(found, axis) < problem.error(plain, axis) else plain


def _turned(target: Array, first: Affine, importance: Array, second: Affine) -> Affine:
    """`first` with those scales of `second` for the negative target, as negative ones, that leave less error."""
    grid = first.scale.shape
    rest = (
        importance * np.square(target.astype(np.float64) - sign * q.dequantize())
        for sign, q in ((1, first), (-1, second))
    )
    errors = [to_rows(part, grid).sum(axis=1).reshape(grid) for part in rest]
    return replace(first, scale=np.where(errors[1] < errors[0], -second.scale, first.scale))


def _problem(weight: Array, axis: int, hessian: Hessian) -> _Problem:
    rows = hessian.rows(weight, axis)
    width = rows.shape[2]
    diagonal = np.einsum("gnn->gn", hessian.matrix)
    if not np.isfinite(hessian.matrix).all() or (diagonal < 0).any():
        raise DataError("the Hessian holds NaN, infinite values, or negative ones on its diagonal")
    mean = diagonal.mean(axis=1)[:, None, None]
    damped = np.where(mean > 0, hessian.matrix + DAMPING * mean * np.eye(width), np.eye(width))
    target = rows
    if hessian.cross.any():
        target = rows + TRUST * np.linalg.solve(damped, hessian.cross.swapaxes(1, 2)).swapaxes(1, 2)
    exponent = int(np.frexp(np.abs(target).max(initial=0))[1])
    return _Problem(np.ldexp(target, -exponent), damped / np.einsum("gnn->gn", damped).mean(), exponent)


def _grid(problem: _Problem, first: Affine | Palette, axis: int, dtype: str) -> tuple[Grid, Store]:
    """The grid of the usual method in the problem's units, and what rounds parameters as they are stored."""
    groups, rows, _ = problem.target.shape
    info = np.finfo(dtype)
    smallest, largest = 0.0, float(info.max)
    if isinstance(first, Affine):
        low, high = code_range(first.bits)
        smallest = float(info.smallest_normal)
        largest = float(np.nextafter(np.asarray(largest / -low, dtype), np.asarray(0, dtype)))
        places = np.moveaxis(np.arange(first.scale.size).reshape(first.scale.shape), axis, 0)
        tiles = np.broadcast_to(places.reshape(len(places), -1), (groups * rows, places.size // len(places)))
        share = np.ascontiguousarray(tiles.reshape(groups, rows, -1).swapaxes(1, 2))

    def store(parameters: NDArray[np.float64]) -> Floats:
        size = np.clip(np.ldexp(np.abs(parameters), problem.exponent), smallest, largest)
        rounded = np.copysign(size, parameters).astype(dtype)
        units: Floats = np.ldexp(rounded.astype(np.float64), -problem.exponent).astype(np.float32)
        return units

    if isinstance(first, Affine):
        scale = np.ldexp(first.scale.astype(np.float64).ravel(), -problem.exponent)
        return Steps(store(scale), share, low, high), store
    entries = first.table.shape[-1]
    which = np.arange(groups * rows) * (first.table.size // entries) // (groups * rows)
    tables = np.ldexp(first.table.astype(np.float64).ravel(), -problem.exponent)
    return Tables(store(tables), which.reshape(groups, rows), entries), store


def _descend(problem: _Problem, grid: Grid, store: Store) -> State:
    """Steps 4 and 5."""
    target = np.ascontiguousarray(problem.target.swapaxes(1, 2), dtype=np.float32)
    hessian = problem.hessian.astype(np.float32)
    order = np.argsort(-np.einsum("gnn->gn", problem.hessian), axis=1, kind="stable")
    best = quadratic.sweep(target, quadratic.succession(problem.hessian, order), grid, order)
    least = quadratic.error(best.rest, hessian)
    feedback = quadratic.relaxation(hessian, order)
    for _ in range(min(_ROUNDS, _WORK // max(1, target.size * target.shape[1]))):
        fitted = quadratic.refit(target, hessian, best, store)
        state = quadratic.sweep(target, feedback, fitted.grid, order, fitted.rest)
        found = quadratic.error(state.rest, hessian)
        before = least
        if found < least:
            best, least = state, found
        if found > (1 - _ENOUGH) * before:
            break
    return best


def _stored(problem: _Problem, state: State, first: Affine | Palette, axis: int) -> Affine | Palette:
    shape = tuple(np.moveaxis(first.codes, axis, 0).shape)
    codes = np.moveaxis(state.codes.swapaxes(1, 2).reshape(shape), 0, axis)
    codes = np.ascontiguousarray(codes).astype(first.codes.dtype)
    parameters = np.ldexp(state.grid.parameters.astype(np.float64), problem.exponent)
    if isinstance(first, Affine):
        return Affine(codes, parameters.reshape(first.scale.shape).astype(first.scale.dtype), bits=first.bits)
    return Palette(codes, parameters.reshape(first.table.shape).astype(first.table.dtype), first.bits)
