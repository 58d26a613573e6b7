"""Arrays as MIL stores them: `weight.bin` (MIL blob storage, version 2), and packed codes.

The file is a 64-byte header (uint32 count, uint32 version 2) and, each at a multiple of 64 bytes, a 64-byte record
(uint32 0xDEADBEEF, uint32 data type, uint64 bytes, uint64 offset of the data, uint64 unused bits at its end) before its
data. Codes narrower than a byte follow one another from the least significant bit on, across bytes.
Source: coremltools, mlmodel/src/MILBlob/Blob/StorageFormat.hpp.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from octoc.packing import pack_codes
from octoc.qtensor import Array

_ALIGNMENT = 64


@dataclass(frozen=True)
class Type:
    """A MIL data type.

    Args:
        name: in MIL.proto.
        bits: of one element.
        number: in `weight.bin`.
    """

    name: str
    bits: int
    number: int


TYPES = {
    kind.name: kind
    for kind in (
        Type("FLOAT16", 16, 1),
        Type("FLOAT32", 32, 2),
        Type("UINT8", 8, 3),
        Type("INT8", 8, 4),
        Type("INT16", 16, 6),
        Type("UINT16", 16, 7),
        Type("INT4", 4, 8),
        Type("UINT1", 1, 9),
        Type("UINT2", 2, 10),
        Type("UINT4", 4, 11),
        Type("UINT3", 3, 12),
        Type("UINT6", 6, 13),
        Type("INT32", 32, 14),
        Type("UINT32", 32, 15),
    )
}


def to_bytes(array: Array, kind: str) -> bytes:
    """The bytes of an array as a MIL type."""
    bits = TYPES[kind].bits
    return (pack_codes(array, bits) if bits < 8 else np.ascontiguousarray(array)).tobytes()


class WeightWriter:
    """Writes a `weight.bin`; equal arrays of one type are stored once.

    Args:
        file: empty, open for writing bytes.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._records: dict[tuple[str, int, bytes], int] = {}
        self._append(self._header())

    def add(self, array: Array, kind: str) -> int:
        """Stores an array of a MIL type and returns its record's offset in bytes."""
        stored = TYPES[kind]
        data = to_bytes(array, kind)
        key = (kind, array.size, hashlib.sha256(data).digest())
        if key not in self._records:
            offset = self._file.tell()
            unused = len(data) * 8 - array.size * stored.bits
            self._append(struct.pack("<IIQQQ", 0xDEADBEEF, stored.number, len(data), offset + _ALIGNMENT, unused))
            self._append(data)
            self._records[key] = offset
        return self._records[key]

    def finish(self) -> None:
        """Writes the number of records into the header."""
        self._file.seek(0)
        self._file.write(self._header())

    def _header(self) -> bytes:
        return struct.pack("<II", len(self._records), 2)

    def _append(self, data: bytes) -> None:
        self._file.write(data)
        self._file.write(bytes(-len(data) % _ALIGNMENT))
