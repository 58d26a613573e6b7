"""Compressed weights, represented once.

A `QTensor` is what a file stores in place of a float weight. `dequantize()` is the definition of what its codes mean:
the compressed network is evaluated with it, every exporter writes exactly these codes, and verification reads them back
and compares bit for bit. Numpy only.

    Affine    (codes - zero_point) * scale        integers, scale per tensor, channel, group or block
    Palette   table[codes]                        a look-up table per tensor or per group of channels
    Codebook  table[codes] * scale                one look-up table of numbers or vectors, scales as in Affine
    Cast      the weight in float16
    Sparse    zeros where mask is False, any of the above elsewhere

`Scheme` names a representation before it is computed; its text form ("int4-group32") is what recipes and devices use.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octoc.errors import ArtifactError, UsageError
from octoc.packing import packed_bytes

Array = NDArray[Any]

PALETTE_BITS = (1, 2, 3, 4, 6, 8)

# How the text of a scheme begins, by its kind.
_HEADS = {"affine": "int", "asymmetric": "uint", "palette": "palette", "codebook": "codebook"}
_KINDS = {head: kind for kind, head in _HEADS.items()}


@dataclass(frozen=True)
class Scheme:
    """How a weight is to be stored.

    Args:
        kind: "affine", "asymmetric" (affine, unsigned codes with a zero point beside each scale), "palette",
            "codebook" or "cast".
        bits: width of a code; 16 for "cast".
        granularity: what shares one scale or table: "tensor", "channel" (one output channel) or "group".
        group_size: palette: neighbouring output channels that share a table; otherwise neighbouring input channels
            that share a scale. 0 where granularity is not "group".
        sparse: zeros are stored as a bit mask and cost no code; not for "codebook".
        vector: codebook: neighbouring input channels that share a code; 1 otherwise.
    """

    kind: str
    bits: int
    granularity: str = "tensor"
    group_size: int = 0
    sparse: bool = False
    vector: int = 1

    def __str__(self) -> str:
        tail = "-sparse" if self.sparse else ""
        if self.kind == "cast":
            return "float16" + tail
        head = f"{_HEADS[self.kind]}{self.bits}{f'x{self.vector}' if self.vector > 1 else ''}"
        return f"{head}-{self.granularity}{self.group_size or ''}{tail}"

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """The inverse of `str`. Raises UsageError on anything else."""
        sparse = text.endswith("-sparse")
        core = text.removesuffix("-sparse")
        if core == "float16":
            return cls("cast", 16, sparse=sparse)
        match = re.fullmatch(r"(int|uint|palette|codebook)(\d+)(?:x(\d+))?-(tensor|channel|group)(\d*)", core)
        if match is None or (match[4] == "group") != bool(match[5]):
            raise UsageError(
                f"{text!r} is no weight encoding; examples: float16, int8-channel, int4-group32, palette4-tensor"
            )
        kind, bits, vector = _KINDS[match[1]], int(match[2]), int(match[3] or 1)
        if bits not in (PALETTE_BITS if kind == "palette" else range(2, 9)):
            raise UsageError(f"{text!r}: no {match[1]} encoding of {bits} bits")
        if vector not in ((1, 2) if kind == "codebook" else (1,)):
            raise UsageError(f"{text!r}: no {match[1]} encoding of vectors of {vector}")
        if sparse and kind == "codebook":
            raise UsageError(f"{text!r}: a codebook has no sparse form")
        return cls(kind, bits, match[4], int(match[5] or 0), sparse, vector)

    def unfit(self, shape: tuple[int, ...], axis: int) -> str | None:
        """Why a weight of this shape cannot be stored so, or None.

        Args:
            shape: the weight's shape.
            axis: its output-channel axis, 0 or 1.
        """
        if self.vector > 1 and (len(shape) < 2 or shape[1 - axis] % self.vector):
            count = shape[1 - axis] if len(shape) > 1 else 1
            return f"{count} input channels are not a multiple of vectors of {self.vector}"
        if self.granularity == "group" and self.group_size % self.vector:
            return f"groups of {self.group_size} are not a multiple of vectors of {self.vector}"
        if self.kind == "cast" or self.granularity != "group":
            return None
        grouped = axis if self.kind == "palette" else 1 - axis
        what = "output" if self.kind == "palette" else "input"
        if len(shape) < 2 or shape[grouped] % self.group_size:
            count = shape[grouped] if len(shape) > 1 else 1
            return f"{count} {what} channels are not a multiple of groups of {self.group_size}"
        return None

    def grid(self, shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
        """Shape of the scale, or of the grid of tables: the weight's rank, each size divides the weight's."""
        reason = self.unfit(shape, axis)
        if reason:
            raise UsageError(f"{self}: {reason}")
        sizes = [1] * len(shape)
        if self.kind == "palette":
            if self.granularity == "group":
                sizes[axis] = shape[axis] // self.group_size
            elif self.granularity == "channel":
                sizes[axis] = shape[axis]
        elif self.granularity != "tensor":
            sizes[axis] = shape[axis]
            if self.granularity == "group":
                sizes[1 - axis] = shape[1 - axis] // self.group_size
        return tuple(sizes)


def expand(grid: Array, shape: tuple[int, ...]) -> Array:
    """Repeats each element of `grid` over its tile, so that the result has the weight's shape.

    Args:
        grid: [g_0, ..., g_{r-1}], each g_i divides shape[i].
        shape: the weight's shape, of the same rank.
    """
    if grid.ndim != len(shape) or any(size % g for size, g in zip(shape, grid.shape, strict=True)):
        raise ArtifactError(f"a grid of shape {grid.shape} does not tile a weight of shape {shape}")
    for i, size in enumerate(shape):
        if grid.shape[i] not in (1, size):
            grid = np.repeat(grid, size // grid.shape[i], axis=i)
    return np.broadcast_to(grid, shape)


@dataclass(frozen=True, eq=False)
class Affine:
    """Integer codes with a scale.

    Args:
        codes: int8 (signed), uint8 (unsigned) or int32 (32 bits), one code per element, the weight's shape.
        scale: float32 or float16, the weight's rank, tiles the weight.
        zero_point: codes' dtype, scale's shape; None means 0 (signed) throughout.
        bits: width of a code.
        signed: codes are two's complement.
    """

    codes: Array
    scale: Array
    zero_point: Array | None = None
    bits: int = 8
    signed: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    def dequantize(self) -> Array:
        """float32 of the weight's shape; the product is rounded to the scale's dtype, as the runtimes do."""
        shifted = self.codes.astype(np.int64)
        if self.zero_point is not None:
            shifted = shifted - expand(self.zero_point.astype(np.int64), self.shape)
        product = shifted.astype(self.scale.dtype) * expand(self.scale, self.shape)
        return product.astype(np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points in a file."""
        points = 0 if self.zero_point is None else packed_bytes(self.zero_point.size, self.bits)
        return packed_bytes(self.codes.size, self.bits) + self.scale.nbytes + points

    def arrays(self) -> dict[str, Array]:
        points = {} if self.zero_point is None else {"zero_point": self.zero_point}
        return {"codes": self.codes, "scale": self.scale, **points}


