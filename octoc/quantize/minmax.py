"""Rounding to nearest with the scale that just holds the largest weight: the textbook's baseline, at full speed.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018, in
its symmetric form for weights. A few tiles at a time, so that what is worked on stays in the cache:

1. scale = max|w| / high, rounded to the dtype it is stored in, a normal number with which no code overflows.
2. code = round(w / scale), ties to even. No scale rounds down so far that a code beyond `high` is asked for.

One large weight makes all others of its tile coarse; `rtn` searches for a better scale.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from octoc.qtensor import Affine, Array, Scheme
from octoc.quantize import from_rows, require, to_rows

KIND = "encode"
ENCODES = ("affine",)
NEEDS = ()

_BLOCK = 1 << 17  # elements worked on at a time: a quarter of what a core's second cache holds today


def encode(weight: Array, scheme: Scheme, axis: int, *, dtype: str, importance: Array | None = None) -> Affine:
    """Rounds a weight to integers, one scale a tile.

    Args:
        weight: float32, any shape, finite.
        scheme: of kind "affine", 2 to 8 bits.
        axis: output-channel axis of the weight.
        dtype: of the scale.
        importance: changes nothing: the scale follows from the range, and the nearest code is best for every element.

    Raises:
        ModelError: weights beyond the range of `dtype`.
        UsageError: the scheme does not fit.
    """
    require(scheme, ENCODES, weight, dtype)
    grid = scheme.grid(weight.shape, axis)
    rows = torch.from_numpy(np.require(to_rows(weight, grid), np.float32, "W"))
    codes = torch.empty(rows.shape, dtype=torch.int8)
    scale = torch.empty(len(rows), 1, dtype=getattr(torch, dtype))
    step = max(1, _BLOCK // max(1, rows.shape[1]))
    buffer = torch.empty(min(step, len(rows)), rows.shape[1])
    for each, coded, scaled in zip(
        torch.split(rows, step), torch.split(codes, step), torch.split(scale, step), strict=True
    ):
        _round(each, coded, scaled, 2 ** (scheme.bits - 1) - 1, buffer[: len(each)])
    return Affine(from_rows(codes.numpy(), weight.shape, grid), scale.numpy().reshape(grid), bits=scheme.bits)


def _round(rows: Tensor, codes: Tensor, scale: Tensor, high: int, buffer: Tensor) -> None:
    """Steps 1 and 2 into `codes` [rows, elements] and `scale` [rows, 1]; `buffer` is like `rows`."""
    info = torch.finfo(scale.dtype)
    peak = torch.abs(rows, out=buffer).amax(1, keepdim=True)
    # Just below the largest scale: high times the nearest number to max / high may be beyond max.
    most = info.max / high * (1 - info.eps)
    scale.copy_((peak / high).clamp(info.smallest_normal, most)).masked_fill_(peak == 0, 1)
    torch.div(rows, scale.float(), out=buffer).round_()
    codes.copy_(buffer)
