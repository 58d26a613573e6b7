"""Pooling, resizing and resampling."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from octoc.runtime.mil.neural import pad_spatial, window_padding
from octoc.runtime.mil.operation import Ints, Table, UnsupportedOperation

Padding = list[tuple[int, int]]


def _pool_padding(
    x: Tensor, kernel: Ints, strides: Ints, pad_type: str, pad: Ints | None, ceil_mode: bool
) -> tuple[Padding, Padding]:
    """The declared padding, and the same with what the last window of ceil mode reaches beyond it."""
    declared = window_padding(pad_type, pad, tuple(x.shape[2:]), kernel, strides)
    if not ceil_mode:
        return declared, declared
    reach = []
    for size, extent, stride, (before, after) in zip(x.shape[2:], kernel, strides, declared, strict=True):
        windows = math.ceil((size + before + after - extent) / stride) + 1
        if (windows - 1) * stride >= size + before and before + after > 0:
            windows -= 1
        reach.append((before, (windows - 1) * stride + extent - size - before))
    return declared, reach


def _in_2d(x: Tensor, kernel: Ints, strides: Ints) -> tuple[Tensor, Ints, Ints]:
    return (x.unsqueeze(2), (1, *kernel), (1, *strides)) if x.dim() == 3 else (x, kernel, strides)


def _window_sum(x: Tensor, kernel: Ints, strides: Ints) -> Tensor:
    flat, kernel, strides = _in_2d(x, kernel, strides)
    pool: Callable[..., Tensor] = F.avg_pool3d if x.dim() == 5 else F.avg_pool2d
    total = pool(flat, kernel, strides, divisor_override=1)
    return total.squeeze(2) if x.dim() == 3 else total


def max_pool(
    x: Tensor,
    kernel_sizes: Ints,
    strides: Ints | None = None,
    pad_type: str = "valid",
    pad: Ints | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    strides = strides or (1,) * len(kernel_sizes)
    _, reach = _pool_padding(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    flat, kernel, steps = _in_2d(pad_spatial(x, reach, -torch.inf), kernel_sizes, strides)
    out = F.max_pool3d(flat, kernel, steps) if x.dim() == 5 else F.max_pool2d(flat, kernel, steps)
    return out.squeeze(2) if x.dim() == 3 else out


def avg_pool(
    x: Tensor,
    kernel_sizes: Ints,
    strides: Ints | None = None,
    pad_type: str = "valid",
    pad: Ints | None = None,
    exclude_padding_from_average: bool = False,
    ceil_mode: bool = False,
) -> Tensor:
    strides = strides or (1,) * len(kernel_sizes)
    declared, reach = _pool_padding(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    total = _window_sum(pad_spatial(x, reach), kernel_sizes, strides)
    if declared == reach and (exclude_padding_from_average is False or not any(map(any, declared))):
        return total / math.prod(kernel_sizes)
    # Elements beyond the declared padding never count; declared padding counts unless excluded.
    counted = torch.ones(1, 1, *x.shape[2:])
    if exclude_padding_from_average:
        counted = pad_spatial(counted, reach)
    else:
        beyond = [(0, r[1] - d[1]) for d, r in zip(declared, reach, strict=True)]
        counted = pad_spatial(pad_spatial(counted, declared, 1.0), beyond)
    return total / _window_sum(counted, kernel_sizes, strides)


def l2_pool(
    x: Tensor,
    kernel_sizes: Ints,
    strides: Ints | None = None,
    pad_type: str = "valid",
    pad: Ints | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    strides = strides or (1,) * len(kernel_sizes)
    _, reach = _pool_padding(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    return _window_sum(pad_spatial(x.square(), reach), kernel_sizes, strides).sqrt()


def _grid(source: int, target: int, mode: str) -> Tensor:
    """Sampling positions along one axis, as in the reference of `resize_bilinear`: float64 [target]."""
    step = torch.arange(target, dtype=torch.float64)
    if mode in ("ALIGN_CORNERS", "STRICT_ALIGN_CORNERS"):
        if target == 1:
            grid = torch.full((1,), (source - 1) / 2 if mode == "ALIGN_CORNERS" else 0.0, dtype=torch.float64)
        else:
            grid = step * ((source - 1) / (target - 1))
    elif mode == "DEFAULT":
        grid = step * (source / target)  # (source - source / target) / (target - 1)
    elif mode == "OFFSET_CORNERS":
        delta = max(1, source - 1) / target
        grid = 0.5 * delta + step * delta
    elif mode == "UNALIGN_CORNERS":
        grid = (step + 0.5) * (source / target) - 0.5
    else:
        raise UnsupportedOperation(f"sampling mode {mode!r}")
    return grid.clamp(0, source - 1)


def _interpolate(x: Tensor, axis: int, target: int, mode: str) -> Tensor:
    if target == x.shape[axis]:
        return x  # every mode but OFFSET_CORNERS then samples the pixels themselves
    grid = _grid(x.shape[axis], target, mode)
    low = grid.floor().long()
    high = (low + 1).clamp(max=x.shape[axis] - 1)
    shape = [1] * x.dim()
    shape[axis] = -1
    weight = (grid - low).float().reshape(shape)
    return x.index_select(axis, low) * (1 - weight) + x.index_select(axis, high) * weight


def _resize_linear(x: Tensor, sizes: Ints, mode: str) -> Tensor:
    for axis, size in zip(range(-len(sizes), 0), sizes, strict=True):
        if mode == "OFFSET_CORNERS" and size == x.shape[axis]:
            raise UnsupportedOperation("resize to the same size with OFFSET_CORNERS")
        x = _interpolate(x, axis, size, mode)
    return x


def _resize_nearest(x: Tensor, sizes: Ints, mode: str) -> Tensor:
    if mode not in ("DEFAULT", "UNALIGN_CORNERS"):
        raise UnsupportedOperation(f"nearest-neighbour resize with sampling mode {mode!r}")
    for axis, size in zip(range(-len(sizes), 0), sizes, strict=True):
        source = x.shape[axis]
        half = 0.0 if mode == "DEFAULT" else 0.5
        position = ((torch.arange(size, dtype=torch.float64) + half) * (source / size)).floor().long()
        x = x.index_select(axis, position.clamp(0, source - 1))
    return x


def resize_bilinear(
    x: Tensor, target_size_height: int = 1, target_size_width: int = 1, sampling_mode: str = "DEFAULT"
) -> Tensor:
    return _resize_linear(x, (target_size_height, target_size_width), sampling_mode)


def resize_nearest_neighbor(x: Tensor, target_size_height: int, target_size_width: int) -> Tensor:
    return _resize_nearest(x, (target_size_height, target_size_width), "DEFAULT")


def resize(
    x: Tensor, shape: Ints, resized_dims: int, interpolation_mode: str = "LINEAR", sampling_mode: str = "DEFAULT"
) -> Tensor:
    wanted = shape[len(shape) - resized_dims :]
    current = x.shape[x.dim() - resized_dims :]
    sizes = tuple(size or own for size, own in zip(wanted, current, strict=True))
    modes = {"LINEAR": _resize_linear, "NEAREST_NEIGHBOR": _resize_nearest}
    if interpolation_mode not in modes:
        raise UnsupportedOperation(f"resize with interpolation {interpolation_mode!r}")
    return modes[interpolation_mode](x, sizes, sampling_mode)


def _scaled_sizes(x: Tensor, height: float, width: float) -> Ints:
    return math.floor(x.shape[-2] * height), math.floor(x.shape[-1] * width)


def upsample_nearest_neighbor(x: Tensor, scale_factor_height: float = 1.0, scale_factor_width: float = 1.0) -> Tensor:
    return _resize_nearest(x, _scaled_sizes(x, scale_factor_height, scale_factor_width), "DEFAULT")


def upsample_bilinear(
    x: Tensor,
    scale_factor_height: float = 1.0,
    scale_factor_width: float = 1.0,
    align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> Tensor:
    modes = {(True, False): "STRICT_ALIGN_CORNERS", (False, True): "UNALIGN_CORNERS", (False, False): "DEFAULT"}
    centers = (not align_corners) if half_pixel_centers is None else half_pixel_centers
    if (align_corners, centers) not in modes:
        raise UnsupportedOperation("upsample_bilinear with both align_corners and half_pixel_centers")
    sizes = _scaled_sizes(x, scale_factor_height, scale_factor_width)
    return _resize_linear(x, sizes, modes[align_corners, centers])


# (MIL padding mode, align_corners) -> grid_sample's padding mode
_GRID_PADDING = {
    ("constant", True): "zeros",
    ("constant", False): "zeros",
    ("border", True): "border",
    ("border", False): "border",
    ("reflection", True): "reflection",  # about the centre of the border pixel
    ("symmetric", False): "reflection",  # about its outer edge
}


def _minus_one_to_one(coordinates: Tensor, mode: str, sizes: Tensor, align_corners: bool) -> Tensor:
    """Coordinates [..., (x, y)] in grid_sample's units."""
    if mode == "normalized_minus_one_to_one":
        return coordinates
    if mode == "normalized_zero_to_one":
        return coordinates * 2 - 1
    if mode != "unnormalized":
        raise UnsupportedOperation(f"coordinates mode {mode!r}")
    return coordinates * 2 / (sizes - 1) - 1 if align_corners else (coordinates * 2 + 1) / sizes - 1


