"""A compressed weight as constants of the file, and back.

A float operation reads a weight through DEQUANTIZE of its codes, which computes exactly what `QTensor.dequantize` does
and leaves the activations alone (the kernels that take integer weights directly quantize activations as well).
DEQUANTIZE knows one scale per slice of one axis. So:

1. Each axis of the weight is split into tiles that share a scale and elements of a tile: (8 tiles, 4 elements).
2. Scales per tensor or channel: the codes stand in the order that the operation reads.
   Scales per group: the tiles come first and make the rows of a matrix, one scale each; behind DEQUANTIZE a RESHAPE
   (and a TRANSPOSE, where a convolution's taps lie between groups) restores the operation's order.
3. Codes of 4 and 2 bits are packed, the first in the low bits. Unsigned codes move by half their range, and so do
   their zero points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from octoc.errors import ArtifactError, ModelError
from octoc.export.tflite_lowering.flat import Grid, Operation, Value, constant, is_identity, operation
from octoc.packing import pack_codes, unpack_codes
from octoc.qtensor import Affine, Array, Cast, QTensor, describe, rebuild

CODE_TYPES = {8: schema.TensorType.INT8, 4: schema.TensorType.INT4, 2: schema.TensorType.INT2}
_DEQUANTIZE_VERSION = {8: 5, 4: 6, 2: 6}


@dataclass(frozen=True)
class Layout:
    """How codes lie in the file: `codes.reshape(split).transpose(order)`.

    Args:
        split: tiles and elements of a tile, axis after axis.
        order: of the split axes.
        rows: number of leading axes that enumerate tiles; 0 where the codes stand as the operation reads them.
    """

    split: tuple[int, ...]
    order: tuple[int, ...]
    rows: int

    def apply(self, codes: Array) -> Array:
        return codes.reshape(self.split).transpose(self.order)

    def invert(self, stored: Array, shape: tuple[int, ...]) -> Array:
        ordered = stored.reshape([self.split[i] for i in self.order])
        return np.ascontiguousarray(ordered.transpose(np.argsort(self.order)).reshape(shape))


def arrange(shape: tuple[int, ...], grid: tuple[int, ...], axes: tuple[int, ...]) -> Layout:
    """The layout of a weight's codes; see the module's steps 1 and 2.

    Args:
        shape: the weight's.
        grid: the scale's shape.
        axes: order in which the operation reads the weight's axes.
    """
    split = tuple(size for g, total in zip(grid, shape, strict=True) for size in (g, total // g))
    plain = tuple(i for axis in axes for i in (2 * axis, 2 * axis + 1))
    cut = [axis for axis in axes if grid[axis] > 1]
    if not cut or (len(cut) == 1 and grid[cut[0]] == shape[cut[0]]):
        return Layout(split, plain, 0)
    return Layout(split, tuple(2 * axis for axis in axes) + tuple(2 * axis + 1 for axis in axes), len(axes))


def encode(name: str, tensor: QTensor, place: Value, axes: tuple[int, ...]) -> tuple[list[Operation], Value, Value]:
    """The constants and operations that stand for a weight.

    Args:
        name: of the stored constant.
        tensor: the compressed weight.
        place: the float constant that it replaces.
        axes: order of the weight's axes there.

    Returns:
        The operations; the stored constant; a float value of the place's shape.

    Raises:
        ModelError: the format cannot hold the weight so.
    """
    if isinstance(tensor, Cast):
        stored = constant(tensor.values.transpose(axes).reshape(place.shape), name)
        result = Value(place.shape)
        return [operation("DEQUANTIZE", [stored], result, 3)], stored, result
    if not isinstance(tensor, Affine) or tensor.scale.dtype != np.float32:
        raise ModelError(f"TFLite: weight {name}: no constant holds {describe(tensor)} with its scales")
    if tensor.bits == 32:
        return _encode_bias(name, tensor, place)
    if tensor.bits not in CODE_TYPES:
        raise ModelError(f"TFLite: weight {name}: codes of {tensor.bits} bits")
    layout = arrange(tensor.shape, tuple(tensor.scale.shape), axes)
    half = 0 if tensor.signed else 2 ** (tensor.bits - 1)
    codes = layout.apply(_moved(tensor.codes, -half))
    scale = tensor.scale.transpose(axes).reshape(-1)
    zero_point = np.zeros(tensor.scale.shape, np.int64) - half
    if tensor.zero_point is not None:
        zero_point = tensor.zero_point.astype(np.int64) - half
    axis = 0 if layout.rows else _scale_axis(tensor, axes, place.shape)
    shape = (scale.size, codes.size // scale.size) if layout.rows else place.shape
    grid = Grid(scale, zero_point.transpose(axes).reshape(-1), axis)
    stored = Value(shape, CODE_TYPES[tensor.bits], pack_codes(codes, tensor.bits), grid, name)
    operations, result = _restore(stored, codes.shape, layout, place.shape, tensor.bits)
    return operations, stored, result


def _moved(codes: Array, by: int) -> Array:
    return codes.view(np.int8) if by == 0 else (codes.astype(np.int16) + by).astype(np.int8)


def _scale_axis(tensor: Affine, axes: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """The axis of the place that the weight's only axis with scales has become."""
    if tensor.scale.size == 1:
        return 0
    channels = np.arange(tensor.scale.size).reshape(tensor.scale.shape)
    where = np.broadcast_to(channels, tensor.shape).transpose(axes).reshape(shape)
    for axis, size in enumerate(shape):
        if size == tensor.scale.size and np.array_equal(where.min(_rest(shape, axis)), where.max(_rest(shape, axis))):
            return axis
    raise ModelError(f"TFLite: no axis of {shape} holds the channels of a weight of shape {tensor.shape}")


