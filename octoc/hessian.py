"""The quadratic error of a layer, summed up batch by batch in memory that does not grow with the samples.

A layer with weights W, behind layers that are compressed, sees inputs y and should add r to its outputs W y, so that
they become what the original network has there. With weights Q in place of W its error is

    E = sum over samples of |W y + r - Q y|^2

which is, up to a constant, the trace of (Q - V) H (Q - V)^T with

    H = sum y y^T      C = sum r y^T      V = W + C H^-1

so that H, C and the sums of y and r are all that a method needs. Li et al., "GPTAQ: Efficient Finetuning-Free
Quantization for Asymmetric Calibration", arXiv 2504.02692, minimise the same error column by column.

A layer whose bias is corrected afterwards has the least error over all biases: the same with y and r less their means.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike, NDArray

from octoc.errors import DataError
from octoc.qtensor import Array

_CHUNK = 4096  # samples that are summed in float32 before the sum goes to float64
_NOISE = 1e-5  # of the diagonal, above what float32 products round off

Floats = NDArray[np.float64]


class Hessian:
    """Sums over the inputs of one layer.

    Args:
        groups: of a convolution, each of which sees inputs of its own; 1 elsewhere.
        rows: outputs of one group.
        width: inputs that one output is computed from.
    """

    def __init__(self, groups: int, rows: int, width: int) -> None:
        self.count = 0
        self.matrix: Floats = np.zeros((groups, width, width))
        self.cross: Floats = np.zeros((groups, rows, width))
        self.inputs: Floats = np.zeros((groups, width))
        self.missing: Floats = np.zeros((groups, rows))

    def update(self, inputs: NDArray[np.float32], missing: NDArray[np.float32] | None = None) -> None:
        """Adds samples.

        Args:
            inputs: y, float32 [groups, samples, width].
            missing: r, float32 [groups, samples, rows]; None where nothing is missing.

        Raises:
            DataError: values that are NaN, infinite, or too large to be squared.
        """
        for start in range(0, inputs.shape[1], _CHUNK):
            y = inputs[:, start : start + _CHUNK]
            with np.errstate(over="ignore", invalid="ignore"):
                self.matrix += y.swapaxes(1, 2) @ y
                self.inputs += y.sum(axis=1, dtype=np.float64)
                if missing is not None:
                    r = missing[:, start : start + _CHUNK]
                    self.cross += r.swapaxes(1, 2) @ y
                    self.missing += r.sum(axis=1, dtype=np.float64)
        if not (np.isfinite(self.matrix).all() and np.isfinite(self.cross).all()):
            raise DataError("calibration gives a layer values that are NaN, infinite or too large for float32")
        self.count += inputs.shape[1]

    def centred(self) -> Hessian:
        """The sums over samples less their means, and `_NOISE` on the diagonal of H: the difference is rounded."""
        groups, rows, width = self.cross.shape
        result = Hessian(groups, rows, width)
        mean = self.inputs / max(1, self.count)
        result.count = self.count
        result.matrix = self.matrix - self.inputs[:, :, None] * mean[:, None]
        diagonal = np.einsum("gnn->gn", result.matrix)
        noise = _NOISE * np.einsum("gnn->gn", self.matrix)
        np.einsum("gnn->gn", result.matrix)[...] = np.maximum(diagonal, 0) + noise
        result.cross = self.cross - self.missing[:, :, None] * mean[:, None]
        return result

    def rows(self, weight: Array, axis: int, dtype: DTypeLike = np.float64) -> Array:
        """A weight as its rows, [groups, rows, width], in this dtype.

        Raises:
            DataError: the sums are of a layer of another shape.
        """
        if weight.size != self.cross.size or weight.shape[axis] != self.cross.shape[0] * self.cross.shape[1]:
            raise DataError(f"sums over a layer of {self.cross.shape} for a weight of shape {weight.shape}")
        return np.moveaxis(weight, axis, 0).reshape(self.cross.shape).astype(dtype, copy=False)

    def shift(self, weight: Array, decoded: Array, axis: int) -> Floats:
        """What its bias lacks once `decoded` stands for `weight`: mean of W y + r - Q y, [outputs]."""
        change = self.rows(weight, axis) - self.rows(decoded, axis)
        total: Floats = np.einsum("grn,gn->gr", change, self.inputs) + self.missing
        shift: Floats = total.ravel() / max(1, self.count)
        return shift
