"""HIGGS: the least-error grid of a Gaussian, times a scale per group; data-free.

Malinovskii et al., "Pushing the Limits of Large Language Model Quantization via the Linearity Theorem", 2024
(arXiv 2411.17525). After a random Hadamard rotation (`octoc/quantize/rotate.py`) weights are close to Gaussian, so that
one table that is best for a Gaussian serves every tile:

1. The table: for single weights the quantizer of Max, "Quantizing for Minimum Distortion", 1960, and Lloyd, 1982, by
   its two conditions (an entry is the mean of its cell, a border lies midway between entries), from the closed form of
   the Gaussian's partial moments. For pairs of weights the same conditions in the plane, on a fine lattice of points.
2. The scale of a tile starts at the root of its mean square, the Gaussian's own scale, and at what brings the largest
   weight to the table's edge; between and around them more scales are tried, as few weights a scale are never exactly
   Gaussian.
3. From each, alternate: nearest entries v, then s = <v, w> / <v, v>, the best scale for these entries.
4. Round the scale to the dtype it is stored in, within its normal range and so that no entry times it overflows. The
   scale with the least squared error of what is stored is kept.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from scipy.special import ndtr, ndtri

from octoc.errors import ModelError
from octoc.qtensor import Array, Codebook, Scheme
from octoc.quantize import from_rows, largest, require, to_rows

KIND = "encode"
ENCODES = ("codebook",)
NEEDS = ()

_SCALES = tuple(np.geomspace(0.6, 1.6, 9))  # of step 2, relative to the root mean square
_ROUNDS = 3  # of step 3
_BLOCK = 1 << 15  # elements worked on at a time
_REACH, _SIDE = 6.0, 301  # the lattice of step 1: from -6 to 6 standard deviations, so many points a side
_LLOYD = 60  # its rounds

Floats = NDArray[np.float64]


def encode(weight: Array, scheme: Scheme, axis: int, *, dtype: str, importance: Array | None = None) -> Codebook:
    """Replaces each weight, or pair of neighbouring input channels, by the nearest entry times the scale of its tile.

    Args:
        weight: float32, any shape, finite; close to Gaussian where it was rotated.
        scheme: of kind "codebook", 2 to 8 bits.
        axis: output-channel axis of the weight.
        dtype: of the scales and the table.
        importance: how much the squared error of each element counts, at most 1, the weight's shape; None: alike.

    Raises:
        ModelError: weights beyond the range of `dtype`, for pairs beyond its root of 1/2.
        UsageError: the scheme does not fit.
    """
    require(scheme, ENCODES, weight, dtype)
    most = float(np.finfo(dtype).max) / np.sqrt(scheme.vector)  # the entries of a table of pairs fill a disc
    if largest(weight) > most:
        raise ModelError(f"the largest weight is {largest(weight):g}; pairs in {dtype} hold at most {most:g}")
    grid = scheme.grid(weight.shape, axis)
    table = gaussian_table(2**scheme.bits, scheme.vector).astype(dtype)
    along = 1 - axis if len(weight.shape) > 1 else 0
    parts = _vectors(weight, grid, along, scheme.vector)
    counts = None if importance is None else _vectors(importance, grid, along, scheme.vector)
    codes = np.empty(parts.shape[:2], np.uint8)
    scale = np.empty(len(parts), dtype)
    step = max(1, _BLOCK // max(1, parts[0].size))
    for start in range(0, len(parts), step):
        block = slice(start, start + step)
        codes[block], scale[block] = _encode_tiles(parts[block], None if counts is None else counts[block], table)
    sizes = list(weight.shape)
    sizes[along] //= scheme.vector
    return Codebook(from_rows(codes, tuple(sizes), grid), table, scale.reshape(grid), scheme.bits, along)


def _vectors(weight: Array, grid: tuple[int, ...], along: int, length: int) -> Floats:
    """float64 [tiles, vectors, length]; the vectors take neighbours of one axis."""
    sizes = list(weight.shape)
    split = weight.reshape(*sizes[:along], sizes[along] // length, length, *sizes[along + 1 :])
    parts = [to_rows(np.take(split, k, axis=along + 1), grid) for k in range(length)]
    return np.stack(parts, axis=-1).astype(np.float64)


def _encode_tiles(parts: Floats, counts: Floats | None, table: Array) -> tuple[Array, Array]:
    """Codes [tiles, vectors] and scales [tiles]."""
    peak = np.abs(parts).max(axis=(1, 2), initial=0)
    exponent = np.frexp(peak)[1]
    unit = np.ldexp(parts, -exponent[:, None, None])
    entries = table.astype(np.float64)
    mass = np.ones_like(unit) if counts is None else counts
    norm = np.sqrt(np.einsum("ijk,ijk,ijk->i", mass, unit, unit) / mass.sum(axis=(1, 2)))
    best: tuple[Array, ...] = ()
    for start in (np.ldexp(peak, -exponent) / np.abs(entries).max(), *(norm * factor for factor in _SCALES)):
        wished = start
        for _ in range(_ROUNDS):
            scale = _storable(np.ldexp(wished, exponent), table)
            in_units = np.ldexp(scale.astype(np.float64), -exponent)[:, None, None]
            codes = nearest(unit / in_units, counts, entries)
            chosen = entries[codes]
            error = np.einsum("ijk,ijk->i", mass, np.square(unit - in_units * chosen))
            found = (error, codes, scale)
            best = tuple(_where(error < best[0], *pair) for pair in zip(found, best, strict=True)) if best else found
            power = np.einsum("ijk,ijk,ijk->i", mass, chosen, chosen)
            fitted = np.einsum("ijk,ijk,ijk->i", mass, chosen, unit) / np.where(power > 0, power, 1)
            wished = np.where(fitted > 0, fitted, wished)
    return best[1].astype(np.uint8), best[2]


def _where(better: Array, new: Array, old: Array) -> Array:
    return np.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)


def nearest(vectors: Floats, counts: Floats | None, entries: Floats) -> Array:
    """Index [...] of the entry nearest to each vector.

    Args:
        vectors: [..., length].
        counts: how much each element's squared error counts, like `vectors`; None: alike.
        entries: [n, length], ascending where the length is 1.
    """
    if entries.shape[1] == 1:
        codes: Array = np.searchsorted((entries[1:, 0] + entries[:-1, 0]) / 2, vectors[..., 0])
        return codes
    if counts is None:
        return np.asarray(_tree(entries.tobytes(), entries.shape[1]).query(vectors)[1])
    # sum_k c (x - t)^2, less what does not depend on the entry
    distance = counts @ np.square(entries).T - 2 * (counts * vectors) @ entries.T
    return np.asarray(distance.argmin(axis=-1))


@cache
def _tree(raw: bytes, length: int) -> cKDTree:
    return cKDTree(np.frombuffer(raw).reshape(-1, length))


def _storable(scale: Floats, table: Array) -> Array:
    """Step 4. Tiles of zeros get the least scale: the table holds no zero."""
    info = np.finfo(table.dtype)
    edge = float(np.abs(table.astype(np.float64)).max())
    limit = np.nextafter(np.asarray(float(info.max) / edge, table.dtype), np.asarray(0, table.dtype))
    return np.clip(scale, float(info.smallest_normal), float(limit)).astype(table.dtype)


@cache
def gaussian_table(entries: int, length: int) -> Floats:
    """Step 1: the [entries, length] of least mean squared error for independent standard Gaussians.

    Args:
        entries: a power of two.
        length: 1 or 2.
    """
    if length == 1:
        return _lloyd_max(entries)[:, None]
    side = np.linspace(-_REACH, _REACH, _SIDE)
    points = np.stack(np.meshgrid(side, side, indexing="ij"), axis=-1).reshape(-1, 2)
    mass = np.exp(-np.square(points).sum(axis=1) / 2)
    table = _spiral(entries)
    for _ in range(_LLOYD):
        cell = cKDTree(table).query(points)[1]
        total = np.bincount(cell, mass, entries)
        sums = np.stack([np.bincount(cell, mass * points[:, k], entries) for k in range(2)], axis=1)
        table = np.where(total[:, None] > 0, sums / np.maximum(total, 1e-300)[:, None], table)
    return table


def _lloyd_max(entries: int) -> Floats:
    """The [entries] that meet the two conditions of step 1, ascending."""
    x: Floats = ndtri((np.arange(entries) + 0.5) / entries) * 1.2
    for _ in range(100_000):
        border = np.concatenate([[-np.inf], (x[1:] + x[:-1]) / 2, [np.inf]])
        density = np.exp(-np.square(border) / 2) / np.sqrt(2 * np.pi)
        mean = -np.diff(density) / np.diff(ndtr(border))
        mean = (mean - mean[::-1]) / 2  # the Gaussian is symmetric
        moved = float(np.abs(mean - x).max())
        x = mean
        if moved < 1e-12:
            break
    return x


def _spiral(entries: int) -> Floats:
    """Points [entries, 2] spread with the density of the best ones, the square root of the Gaussian's (Zador, 1982)."""
    rank = (np.arange(entries) + 0.5) / entries
    radius, turn = np.sqrt(-4 * np.log1p(-rank)), np.arange(entries) * np.pi * (3 - np.sqrt(5))
    return np.stack([radius * np.cos(turn), radius * np.sin(turn)], axis=1)
