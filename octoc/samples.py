"""One input's samples: arrays or lazy rows, and how they are made to fit a network's input."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from octoc.errors import DataError

if TYPE_CHECKING:
    from octoc.model import InputSpec

Array = NDArray[Any]

_ROWS = 1024  # samples looked at together


class Samples(Protocol):
    """One input's samples: an array, or something that makes rows when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, rows: Any, /) -> Array: ...


@dataclass(frozen=True)
class Rows:
    """Some rows of samples, made when they are asked for.

    Args:
        base: where the rows are.
        indices: which, in order.
        dtype: what they become.
    """

    base: Samples
    indices: Array
    dtype: np.dtype[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.indices), *self.base.shape[1:])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, rows: Any, /) -> Array:
        return np.asarray(self.base[self.indices[rows]]).astype(self.dtype, copy=False)


def cast(x: Samples, dtype: np.dtype[Any]) -> Samples:
    if x.dtype == dtype:
        return x
    if isinstance(x, np.ndarray) and not isinstance(x, np.memmap):
        with np.errstate(over="ignore"):  # what overflows is infinite, and refused as such
            return x.astype(dtype)
    return Rows(x, np.arange(len(x)), dtype)


def taken(x: Samples, indices: Array) -> Samples:
    if isinstance(x, np.ndarray) and not isinstance(x, np.memmap):
        return x[indices]
    if isinstance(x, Rows):
        return replace(x, indices=x.indices[indices])
    return Rows(x, indices, x.dtype)


def fitted(x: Samples, spec: InputSpec, name: str) -> Samples:
    """Samples in the dtype of the network's input, or the reason why they do not fit."""
    wanted = np.dtype(str(spec.dtype).removeprefix("torch."))
    given = f"{name} is {x.dtype} {list(x.shape)}"
    takes = f"the network's {spec.name} takes {wanted} [{', '.join(['*', *map(str, spec.shape[1:])])}]"
    if not spec.shape:
        raise DataError(f"{given}; the network's {spec.name} takes one number without samples, which data cannot give")
    if x.shape[1:] != spec.shape[1:]:
        raise DataError(f"{given}; {takes}{_hint(x.shape[1:], spec.shape[1:])}")
    if x.dtype.kind == "f" and wanted.kind == "f":
        _check_values(x, name)
        return cast(x, wanted)
    if wanted.kind == "f":
        raise DataError(f"{given}; {takes}; octoc does not scale: apply the network's own preprocessing to x first")
    if x.dtype.kind not in "iub" or (wanted.kind == "b") != (x.dtype.kind == "b"):
        raise DataError(f"{given}; {takes}; convert with x.astype({str(wanted)!r}) if the values are meant so")
    if not np.can_cast(x.dtype, wanted):
        limits = np.iinfo(wanted)
        low, high = _range(x)
        if low < limits.min or high > limits.max:
            raise DataError(f"{given} with values from {low} to {high}; {takes}, from {limits.min} to {limits.max}")
    return cast(x, wanted)


def _hint(given: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """What to do about a wrong shape, where it is one of the usual mistakes."""
    if len(given) >= 2 and (given[-1], *given[:-1]) == wanted:
        axes = (0, len(given), *range(1, len(given)))
        return f"; its channels are last: x.transpose{axes} moves them"
    if len(given) >= 2 and (*given[1:], given[0]) == wanted:
        axes = (0, *range(2, len(given) + 1), 1)
        return f"; its channels are first: x.transpose{axes} moves them"
    if (1, *given) == wanted:
        return "; it lacks the channel axis: x[:, None] adds it"
    if len(given) == len(wanted) - 1 and given == wanted[1:]:
        return f"; it lacks an axis of {wanted[0]} after the samples"
    return ""


def _check_values(x: Samples, name: str) -> None:
    nans = infinities = 0
    for start in range(0, len(x), _ROWS):
        rows = np.asarray(x[start : start + _ROWS])
        finite = np.isfinite(rows)
        if not finite.all():
            nans += int(np.isnan(rows).sum())
            infinities += int(np.isinf(rows).sum())
    if nans or infinities:
        size = int(np.prod(x.shape))
        raise DataError(f"{name} has {nans} NaN and {infinities} infinite values of {size}; remove those samples")


def _range(x: Samples) -> tuple[int, int]:
    parts = [np.asarray(x[start : start + _ROWS]) for start in range(0, len(x), _ROWS)]
    return min(int(part.min()) for part in parts), max(int(part.max()) for part in parts)
