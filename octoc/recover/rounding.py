"""Weights whose rounding is learned.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", arXiv 2004.10568 (AdaRound).

A weight lies between two neighbours, codes or entries of its table: low + h (high - low), with
h = clip(1.2 sigmoid(v) - 0.1, 0, 1) and v learned. At the end h is rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octoc.qtensor import Affine, Palette, QTensor, Sparse
from octoc.recover.codes import AffineRows, Coded, Masked, PaletteRows

_STRETCH = (-0.1, 1.1)
_MARGIN = 0.01  # how far h begins from where it would round to another code, and from the end of its slope


def rectified(v: Tensor) -> Tensor:
    """h of step 2."""
    low, high = _STRETCH
    return (torch.sigmoid(v) * (high - low) + low).clamp(0, 1)


def unrectified(h: Tensor) -> Tensor:
    """v of an h within (0, 1)."""
    low, high = _STRETCH
    return torch.logit((h - low) / (high - low))


def regulariser(h: Tensor, beta: float) -> Tensor:
    """1 - |2h - 1|^beta of each element; 0 where h is 0 or 1."""
    return 1 - (2 * h - 1).abs().pow(beta)


def begin(share: Tensor, upper: Tensor) -> Tensor:
    """v for weights that lie at `share` of the way to the upper neighbour and whose code is the upper one or not."""
    above = share.clamp(0.5 + _MARGIN, 1 - _MARGIN)
    below = share.clamp(_MARGIN, 0.5 - _MARGIN)
    return unrectified(torch.where(upper, above, below)).requires_grad_()


class AffineRounding:
    """Codes of an affine tensor between neighbours; scales are learned too."""

    def __init__(self, tensor: Affine, weight: Tensor) -> None:
        self.rows = rows = AffineRows(tensor, weight)
        upper = ((rows.values < rows.codes) | (rows.codes >= rows.high)) & (rows.codes > rows.low)
        self.base = rows.codes - upper.float()
        self.v = begin(rows.values - self.base, upper)
        self.change = torch.zeros_like(rows.scale).requires_grad_()

    def parameters(self) -> dict[str, Tensor]:
        return {"rounding": self.v, "scale": self.change}

    def share(self) -> Tensor:
        return rectified(self.v)

    def weight(self) -> Tensor:
        return self.rows.shaped((self.base + self.share()) * (self.rows.factor(self.change) * self.rows.scale))

    def hard(self) -> Affine:
        with torch.no_grad():
            return self.rows.stored(self.base + (self.share() >= 0.5), self.rows.factor(self.change))


class PaletteRounding:
    """Indices of a palette between neighbours in its table, which is learned too."""

    def __init__(self, tensor: Palette, weight: Tensor) -> None:
        self.rows = rows = PaletteRows(tensor, weight)
        last = rows.table.shape[1] - 1
        at = rows.table.gather(1, rows.codes)
        upper = ((rows.values < at) | (rows.codes >= last)) & (rows.codes > 0)
        self.base = rows.codes - upper.long()
        low, high = rows.table.gather(1, self.base), rows.table.gather(1, (self.base + 1).clamp_max(last))
        apart = high > low
        share = torch.where(apart, (rows.values - low) / torch.where(apart, high - low, 1), upper.float())
        self.v = begin(share, upper)
        self.table = rows.table.clone().requires_grad_()
        self.next = (self.base + 1).clamp_max(last)

    def parameters(self) -> dict[str, Tensor]:
        return {"rounding": self.v, "table": self.table}

    def share(self) -> Tensor:
        return rectified(self.v)

    def weight(self) -> Tensor:
        low, high = self.table.gather(1, self.base), self.table.gather(1, self.next)
        return self.rows.shaped((low + self.share() * (high - low)) * self.rows.unit)

    def hard(self) -> Palette:
        with torch.no_grad():
            return self.rows.stored(torch.where(self.share() >= 0.5, self.next, self.base), self.table)


def rounding(tensor: QTensor, weight: Tensor) -> Coded:
    """A compressed weight with learned rounding.

    Args:
        tensor: its codes.
        weight: the floats they stand for.
    """
    if isinstance(tensor, Sparse):
        return Masked(rounding(tensor.dense, weight), tensor.mask)
    if isinstance(tensor, Affine):
        return AffineRounding(tensor, weight)
    assert isinstance(tensor, Palette)
    return PaletteRounding(tensor, weight)


def share(part: Coded) -> Tensor:
    """h of a weight that `rounding` made, [tiles, elements]."""
    inner = part.dense if isinstance(part, Masked) else part
    assert isinstance(inner, AffineRounding | PaletteRounding)
    return inner.share()
