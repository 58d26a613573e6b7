"""Compressed tensors as ONNX initializers and the nodes that decode them.

    Affine   codes ─► DequantizeLinear ─► [Reshape ─► Transpose] ─► the weight
             codes ─► Cast ─► Mul ─► [Reshape ─► Transpose] ─► the weight, where `at_load`
             codes ─► Cast to int8 ─► DequantizeLinear ─► the weight, where `widened`
    Cast     float16 values ─► Cast ─► the weight

DequantizeLinear takes one scale, one per index of an axis, or (two dimensions, codes of 8 bits or fewer) one per block
of an axis. Every other grid with one grouped axis becomes one of those: with the axes of full resolution first, the
grouped one next and the shared ones last, all elements of a tile are neighbours, so that the codes are a matrix with
one scale per row. `Layout` holds what was done, and `decode` undoes it.

onnxruntime decodes by DequantizeLinear at every call. That serves matrices, where it joins the two, and integer
operations; a float convolution of ResNet-20 takes twice its time so. Cast and Mul it computes once, at load.

Its integer kernels take 8-bit weights only. A Cast of 4-bit codes it computes at load too, before it joins
DequantizeLinear and the operation: the file holds 4 bits a weight, and the kernel reads 8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from octoc.errors import ArtifactError
from octoc.packing import pack_codes, unpack_codes
from octoc.qtensor import Affine, Cast, QTensor, describe, rebuild

Array = NDArray[Any]

# Element type by (bits, signed). Types of 2 bits came with opset 25.
ELEMENTS = {
    (2, True): TensorProto.INT2,
    (2, False): TensorProto.UINT2,
    (4, True): TensorProto.INT4,
    (4, False): TensorProto.UINT4,
    (8, True): TensorProto.INT8,
    (8, False): TensorProto.UINT8,
    (32, True): TensorProto.INT32,
}
_FLOATS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


@dataclass(frozen=True)
class Layout:
    """How a tensor's codes lie in the file.

    Args:
        shape: the tensor's.
        grid: shape of its scale.
        perm: order of the axes in the file.
        rows: the permuted codes are a matrix of so many rows, one scale each; 0 where they keep their rank.
    """

    shape: tuple[int, ...]
    grid: tuple[int, ...]
    perm: tuple[int, ...]
    rows: int = 0

    def pack(self, array: Array) -> Array:
        """Codes as the file holds them."""
        moved = np.array(array.transpose(self.perm), order="C")
        return moved.reshape(self.rows, -1) if self.rows else moved

    def unpack(self, stored: Array, shape: tuple[int, ...]) -> Array:
        """The inverse of `pack` for an array of `shape`: the codes', or the grid's."""
        moved = stored.reshape([shape[axis] for axis in self.perm])
        return np.array(moved.transpose(np.argsort(self.perm)), order="C")


@dataclass(frozen=True)
class Stored:
    """What takes the place of a float initializer.

    Args:
        initializers: codes, scales, zero points.
        nodes: what decodes them into a value of the tensor's name.
        facts: JSON data that `decode` needs.
    """

    initializers: list[TensorProto]
    nodes: list[onnx.NodeProto]
    facts: dict[str, Any]


def choose(affine: Affine, transposed: bool) -> Layout:
    """The layout of an affine tensor.

    Args:
        affine: its scale tiles it with at most one grouped axis.
        transposed: the operation reads a matrix the other way round, and the file holds it so.

    Raises:
        ArtifactError: more than one axis is grouped.
    """
    shape, grid = affine.shape, affine.scale.shape
    order = _order(shape, transposed)
    full = [axis for axis in order if grid[axis] == shape[axis] > 1]
    grouped = [axis for axis in order if 1 < grid[axis] < shape[axis]]
    if len(grouped) > 1:
        raise ArtifactError(f"scales of shape {grid} for a weight of shape {shape}: ONNX groups along one axis only")
    by_blocks = len(shape) == 2 and len(full) == 1 and affine.bits <= 8
    if (not grouped and len(full) <= 1) or (grouped and by_blocks):
        return Layout(shape, grid, order)
    first = [*full, *grouped]
    perm = (*first, *(axis for axis in order if axis not in first))
    return Layout(shape, grid, perm, math.prod(grid))


def encode(
    name: str,
    tensor: QTensor,
    transposed: bool = False,
    explicit_zero: bool = False,
    at_load: bool = False,
    widened: bool = False,
) -> Stored:
    """Initializers and nodes for a compressed tensor.

    Args:
        name: the tensor's; the last node's output is called so.
        tensor: Affine of 2, 4, 8 or 32 bits, or Cast.
        transposed: the value of this name is the transposed matrix.
        explicit_zero: write a zero point of zeros where the tensor has none.
        at_load: decode by Cast and Mul, which onnxruntime computes once, instead of DequantizeLinear.
        widened: DequantizeLinear reads int8, which codes without a zero point are cast to.

    Raises:
        ArtifactError: the tensor has no representation in ONNX.
    """
    if isinstance(tensor, Cast):
        perm = (1, 0) if transposed else tuple(range(len(tensor.shape)))
        layout = Layout(tensor.shape, (), perm)
        values = numpy_helper.from_array(layout.pack(tensor.values), f"{name}:values")
        node = helper.make_node("Cast", [values.name], [name], to=TensorProto.FLOAT)
        return Stored([values], [node], _facts(tensor, layout))
    if not isinstance(tensor, Affine) or (tensor.bits, tensor.signed) not in ELEMENTS:
        raise ArtifactError(f"weight {name}: ONNX cannot hold {describe(tensor)}")
    layout = choose(tensor, transposed)
    parts = _parts(name, tensor, layout, explicit_zero, at_load)
    if at_load:
        nodes = _by_arithmetic(parts)
    elif widened:
        nodes = _by_widening(name, parts, layout)
    else:
        nodes = [_by_dequantize(parts, layout)]
    if tensor.scale.dtype == np.float16:
        nodes.append(helper.make_node("Cast", [""], [""], to=TensorProto.FLOAT))
    if layout.rows:
        moved = np.array([layout.shape[i] for i in layout.perm], np.int64)
        parts["shape"] = numpy_helper.from_array(moved, f"{name}:shape")
        nodes.append(helper.make_node("Reshape", ["", parts["shape"].name], [""]))
        back = [layout.perm.index(i) for i in _order(layout.shape, transposed)]
        if back != sorted(back):
            nodes.append(helper.make_node("Transpose", [""], [""], perm=back))
    _chain(nodes, name)
    return Stored(list(parts.values()), nodes, _facts(tensor, layout))


def _order(shape: tuple[int, ...], transposed: bool) -> tuple[int, ...]:
    return tuple(range(len(shape)))[:: -1 if transposed else 1]


def _parts(name: str, tensor: Affine, layout: Layout, explicit_zero: bool, at_load: bool) -> dict[str, TensorProto]:
    sizes = _axis(layout)[2]
    if at_load:  # Mul broadcasts, so that the scale keeps its rank
        sizes = [layout.rows, 1] if layout.rows else [layout.grid[i] for i in layout.perm]
    scale = np.array(tensor.scale.transpose(layout.perm).reshape(sizes), order="C")
    parts = {
        "codes": _integers(f"{name}:codes", layout.pack(tensor.codes), tensor),
        "scale": numpy_helper.from_array(scale, f"{name}:scale"),
    }
    point = tensor.zero_point
    if point is None and explicit_zero:
        point = np.zeros(tensor.scale.shape, tensor.codes.dtype)
    if point is not None:
        moved = point.transpose(layout.perm).reshape(sizes)
        parts["zero_point"] = _integers(f"{name}:zero_point", moved, tensor)
    return parts


def _by_dequantize(parts: Mapping[str, TensorProto], layout: Layout) -> onnx.NodeProto:
    axis, block, _ = _axis(layout)
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    if block:
        attributes["block_size"] = block
    return helper.make_node("DequantizeLinear", [part.name for part in parts.values()], [""], **attributes)


def _by_widening(name: str, parts: dict[str, TensorProto], layout: Layout) -> list[onnx.NodeProto]:
    """Cast and DequantizeLinear; a zero point, which is of the type of what it belongs to, becomes int8 in `parts`."""
    if "zero_point" in parts:
        zeros = np.zeros(tuple(parts["zero_point"].dims), np.int8)
        parts["zero_point"] = numpy_helper.from_array(zeros, parts["zero_point"].name)
    wide = f"{name}:int8"
    dequantize = _by_dequantize(parts, layout)
    dequantize.input[0] = wide
    return [helper.make_node("Cast", [parts["codes"].name], [wide], to=TensorProto.INT8), dequantize]


def _by_arithmetic(parts: Mapping[str, TensorProto]) -> list[onnx.NodeProto]:
    to = parts["scale"].data_type
    nodes = [helper.make_node("Cast", [parts["codes"].name], [""], to=to)]
    if "zero_point" in parts:
        point = parts["zero_point"].name
        nodes.insert(0, helper.make_node("Cast", [point], [f"{point}:float"], to=to))
        nodes.append(helper.make_node("Sub", ["", f"{point}:float"], [""]))
    return [*nodes, helper.make_node("Mul", ["", parts["scale"].name], [""])]


def _chain(nodes: list[onnx.NodeProto], name: str) -> None:
    """Each empty first input reads the node before; the last output is `name`."""
    for i, node in enumerate(nodes):
        if not node.output[0]:
            node.output[0] = name if i == len(nodes) - 1 else f"{name}:{i}"
        if not node.input[0]:
            node.input[0] = nodes[i - 1].output[0]


def _axis(layout: Layout) -> tuple[int | None, int, list[int]]:
    """DequantizeLinear's axis and block size, and the shape of its scale."""
    if layout.rows:
        return 0, 0, [layout.rows]
    shape, grid = ([sizes[axis] for axis in layout.perm] for sizes in (layout.shape, layout.grid))
    wide = [axis for axis, size in enumerate(grid) if size > 1]
    grouped = [axis for axis in wide if grid[axis] < shape[axis]]
    if grouped:
        return grouped[0], shape[grouped[0]] // grid[grouped[0]], grid
    return (wide[0], 0, [grid[wide[0]]]) if wide else (None, 0, [])


