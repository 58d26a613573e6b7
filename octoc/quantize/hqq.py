"""Half-quadratic quantization: scale and zero point from the weights alone, robust against outliers.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023. With codes q, scale s and zero
point z of a tile it seeks the least sum of |w - s (q - z)|^p, p < 1, by splitting off the error e:

    F = sum |e|^p + beta / 2 (w - s (q - z) - e)^2,   everything in units of the tile's first scale.

1. Divide by a power of two, so that nothing overflows. Start at the range of the weights with 0 in it, clipped by
   several ratios: F has many local minima.
2. For the scale and zero point at hand the nearest code and then e = prox(w - s (q - z)) together are the exact
   minimum, because the least F over e rises with the distance. The prox is that of |e|^p itself, found by iteration
   (Zuo et al., "A Generalized Iterated Shrinkage Algorithm", 2013), and not its first step, so that F never rises.
3. z = mean(q - (w - e) / s), the minimum for these q and e; then 2 again, with beta a little larger, as in the paper.
4. The formats store whole zero points: round z down and up, and fit the scale anew by the same splitting,
   s = <q - z, w - e> / <q - z, q - z>.
5. Round the scale to the dtype it is stored in. Of all starts, and of the scales before and after step 4, keep that
   with the least squared error of what is stored: the splitting decides where to look, the squared error what to keep.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from octoc.qtensor import Affine, Array, Scheme
from octoc.quantize import from_rows, require, to_rows

KIND = "encode"
ENCODES = ("asymmetric",)
NEEDS = ()

POWER = 0.7  # p, beta, its growth and the rounds are the paper's
_BETA = 10.0
_GROWTH = 1.01
_ROUNDS = 20
_REFITS = 5  # of step 4
_CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # of step 1; the range of 2 bits is clipped the most
_BLOCK = 1 << 15  # elements worked on at a time, so that buffers stay in the cache

Floats = NDArray[np.float64]


def encode(weight: Array, scheme: Scheme, axis: int, *, dtype: str, importance: Array | None = None) -> Affine:
    """Rounds a weight to unsigned integers, one scale and zero point a tile.

    Args:
        weight: float32, any shape, finite.
        scheme: of kind "asymmetric", 2 to 8 bits.
        axis: output-channel axis of the weight.
        dtype: of the scale.
        importance: how much the error of each element counts, at most 1, the weight's shape; None: alike.

    Raises:
        ModelError: weights beyond the range of `dtype`.
        UsageError: the scheme does not fit.
    """
    require(scheme, ENCODES, weight, dtype)
    grid = scheme.grid(weight.shape, axis)
    rows = to_rows(weight, grid)
    counts = np.ones(rows.shape, np.bool_) if importance is None else to_rows(importance, grid)
    codes = np.empty(rows.shape, np.uint8)
    scale, zero = np.empty(len(rows), dtype), np.empty(len(rows), np.uint8)
    step = max(1, _BLOCK // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        block = slice(start, start + step)
        codes[block], scale[block], zero[block] = _encode_rows(
            rows[block].astype(np.float64), counts[block].astype(np.float64), 2**scheme.bits - 1, dtype
        )
    return Affine(
        from_rows(codes, weight.shape, grid), scale.reshape(grid), zero.reshape(grid), scheme.bits, signed=False
    )


def _encode_rows(rows: Floats, counts: Floats, high: int, dtype: str) -> tuple[Array, Array, Array]:
    """Codes [rows, elements], scales [rows] and zero points [rows]."""
    low, top = rows.min(axis=1, initial=0), rows.max(axis=1, initial=0)
    exponent = np.frexp(top - low)[1]
    unit = np.ldexp(rows, -exponent[:, None])
    span = np.ldexp(top - low, -exponent)
    flat = span == 0  # zeros throughout
    best: tuple[Array, ...] = ()
    for clip in _CLIPS:
        scale = np.where(flat, 1, span * clip / high)
        ratio = unit / scale[:, None]
        real = solve_zero(ratio, counts, -np.ldexp(low, -exponent) / scale, high)
        for zero in (np.clip(np.floor(real), 0, high), np.clip(np.ceil(real), 0, high)):
            for factor in (np.ones(len(rows)), solve_scale(ratio, counts, zero, high)):
                stored = _storable(np.ldexp(np.where(flat, 0, scale * factor), exponent), dtype)
                found = _stored(unit, counts, stored, zero, exponent, high)
                best = (
                    tuple(_where(found[0] < best[0], *pair) for pair in zip(found, best, strict=True))
                    if best
                    else found
                )
    _, codes, stored, zero = best
    return codes.astype(np.uint8), stored, zero.astype(np.uint8)


def _stored(
    unit: Floats, counts: Floats, scale: Array, zero: Floats, exponent: Array, high: int
) -> tuple[Floats, Floats, Array, Floats]:
    """Squared error [rows] of what is stored, in units of 4**exponent, and codes, scale and zero point with it."""
    in_units = np.ldexp(scale.astype(np.float64), -exponent)[:, None]
    codes = _storable_codes(_codes(unit / in_units, zero, high), zero, scale)
    error = np.einsum("ij,ij->i", counts, np.square(unit - in_units * (codes - zero[:, None])))
    return error, codes, scale, zero


def _where(better: Array, new: Array, old: Array) -> Array:
    return np.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)


def solve_zero(
    ratio: Floats, counts: Floats, zero: Floats, high: int, rounds: int = _ROUNDS, growth: float = _GROWTH
) -> Floats:
    """Steps 2 and 3.

    Args:
        ratio: [rows, elements] weights divided by the scale.
        counts: [rows, elements] how much each error counts, not all 0 in a row.
        zero: [rows] zero points to start from.
        high: highest code; the lowest is 0.
        rounds: alternations.
        growth: factor of beta after each.

    Returns:
        Zero points [rows], not rounded.
    """
    beta, mass = _BETA, counts.sum(axis=1)
    for _ in range(rounds):
        codes, rest = split(ratio, zero, high, beta)
        zero = np.einsum("ij,ij->i", counts, codes - ratio + rest) / mass
        beta *= growth
    return zero


def solve_scale(ratio: Floats, counts: Floats, zero: Floats, high: int, rounds: int = _REFITS) -> Floats:
    """Step 4: the factor [rows] on the scale, at least half of it and at most twice; arguments as in `solve_zero`."""
    factor = np.ones(len(ratio))
    for _ in range(rounds):
        codes, rest = split(ratio, zero, high, _BETA, factor)
        steps = codes - zero[:, None]
        norm = np.einsum("ij,ij,ij->i", counts, steps, steps)
        fitted = np.einsum("ij,ij,ij->i", counts, steps, ratio - rest) / np.where(norm > 0, norm, 1)
        factor = np.where(norm > 0, np.clip(fitted, 0.5, 2), factor)
    return factor


def split(ratio: Floats, zero: Floats, high: int, beta: float, factor: Floats | None = None) -> tuple[Floats, Floats]:
    """Step 2: codes and split-off errors [rows, elements], for a scale of `factor` [rows] (1 where None)."""
    scale = np.ones(len(ratio)) if factor is None else factor
    codes = _codes(ratio / scale[:, None], zero, high)
    return codes, shrink(ratio - scale[:, None] * (codes - zero[:, None]), beta)


def shrink(x: Floats, beta: float, power: float = POWER) -> Floats:
    """argmin_e |e|^power + beta / 2 (x - e)^2, element by element."""
    # Below the threshold 0 is the minimum; above it the iteration rises to the other one from any start above.
    least = (2 * (1 - power) / beta) ** (1 / (2 - power))
    threshold = least + power / beta * least ** (power - 1)
    magnitude = np.abs(x)
    kept = magnitude > threshold
    size = np.where(kept, magnitude, 1.0)
    e = size
    for _ in range(4):
        e = np.where(kept, size - power / beta * e ** (power - 1), 1.0)
    return np.where(kept, np.sign(x) * e, 0.0)


def _codes(ratio: Floats, zero: Floats, high: int) -> Floats:
    """Nearest codes, as floats."""
    codes: Floats = np.clip(np.rint(ratio + zero[:, None]), 0, high)
    return codes


def _storable(scale: Floats, dtype: str) -> Array:
    """Step 5; rows of zeros, whose scale is 0, get 1. A subnormal scale is 0 on hardware that flushes them."""
    info = np.finfo(dtype)
    rounded = np.clip(scale, float(info.smallest_normal), float(info.max)).astype(dtype)
    return np.where(scale > 0, rounded, np.asarray(1, dtype))


def _storable_codes(codes: Floats, zero: Floats, scale: Array) -> Floats:
    """Codes whose product with the scale does not overflow its dtype."""
    most = np.floor(float(np.finfo(scale.dtype).max) / scale.astype(np.float64))
    return np.clip(codes, (zero - most)[:, None], (zero + most)[:, None])
