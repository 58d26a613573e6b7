"""Codes whose quadratic error is small: rounding with error feedback, descent on codes, least squares for values.

Arrays hold a group of a convolution first (one of them elsewhere), then inputs, then rows: [groups, width, rows]. A
step of an input is then one operation on contiguous rows. The error of E = target - values is the sum of E^T H E.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from octoc.errors import DataError

_BLOCK = 128  # inputs between two products with all others
_STRIP = 16  # inputs between two products within a block
_STEPS = 8  # of conjugate gradients, or
_SOLVED = 1e-4  # of the first preconditioned slope, squared: steps until so little is left

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]
Nearest = Callable[[Floats, Ints], tuple[Floats, Floats]]  # aims and the input of each group -> codes, values
Store = Callable[[Doubles], Floats]  # parameters as they can be stored


class Grid(Protocol):
    """What codes may mean: values linear in some parameters."""

    @property
    def parameters(self) -> Floats:
        """float32 [parameters]."""

    def nearest(self, width: int) -> Nearest:
        """The function that rounds all rows of one input of each group."""

    def spread(self, parameters: Doubles, codes: Floats) -> Floats:
        """Value of each code, [groups, width, rows]."""

    def collect(self, slopes: Floats, codes: Floats, power: int = 1) -> Doubles:
        """The transpose of `spread`; with power 2 that of its elements' squares. [parameters]"""

    def fitted(self, parameters: Doubles, codes: Floats, store: Store) -> tuple[Self, Floats]:
        """The grid with new parameters, and the codes of the same values."""


@dataclass(frozen=True)
class Steps:
    """Integers times scales.

    Args:
        parameters: float32 [parameters], the scales, not 0.
        share: [groups, tiles, rows], which of them each tile of neighbouring inputs takes.
        low: lowest code.
        high: highest code.
    """

    parameters: Floats
    share: Ints
    low: int
    high: int

    def nearest(self, width: int) -> Nearest:
        scale = self.parameters[self.share]
        inverse = 1 / scale
        tile = np.arange(width) * scale.shape[1] // width
        every = np.arange(len(scale))

        def find(aim: Floats, column: Ints) -> tuple[Floats, Floats]:
            codes = aim * inverse[every, tile[column]]
            np.rint(codes, out=codes)
            np.clip(codes, self.low, self.high, out=codes)
            return codes, codes * scale[every, tile[column]]

        return find

    def _tiles(self, values: Floats) -> Floats:
        return values.reshape(len(values), self.share.shape[1], -1, values.shape[2])

    def spread(self, parameters: Doubles, codes: Floats) -> Floats:
        scale = parameters.astype(np.float32)[self.share]
        return (self._tiles(codes) * scale[:, :, None]).reshape(codes.shape)

    def collect(self, slopes: Floats, codes: Floats, power: int = 1) -> Doubles:
        sums = np.einsum("gtnr,gtnr->gtr", self._tiles(slopes), self._tiles(codes**power), dtype=np.float64)
        return np.bincount(self.share.ravel(), sums.ravel(), len(self.parameters)).astype(np.float64)

    def fitted(self, parameters: Doubles, codes: Floats, store: Store) -> tuple[Steps, Floats]:
        kept = np.where(parameters * self.parameters > 0, parameters, self.parameters)  # a scale keeps its sign
        return replace(self, parameters=store(kept)), codes


@dataclass(frozen=True)
class Tables:
    """Entries of look-up tables.

    Args:
        parameters: float32 [tables * entries], each table ascending.
        which: [groups, rows], the table of each row.
        entries: of a table.
    """

    parameters: Floats
    which: Ints
    entries: int

    def nearest(self, width: int) -> Nearest:
        tables = self.parameters.reshape(-1, self.entries)
        middles = (tables[:, 1:] + tables[:, :-1]) / 2
        spread = np.moveaxis(middles[self.which], 2, 0).copy()  # [entries - 1, groups, rows]

        def find(aim: Floats, column: Ints) -> tuple[Floats, Floats]:
            codes = np.searchsorted(middles[0], aim) if len(tables) == 1 else (aim > spread).sum(axis=0)
            return codes.astype(np.float32), tables[self.which, codes]

        return find

    def spread(self, parameters: Doubles, codes: Floats) -> Floats:
        tables = parameters.astype(np.float32).reshape(-1, self.entries)
        return tables[self.which[:, None], codes.astype(np.int64)]

    def collect(self, slopes: Floats, codes: Floats, power: int = 1) -> Doubles:
        place = self.which[:, None] * self.entries + codes.astype(np.int64)
        return np.bincount(place.ravel(), slopes.ravel(), len(self.parameters)).astype(np.float64)

    def fitted(self, parameters: Doubles, codes: Floats, store: Store) -> tuple[Tables, Floats]:
        tables = store(parameters).reshape(-1, self.entries)
        order = np.argsort(tables, axis=1, kind="stable")
        places = np.argsort(order, axis=1, kind="stable")
        ascending = np.take_along_axis(tables, order, axis=1).ravel()
        return replace(self, parameters=ascending), places[self.which[:, None], codes.astype(np.int64)].astype(
            np.float32
        )


@dataclass(frozen=True)
class State:
    """A grid, codes on it, and target less values; arrays [groups, width, rows]."""

    grid: Grid
    codes: Floats
    rest: Floats


def error(rest: Floats, hessian: Floats) -> float:
    """Sum of E^T H E."""
    return float(np.einsum("gnr,gnr->", rest, hessian @ rest, dtype=np.float64))