def _integers(name: str, array: Array, tensor: Affine) -> TensorProto:
    raw = (array if tensor.bits >= 8 else pack_codes(array, tensor.bits)).tobytes()
    return TensorProto(name=name, dims=array.shape, data_type=ELEMENTS[tensor.bits, tensor.signed], raw_data=raw)


def _facts(tensor: QTensor, layout: Layout) -> dict[str, Any]:
    facts = {**describe(tensor), **asdict(layout)}
    if isinstance(tensor, Affine):
        facts["zero_point"] = tensor.zero_point is not None
    if not layout.rows:
        del facts["rows"]
    if layout.perm == tuple(range(len(layout.shape))):
        del facts["perm"]
    return facts


def decode(name: str, facts: Mapping[str, Any], initializers: Mapping[str, TensorProto]) -> QTensor:
    """The tensor that `encode` stored.

    Raises:
        ArtifactError: a part is missing or has another size than the facts say.
    """
    try:
        facts = dict(facts)
        shape, grid = tuple(facts.pop("shape")), tuple(facts.pop("grid"))
        perm = tuple(facts.pop("perm", range(len(shape))))
        layout = Layout(shape, grid, perm, facts.pop("rows", 0))
        pointed = facts.pop("zero_point", False)
        if facts["kind"] == "cast":
            values = numpy_helper.to_array(initializers[f"{name}:values"])
            return rebuild(facts, {"values": layout.unpack(values, shape)})
        kept = {"codes": shape, "scale": grid, **({"zero_point": grid} if pointed else {})}
        read = {part: _read(initializers[f"{name}:{part}"], facts) for part in kept}
        return rebuild(facts, {part: layout.unpack(array, kept[part]) for part, array in read.items()})
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise ArtifactError(f"weight {name} cannot be read back: {type(error).__name__}: {error}") from error


def _read(tensor: TensorProto, facts: Mapping[str, Any]) -> Array:
    if tensor.data_type in _FLOATS.values() or facts["bits"] >= 8:
        return numpy_helper.to_array(tensor)
    raw = np.frombuffer(tensor.raw_data, np.uint8)
    return unpack_codes(raw, math.prod(tensor.dims), facts["bits"], facts["signed"])
