"""Streaming statistics: one pass over the calibration samples, memory that does not grow with their number."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BINS = 2048
_SMALL, _LARGE = 1e-30, 1e38  # limits between which float32 computes the bin of a value


class Histogram:
    """A histogram of float values whose range grows by doubling.

    The range is [-limit, limit] with limit a power of two times the first batch's largest magnitude; when a value lies
    outside, neighbouring bins are merged in pairs until it fits, so that the result depends on the batches only
    through the first one's magnitude. Minimum and maximum are kept exactly.
    """

    def __init__(self) -> None:
        self.limit = 0.0
        self.counts: NDArray[np.float64] = np.zeros(BINS)
        self.lowest = np.inf
        self.highest = -np.inf

    def update(self, values: NDArray[np.float32]) -> None:
        """Counts finite values; infinities (attention masks) are left out.

        Args:
            values: any shape.
        """
        values = values.ravel()
        low, high = float(values.min(initial=np.inf)), float(values.max(initial=-np.inf))
        if not (np.isfinite(low) and np.isfinite(high)):
            values = values[np.isfinite(values)]
            low, high = float(values.min(initial=np.inf)), float(values.max(initial=-np.inf))
        if values.size == 0:
            return
        self.lowest, self.highest = min(self.lowest, low), max(self.highest, high)
        reach = max(-low, high)
        if reach == 0:
            self.counts[BINS // 2] += values.size
            return
        if self.limit == 0:
            zeros = self.counts[BINS // 2]
            self.limit = reach
            self.counts[:] = 0
            self.counts[BINS // 2] = zeros
        while reach > self.limit:
            self.limit *= 2
            merged = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts[:] = 0
            self.counts[BINS // 4 : BINS // 4 + BINS // 2] = merged
        width = 2 * self.limit / BINS
        # float32 is twice as fast, but its width is 0 at one end and its sum infinite at the other
        kind = np.float32 if _SMALL < self.limit < _LARGE else np.float64
        index = np.minimum((values + kind(self.limit)) / kind(width), BINS - 1).astype(np.int32)
        self.counts += np.bincount(index, minlength=BINS)

    @property
    def centres(self) -> NDArray[np.float64]:
        """Middle of each bin, [BINS]."""
        width = 2 * self.limit / BINS
        return np.asarray(-self.limit + width * (np.arange(BINS) + 0.5), dtype=np.float64)
