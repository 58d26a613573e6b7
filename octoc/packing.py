"""Codes of a few bits each, packed without gaps. Numpy only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from octoc.errors import ArtifactError

Array = NDArray[Any]

_PIECE = 1 << 20  # codes packed at a time: unpacked bits take a byte each; a multiple of 8


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take when packed without gaps."""
    return -(-count * bits // 8)


def pack_codes(codes: Array, bits: int) -> Array:
    """Codes without gaps: uint8 [packed_bytes(codes.size, bits)].

    Each code follows the one before from the least significant bit of a byte on, across bytes; what is left of the last
    byte is zero. ONNX, TFLite and MIL all store codes so.

    Args:
        codes: integers of one byte, of any shape; the low `bits` bits of each are stored.
        bits: width of a code, 1 to 8.
    """
    low = np.ascontiguousarray(codes).reshape(-1).view(np.uint8)
    packed = np.empty(packed_bytes(low.size, bits), np.uint8)
    for start in range(0, low.size, _PIECE):
        piece = _packed(low[start : start + _PIECE], bits)
        first = start * bits // 8
        packed[first : first + piece.size] = piece
    return packed


def _packed(low: Array, bits: int) -> Array:
    if 8 % bits:
        each = np.unpackbits(low[:, None], axis=1, bitorder="little", count=bits)  # [codes, bits]
        return np.packbits(each, bitorder="little")
    codes = np.zeros(-(-low.size // (8 // bits)) * (8 // bits), np.uint8)
    np.bitwise_and(low, (1 << bits) - 1, out=codes[: low.size])
    while bits < 8:  # two neighbours are the low and the high byte of one number
        pairs = codes.view("<u2")
        codes, bits = (pairs | (pairs >> (8 - bits))).astype(np.uint8), 2 * bits
    return codes


def unpack_codes(packed: Array, count: int, bits: int, signed: bool) -> Array:
    """The inverse of `pack_codes`: int8 (signed) or uint8 [count].

    Raises:
        ArtifactError: the bytes are not those of `count` codes.
    """
    if packed.size != packed_bytes(count, bits):
        raise ArtifactError(f"{packed.size} bytes cannot hold {count} codes of {bits} bits")
    codes = np.empty(count, np.uint8)
    for start in range(0, count, _PIECE):
        number = min(_PIECE, count - start)
        first = start * bits // 8
        piece = packed[first : first + packed_bytes(number, bits)]
        each = np.unpackbits(piece, bitorder="little", count=number * bits).reshape(number, bits)
        codes[start : start + number] = np.packbits(each, axis=1, bitorder="little").reshape(-1)
    if not signed:
        return codes
    spare = 8 - bits
    extended: Array = (codes << spare).view(np.int8) >> spare
    return extended
