"""Methods that change how weights and activations are stored, one a file. The file's name is the method's name.

A file says in `KIND` which kind of method it is; one of kind "encode" has

    ENCODES                                 every `Scheme.kind` that it produces
    NEEDS                                   statistics of the layer's inputs that it takes: () or ("hessian",)
    encode(weight, scheme, axis, *, dtype, importance, **statistics) -> QTensor

`encode` of this module is the way in: it checks what it is given, takes the usual method for the scheme where none is
named and, where the scheme is sparse, stores zeros as a mask (the method then sees them with importance 0).
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from octoc.errors import DataError, ModelError, UsageError
from octoc.hessian import Hessian
from octoc.qtensor import Affine, Array, Cast, Codebook, Palette, QTensor, Scheme, Sparse

DTYPES = ("float32", "float16")

_PIECE = 1 << 16  # elements that stay in the cache

# The method that encodes a kind of scheme where nothing else is asked for.
_USUAL = {"affine": "rtn", "asymmetric": "hqq", "palette": "palette", "codebook": "higgs", "cast": "cast"}


class Encoder(Protocol):
    """What every file of kind "encode" provides; see above."""

    KIND: str
    ENCODES: tuple[str, ...]
    NEEDS: tuple[str, ...]

    def encode(
        self, weight: Array, scheme: Scheme, axis: int, *, dtype: str, importance: Array | None, **statistics: Any
    ) -> Affine | Palette | Codebook | Cast: ...


def encoders() -> tuple[str, ...]:
    """Names of all methods that encode weights, without importing them."""
    names = (info.name for info in pkgutil.iter_modules(__path__) if not info.ispkg)
    return tuple(sorted(name for name in names if _kind(name) == "encode"))


def encoder(name: str) -> Encoder:
    """The method `name`. Raises UsageError where there is none that encodes."""
    if name not in encoders():
        raise UsageError(f"no method {name!r} encodes weights; there are {', '.join(encoders())}")
    method: Encoder = importlib.import_module(f"{__name__}.{name}")  # type: ignore[assignment]
    return method


def _kind(name: str) -> str | None:
    """What the file says of itself: importing it would import what it needs."""
    source = pkgutil.get_data(__name__, f"{name}.py") or b""
    match = re.search(rb'^KIND = "(\w+)"', source, re.MULTILINE)
    return match[1].decode() if match else None


def encode(
    weight: Array,
    scheme: Scheme,
    axis: int,
    *,
    dtype: str = "float32",
    importance: Array | None = None,
    method: str | None = None,
    hessian: Hessian | None = None,
) -> QTensor:
    """Stores a weight as `scheme` says, with the least error that the method finds.

    Args:
        weight: any float array.
        scheme: how it is to be stored.
        axis: its output-channel axis, 0 or 1.
        dtype: one of DTYPES, of scales and tables, which is also what the runtime computes in.
        importance: how much the squared error of each element counts; not negative, broadcasts to the weight's shape.
            Where a whole scale or table would count for nothing, its elements that are not zero count alike.
        method: the file that encodes; the usual one of the scheme where None.
        hessian: of the layer, where the method needs it.

    Raises:
        ModelError: NaN or infinite weights, or weights that float16 cannot hold.
        UsageError: the scheme does not fit the shape or the method, or the method needs what is not given.
        DataError: the importance or the Hessian does not fit the weight.
    """
    name = _USUAL[scheme.kind] if method is None else method
    chosen = encoder(name)
    if scheme.kind not in chosen.ENCODES:
        raise UsageError(f"{name} makes {' and '.join(chosen.ENCODES)} encodings, and {scheme} is {scheme.kind}")
    if "hessian" in chosen.NEEDS and hessian is None:
        raise UsageError(f"{name} needs the Hessian of the layer, which calibration samples give")
    weight = np.asarray(weight, np.float32)
    if not np.isfinite(largest(weight)):
        bad = int(np.count_nonzero(~np.isfinite(weight)))
        raise ModelError(f"{bad} of {weight.size} weights are NaN or infinite")
    grid = scheme.grid(weight.shape, axis)
    counts = _counts(weight, scheme, importance, grid)
    statistics = {"hessian": hessian} if "hessian" in chosen.NEEDS else {}
    dense = chosen.encode(weight, replace(scheme, sparse=False), axis, dtype=dtype, importance=counts, **statistics)
    if not scheme.sparse:
        return dense
    if isinstance(dense, Codebook):
        raise UsageError(f"{scheme}: a codebook has no sparse form")
    mask = weight != 0
    return Sparse(mask, _zero_outside(dense, mask))


def _counts(weight: Array, scheme: Scheme, importance: Array | None, grid: tuple[int, ...]) -> Array | None:
    """How much the error of each element counts, None where all count alike."""
    if importance is None and not scheme.sparse:
        return None
    mask = weight != 0
    counts: Array = np.ones(weight.shape, np.float32) if importance is None else _checked(importance, weight.shape)
    return _never_void(counts * mask if scheme.sparse else counts, mask, grid)


def _checked(importance: Array, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Scaled to at most 1, so that products with it stay finite."""
    try:
        spread = np.broadcast_to(np.asarray(importance, np.float64), shape)
    except ValueError:
        raise DataError(f"importance of shape {np.shape(importance)} for a weight of shape {shape}") from None
    if not np.isfinite(spread).all() or (spread < 0).any():
        raise DataError("importance holds NaN, infinite or negative values")
    return (spread / (spread.max(initial=0) or 1)).astype(np.float32)


