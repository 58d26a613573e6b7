"""Operations that look values up, order them, or make tensors from numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from octoc.runtime.mil.operation import Table, UnsupportedOperation


def _positive(indices: Tensor, size: int) -> Tensor:
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)


def gather(x: Tensor, indices: Tensor, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    axis %= x.dim()
    found = _positive(indices, x.shape[axis])
    if batch_dims == 0:
        picked = x.index_select(axis, found.reshape(-1))
        return picked.reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :])
    batch, before, after = x.shape[:batch_dims], x.shape[batch_dims:axis], x.shape[axis + 1 :]
    rows = x.reshape(math.prod(batch), math.prod(before), x.shape[axis], math.prod(after))
    found = found.reshape(math.prod(batch), 1, -1, 1)
    picked = torch.gather(rows, 2, found.expand(-1, rows.shape[1], -1, rows.shape[3]))
    return picked.reshape(batch + before + indices.shape[batch_dims:] + after)


def gather_along_axis(x: Tensor, indices: Tensor, axis: int = 0, validate_indices: bool = False) -> Tensor:
    return torch.gather(x, axis, _positive(indices, x.shape[axis]))


def _flat_rows(indices: Tensor, sizes: torch.Size | tuple[int, ...]) -> Tensor:
    """Row number of each index vector: [..., K] -> [...]."""
    rows = torch.zeros(indices.shape[:-1], dtype=torch.int64)
    for place, size in enumerate(sizes):
        rows = rows * size + _positive(indices[..., place], size)
    return rows


def gather_nd(x: Tensor, indices: Tensor, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    depth = batch_dims + indices.shape[-1]
    batch, indexed, rest = x.shape[:batch_dims], x.shape[batch_dims:depth], x.shape[depth:]
    rows = x.reshape(math.prod(batch), math.prod(indexed), math.prod(rest))
    found = _flat_rows(indices, indexed).reshape(math.prod(batch), -1, 1)
    picked = torch.gather(rows, 1, found.expand(-1, -1, rows.shape[2]))
    return picked.reshape(indices.shape[:-1] + rest)


def scatter_along_axis(
    data: Tensor, indices: Tensor, updates: Tensor, axis: int = 0, mode: str = "add", validate_indices: bool = False
) -> Tensor:
    found = _positive(indices, data.shape[axis])
    if mode == "update":
        return data.scatter(axis, found, updates)
    if mode == "add":
        return data.scatter_add(axis, found, updates)
    if mode == "sub":
        return data.scatter_add(axis, found, -updates)
    if mode == "div":
        return data / torch.ones_like(data).scatter_reduce(axis, found, updates, "prod")
    reductions = {"mul": "prod", "max": "amax", "min": "amin"}
    if mode not in reductions:
        raise UnsupportedOperation(f"scatter mode {mode!r}")
    return data.scatter_reduce(axis, found, updates, reductions[mode])


def scatter(
    data: Tensor, indices: Tensor, updates: Tensor, axis: int = 0, mode: str = "add", validate_indices: bool = False
) -> Tensor:
    axis %= data.dim()
    before, after = data.shape[:axis], data.shape[axis + 1 :]
    updates = updates.reshape((*before, indices.numel(), *after))
    shape = [1] * data.dim()
    shape[axis] = -1
    found = indices.reshape(shape).expand(updates.shape)
    return scatter_along_axis(data, found, updates, axis, mode)


def scatter_nd(
    data: Tensor, indices: Tensor, updates: Tensor, mode: str = "add", validate_indices: bool = False
) -> Tensor:
    depth = indices.shape[-1]
    rows = data.reshape(math.prod(data.shape[:depth]), math.prod(data.shape[depth:]))
    found = _flat_rows(indices, data.shape[:depth]).reshape(-1)
    return scatter(rows, found, updates.reshape(found.shape[0], rows.shape[1]), 0, mode).reshape(data.shape)


def argsort(x: Tensor, axis: int = -1, ascending: bool = False) -> Tensor:
    return torch.sort(x, dim=axis, descending=not ascending, stable=True).indices


def topk(
    x: Tensor,
    k: int = 1,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: str = "int32",
) -> tuple[Tensor, ...]:
    size = x.shape[axis] if k == -1 else k
    ordered = torch.sort(x, dim=axis, descending=not ascending, stable=True)
    values, indices = ordered.values.narrow(axis, 0, size), ordered.indices.narrow(axis, 0, size)
    return (values, indices) if return_indices else (values,)


def one_hot(
    indices: Tensor,
    one_hot_vector_size: int,
    axis: int = -1,
    on_value: Tensor | None = None,
    off_value: Tensor | None = None,
) -> Tensor:
    axis %= indices.dim() + 1
    shape = [1] * (indices.dim() + 1)
    shape[axis] = -1
    hot = indices.unsqueeze(axis) == torch.arange(one_hot_vector_size).reshape(shape)
    on = torch.tensor(1, dtype=torch.int32) if on_value is None else on_value
    off = torch.zeros_like(on) if off_value is None else off_value
    return torch.where(hot, on, off)


def range_1d(start: int | float, end: int | float, step: int | float) -> Tensor:
    return torch.arange(start, end, step)


def shape(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int32)


def fill(shape: tuple[int, ...], value: Tensor | None = None) -> Tensor:
    return (torch.tensor(0.0) if value is None else value).expand(shape)


def fill_like(ref_tensor: Tensor, value: Tensor | None = None) -> Tensor:
    return fill(tuple(ref_tensor.shape), value)


def non_zero(x: Tensor) -> Tensor:
    return torch.nonzero(x)


def cumsum(x: Tensor, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Tensor:
    total = (x.flip(axis) if reverse else x).cumsum(axis)
    if exclusive:
        total = torch.cat([torch.zeros_like(total.narrow(axis, 0, 1)), total.narrow(axis, 0, x.shape[axis] - 1)], axis)
    return total.flip(axis) if reverse else total


def band_part(x: Tensor, lower: int = -1, upper: int = -1) -> Tensor:
    below = torch.arange(x.shape[-2])[:, None] - torch.arange(x.shape[-1])[None, :]
    keep = torch.ones_like(below, dtype=torch.bool)
    if lower >= 0:
        keep &= below <= lower
    if upper >= 0:
        keep &= -below <= upper
    return torch.where(keep, x, torch.zeros_like(x))


OPERATIONS: Table = {
    "argsort": argsort,
    "band_part": band_part,
    "cumsum": cumsum,
    "fill": fill,
    "fill_like": fill_like,
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "gather_nd": gather_nd,
    "non_zero": non_zero,
    "one_hot": one_hot,
    "range_1d": range_1d,
    "scatter": scatter,
    "scatter_along_axis": scatter_along_axis,
    "scatter_nd": scatter_nd,
    "shape": shape,
    "topk": topk,
}
