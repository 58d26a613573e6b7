"""Operations that move, repeat or cut values and never change one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from octoc.runtime.mil.operation import Bools, Ints, Table, Tensors, UnsupportedOperation, axes_of


def identity(x: Tensor) -> Tensor:
    return x


def reshape(x: Tensor, shape: Ints) -> Tensor:
    if 0 in shape and len(shape) == x.dim():
        shape = tuple(size if wanted == 0 else wanted for wanted, size in zip(shape, x.shape, strict=True))
    return x.reshape(shape)


def reshape_like(x: Tensor, ref_tensors: Tensors, begins: Ints, ends: Ints, end_masks: Bools) -> Tensor:
    shape: list[int] = []
    for reference, begin, end, to_the_end in zip(ref_tensors, begins, ends, end_masks, strict=True):
        shape += reference.shape[begin : None if to_the_end else end]
    return x.reshape(shape)


def transpose(x: Tensor, perm: Ints) -> Tensor:
    return x.permute(perm) if perm else x


def expand_dims(x: Tensor, axes: Ints) -> Tensor:
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def squeeze(x: Tensor, axes: Ints | None = None) -> Tensor:
    single = {axis for axis in axes_of(x, axes) if x.shape[axis] == 1}
    return x.reshape([size for axis, size in enumerate(x.shape) if axis not in single])


def flatten2d(x: Tensor, axis: int = 1) -> Tensor:
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def concat(values: Tensors, axis: int, interleave: bool = False) -> Tensor:
    if values[0].dim() == 0:
        return torch.stack(values)
    if not interleave:
        return torch.cat(values, axis)
    axis %= values[0].dim()
    return torch.stack(values, axis + 1).flatten(axis, axis + 1)


def stack(values: Tensors, axis: int) -> Tensor:
    return torch.stack(values, axis)


def split(x: Tensor, axis: int, num_splits: int | None = None, split_sizes: Ints | None = None) -> Sequence[Tensor]:
    if split_sizes is None:
        if num_splits is None:
            raise UnsupportedOperation("split without num_splits or split_sizes")
        split_sizes = (x.shape[axis] // num_splits,) * num_splits
    return torch.split(x, list(split_sizes), axis)


def slice_positions(
    size: int, begin: int, end: int, stride: int, from_start: bool, to_end: bool, single: bool
) -> range:
    """The positions along one axis that a slice selects; `single` selects `begin` alone."""
    if single:
        return range(begin % size, begin % size + 1)
    return range(*slice(None if from_start else begin, None if to_end else end, stride).indices(size))


def all_slice_positions(
    x: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints | None,
    begin_mask: Bools | None,
    end_mask: Bools | None,
    squeeze_mask: Bools | None,
) -> list[range]:
    """`slice_positions` of every axis."""
    rank = x.dim()
    none = (False,) * rank
    columns = (x.shape, begin, end, stride or (1,) * rank, begin_mask or none, end_mask or none, squeeze_mask or none)
    return [slice_positions(*column) for column in zip(*columns, strict=True)]


def _take(x: Tensor, axis: int, positions: range) -> Tensor:
    if len(positions) == x.shape[axis] and positions.step == 1:
        return x
    if positions.step > 0:
        index = [slice(None)] * x.dim()
        index[axis] = slice(positions.start, positions.stop, positions.step)
        return x[tuple(index)]
    return x.index_select(axis, torch.tensor(list(positions)))  # torch has no negative strides


def slice_by_index(
    x: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints | None = None,
    begin_mask: Bools | None = None,
    end_mask: Bools | None = None,
    squeeze_mask: Bools | None = None,
) -> Tensor:
    positions = all_slice_positions(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    for axis, selected in enumerate(positions):
        x = _take(x, axis, selected)
    dropped = squeeze_mask or (False,) * x.dim()
    return x.reshape([size for size, drop in zip(x.shape, dropped, strict=True) if not drop])


def slice_by_size(x: Tensor, begin: Ints, size: Ints) -> Tensor:
    for axis, (start, length) in enumerate(zip(begin, size, strict=True)):
        start %= max(x.shape[axis], 1)
        x = x.narrow(axis, start, x.shape[axis] - start if length == -1 else length)
    return x


def slice_update(
    x: Tensor,
    update: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints | None = None,
    begin_mask: Bools | None = None,
    end_mask: Bools | None = None,
    squeeze_mask: Bools | None = None,
) -> Tensor:
    selected = all_slice_positions(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    places = torch.arange(x.numel()).reshape(x.shape)
    for axis, positions in enumerate(selected):
        places = places.index_select(axis, torch.tensor(list(positions), dtype=torch.int64))
    # Out of place and on flat indices, so that a vectorised run may update a shared tensor.
    return x.reshape(-1).scatter(0, places.reshape(-1), update.reshape(-1)).reshape(x.shape)


def _pad_positions(size: int, before: int, after: int, mode: str) -> Tensor:
    """Source position of each element of a reflected or replicated axis."""
    position = torch.arange(-before, size + after)
    if mode == "replicate" or size == 1:
        return position.clamp(0, size - 1)
    period = 2 * (size - 1)
    position = position.remainder(period)
    return torch.minimum(position, period - position)


def pad(x: Tensor, pad: Ints, mode: str = "constant", constant_val: float = 0.0) -> Tensor:
    pairs = list(zip(pad[0::2], pad[1::2], strict=True))
    if mode == "constant":
        return F.pad(x, [amount for pair in reversed(pairs) for amount in pair], value=constant_val)
    if mode not in ("reflect", "replicate"):
        raise UnsupportedOperation(f"pad mode {mode!r}")
    for axis, (before, after) in enumerate(pairs, x.dim() - len(pairs)):
        if before or after:
            x = x.index_select(axis, _pad_positions(x.shape[axis], before, after, mode))
    return x


def crop(x: Tensor, crop_height: Ints, crop_width: Ints) -> Tensor:
    height, width = x.shape[-2:]
    return x[..., crop_height[0] : height - crop_height[1], crop_width[0] : width - crop_width[1]]


def tile(x: Tensor, reps: Ints) -> Tensor:
    return x.repeat(reps)


def reverse(x: Tensor, axes: Ints | None = None) -> Tensor:
    return x.flip(axes_of(x, axes))


def reverse_sequence(x: Tensor, lengths: Tensor, seq_axis: int = 0, batch_axis: int = 0) -> Tensor:
    rank = x.dim()
    shape = [1] * rank
    shape[seq_axis] = -1
    step = torch.arange(x.shape[seq_axis]).reshape(shape)
    shape = [1] * rank
    shape[batch_axis] = -1
    length = lengths.long().reshape(shape)
    source = torch.where(step < length, length - 1 - step, step)
    return torch.gather(x, seq_axis, source.expand(x.shape))


def sliding_windows(x: Tensor, axis: int, size: int, stride: int = 1) -> Tensor:
    axis %= x.dim()
    return x.unfold(axis, size, stride).movedim(-1, axis + 1)


def pixel_shuffle(x: Tensor, upscale_factor: int) -> Tensor:
    return F.pixel_shuffle(x, upscale_factor)


def pixel_unshuffle(x: Tensor, downscale_factor: int) -> Tensor:
    return F.pixel_unshuffle(x, downscale_factor)


def depth_to_space(x: Tensor, block_size: int) -> Tensor:
    # unlike pixel_shuffle, the block's offset is the slow part of the channel
    batch, channels, height, width = x.shape
    blocks = x.reshape(batch, block_size, block_size, channels // block_size**2, height, width)
    return blocks.permute(0, 3, 4, 1, 5, 2).reshape(batch, -1, height * block_size, width * block_size)


def space_to_depth(x: Tensor, block_size: int) -> Tensor:
    batch, channels, height, width = x.shape
    blocks = x.reshape(batch, channels, height // block_size, block_size, width // block_size, block_size)
    return blocks.permute(0, 3, 5, 1, 2, 4).reshape(batch, -1, height // block_size, width // block_size)


def space_to_batch(x: Tensor, block_shape: Ints, paddings: Ints) -> Tensor:
    top, bottom, left, right = paddings
    x = F.pad(x, [left, right, top, bottom])
    batch, channels, height, width = x.shape
    down, across = block_shape
    blocks = x.reshape(batch, channels, height // down, down, width // across, across)
    return blocks.permute(3, 5, 0, 1, 2, 4).reshape(-1, channels, height // down, width // across)


def batch_to_space(x: Tensor, block_shape: Ints, crops: Ints) -> Tensor:
    batch, channels, height, width = x.shape
    down, across = block_shape
    blocks = x.reshape(down, across, batch // (down * across), channels, height, width)
    x = blocks.permute(2, 3, 4, 0, 5, 1).reshape(-1, channels, height * down, width * across)
    return crop(x, crops[:2], crops[2:])


OPERATIONS: Table = {
    "batch_to_space": batch_to_space,
    "concat": concat,
    "crop": crop,
    "depth_to_space": depth_to_space,
    "expand_dims": expand_dims,
    "flatten2d": flatten2d,
    "identity": identity,
    "pad": pad,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "reshape": reshape,
    "reshape_like": reshape_like,
    "reverse": reverse,
    "reverse_sequence": reverse_sequence,
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "slice_update": slice_update,
    "sliding_windows": sliding_windows,
    "space_to_batch": space_to_batch,
    "space_to_depth": space_to_depth,
    "split": split,
    "squeeze": squeeze,
    "stack": stack,
    "tile": tile,
    "transpose": transpose,
}