def _never_void(importance: Array, mask: Array, grid: tuple[int, ...]) -> Array:
    """In tiles of total importance 0, elements that are not zero count 1; in tiles of zeros all do."""
    rows, kept = to_rows(importance, grid), to_rows(mask, grid)
    void = ~rows.any(axis=1)
    if not void.any():
        return importance
    filled = rows.copy()
    filled[void] = np.where(kept[void].any(axis=1, keepdims=True), kept[void], True)
    return from_rows(filled, importance.shape, grid)


def _zero_outside(dense: Affine | Palette | Cast, mask: Array) -> Affine | Palette | Cast:
    if isinstance(dense, Cast):
        return replace(dense, values=np.where(mask, dense.values, np.float16(0)))
    return replace(dense, codes=np.where(mask, dense.codes, dense.codes.dtype.type(0)))


def require(scheme: Scheme, kinds: tuple[str, ...], weight: Array, dtype: str) -> None:
    """Checks that a method was given its own kinds of scheme and weights that `dtype` can hold."""
    if scheme.kind not in kinds:
        raise UsageError(f"{scheme} is no {' or '.join(kinds)} encoding")
    if dtype not in DTYPES:
        raise UsageError(f"scales and tables are {' or '.join(DTYPES)}, not {dtype}")
    most, limit = largest(weight), float(np.finfo(dtype).max)
    if most > limit:
        raise ModelError(f"the largest weight is {most:g}; {dtype} holds at most {limit:g}")


def largest(weight: Array) -> float:
    """The largest magnitude, NaN where there is one; a piece at a time, so that memory is read once and none taken."""
    flat, found = weight.reshape(-1), np.float32(0)
    for start in range(0, flat.size, _PIECE):
        piece = flat[start : start + _PIECE]
        found = np.maximum(found, np.maximum(piece.max(), -piece.min()))
    return float(found)


def to_rows(weight: Array, grid: tuple[int, ...]) -> Array:
    """The elements of each tile of a grid as one row.

    Args:
        weight: any shape.
        grid: [g_0, ..., g_{r-1}], each g_i divides weight.shape[i].

    Returns:
        [product of the grid, elements in a tile], tiles in C order of the grid.
    """
    split = [part for g, size in zip(grid, weight.shape, strict=True) for part in (g, size // g)]
    order = [*range(0, len(split), 2), *range(1, len(split), 2)]
    tiles = int(np.prod(grid))
    return np.ascontiguousarray(weight.reshape(split).transpose(order)).reshape(tiles, weight.size // tiles)


def from_rows(rows: Array, shape: tuple[int, ...], grid: tuple[int, ...]) -> Array:
    """The inverse of `to_rows`."""
    rank = len(shape)
    tile = [size // g for g, size in zip(grid, shape, strict=True)]
    order = [axis for i in range(rank) for axis in (i, rank + i)]
    return np.ascontiguousarray(rows.reshape(*grid, *tile).transpose(order)).reshape(shape)
