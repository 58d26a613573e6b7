"""Over which range a value becomes int8, from a streaming histogram of it: one function a method.

- minmax: all that was seen. Jacob et al., "Quantization and Training of Neural Networks for Efficient
  Integer-Arithmetic-Only Inference", 2018.
- percentile: all but 1 value of 10,000 on each side. Wu et al., "Integer Quantization for Deep Learning Inference",
  arXiv 2004.09602.
- mse: the range of least expected squared error, clipping against rounding.
- entropy: of the ranges that clip, the one after which the values' distribution is told worst apart from what it was.
  Migacz, "8-bit Inference with TensorRT", 2017, with both ends free in place of a symmetric range.

Zero always lies inside and has a code of its own: padding and ReLU are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octoc.errors import UsageError
from octoc.stats import Histogram

KIND = "ranges"
LOW, HIGH = -128, 127
TAIL = 1e-4  # share of the values that `percentile` clips on a side
_LEAST_SPAN = 1e-30  # values within less are zero; the scale of a clipped range stays a normal float32
_LEAST_SHARE = 1e-12  # of a code that no value has, where the logarithm of it is taken

Floats = NDArray[np.float64]
Chooser = Callable[[Floats, Floats, int], tuple[float, float]]


@dataclass(frozen=True)
class Range:
    """How one value becomes int8: code = round(value / scale) + zero_point, saturated to [-128, 127]."""

    scale: float
    zero_point: int


def choose_range(histogram: Histogram, slope: float = 1.0, steps: int = 100, method: str = "mse") -> Range:
    """The int8 range of a value.

    Args:
        histogram: of the value.
        slope: what a negative value is multiplied by afterwards; its error counts with the square.
        steps: clipping ratios tried on each side, by the methods that search.
        method: a key of `METHODS`.
    """
    if method not in METHODS:
        raise UsageError(f"no method {method!r} chooses ranges; there are {', '.join(METHODS)}")
    low, high = min(histogram.lowest, 0.0), max(histogram.highest, 0.0)
    if not np.isfinite(low) or not np.isfinite(high) or high - low < _LEAST_SPAN:
        return Range(1.0, 0)
    used = histogram.counts > 0
    values = np.clip(histogram.centres[used], low, high)
    weights = histogram.counts[used] * np.where(values < 0, slope * slope, 1.0)
    # the ends exactly: a bin's centre lies inside of them
    values, weights = np.concatenate([[low], values, [high]]), np.concatenate([[0.0], weights, [0.0]])
    return _to_range(*METHODS[method](values, weights, steps))


def _minmax(values: Floats, weights: Floats, steps: int) -> tuple[float, float]:
    return float(values[0]), float(values[-1])


def _percentile(values: Floats, weights: Floats, steps: int) -> tuple[float, float]:
    below = np.cumsum(weights)
    if below[-1] == 0:
        return _minmax(values, weights, steps)
    low, high = np.searchsorted(below, [TAIL * below[-1], (1 - TAIL) * below[-1]])
    return min(float(values[low]), 0.0), max(float(values[high]), 0.0)


def _mse(values: Floats, weights: Floats, steps: int) -> tuple[float, float]:
    return _descend(values, lambda found: float(weights @ np.square(_decode(values, found) - values)), steps)


def _entropy(values: Floats, weights: Floats, steps: int) -> tuple[float, float]:
    total = weights.sum()
    if total == 0:
        return _minmax(values, weights, steps)
    shares = weights / total

    def divergence(found: Range) -> float:
        """Kullback-Leibler, of the values from what each code says of those it holds: the same for all its bins."""
        inside = np.abs(_decode(values, found) - values) <= found.scale / 2
        codes = _codes(values, found) - LOW
        kept = np.bincount(codes[inside], shares[inside], HIGH - LOW + 1)
        bins = np.bincount(codes[inside & (shares > 0)], minlength=HIGH - LOW + 1)
        # clipped values are missing in what the codes say, and stand at the ends in what they are compared with
        wanted = np.where(inside, shares, 0.0)
        ends = np.flatnonzero(inside & (shares > 0))
        if ends.size == 0:
            return np.inf
        wanted[ends[0]] += shares[: ends[0]].sum()
        wanted[ends[-1]] += shares[ends[-1] + 1 :].sum()
        said = (kept / np.maximum(bins, 1))[codes] / max(float(kept.sum()), _LEAST_SHARE)
        some = wanted > 0
        return float(wanted[some] @ np.log(wanted[some] / np.maximum(said[some], _LEAST_SHARE)))

    return _descend(values, divergence, steps)


METHODS: dict[str, Chooser] = {"mse": _mse, "minmax": _minmax, "percentile": _percentile, "entropy": _entropy}


def _descend(values: Floats, cost: Callable[[Range], float], steps: int) -> tuple[float, float]:
    """Coordinate descent: the cost is nearly separable in the two ends, which only share the step."""
    low, high = float(values[0]), float(values[-1])
    best, lo, hi = cost(_to_range(low, high)), low, high
    for _ in range(2):
        for end, extreme in (("low", low), ("high", high)):
            if extreme == 0:
                continue
            for ratio in np.linspace(1.0, 0.02, steps):
                a, b = (low * ratio, hi) if end == "low" else (lo, high * ratio)
                found = cost(_to_range(a, b))
                if found < best:
                    best, lo, hi = found, a, b
    return lo, hi


def _to_range(low: float, high: float) -> Range:
    scale = float(np.float32((high - low) / (HIGH - LOW)))
    return Range(scale, int(np.clip(round(LOW - low / scale), LOW, HIGH)))


def _codes(values: Floats, found: Range) -> NDArray[Any]:
    return np.clip(np.round(values / found.scale) + found.zero_point, LOW, HIGH).astype(np.int64)


def _decode(values: Floats, found: Range) -> Floats:
    return np.asarray((_codes(values, found) - found.zero_point) * found.scale, dtype=np.float64)
