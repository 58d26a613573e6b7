"""Compressed constants, quantize and dequantize; and the raw codes of a package.

The operations work on flat or dense torch tensors exactly as the iOS 16 and iOS 18 references define them. A list
that a reference calls a one-output value may come from a two-output sparse operation: its data is the second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from octoc.errors import ArtifactError
from octoc.runtime.mil.operation import Ints, Table, per_channel
from octoc.runtime.mil.reader import Name, Operation, constant_value, read_program
from octoc.runtime.mil.storage import unpack_bits


def _codes(packed: Tensor, bits: int, shape: Ints) -> Tensor:
    return torch.from_numpy(unpack_bits(packed.numpy(), bits, math.prod(shape))).reshape(shape)


def _expand(blocks: Tensor, shape: Ints) -> Tensor:
    """Each entry of `blocks` repeated over its block, to `shape`; further axes stay."""
    for axis, size in enumerate(shape):
        if size % blocks.shape[axis]:
            raise ValueError(f"{blocks.shape[axis]} blocks do not divide axis {axis} of size {size}")
        blocks = blocks.repeat_interleave(size // blocks.shape[axis], axis)
    return blocks


def affine_dequantize(quantized_data: Tensor, zero_point: Tensor, scale: Tensor, axis: int) -> Tensor:
    rank = quantized_data.dim()
    shift, factor = per_channel(zero_point, rank, axis), per_channel(scale, rank, axis)
    return factor * (quantized_data.float() - shift.float())


def blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    shape = tuple(data.shape)
    shifted = data.float() if offset is None else data.float() - _expand(offset.float(), shape)
    return _expand(scale, shape) * shifted


def _look_up(indices: Tensor, lut: Tensor, vector_axis: int | None) -> Tensor:
    """indices [*shape], lut [*groups, entries, vector size] -> [*shape], vector_axis times the vector size."""
    tables = _expand(lut, tuple(indices.shape))  # [*shape, entries, vector size]
    place = indices.long()[..., None, None].expand(*indices.shape, 1, lut.shape[-1])
    vectors = torch.gather(tables, -2, place).squeeze(-2)  # [*shape, vector size]
    if vector_axis is None or lut.shape[-1] == 1:
        return vectors.squeeze(-1)
    axis = vector_axis % indices.dim()
    return vectors.movedim(-1, axis + 1).flatten(axis, axis + 1)


def lut_to_dense(indices: Tensor, lut: Tensor, shape: Ints | None = None, vector_axis: int | None = None) -> Tensor:
    if shape is None:
        return _look_up(indices, lut, vector_axis)
    bits = int(math.log2(lut.shape[0]))  # iOS 16: packed indices of one table
    return lut[_codes(indices, bits, shape).long()]


def sparse_to_dense(nonzero_data: Tensor, mask: Tensor, shape: Ints | None = None) -> Tensor:
    kept = (mask if shape is None else _codes(mask, 1, shape)) != 0
    dense = torch.zeros(kept.shape, dtype=nonzero_data.dtype)
    dense[kept] = nonzero_data
    return dense


def lut_to_sparse(
    indices_mask: Tensor, indices_nonzero_data: Tensor, lut: Tensor, vector_axis: int | None = None
) -> tuple[Tensor, Tensor]:
    dense = _look_up(sparse_to_dense(indices_nonzero_data, indices_mask), lut, vector_axis)
    mask = indices_mask
    if vector_axis is not None:
        mask = mask.repeat_interleave(lut.shape[-1], vector_axis)
    return mask, dense[mask != 0]


def sparse_blockwise_shift_scale(
    data_mask: Tensor, nonzero_data: Tensor, scale: Tensor, offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    dense = blockwise_shift_scale(sparse_to_dense(nonzero_data, data_mask), scale, offset)
    return data_mask, dense[data_mask != 0]


def constexpr_cast(source_val: Tensor, output_dtype: str) -> Tensor:
    return source_val  # the declared output type says it all


_RANGES = {"int8": (-128, 127), "uint8": (0, 255)}


def quantize(
    input: Tensor, scale: Tensor, output_dtype: str, zero_point: Tensor | None = None, axis: int | None = None
) -> Tensor:
    rank = input.dim()
    codes = torch.round(input / per_channel(scale, rank, axis or 0))  # half to even
    if zero_point is not None:
        codes = codes + per_channel(zero_point.float(), rank, axis or 0)
    return codes.clamp(*_RANGES[output_dtype])


def dequantize(input: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: int | None = None) -> Tensor:
    rank = input.dim()
    codes = input.float()
    if zero_point is not None:
        codes = codes - per_channel(zero_point.float(), rank, axis or 0)
    return per_channel(scale, rank, axis or 0) * codes


OPERATIONS: Table = {
    "constexpr_affine_dequantize": affine_dequantize,
    "constexpr_blockwise_shift_scale": blockwise_shift_scale,
    "constexpr_cast": constexpr_cast,
    "constexpr_lut_to_dense": lut_to_dense,
    "constexpr_lut_to_sparse": lut_to_sparse,
    "constexpr_sparse_blockwise_shift_scale": sparse_blockwise_shift_scale,
    "constexpr_sparse_to_dense": sparse_to_dense,
    "dequantize": dequantize,
    "quantize": quantize,
}


@dataclass(frozen=True)
class CompressedConstant:
    """The raw fields of one constexpr operation.

    Attributes:
        kind: the MIL operation.
        fields: by role: `codes` (integers at full dense shape, 0 where a mask drops them), `values` (non-zero
            floats at dense shape), `table`, `scale`, `offset`, `mask` (bool, dense shape), `axis`,
            `vector_axis`. An axis is an array of rank 0.
        sources: role -> output name of the constexpr operation that computes this field instead; such a role is
            absent from `fields`.
    """

    kind: str
    fields: dict[str, np.ndarray]
    sources: dict[str, str]


# MIL parameter -> role
_ROLES = {
    "quantized_data": "codes",
    "data": "codes",
    "indices": "codes",
    "indices_nonzero_data": "codes",
    "nonzero_data": "values",
    "source_val": "values",
    "lut": "table",
    "scale": "scale",
    "offset": "offset",
    "zero_point": "offset",
    "mask": "mask",
    "indices_mask": "mask",
    "data_mask": "mask",
    "axis": "axis",
    "vector_axis": "vector_axis",
}


def read_constants(path: Path) -> dict[str, CompressedConstant]:
    """The raw fields of every constexpr operation of a package, by the name of its (last) output.

    Args:
        path: a `.mlpackage` folder.

    Raises:
        ArtifactError: the package is damaged.
    """
    main = read_program(path).main
    constants = {next(iter(op.outputs)): constant_value(op) for op in main.operations if op.kind == "const"}
    found: dict[str, CompressedConstant] = {}
    for op in main.operations:
        if op.kind.startswith("constexpr_"):
            found[list(op.outputs)[-1]] = _compressed_constant(op, constants)
    return found


def read_stored(path: Path) -> dict[str, np.ndarray]:
    """Every array that a package holds as a plain `const`, by name."""
    main = read_program(path).main
    plain = {next(iter(op.outputs)): constant_value(op) for op in main.operations if op.kind == "const"}
    return {name: value for name, value in plain.items() if isinstance(value, np.ndarray)}


def _compressed_constant(op: Operation, constants: dict[str, Any]) -> CompressedConstant:
    fields: dict[str, np.ndarray] = {}
    sources: dict[str, str] = {}
    for parameter, (value, *_) in op.inputs.items():
        role = _ROLES.get(parameter)
        value = constants.get(value, value) if isinstance(value, Name) else value
        if role and isinstance(value, Name):
            sources[role] = str(value)
        elif role:
            fields[role] = np.asarray(value)
    if op.kind == "constexpr_sparse_blockwise_shift_scale" and "values" in fields:
        fields["codes"] = fields.pop("values")  # here the non-zero data are codes
    shape = op.inputs["shape"][0] if "shape" in op.inputs else None
    if isinstance(shape, np.ndarray):
        _unpack_fields(fields, tuple(int(size) for size in shape))
    if "mask" in fields:
        fields["mask"] = fields["mask"] != 0
        for role in ("codes", "values"):
            if role in fields:
                fields[role] = _dense(fields[role], fields["mask"], op.name)
    return CompressedConstant(op.kind, fields, sources)


def _unpack_fields(fields: dict[str, np.ndarray], shape: Ints) -> None:
    """iOS 16 forms keep codes and masks packed, beside the dense shape."""
    count = math.prod(shape)
    if "mask" in fields:
        fields["mask"] = unpack_bits(fields["mask"], 1, count).reshape(shape)
    if "codes" in fields and "table" in fields:
        bits = int(math.log2(len(fields["table"])))
        fields["codes"] = unpack_bits(fields["codes"], bits, count).reshape(shape)


def _dense(nonzero: np.ndarray, mask: np.ndarray, name: str) -> np.ndarray:
    kept = int(mask.sum())
    if nonzero.size != kept:
        raise ArtifactError(f"{name}: {nonzero.size} non-zero values for a mask of {kept}")
    dense = np.zeros(mask.shape, nonzero.dtype)
    dense[mask] = nonzero
    return dense