def _rest(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return tuple(i for i in range(len(shape)) if i != axis)


def _restore(
    stored: Value, sizes: tuple[int, ...], layout: Layout, shape: tuple[int, ...], bits: int
) -> tuple[list[Operation], Value]:
    """DEQUANTIZE, and what brings tiles back into the order of the operation."""
    assert stored.grid is not None
    result = Value(stored.shape)
    many = stored.grid.scale.size > 1
    operations = [operation("DEQUANTIZE", [stored], result, _DEQUANTIZE_VERSION[bits] if many or bits < 8 else 2)]
    if not layout.rows:
        return operations, result
    kept = [i for i, size in enumerate(sizes) if size > 1]
    # Axis after axis: tiles, then the elements of a tile.
    back = [kept.index(i) for axis in range(layout.rows) for i in (axis, axis + layout.rows) if i in kept]
    if not is_identity(back):
        parts = tuple(sizes[i] for i in kept)
        result = _append(operations, "RESHAPE", result, parts, parts)
        result = _append(operations, "TRANSPOSE", result, back, tuple(parts[i] for i in back))
    return operations, _append(operations, "RESHAPE", result, shape, shape)


def _append(operations: list[Operation], kind: str, source: Value, argument: Any, shape: tuple[int, ...]) -> Value:
    result = Value(shape)
    options: dict[str, Any] = {"newShape": list(shape)} if kind == "RESHAPE" else {}
    operations.append(operation(kind, [source, constant(np.asarray(argument, np.int32))], result, **options))
    return result


def _encode_bias(name: str, bias: Affine, place: Value) -> tuple[list[Operation], Value, Value]:
    """32-bit codes for a float operation. DEQUANTIZE does not take them, so CAST and a product with the scales."""
    stored = encode_integer_bias(name, bias, bias.scale.size)
    floats, result = Value(stored.shape), Value(stored.shape)
    scales = constant(np.broadcast_to(bias.scale, bias.shape).astype(np.float32))
    types = {"inDataType": schema.TensorType.INT32, "outDataType": schema.TensorType.FLOAT32}
    operations = [
        operation("CAST", [stored], floats, **types),
        operation("MUL", [floats, scales], result),
    ]
    if place.shape != stored.shape:
        result = _append(operations, "RESHAPE", result, place.shape, place.shape)
    return operations, stored, result


def encode_integer_bias(name: str, bias: Affine, scales: int) -> Value:
    """The 32-bit codes of a bias, as integer operations take them: [channels].

    Args:
        name: of the constant.
        bias: the codes; its scales are all equal where `scales` is 1.
        scales: number of scales of the weight, which the kernels want of the bias too.
    """
    scale = bias.scale.reshape(-1)
    if scales == 1 and not (scale == scale[0]).all():
        raise ModelError(f"TFLite: bias {name} has scales of its own where its weight has one")
    grid = Grid(scale[:1] if scales == 1 else scale, np.zeros(scales, np.int64))
    return constant(bias.codes.reshape(-1), name, grid)


def facts(tensor: QTensor, axes: tuple[int, ...]) -> dict[str, Any]:
    """What the stored constant does not say of itself, as JSON data."""
    found = {**describe(tensor), "shape": list(tensor.shape), "axes": list(axes)}
    if isinstance(tensor, Affine):
        found |= {"grid": list(tensor.scale.shape), "points": tensor.zero_point is not None}
    return found


def decode(stored: Value, known: Mapping[str, Any]) -> QTensor:
    """The compressed weight that a constant holds; the inverse of `encode`.

    Raises:
        ArtifactError: the constant and the facts do not belong together.
    """
    try:
        rest = dict(known)
        shape, axes = tuple(rest.pop("shape")), tuple(rest.pop("axes"))
        if rest["kind"] == "cast":
            values = stored.array().reshape([shape[i] for i in axes]).transpose(np.argsort(axes))
            return rebuild(rest, {"values": np.ascontiguousarray(values)})
        return _decode_affine(stored, rest, shape, axes)
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
        raise ArtifactError(f"constant {stored.name} does not hold {dict(known)}: {error}") from error


def _decode_affine(stored: Value, rest: dict[str, Any], shape: tuple[int, ...], axes: tuple[int, ...]) -> QTensor:
    grid, has_points = tuple(rest.pop("grid")), rest.pop("points")
    assert stored.grid is not None
    assert stored.data is not None
    turned = [grid[i] for i in axes]

    def in_order(array: Array) -> Array:
        return np.ascontiguousarray(array.reshape(turned).transpose(np.argsort(axes)))

    if rest["bits"] == 32:
        scale = np.broadcast_to(stored.grid.scale, (math.prod(grid),)).reshape(grid).copy()
        return rebuild(rest, {"codes": stored.array().reshape(shape).copy(), "scale": scale})
    arrays = {"scale": in_order(stored.grid.scale)}
    half = 0 if rest["signed"] else 2 ** (rest["bits"] - 1)
    dtype = np.int8 if rest["signed"] else np.uint8
    codes = unpack_codes(stored.data, math.prod(shape), rest["bits"], signed=True)
    codes = arrange(shape, grid, axes).invert(codes, shape)
    arrays["codes"] = (codes.astype(np.int16) + half).astype(dtype)
    if has_points:
        arrays["zero_point"] = in_order(stored.grid.zero_point + half).astype(dtype)
    return rebuild(rest, arrays)
