"""Tensors in training: rows of tiles in torch, and what of them may be stored.

A tile is what shares one scale or table. All work is done on rows [tiles, elements], each element in units of the
distance between neighbouring codes, so that one learning rate serves weights of any size and any bits: what there is to
learn is of the size of a rounding error. A float that is stored is made of them at the end, once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from octoc.qtensor import Affine, Array, Palette, QTensor, Sparse

_LEAST = 2.0**-100  # of a unit, so that weights in units of it stay finite


class Part(Protocol):
    """A tensor in training."""

    def parameters(self) -> dict[str, Tensor]:
        """What is trained, by the group of its learning rate."""
        ...

    def weight(self) -> Tensor:
        """The tensor as its parameters mean it now, differentiable, float32 of its shape."""
        ...


class Coded(Part, Protocol):
    """A compressed weight in training."""

    def hard(self) -> QTensor:
        """The codes as they are now, storable."""
        ...


def to_rows(weight: Tensor, grid: tuple[int, ...]) -> Tensor:
    """[tiles, elements] of a weight, tiles in C order of the grid; each size of the grid divides the weight's."""
    split = [part for g, size in zip(grid, weight.shape, strict=True) for part in (g, size // g)]
    order = [*range(0, len(split), 2), *range(1, len(split), 2)]
    return weight.reshape(split).permute(order).reshape(int(np.prod(grid)), -1)


def from_rows(rows: Tensor, shape: tuple[int, ...], grid: tuple[int, ...]) -> Tensor:
    """The inverse of `to_rows`."""
    rank = len(shape)
    tile = [size // g for g, size in zip(grid, shape, strict=True)]
    order = [axis for i in range(rank) for axis in (i, rank + i)]
    return rows.reshape(*grid, *tile).permute(order).reshape(shape)


def grid_of(tensor: Affine | Palette) -> tuple[int, ...]:
    """Shape of the scale, or of the grid of tables."""
    return tuple(tensor.scale.shape if isinstance(tensor, Affine) else tensor.table.shape[:-1])


def code_range(tensor: Affine) -> tuple[int, int]:
    """Codes that may be used; above 4 bits without the lowest, as integer kernels want, where none has it yet."""
    if not tensor.signed:
        return 0, 2**tensor.bits - 1
    high = 2 ** (tensor.bits - 1) - 1
    whole = tensor.bits <= 4 or tensor.zero_point is not None
    return (-high - 1 if whole or tensor.codes.min(initial=0) < -high else -high), high


def trainable(tensor: QTensor) -> bool:
    """Whether a tensor has codes to learn; 32-bit biases follow from weights, a cast has none."""
    dense = tensor.dense if isinstance(tensor, Sparse) else tensor
    return isinstance(dense, Palette) or (isinstance(dense, Affine) and dense.bits <= 8)


class AffineRows:
    """An affine tensor as rows of codes less zero points.

    Args:
        tensor: the codes.
        weight: what they stand for, float32.

    Attributes:
        codes: [tiles, elements], less the zero point.
        values: [tiles, elements] the weight in steps of its tile.
        low, high: [tiles, 1] lowest and highest code, less the zero point.
        scale: float32 [tiles, 1].
        reach: [tiles, 1] magnitude of the furthest code.
    """

    def __init__(self, tensor: Affine, weight: Tensor) -> None:
        self.tensor, self.grid = tensor, grid_of(tensor)
        self.scale = torch.from_numpy(tensor.scale.astype(np.float32)).reshape(-1, 1)
        zero = np.zeros(tensor.scale.shape) if tensor.zero_point is None else tensor.zero_point
        self.zero = torch.from_numpy(zero.astype(np.float32)).reshape(-1, 1)
        self.codes = to_rows(torch.from_numpy(tensor.codes.astype(np.float32)), self.grid) - self.zero
        self.values = to_rows(weight.detach().float(), self.grid) / self.scale
        low, high = code_range(tensor)
        self.low, self.high = low - self.zero, high - self.zero
        self.reach = torch.maximum(-self.low, self.high).clamp_min(1)

    def factor(self, change: Tensor) -> Tensor:
        """What scales are multiplied by: a change of 1 moves the furthest code by its step, so that scales of many bits
        are not shaken by more than a rounding error. Never less than a hundredth."""
        return (1 + change / self.reach).clamp_min(0.01)

    def shaped(self, rows: Tensor) -> Tensor:
        return from_rows(rows, self.tensor.shape, self.grid)

    def stored(self, codes: Tensor, factor: Tensor) -> Affine:
        """The tensor with other codes [tiles, elements] and scales multiplied by a factor [tiles, 1]."""
        info = np.finfo(self.tensor.scale.dtype)
        scale = (self.scale.double() * factor.detach().double()).clamp_min(float(info.smallest_normal))
        limit = float(info.max) * (1 - float(info.eps))  # so that neither the scale nor a product with it overflows
        scale = torch.minimum(scale, limit / self.reach.double())
        whole = torch.minimum(torch.maximum(codes.detach(), self.low), self.high) + self.zero
        return replace(
            self.tensor,
            codes=self.shaped(whole).numpy().astype(self.tensor.codes.dtype),
            scale=scale.numpy().astype(self.tensor.scale.dtype).reshape(self.tensor.scale.shape),
        )


class PaletteRows:
    """A palette as rows of indices.

    Args:
        tensor: the indices and tables.
        weight: what they stand for, float32.

    Attributes:
        codes: int64 [tiles, elements].
        values: [tiles, elements] the weight in units.
        table: [tiles, entries] in units.
        unit: [tiles, 1] about the mean distance between entries, a power of two, so that what is not trained stays as
            it was.
    """

    def __init__(self, tensor: Palette, weight: Tensor) -> None:
        self.tensor, self.grid = tensor, grid_of(tensor)
        table = torch.from_numpy(tensor.table.astype(np.float32)).reshape(-1, tensor.table.shape[-1])
        span = (table[:, -1:] - table[:, :1]) / (table.shape[1] - 1)
        size = torch.where(span > 0, span, table.abs().amax(1, keepdim=True)).clamp_min(_LEAST)
        self.unit = torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent)
        self.codes = to_rows(torch.from_numpy(tensor.codes.astype(np.int64)), self.grid)
        self.values = to_rows(weight.detach().float(), self.grid) / self.unit
        self.table = table / self.unit

    def shaped(self, rows: Tensor) -> Tensor:
        return from_rows(rows, self.tensor.shape, self.grid)

    def stored(self, codes: Tensor, table: Tensor) -> Palette:
        """The palette with other codes and tables, sorted anew; of equal entries the first is used."""
        dtype = self.tensor.table.dtype
        limit = float(np.finfo(dtype).max)
        entries = np.clip((table.detach() * self.unit).double().numpy(), -limit, limit).astype(dtype)
        order = np.argsort(entries, axis=1, kind="stable")
        entries = np.take_along_axis(entries, order, axis=1)
        place = np.argsort(order, axis=1, kind="stable")
        first = np.stack([np.searchsorted(row, row) for row in entries])
        moved = np.take_along_axis(np.take_along_axis(first, place, axis=1), codes.numpy(), axis=1)
        shaped = self.shaped(torch.from_numpy(moved)).numpy()
        return replace(self.tensor, codes=shaped.astype(np.uint8), table=entries.reshape(self.tensor.table.shape))


class Masked:
    """A sparse weight in training: what is masked stays zero.

    Args:
        dense: the weight without its mask.
        mask: True where it is stored.
    """

    def __init__(self, dense: Coded, mask: Array) -> None:
        self.dense, self.mask, self._kept = dense, mask, torch.from_numpy(mask)

    def parameters(self) -> dict[str, Tensor]:
        return self.dense.parameters()

    def weight(self) -> Tensor:
        return self.dense.weight() * self._kept

    def hard(self) -> Sparse:
        dense = self.dense.hard()
        assert isinstance(dense, Affine | Palette)
        return Sparse(self.mask, replace(dense, codes=np.where(self.mask, dense.codes, dense.codes.dtype.type(0))))


def groups(parts: Mapping[str, Part]) -> dict[str, dict[str, Tensor]]:
    """Parameters by group of learning rate, then by name of the tensor."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, part in parts.items():
        for group, parameter in part.parameters().items():
            found.setdefault(group, {})[name] = parameter
    return found


class FloatTraining:
    """A vector of floats in training, in units of its mean magnitude."""

    def __init__(self, vector: Tensor) -> None:
        mean = float(vector.abs().mean())
        self.start, self.unit = vector.detach(), mean if mean > 0 else 1.0
        self.change = torch.zeros_like(vector).requires_grad_()

    def parameters(self) -> dict[str, Tensor]:
        return {"float": self.change}

    def weight(self) -> Tensor:
        return self.start + self.change * self.unit