def factor(hessian: Doubles, more: Doubles, order: Ints) -> Doubles:
    """U of H + more = U^T U, where H has its inputs from the last in order to the first.

    Args:
        hessian: [groups, width, width].
        more: [groups, 1] on the diagonal.
        order: [groups, width] in which inputs are rounded.

    Returns:
        [groups, width, width], upper triangular.

    Raises:
        DataError: the sum is not positive definite.
    """
    backward = np.ascontiguousarray(order[:, ::-1])
    turned = np.empty_like(hessian)
    for group, inputs in enumerate(backward):
        for start in range(0, len(inputs), _STRIP):  # so few that the second gather reads from the cache
            strip = slice(start, start + _STRIP)
            turned[group, strip] = hessian[group, inputs[strip]].take(inputs, 1)
    np.einsum("gnn->gn", turned)[...] += more
    lower, failed = torch.linalg.cholesky_ex(torch.from_numpy(turned).mT)
    if failed.any():
        raise DataError("the Hessian is not positive semidefinite: no samples give it")
    upper: Doubles = lower.mT.contiguous().numpy()
    return upper


def solve(factor: Doubles, order: Ints, right: Doubles) -> Doubles:
    """X of X H = right.

    Args:
        factor: of the Hessian in this order.
        order: [groups, width].
        right: [groups, rows, width].
    """
    backward = np.ascontiguousarray(order[:, ::-1])[:, None]
    turned = torch.from_numpy(np.take_along_axis(right, backward, 2)).mT
    found = torch.cholesky_solve(turned, torch.from_numpy(factor), upper=True).mT.numpy()
    result: Doubles = np.take_along_axis(found, np.argsort(backward, axis=2), 2)
    return result


def succession(factor: Doubles) -> Floats:
    """Feedback of GPTQ: with H = L L^T, inputs in their order and L upper triangular, it is L_ij / L_jj for j after i.

    The error is the sum of squares of E^T L, whose column j holds no input after j: rounding in order makes one column
    after another as small as it can be. That is what GPTQ's updates by the inverse Hessian come to (Chee et al., QuIP,
    arXiv 2307.13304, theorem 6), for a third of the factorisations.

    Args:
        factor: of `factor`, which is L^T with both axes turned round.

    Returns:
        [groups, width, width], in order: by input that is rounded, then by input whose error it makes up for.
    """
    feedback = np.empty(factor.shape, np.float32)
    diagonal = np.einsum("gnn->gn", factor)[:, ::-1, None]
    np.divide(factor[:, ::-1, ::-1], diagonal, out=feedback, casting="same_kind")
    return feedback


def relaxation(hessian: Floats, order: Ints) -> Floats:
    """Feedback of coordinate descent, H_ij / H_jj; shaped and ordered as that of `succession`."""
    scaled = hessian / np.einsum("gnn->gn", hessian)[:, :, None]
    width = np.arange(hessian.shape[1])
    scaled[:, width, width] = 0
    return np.take_along_axis(scaled[np.arange(len(order))[:, None], order], order[:, None], 2)


def sweep(target: Floats, feedback: Floats, grid: Grid, order: Ints, rest: Floats | None = None) -> State:
    """Rounds input after input, each to where it makes up for what the others leave.

    Args:
        target: [groups, width, rows].
        feedback: of `succession`, or of `relaxation` where `rest` is given.
        grid: of values.
        order: [groups, width], as for the feedback.
        rest: target less the values so far; None where nothing is rounded yet.
    """
    nearest = grid.nearest(target.shape[1])
    every = np.arange(len(target))[:, None]
    left = np.zeros_like(target) if rest is None else rest[every, order]
    codes, back = np.empty_like(target), np.empty_like(target)
    for start in range(0, target.shape[1], _BLOCK):
        block = slice(start, start + _BLOCK)
        known = slice(start) if rest is None else slice(None)
        aims = target[every, order[:, block]]
        base = aims + feedback[:, block, known] @ left[:, known]
        inner = feedback[:, block, block]
        change, chosen = np.zeros_like(base), np.empty_like(base)
        for first in range(0, base.shape[1], _STRIP):
            strip = slice(first, first + _STRIP)
            base[:, strip] += inner[:, strip, :first] @ change[:, :first]
            for j in range(first, min(first + _STRIP, base.shape[1])):
                aim = base[:, j] + (inner[:, j : j + 1, first:j] @ change[:, first:j])[:, 0]
                chosen[:, j], values = nearest(aim, order[:, start + j])
                fresh = aims[:, j] - values
                change[:, j] = fresh - left[:, start + j]
                left[:, start + j] = fresh
        codes[every, order[:, block]], back[every, order[:, block]] = chosen, left[:, block]
    return State(grid, codes, back)


def refit(target: Floats, hessian: Floats, state: State, store: Store) -> State:
    """The parameters of least error for these codes, by conjugate gradients, and what is left with them."""
    grid, codes = state.grid, state.codes
    found = grid.parameters.astype(np.float64)
    slope = grid.collect(hessian @ state.rest, codes)
    curvature = grid.collect(np.broadcast_to(np.einsum("gnn->gn", hessian)[:, :, None], codes.shape), codes, 2)
    scaled = np.divide(slope, curvature, out=np.zeros_like(slope), where=curvature > 0)
    direction, size = scaled, float(slope @ scaled)
    enough = _SOLVED * size
    for _ in range(_STEPS):
        if size <= enough:
            break
        bent = grid.collect(hessian @ grid.spread(direction, codes), codes)
        along = float(direction @ bent)
        if along <= 0:
            break
        found = found + size / along * direction
        slope = slope - size / along * bent
        scaled = np.divide(slope, curvature, out=np.zeros_like(slope), where=curvature > 0)
        before, size = size, float(slope @ scaled)
        direction = scaled + size / before * direction
    grid, codes = grid.fitted(found, codes, store)
    return State(grid, codes, target - grid.spread(grid.parameters.astype(np.float64), codes))