@dataclass(frozen=True, eq=False)
class Palette:
    """Indices into look-up tables.

    Args:
        codes: uint8, one index per element, the weight's shape.
        table: float32 or float16 [*grid, 2**bits]; grid has the weight's rank and tiles it.
        bits: width of an index, one of PALETTE_BITS.
    """

    codes: Array
    table: Array
    bits: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    def dequantize(self) -> Array:
        """float32 of the weight's shape."""
        grid = self.table.shape[:-1]
        which = expand(np.arange(int(np.prod(grid))).reshape(grid), self.shape)
        flat = self.table.reshape(-1, self.table.shape[-1])
        return flat[which, self.codes].astype(np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of indices and tables in a file."""
        return packed_bytes(self.codes.size, self.bits) + self.table.nbytes

    def arrays(self) -> dict[str, Array]:
        return {"codes": self.codes, "table": self.table}


@dataclass(frozen=True, eq=False)
class Codebook:
    """Indices into one table of numbers or short vectors, times a scale.

    Args:
        codes: uint8, one index for `length` neighbours along `axis`: the weight's shape, that axis divided by it.
        table: float32 or float16 [2**bits, length].
        scale: the table's dtype, the weight's rank, tiles the weight; all elements of a vector share one.
        bits: width of an index, at most 8.
        axis: along which the vectors lie.
    """

    codes: Array
    table: Array
    scale: Array
    bits: int
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = list(self.codes.shape)
        sizes[self.axis] *= self.table.shape[1]
        return tuple(sizes)

    def dequantize(self) -> Array:
        """float32 of the weight's shape; the product is rounded to the scale's dtype."""
        entries = np.moveaxis(self.table[self.codes], -1, self.axis + 1).reshape(self.shape)
        return (entries * expand(self.scale, self.shape)).astype(np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of indices, table and scales in a file."""
        return packed_bytes(self.codes.size, self.bits) + self.table.nbytes + self.scale.nbytes

    def arrays(self) -> dict[str, Array]:
        return {"codes": self.codes, "table": self.table, "scale": self.scale}


@dataclass(frozen=True, eq=False)
class Cast:
    """The weight in float16.

    Args:
        values: float16, the weight's shape.
    """

    values: Array
    bits: int = 16

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def dequantize(self) -> Array:
        """float32 of the weight's shape."""
        return self.values.astype(np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of the values in a file."""
        return int(self.values.nbytes)

    def arrays(self) -> dict[str, Array]:
        return {"values": self.values}


@dataclass(frozen=True, eq=False)
class Sparse:
    """Zeros by a bit mask, a dense representation elsewhere.

    Args:
        mask: bool, True where the weight is stored, the weight's shape.
        dense: representation of the whole weight; its codes where mask is False are not stored and stand at 0.
    """

    mask: Array
    dense: Affine | Palette | Cast

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.mask.shape)

    @property
    def bits(self) -> int:
        return self.dense.bits

    def dequantize(self) -> Array:
        """float32 of the weight's shape."""
        return np.where(self.mask, self.dense.dequantize(), np.float32(0))

    @property
    def nbytes(self) -> int:
        """Bytes of the mask, of the codes that are stored, and of scales or tables in a file."""
        stored = packed_bytes(int(np.count_nonzero(self.mask)), self.bits)
        return packed_bytes(self.mask.size, 1) + stored + self.dense.nbytes - packed_bytes(self.mask.size, self.bits)

    def arrays(self) -> dict[str, Array]:
        return {"mask": self.mask, **self.dense.arrays()}


QTensor = Affine | Palette | Codebook | Cast | Sparse

_CLASSES: dict[str, Any] = {"affine": Affine, "palette": Palette, "codebook": Codebook, "cast": Cast}


def describe(tensor: QTensor) -> dict[str, Any]:
    """The facts that `arrays()` lacks, as JSON data; `rebuild` is the inverse."""
    if isinstance(tensor, Sparse):
        return {**describe(tensor.dense), "sparse": True}
    facts: dict[str, Any] = {"kind": type(tensor).__name__.lower(), "bits": tensor.bits}
    if isinstance(tensor, Affine):
        facts["signed"] = tensor.signed
    if isinstance(tensor, Codebook):
        facts["axis"] = tensor.axis
    return facts


def rebuild(facts: dict[str, Any], arrays: dict[str, Array]) -> QTensor:
    """The QTensor of `describe(q)` and `q.arrays()`. Raises ArtifactError where they do not belong together."""
    facts = dict(facts)
    try:
        if facts.pop("sparse", False):
            inner = rebuild(facts, {k: v for k, v in arrays.items() if k != "mask"})
            if isinstance(inner, Sparse | Codebook):
                raise ArtifactError(f"a sparse tensor cannot hold a {type(inner).__name__.lower()}")
            return Sparse(arrays["mask"], inner)
        kind = facts.pop("kind")
        built: QTensor = _CLASSES[kind](**arrays, **facts)
        return built
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"compressed tensor {facts} with parts {sorted(arrays)} cannot be read: {error}") from error


def difference(expected: QTensor, found: QTensor) -> str | None:
    """Where two compressed tensors differ, or None where they are the same bit for bit."""
    if describe(expected) != describe(found):
        return f"stored as {describe(found)}, not {describe(expected)}"
    ours, theirs = expected.arrays(), found.arrays()
    if ours.keys() != theirs.keys():
        return f"parts {sorted(theirs)}, not {sorted(ours)}"
    for part, array in ours.items():
        other = theirs[part]
        if array.dtype != other.dtype or array.shape != other.shape:
            return f"{part}: {other.dtype}{list(other.shape)}, not {array.dtype}{list(array.shape)}"
        wrong = np.atleast_1d(_bits(array) != _bits(other))
        if wrong.any():
            first = tuple(int(i) for i in np.argwhere(wrong)[0])
            return f"{part}: {int(np.count_nonzero(wrong))} of {array.size} differ, the first at {first}"
    return None


def _bits(array: Array) -> Array:
    """Floats as integers, so that NaN equals itself and -0.0 differs from 0.0."""
    if array.dtype.kind == "f":
        return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}").reshape(array.shape)
    return array
