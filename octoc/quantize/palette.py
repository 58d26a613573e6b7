"""Look-up tables by exact one-dimensional k-means.

Dynamic programming over sorted values is globally optimal: Wu, "Optimal quantization by matrix searching", 1991;
Grønlund et al., "Fast exact k-means, k-medians and Bregman divergence clustering in 1D", 2017. Both fill a table of
(clusters, values); here most of it is never looked at, because bounds prove that no optimal boundary lies there.

For each tile of weights that shares a table:

1. Sort; equal values become one with the sum of their importance. Prefix sums give the cost of any interval.
2. A few rounds of Lloyd's algorithm from quantiles give an upper bound U on the optimum.
3. Choose nodes: places where a boundary between clusters may stand. Between two nodes lies a bin of values.
4. Forward and backward dynamic programming over (clusters, nodes): F + G is the least cost with boundary m at a node.
5. Optimal centres, with each bin given whole to the centre nearest to its mean, cost more than the optimum by at most
   gap = (largest - smallest value) * max over bins of sum |w - mean|: a bin costs the concave function
   min_c (w - c)^2 - w^2, which bends by 2 (c_{m+1} - c_m) at boundary m (Jensen). So boundary m of the optimum lies
   beside a node where F + G <= U + gap. All other bins are dropped, for this m.
6. Split the bins that remain and go back to 4 until each holds one value. Then gap is 0 and the least path is optimal.
7. Round the centres to the dtype they are stored in, and give each weight the entry nearest to it.

Up to 32 clusters, or 2048 distinct values, this is exact up to the rounding of float64 sums: within 1e-10 of the sum
of squares about the mean. For more of both, step 4 begins with the nodes within about 16 clusters of the best path, and
step 5 keeps only those within a hundredth of gap of it. That is not proven optimal; on values of six distributions and
on weights of real convolutions, with 64 and 256 clusters, it found the optimum each time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from octoc.qtensor import Array, Palette, Scheme
from octoc.quantize import from_rows, require, to_rows

KIND = "encode"
ENCODES = ("palette",)
NEEDS = ()

_WHOLE = 384  # so few values need no bins
_LLOYD = 12  # rounds in step 2, and again after each level
_PROVEN = 32  # so many clusters, or
_FEW = 2048  # so few values, are always solved exactly
_WIDE = 64  # otherwise: bins to each side of a boundary that are searched first, about 16 clusters
_SHARE = 0.01  # otherwise: the part of the gap that is searched
_SLACK = 1e-11  # of the total sum of squares: what float64 sums may be off

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def encode(weight: Array, scheme: Scheme, axis: int, *, dtype: str, importance: Array | None = None) -> Palette:
    """Replaces each weight by an index into the best table of its tile.

    Args:
        weight: float32, any shape, finite.
        scheme: of kind "palette", 1 to 8 bits.
        axis: output-channel axis of the weight.
        dtype: of the tables.
        importance: how much the squared error of each element counts, at most 1, the weight's shape; None: alike. An
            element of importance 0 has no say in the table and takes the nearest entry.

    Returns:
        Codes and tables; every table has 2**bits entries, ascending, the last one repeated where fewer are needed.

    Raises:
        ModelError: weights beyond the range of `dtype`.
        UsageError: the scheme does not fit.
    """
    require(scheme, ENCODES, weight, dtype)
    grid = scheme.grid(weight.shape, axis)
    entries = 2**scheme.bits
    rows = to_rows(weight, grid)
    counts = None if importance is None else to_rows(importance, grid)
    tables = np.zeros((len(rows), entries), dtype)
    codes = np.zeros(rows.shape, np.uint8)
    for i, row in enumerate(rows):
        centres = cluster(row, entries, None if counts is None else counts[i])
        tables[i, : len(centres)] = centres
        tables[i, len(centres) :] = tables[i, len(centres) - 1]
        codes[i] = nearest(row, tables[i])
    return Palette(from_rows(codes, weight.shape, grid), tables.reshape(*grid, entries), scheme.bits)


def nearest(values: Array, table: Array) -> NDArray[np.uint8]:
    """Index of the entry nearest to each value; of two as near the lower, of equal entries the first.

    Args:
        values: any shape.
        table: [entries], ascending, at most 256.
    """
    exact = table.astype(np.float64)
    codes = np.searchsorted((exact[1:] + exact[:-1]) / 2, values.astype(np.float64))
    first = np.searchsorted(exact, exact).astype(np.uint8)
    return first[codes]


def cluster(values: Array, clusters: int, counts: Array | None = None) -> Floats:
    """Centres of the optimal k-means clustering of numbers.

    Args:
        values: [n], finite, n at least 1.
        clusters: at most so many centres.
        counts: [n] weights of the squared errors, not negative, not all 0; None: 1 each.

    Returns:
        The centres, ascending, float64; fewer than `clusters` where there are fewer distinct values.
    """
    points = _sort(values, counts)
    if len(points.x) <= clusters:
        return points.x + points.origin
    return _means(points, _optimal(points, clusters)) + points.origin


@dataclass(frozen=True)
class _Points:
    """Distinct values and prefix sums.

    Args:
        x: [n] ascending, less `origin`.
        origin: their mean, so that the sums lose little.
        mass: [n + 1] sum of counts of the first i.
        first: [n + 1] sum of counts times x.
        second: [n + 1] sum of counts times x squared.
        place: [n] rises by the square root of mass times width, so that equal steps of it make good bins.
    """

    x: Floats
    origin: float
    mass: Floats
    first: Floats
    second: Floats
    place: Floats


def _sort(values: Array, counts: Array | None) -> _Points:
    """Step 1."""
    if counts is None:
        ordered = np.sort(values, axis=None)
        starts = _starts(ordered)
        mass = np.diff(starts, append=len(ordered)).astype(np.float64)
    else:
        order = np.argsort(values, kind="stable")
        order = order[counts[order] > 0]
        ordered = values[order]
        starts = _starts(ordered)
        mass = np.add.reduceat(counts[order].astype(np.float64), starts)
    x = ordered[starts].astype(np.float64)
    origin = float(np.dot(x, mass) / mass.sum())
    x -= origin
    steps = np.sqrt((mass[1:] + mass[:-1]) * np.diff(x))
    weighted = mass * x
    sums = [np.concatenate([[0.0], np.cumsum(part)]) for part in (mass, weighted, weighted * x)]
    return _Points(x, origin, sums[0], sums[1], sums[2], np.concatenate([[0.0], np.cumsum(steps)]))


def _starts(ordered: Array) -> Ints:
    return np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))


def _cost(points: _Points, start: Array, stop: Array) -> Floats:
    """Sum of squares about the mean of the values start ... stop - 1; 0 where there are none."""
    mass = points.mass[stop] - points.mass[start]
    first = points.first[stop] - points.first[start]
    second = points.second[stop] - points.second[start]
    squared: Floats = np.maximum(second - first * first / np.where(mass > 0, mass, 1), 0)
    return squared


def _means(points: _Points, bounds: Ints) -> Floats:
    """Centres of the clusters between neighbouring bounds, those that are not empty."""
    bounds = np.unique(bounds)
    means: Floats = np.diff(points.first[bounds]) / np.diff(points.mass[bounds])
    return means


def _lloyd(points: _Points, bounds: Ints) -> tuple[float, Ints]:
    """Cost and bounds after a few rounds from these bounds."""
    for _ in range(_LLOYD):
        means = _means(points, bounds)
        inner = np.searchsorted(points.x, (means[1:] + means[:-1]) / 2)
        bounds = np.concatenate([[0], inner, np.full(len(bounds) - len(means), len(points.x))])
    return float(_cost(points, bounds[:-1], bounds[1:]).sum()), bounds


def _optimal(points: _Points, clusters: int) -> Ints:
    """Steps 2 to 6: bounds [clusters + 1] of the optimal clusters, as indices into the values."""
    n = len(points.x)
    proven = clusters <= _PROVEN or n <= _FEW
    slack = _SLACK * float(points.second[n])
    bins = max(_WHOLE // 2, (8 if proven else 4) * clusters)
    upper, _ = _lloyd(points, _quantiles(points, clusters))
    nodes = np.arange(n + 1) if n <= 2 * bins else np.unique(_quantiles(points, bins))
    # Boundary m may stand at the ends of bin i or inside.
    open_bins = np.ones((clusters + 1, len(nodes) - 1), np.bool_) if proven else _near(points, nodes, clusters)
    while True:
        allowed = _allowed(open_bins)
        gap = _gap(points, nodes, open_bins)
        sums = _sums(points, nodes)
        reach, path = _fill(sums, allowed, upper + gap + slack)
        bounds = nodes[path]
        if gap == 0:
            return bounds
        upper = min(upper, _lloyd(points, bounds)[0])
        mirrored = sums[:, -1:] - sums[:, ::-1]
        rest = _fill(mirrored, allowed[::-1, ::-1], upper + gap + slack)[0][::-1, ::-1]
        through = reach + rest
        if not proven:
            upper, gap = through.min(), gap * _SHARE
        kept = through <= upper + gap + slack
        nodes, open_bins = _refine(points, nodes, open_bins & (kept[:, :-1] | kept[:, 1:]), bins)


def _near(points: _Points, nodes: Ints, clusters: int) -> Bools:
    """Bins within `_WIDE` of the best boundaries, sought from where theory has them.

    The density of optimal centres goes as the cube root of that of the values (Panter and Dite, 1951).
    """
    places = np.concatenate([[0.0], np.cumsum(np.cbrt(np.diff(points.mass)[1:] * np.square(np.diff(points.x))))])
    inner = np.searchsorted(places, places[-1] * np.arange(1, clusters) / clusters, side="right")
    path = np.searchsorted(nodes, np.concatenate([[0], inner, [len(points.x)]]))
    sums, bins, best = _sums(points, nodes), np.arange(len(nodes) - 1), np.inf
    while True:
        open_bins: Bools = (bins >= path[:, None] - _WIDE) & (bins < path[:, None] + _WIDE)
        reach, path = _fill(sums, _allowed(open_bins), float(points.second[-1]))
        if reach[-1, -1] >= best:
            return open_bins
        best = reach[-1, -1]


def _quantiles(points: _Points, parts: int) -> Ints:
    """Bounds [parts + 1] of bins of like mass times width, some of them empty where values are few."""
    inner = np.searchsorted(points.place, points.place[-1] * np.arange(1, parts) / parts, side="right")
    return np.concatenate([[0], inner, [len(points.x)]])


def _sums(points: _Points, nodes: Ints) -> Floats:
    """Prefix sums at the nodes: [3, nodes] of mass, first and second moment."""
    return np.stack([points.mass[nodes], points.first[nodes], points.second[nodes]])


def _allowed(open_bins: Bools) -> Bools:
    """Nodes [clusters + 1, nodes] where each boundary may stand: the ends of its bins, and both ends of the whole."""
    padded = np.pad(open_bins, ((0, 0), (1, 1)))
    allowed = padded[:, :-1] | padded[:, 1:]
    allowed[[0, -1]] = False
    allowed[0, 0] = allowed[-1, -1] = True
    return allowed


def _split(points: _Points, start: Ints, stop: Ints, parts: int) -> Ints:
    """Nodes that split each of the bins start ... stop into about `parts` bins, both ends included."""
    low, high = points.place[start], points.place[stop - 1]
    targets = low[:, None] + (high - low)[:, None] * (np.arange(1, parts) / parts)
    inner = np.clip(np.searchsorted(points.place, targets, side="right"), start[:, None], stop[:, None])
    halves = (start + stop) // 2  # where values lie so close that their places are equal, at least this splits them
    return np.unique(np.concatenate([start, halves, stop, inner.ravel()]))


def _gap(points: _Points, nodes: Ints, open_bins: Bools) -> float:
    """Step 5: what rounding the optimal boundaries to nodes costs at most."""
    divisible = open_bins.any(axis=0) & (np.diff(nodes) > 1)
    start, stop = nodes[:-1][divisible], nodes[1:][divisible]
    if not len(start):
        return 0.0
    mean = (points.first[stop] - points.first[start]) / (points.mass[stop] - points.mass[start])
    middle = np.searchsorted(points.x, mean)
    below = mean * (points.mass[middle] - points.mass[start]) - (points.first[middle] - points.first[start])
    return float((points.x[-1] - points.x[0]) * 2 * below.max())


def _between(start: Floats, stop: Floats) -> Floats:
    """Cost of the clusters between prefix sums [3, ...] at their ends (mass, first, second)."""
    difference: Floats = stop - start
    mass, first, second = difference
    np.copyto(mass, 1.0, where=mass <= 0)
    first *= first
    first /= mass
    second -= first
    cost: Floats = np.maximum(second, 0, out=second)
    return cost


def _fill(sums: Floats, allowed: Bools, limit: float) -> tuple[Floats, Ints]:
    """Step 4, one way.

    Args:
        sums: [3, nodes] prefix sums at the nodes.
        allowed: [clusters + 1, nodes] where each boundary may stand.
        limit: costs above it need not be exact.

    Returns:
        Least cost [clusters + 1, nodes] of m clusters that end at a node, infinite where not allowed; and the nodes
        [clusters + 1] on the least path to the last node.
    """
    earliest = _earliest(sums, limit)
    reach = np.full(allowed.shape, np.inf)
    reach[0, 0] = 0.0
    before = np.zeros(1, np.int64)
    for m in range(1, len(allowed)):
        after = np.flatnonzero(allowed[m])
        reach[m, after] = _layer(sums, before, reach[m - 1, before], after, earliest)
        before = after
    path = [allowed.shape[1] - 1]
    for m in range(len(allowed) - 2, -1, -1):
        span = slice(earliest[path[-1]], path[-1] + 1)
        through = reach[m, span] + _between(sums[:, span], sums[:, path[-1], None])
        path.append(span.start + int(np.argmin(through)))
    return reach, np.array(path[::-1])


def _earliest(sums: Floats, limit: float) -> Ints:
    """For each node, the first from which one cluster to it costs at most `limit`."""
    node = np.arange(sums.shape[1])
    low, high = np.full(len(node), -1), node.copy()  # a cluster from low costs more, one from high does not
    while (high - low > 1).any():
        middle = (low + high + 1) // 2
        fits = _between(sums[:, middle], sums) <= limit
        low, high = np.where(fits, low, middle), np.where(fits, middle, high)
    return high


def _layer(sums: Floats, before: Ints, values: Floats, after: Ints, earliest: Ints) -> Floats:
    """Least of values[i] + cost(before[i], after[j]) for each j.

    The best i rises with j (the costs are Monge), so that two neighbouring samples of j bracket those between them.
    """
    start = np.searchsorted(before, earliest[after])
    stop = np.searchsorted(before, after, side="right")
    stride = 1 if len(after) < 32 else 8 if len(after) < 256 else 16
    sample = np.arange(0, len(after), stride)
    found, best = _least(sums, before, values, after[sample, None], start[sample], stop[sample, None])
    if stride == 1:
        return found[:, 0]
    first = best[:, 0]
    last = np.append(first[1:] + 1, stop[-1])
    rows = np.minimum(sample[:, None] + np.arange(stride), len(after) - 1)
    found, _ = _least(sums, before, values, after[rows], first, np.minimum(stop[rows], last[:, None]))
    return found.ravel()[: len(after)]


def _least(sums: Floats, before: Ints, values: Floats, after: Ints, start: Ints, stop: Ints) -> tuple[Floats, Ints]:
    """Least of values[i] + cost(before[i], after[b, j]) over start[b] <= i < stop[b, j], and that i.

    Infinite, at start[b], where there is no such i.
    """
    width = max(1, int((stop - start[:, None]).max()))
    column = start[:, None] + np.arange(width)  # [blocks, width]
    within = np.minimum(column, len(before) - 1)
    total = _between(sums[:, before[within]][:, :, None, :], sums[:, after][:, :, :, None])  # [blocks, rows, width]
    total += values[within][:, None, :]
    total[column[:, None, :] >= stop[:, :, None]] = np.inf
    best = total.argmin(axis=2)
    return np.take_along_axis(total, best[:, :, None], axis=2)[:, :, 0], best + start[:, None]


def _refine(points: _Points, nodes: Ints, open_bins: Bools, bins: int) -> tuple[Ints, Bools]:
    """Step 6: splits the bins that are open for any boundary, down to single values where these are few."""
    chosen = np.flatnonzero(open_bins[1:-1].any(axis=0))
    start, stop = nodes[chosen], nodes[chosen + 1]
    sizes = stop - start
    if sizes.sum() <= 8 * bins:
        inner = np.repeat(stop - np.cumsum(sizes), sizes) + np.arange(sizes.sum())
        fresh = np.unique(np.concatenate([nodes[[0, -1]], inner, stop]))
    else:
        inner = _split(points, start, stop, max(4, 4 * bins // len(start)))
        fresh = np.unique(np.concatenate([nodes[[0, -1]], inner]))
    parent = np.searchsorted(nodes, fresh[:-1], side="right") - 1
    return fresh, open_bins[:, parent] & np.isin(parent, chosen)
