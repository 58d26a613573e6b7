"""Convolutions, products, attention and normalisations."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from octoc.runtime.mil.operation import Ints, Table, Tensors, UnsupportedOperation, axes_of, is_float, per_channel

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


def window_padding(pad_type: str, pad: Ints | None, sizes: Ints, extents: Ints, strides: Ints) -> list[tuple[int, int]]:
    """Padding before and after each spatial axis.

    Args:
        pad_type: valid, custom, same (odd remainder after) or same_lower (odd remainder before).
        pad: before and after of each axis, for custom.
        sizes: spatial sizes of the input.
        extents: kernel sizes, dilation included.
        strides: of the window.
    """
    if pad_type == "valid" or (pad_type == "custom" and pad is None):
        return [(0, 0)] * len(sizes)
    if pad_type == "custom" and pad is not None:
        return list(zip(pad[0::2], pad[1::2], strict=True))
    if pad_type not in ("same", "same_lower"):
        raise UnsupportedOperation(f"pad type {pad_type!r}")
    result = []
    for size, extent, stride in zip(sizes, extents, strides, strict=True):
        total = max(0, (math.ceil(size / stride) - 1) * stride + extent - size)
        small, large = total // 2, total - total // 2
        result.append((small, large) if pad_type == "same" else (large, small))
    return result


def pad_spatial(x: Tensor, padding: list[tuple[int, int]], value: float = 0.0) -> Tensor:
    """x with `padding` added to its last axes; negative amounts cut."""
    if not any(any(pair) for pair in padding):
        return x
    return F.pad(x, [amount for pair in reversed(padding) for amount in pair], value=value)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Ints | None = None,
    pad_type: str = "valid",
    pad: Ints | None = None,
    dilations: Ints | None = None,
    groups: int = 1,
) -> Tensor:
    rank = x.dim() - 2
    strides, dilations = strides or (1,) * rank, dilations or (1,) * rank
    extents = tuple((size - 1) * step + 1 for size, step in zip(weight.shape[2:], dilations, strict=True))
    padding = window_padding(pad_type, pad, tuple(x.shape[2:]), extents, strides)
    symmetric = all(before == after for before, after in padding)
    if not symmetric:
        x = pad_spatial(x, padding)
    inner = tuple(before for before, _ in padding) if symmetric else (0,) * rank
    return _CONV[rank](x, weight, bias, strides, inner, dilations, groups)


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: Ints | None = None,
    output_shape: Ints | None = None,
    pad_type: str = "valid",
    strides: Ints | None = None,
    dilations: Ints | None = None,
    groups: int = 1,
) -> Tensor:
    rank = x.dim() - 2
    strides = strides or (1,) * rank
    # [n, C_out, full size]: the unpadded result, of which the padding cuts the borders
    full = _CONV_TRANSPOSE[rank](x, weight, None, strides, 0, 0, groups, dilations or (1,) * rank)
    padding = _transpose_padding(pad_type, pad, tuple(x.shape[2:]), tuple(full.shape[2:]), strides)
    wanted = output_shape[2:] if output_shape else [None] * rank
    cuts = []
    for size, (before, after), length in zip(full.shape[2:], padding, wanted, strict=True):
        cuts.append((-before, -after if length is None else length - (size - before)))
    out = pad_spatial(full, cuts)
    return out if bias is None else out + per_channel(bias, out.dim())


def _transpose_padding(
    pad_type: str, pad: Ints | None, sizes: Ints, full_sizes: Ints, strides: Ints
) -> list[tuple[int, int]]:
    if pad_type in ("valid", "custom"):
        return window_padding(pad_type, pad, sizes, sizes, strides)
    if pad_type != "same":
        raise UnsupportedOperation(f"pad type {pad_type!r}")
    totals = [full - size * stride for full, size, stride in zip(full_sizes, sizes, strides, strict=True)]
    return [(total // 2, total - total // 2) for total in totals]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    return torch.matmul(
        x.transpose(-1, -2) if transpose_x and x.dim() > 1 else x,
        y.transpose(-1, -2) if transpose_y and y.dim() > 1 else y,
    )


def einsum(values: Tensors, equation: str) -> Tensor:
    return torch.einsum(equation, *values)


def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if attn_mask is not None and is_float(attn_mask):
        scores = scores + attn_mask
    elif attn_mask is not None:
        scores = torch.where(attn_mask, scores, torch.tensor(-torch.inf))
    return torch.softmax(scores, -1) @ value


def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    scale = torch.rsqrt(variance + epsilon) * (1 if gamma is None else gamma)
    shift = (0 if beta is None else beta) - mean * scale
    return x * per_channel(scale, x.dim()) + per_channel(shift, x.dim())


def _standardize(x: Tensor, axes: Ints, epsilon: float) -> Tensor:
    centered = x - x.mean(axes, keepdim=True)
    return centered * torch.rsqrt(centered.square().mean(axes, keepdim=True) + epsilon)


def instance_norm(x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: float = 1e-5) -> Tensor:
    out = _standardize(x, tuple(range(2, x.dim())), epsilon)
    if gamma is not None:
        out = out * per_channel(gamma, x.dim())
    return out if beta is None else out + per_channel(beta, x.dim())


def layer_norm(
    x: Tensor,
    axes: Ints | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    axes = axes_of(x, axes)
    out = _standardize(x, axes, epsilon)
    shape = [size if axis in axes else 1 for axis, size in enumerate(x.shape)]
    if gamma is not None:
        out = out * gamma.reshape(shape)
    return out if beta is None else out + beta.reshape(shape)


def l2_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(x.square().sum((-3, -2, -1), keepdim=True) + epsilon)


def local_response_norm(x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    before = size // 2
    squares = pad_spatial(x.square().movedim(1, -1), [(before, size - 1 - before)])
    total = squares.unfold(-1, size, 1).sum(-1).movedim(-1, 1)  # [n, C, ...]
    return x / (k + alpha / size * total) ** beta


OPERATIONS: Table = {
    "batch_norm": batch_norm,
    "conv": conv,
    "conv_transpose": conv_transpose,
    "einsum": einsum,
    "instance_norm": instance_norm,
    "l2_norm": l2_norm,
    "layer_norm": layer_norm,
    "linear": linear,
    "local_response_norm": local_response_norm,
    "matmul": matmul,
    "scaled_dot_product_attention": scaled_dot_product_attention,
}