def resample(
    x: Tensor,
    coordinates: Tensor,
    sampling_mode: str,
    padding_mode: str,
    padding_value: float,
    coordinates_mode: str,
    align_corners: bool,
) -> Tensor:
    if (padding_mode, align_corners) not in _GRID_PADDING or sampling_mode not in ("bilinear", "nearest"):
        raise UnsupportedOperation(f"resample with {sampling_mode}, {padding_mode}, align_corners={align_corners}")
    sizes = torch.tensor([x.shape[3], x.shape[2]], dtype=torch.float32)
    grid = _minus_one_to_one(coordinates.float(), coordinates_mode, sizes, align_corners)
    outside = padding_value if padding_mode == "constant" else 0.0
    padding = _GRID_PADDING[padding_mode, align_corners]
    return F.grid_sample(x - outside, grid, sampling_mode, padding, align_corners) + outside


def affine(
    x: Tensor,
    transform_matrix: Tensor,
    output_height: int,
    output_width: int,
    sampling_mode: str,
    padding_mode: str,
    padding_value: float,
    coordinates_mode: str,
    align_corners: bool,
) -> Tensor:
    if coordinates_mode != "normalized_minus_one_to_one":
        raise UnsupportedOperation(f"affine with coordinates mode {coordinates_mode!r}")
    matrix = transform_matrix.reshape(-1, 2, 3).expand(x.shape[0], 2, 3)
    grid = F.affine_grid(matrix, [x.shape[0], x.shape[1], output_height, output_width], align_corners)
    return resample(x, grid, sampling_mode, padding_mode, padding_value, coordinates_mode, align_corners)


OPERATIONS: Table = {
    "affine": affine,
    "avg_pool": avg_pool,
    "l2_pool": l2_pool,
    "max_pool": max_pool,
    "resample": resample,
    "resize": resize,
    "resize_bilinear": resize_bilinear,
    "resize_nearest_neighbor": resize_nearest_neighbor,
    "upsample_bilinear": upsample_bilinear,
    "upsample_nearest_neighbor": upsample_nearest_neighbor,
}
