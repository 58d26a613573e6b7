"""Tensor values as MIL stores them: immediate values and records of `weight.bin`.

`weight.bin` is MIL blob storage version 2, little-endian: a 64-byte file header (uint32 count, uint32 version),
then records. A record is 64 bytes of metadata at a multiple of 64 (uint32 sentinel 0xDEADBEEF, uint32 data
type, uint64 bytes, uint64 offset of the data, uint64 unused bits at its end) and the data. Elements narrower
than a byte are packed from the least significant bit on, across byte borders.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from octoc.errors import ArtifactError

_SENTINEL = 0xDEADBEEF
_METADATA = struct.Struct("<IIQQQ")


@dataclass(frozen=True)
class DataType:
    """How a MIL data type is stored.

    Attributes:
        numpy: dtype of the unpacked array.
        bits: bits per element in the file.
        blob_code: the type's number in `weight.bin`; None where it cannot be stored there.
    """

    numpy: np.dtype[Any]
    bits: int
    blob_code: int | None


DATA_TYPES = {
    name: DataType(np.dtype(numpy), bits, blob_code)
    for name, numpy, bits, blob_code in (
        ("BOOL", "bool", 8, None),
        ("FLOAT16", "<f2", 16, 1),
        ("FLOAT32", "<f4", 32, 2),
        ("FLOAT64", "<f8", 64, None),
        ("INT4", "int8", 4, 8),
        ("INT8", "int8", 8, 4),
        ("INT16", "<i2", 16, 6),
        ("INT32", "<i4", 32, 14),
        ("INT64", "<i8", 64, None),
        ("UINT1", "uint8", 1, 9),
        ("UINT2", "uint8", 2, 10),
        ("UINT3", "uint8", 3, 12),
        ("UINT4", "uint8", 4, 11),
        ("UINT6", "uint8", 6, 13),
        ("UINT8", "uint8", 8, 3),
        ("UINT16", "<u2", 16, 7),
        ("UINT32", "<u4", 32, 15),
        ("UINT64", "<u8", 64, None),
    )
}


def unpack_bits(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` codes of a packed array, uint8.

    Args:
        packed: uint8 [bytes], codes from the least significant bit on, across byte borders.
        bits: width of a code, a divisor of 24 up to 8.
        count: codes to return.
    """
    # Three bytes hold a whole number of codes of 1, 2, 3, 4, 6 or 8 bits.
    padded = np.zeros(-(-len(packed) // 3) * 3, np.uint32)
    padded[: len(packed)] = packed
    triples = padded[0::3] | padded[1::3] << 8 | padded[2::3] << 16  # [triples]
    shifts = np.arange(0, 24, bits, dtype=np.uint32)
    codes = (triples[:, None] >> shifts) & np.uint32((1 << bits) - 1)
    return codes.reshape(-1)[:count].astype(np.uint8)


def decode(raw: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """An array from the bytes of its elements.

    Args:
        raw: uint8 [bytes].
        dtype: MIL data type name.
        shape: of the result.

    Raises:
        ArtifactError: the number of bytes does not fit the shape.
    """
    stored = DATA_TYPES[dtype]
    count = int(np.prod(shape, dtype=np.int64))
    needed = -(-count * stored.bits // 8)
    if len(raw) != needed:
        raise ArtifactError(f"{dtype} of shape {list(shape)} needs {needed} bytes, the file gives {len(raw)}")
    if stored.bits >= 8:
        return raw.view(stored.numpy).reshape(shape)
    codes = unpack_bits(raw, stored.bits, count).reshape(shape)
    if dtype == "INT4":
        return ((codes ^ 8).astype(np.int8) - np.int8(8)).astype(np.int8)  # sign-extend
    return codes


class WeightFile:
    """Read-only view of one `weight.bin`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._bytes = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path.name}: cannot be read: {error}") from error
        version = int(self._bytes[4:8].view("<u4")[0]) if len(self._bytes) >= 64 else None
        if version != 2:
            raise ArtifactError(f"{path.name}: not a version 2 weight file (version {version})")

    def read(self, offset: int, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        """The array whose metadata record lies at `offset` bytes.

        Raises:
            ArtifactError: the record is outside the file, damaged, or of another type or size.
        """
        where = f"{self.path.name} at byte {offset}"
        size = len(self._bytes)
        if offset + 64 > size:
            raise ArtifactError(f"{where}: beyond the end of the file ({size} bytes)")
        sentinel, code, length, start, padding = _METADATA.unpack(self._bytes[offset : offset + 32].tobytes())
        if sentinel != _SENTINEL:
            raise ArtifactError(f"{where}: sentinel {sentinel:#x} instead of {_SENTINEL:#x}")
        if code != DATA_TYPES[dtype].blob_code:
            raise ArtifactError(f"{where}: data type number {code} is not {dtype}")
        if start + length > size:
            raise ArtifactError(f"{where}: data ends at byte {start + length}, the file at {size}")
        count = int(np.prod(shape, dtype=np.int64))
        if DATA_TYPES[dtype].bits < 8 and length * 8 - padding != count * DATA_TYPES[dtype].bits:
            raise ArtifactError(f"{where}: {length} bytes less {padding} bits do not hold {count} {dtype}")
        try:
            return decode(self._bytes[start : start + length], dtype, shape)
        except ArtifactError as error:
            raise ArtifactError(f"{where}: {error}") from error


def immediate_array(value: Any, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """The array of an inline tensor.

    Args:
        value: a protobuf `TensorValue`.
        dtype: MIL data type name.
        shape: declared shape.

    Raises:
        ArtifactError: the number of elements does not fit the shape.
    """
    field = value.WhichOneof("value")
    if field == "bytes":
        return decode(np.frombuffer(value.bytes.values, np.uint8), dtype, shape)
    items = getattr(value, field).values if field else ()
    array = np.array(items, DATA_TYPES[dtype].numpy)
    if array.size != int(np.prod(shape, dtype=np.int64)):
        raise ArtifactError(f"{dtype} of shape {list(shape)} is given {array.size} values")
    return array.reshape(shape)
