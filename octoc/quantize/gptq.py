"""GPTQ: each weight is rounded to where it makes up for the errors of those before it, as inputs are correlated.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323,
for scales and for look-up tables; then coordinate descent on the codes as in Behdin et al., "QuantEase", arXiv
2309.01885, with scales or tables fitted in between. The error is that of `octoc.hessian`.

1. H is damped: a hundredth of the mean of its diagonal is added to the diagonal. So a singular Hessian has a Cholesky
   factor, and an input that was never seen (a dead channel) is rounded to nearest. Where no input was seen, H is the
   identity.
2. The target is V, with `TRUST` of the cross terms: what a few samples say is missing is partly their noise.
3. Scales or tables are those of the usual method for V, importance the diagonal of H. There is one code more below 0
   than above; with 2 or 3 bits that is much, and a scale may be negative to have it above. A layer of more than
   `_FITTED` weights is fitted on a sample of each tile (`_sample`).
4. Inputs are rounded in the order of their diagonal, the largest first, in blocks (`quadratic.sweep`).
5. Scales or tables are fitted to the codes by least squares, then each code is changed to its best while the others
   stand: again and again until the error falls by less than a thousandth, for a dozen rounds at most and
   for large layers fewer, so that all rounds take at most `_WORK` products.
6. The codes of the usual method are taken where their error is less, as stored. In a layer where one error takes more
   than `_COMPARED` products, every k-th row is compared, so that it takes no more.

The work is that of one Cholesky factor and one triangular product with the weights, where the public algorithm has two
factors, an inverse and the product; the bounds above keep everything else below these.

Zeros that a mask stores are not held at 0, so that sparse schemes are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from octoc.errors import DataError, UsageError
from octoc.hessian import Hessian
from octoc.qtensor import Affine, Array, Palette, Scheme
from octoc.quantize import quadratic, require, to_rows
from octoc.quantize.palette import encode as cluster
from octoc.quantize.quadratic import Doubles, Floats, Grid, Ints, State, Steps, Store, Tables
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
_FITTED = 1 << 21  # weights that scales or tables are fitted to, and
_FEWEST = 512  # of each tile at least
_COMPARED = 1 << 33  # products in the error of one encoding

_USUAL: dict[str, Callable[..., Affine | Palette]] = {"affine": round_to_nearest, "palette": cluster}


@dataclass(frozen=True)
class _Problem:
    """Steps 1 and 2, in units of 2**exponent.

    Args:
        target: float32 [groups, rows, width].
        hessian: float32 [groups, width, width], positive definite, mean of the diagonal 1.
        succession: its feedback (`quadratic.succession`).
        order: [groups, width] of step 4.
        exponent: so that the target is at most about 1.
    """

    target: Floats
    hessian: Floats
    succession: Floats
    order: Ints
    exponent: int

    def wanted(self, shape: tuple[int, ...], dtype: str) -> Array:
        """The target as a weight of this shape, output channels first, within what `dtype` holds."""
        largest = float(np.finfo(dtype).max)
        with np.errstate(over="ignore"):
            weight = np.ldexp(self.target, self.exponent).reshape(shape)
        return np.clip(weight, -largest, largest, out=weight)

    def importance(self, shape: tuple[int, ...]) -> Array:
        """The diagonal for each element of such a weight, at most 1."""
        diagonal = np.einsum("gnn->gn", self.hessian)[:, None]
        return np.broadcast_to(diagonal / diagonal.max(), self.target.shape).reshape(shape)

    def compared(self) -> Ints:
        """Output channels that step 6 compares."""
        groups, rows, width = self.target.shape
        stride = max(1, math.ceil(self.target.size * width / _COMPARED))
        return np.arange(groups * rows).reshape(groups, rows)[:, ::stride].ravel()

    def error(self, decoded: Array) -> float:
        """Of those channels, decoded."""
        groups, rows, width = self.target.shape
        target = self.target.reshape(groups * rows, width)[self.compared()].reshape(groups, -1, width)
        rest = np.ldexp(decoded.reshape(target.shape), -self.exponent) - target
        return quadratic.error(rest.swapaxes(1, 2), self.hessian)


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
    rows = np.moveaxis(weight, axis, 0)
    grid = scheme.grid(rows.shape, 0)
    first = _fit(problem, scheme, rows.shape, dtype)
    found = _stored(_descend(problem, *_grid(problem, scheme, first, dtype)), problem, scheme, rows.shape, first)

    compared = problem.compared()
    alone = grid[0] == len(rows)  # no other row changes how a row is rounded
    plain = _USUAL[scheme.kind](rows[compared] if alone else rows, scheme, 0, dtype=dtype)
    pair = (_part(found, compared), plain) if alone else (found, plain)
    ours, theirs = (problem.error(q.dequantize() if alone else q.dequantize()[compared]) for q in pair)
    if ours < theirs:
        return _channels_at(found, axis)
    if len(plain.codes) < len(rows):
        plain = _USUAL[scheme.kind](rows, scheme, 0, dtype=dtype)
    return _channels_at(plain, axis)


def _part(stored: Affine | Palette, channels: Ints) -> Affine | Palette:
    """Some output channels, where each has scales or tables of its own."""
    if isinstance(stored, Affine):
        return replace(stored, codes=stored.codes[channels], scale=stored.scale[channels])
    return replace(stored, codes=stored.codes[channels], table=stored.table[channels])


def _channels_at(stored: Affine | Palette, axis: int) -> Affine | Palette:
    """With the output channels, that are first, moved to this axis."""
    codes = np.ascontiguousarray(np.moveaxis(stored.codes, 0, axis))
    if isinstance(stored, Affine):
        return replace(stored, codes=codes, scale=np.ascontiguousarray(np.moveaxis(stored.scale, 0, axis)))
    return replace(stored, codes=codes, table=np.ascontiguousarray(np.moveaxis(stored.table, 0, axis)))


def _problem(weight: Array, axis: int, hessian: Hessian) -> _Problem:
    matrix, diagonal = hessian.matrix, np.einsum("gnn->gn", hessian.matrix)
    if not np.isfinite(matrix).all() or (diagonal < 0).any():
        raise DataError("the Hessian holds NaN, infinite values, or negative ones on its diagonal")
    mean = diagonal.mean(axis=1)
    more = np.where(mean > 0, DAMPING * mean, 1)[:, None]
    unit = (mean[:, None] + more).mean()
    damped = np.empty(matrix.shape, np.float32)
    np.divide(matrix, unit, out=damped, casting="same_kind")
    np.einsum("gnn->gn", damped)[...] = (diagonal + more) / unit
    order = np.argsort(-diagonal, axis=1, kind="stable")
    target: Array = hessian.rows(weight, axis, np.float32)
    factor = quadratic.factor(matrix, more, order)
    if hessian.cross.any():
        target = target + TRUST * quadratic.solve(factor, order, hessian.cross)
    exponent = int(np.frexp(max(target.max(initial=0), -target.min(initial=0)))[1])
    target = np.ldexp(target, -exponent).astype(np.float32, copy=False)
    return _Problem(target, damped, quadratic.succession(factor), order, exponent)


def _fit(problem: _Problem, scheme: Scheme, shape: tuple[int, ...], dtype: str) -> Array:
    """Step 3: scales [*grid] or tables [*grid, entries]."""
    grid = scheme.grid(shape, 0)
    tiles, counts = to_rows(problem.wanted(shape, dtype), grid), to_rows(problem.importance(shape), grid)
    size = max(_FEWEST, _FITTED // len(tiles))
    if tiles.shape[1] >= 2 * size:
        step = max(1, _FITTED // tiles.shape[1])  # few at a time take little memory
        parts = [_sample(tiles[i : i + step], counts[i : i + step], size) for i in range(0, len(tiles), step)]
        tiles, counts = (np.concatenate(part) for part in zip(*parts, strict=True))
    whole = replace(scheme, granularity="channel", group_size=0)
    first = _USUAL[scheme.kind](tiles, whole, 0, dtype=dtype, importance=counts)
    if isinstance(first, Palette):
        tables: Array = first.table.reshape(*grid, -1)
        return tables
    if scheme.bits > _TURNED:
        scales: Array = first.scale.reshape(grid)
        return scales
    second = round_to_nearest(-tiles, whole, 0, dtype=dtype, importance=counts)
    one, other = (
        (counts * np.square(tiles.astype(np.float64) - sign * q.dequantize())).sum(axis=1, keepdims=True)
        for sign, q in ((1, first), (-1, second))
    )
    return np.where(other < one, -second.scale, first.scale).reshape(grid)


def _sample(tiles: Array, counts: Array, size: int) -> tuple[Array, Array]:
    """Of each tile `size` weights evenly spread that count for all others, and an eighth as many, the largest.

    Args:
        tiles: [tiles, elements].
        counts: how much each element counts, at most 1, the same shape.
        size: at most half the elements.
    """
    stride = tiles.shape[1] // size
    columns = np.arange(size) * stride + np.random.default_rng(0).integers(0, stride, size)  # no multiple of a kernel
    magnitude = np.abs(tiles)
    largest = np.argpartition(magnitude, -(size // 8), axis=1)[:, -(size // 8) :]
    limit = np.take_along_axis(magnitude, largest, 1).min(axis=1, keepdims=True)
    spread = tiles.take(columns, 1)
    shares = counts.take(columns, 1) * (np.abs(spread) < limit)
    taken = np.take_along_axis(tiles, largest, 1), np.take_along_axis(counts, largest, 1) / np.float32(stride)
    return np.concatenate([taken[0], spread], 1), np.concatenate([taken[1], shares], 1)


def _grid(problem: _Problem, scheme: Scheme, first: Array, dtype: str) -> tuple[Grid, Store]:
    """The grid of the usual method in the problem's units, and what rounds parameters as they are stored."""
    groups, rows, _ = problem.target.shape
    info = np.finfo(dtype)
    smallest, largest = 0.0, float(info.max)
    low, high = code_range(scheme.bits)
    if scheme.kind == "affine":
        smallest = float(info.smallest_normal)
        largest = float(np.nextafter(np.asarray(largest / -low, dtype), np.asarray(0, dtype)))

    def store(parameters: Doubles) -> Floats:
        size = np.clip(np.ldexp(np.abs(parameters), problem.exponent), smallest, largest)
        rounded = np.copysign(size, parameters).astype(dtype)
        units: Floats = np.ldexp(rounded.astype(np.float64), -problem.exponent).astype(np.float32)
        return units

    parameters = store(np.ldexp(first.astype(np.float64).ravel(), -problem.exponent))
    if scheme.kind == "affine":
        places = np.arange(first.size).reshape(len(first), -1)
        tiles = np.broadcast_to(places, (groups * rows, places.shape[1]))
        share = np.ascontiguousarray(tiles.reshape(groups, rows, -1).swapaxes(1, 2))
        return Steps(parameters, share, low, high), store
    entries = first.shape[-1]
    which = np.arange(groups * rows) * (first.size // entries) // (groups * rows)
    return Tables(parameters, which.reshape(groups, rows), entries), store


def _descend(problem: _Problem, grid: Grid, store: Store) -> State:
    """Steps 4 and 5."""
    target, hessian, order = np.ascontiguousarray(problem.target.swapaxes(1, 2)), problem.hessian, problem.order
    best = quadratic.sweep(target, problem.succession, grid, order)
    rounds = min(_ROUNDS, _WORK // max(1, target.size * target.shape[1]))
    if not rounds:
        return best
    least = quadratic.error(best.rest, hessian)
    feedback = quadratic.relaxation(hessian, order)
    for _ in range(rounds):
        fitted = quadratic.refit(target, hessian, best, store)
        state = quadratic.sweep(target, feedback, fitted.grid, order, fitted.rest)
        found = quadratic.error(state.rest, hessian)
        before = least
        if found < least:
            best, least = state, found
        if found > (1 - _ENOUGH) * before:
            break
    return best


def _stored(state: State, problem: _Problem, scheme: Scheme, shape: tuple[int, ...], first: Array) -> Affine | Palette:
    """Output channels first."""
    dtype = np.int8 if scheme.kind == "affine" else np.uint8
    codes = np.ascontiguousarray(state.codes.astype(dtype).swapaxes(1, 2)).reshape(shape)
    exact = np.ldexp(state.grid.parameters.astype(np.float64), problem.exponent)
    parameters = exact.reshape(first.shape).astype(first.dtype)
    if scheme.kind == "affine":
        return Affine(codes, parameters, bits=scheme.bits)
    return Palette(codes, parameters, scheme.bits)
