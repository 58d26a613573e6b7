"""The planner's exact core: one choice a layer, least predicted loss, within a budget of bytes.

A multiple-choice knapsack. `solve` is dynamic programming over (bytes, loss) states, pruned by dominance and by the
linear relaxation (Sinha and Zoltners, "The Multiple-Choice Knapsack Problem", 1979), which keeps it exact: a state is
dropped only when no completion of it can beat a solution already in hand.

1. Per layer, keep the choices that are not dominated, and of these the lower convex hull.
2. The relaxation of layers k, k+1, ... is a convex piecewise-linear function of the bytes left: all hull segments of
   these layers, steepest first.
3. Walking the segments of all layers and rounding gives a first feasible plan, the incumbent.
4. Forward over layers: extend every state by every choice; drop what is dominated or cannot beat the incumbent.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """One way to store a layer.

    Args:
        key: what is chosen; the planner does not look at it.
        nbytes: cost in the file, bytes.
        loss: predicted increase of the loss.
        costs: what else a budget may limit (see `budgets.py`), by name.
    """

    key: Any
    nbytes: int
    loss: float
    costs: Mapping[str, float] = field(default_factory=dict, hash=False, compare=False)


def smallest(layers: Sequence[Sequence[Choice]]) -> int:
    """Bytes of the smallest plan."""
    return sum(min(choice.nbytes for choice in layer) for layer in layers)


def largest(layers: Sequence[Sequence[Choice]]) -> int:
    """Bytes of the smallest plan of least loss."""
    return sum(min(layer, key=lambda choice: (choice.loss, choice.nbytes)).nbytes for layer in layers)


def solve(layers: Sequence[Sequence[Choice]], budget: float) -> list[Choice] | None:
    """The plan of least total loss that takes at most `budget` bytes; None where even the smallest is larger.

    Of plans with the same loss the smaller wins. Exact for any losses that are finite.
    """
    if smallest(layers) > budget:
        return None
    if not layers:
        return []
    kept = [_undominated(layer) for layer in layers]
    tails = _relaxations(kept)
    incumbent = _rounded(kept, budget)
    # Sums of losses round by their magnitude, however small what is left of them; so much may not prune anything.
    slack = 1e-9 * (1.0 + sum(max(abs(choice.loss) for choice in layer) for layer in kept))
    rest = np.cumsum([0, *(min(c.nbytes for c in layer) for layer in reversed(kept))])[::-1]
    used, lost = np.zeros(1, dtype=np.int64), np.zeros(1)
    trail: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for k, layer in enumerate(kept):
        sizes = np.array([c.nbytes for c in layer], dtype=np.int64)
        losses = np.array([c.loss for c in layer])
        all_used = (used[:, None] + sizes).ravel()
        all_lost = (lost[:, None] + losses).ravel()
        fits = np.flatnonzero(all_used + rest[k + 1] <= budget)
        bound = all_lost[fits] + tails[k + 1].at(budget - all_used[fits])
        fits = fits[bound <= incumbent + slack]
        order = fits[np.lexsort((all_lost[fits], all_used[fits]))]
        best_before = np.concatenate([[np.inf], np.minimum.accumulate(all_lost[order])[:-1]])
        order = order[all_lost[order] < best_before]
        trail.append((order // len(layer), order % len(layer)))
        used, lost = all_used[order], all_lost[order]
    state = int(np.argmin(lost))
    plan: list[Choice] = []
    for layer, (parents, picks) in zip(reversed(kept), reversed(trail), strict=True):
        plan.append(layer[int(picks[state])])
        state = int(parents[state])
    return plan[::-1]


def front(layers: Sequence[Sequence[Choice]]) -> list[tuple[int, float]]:
    """(bytes, predicted loss) along the convex hull of all plans, smallest first."""
    kept = [_undominated(layer) for layer in layers]
    tail = _relaxations(kept)[0]
    return [(int(b), float(c)) for b, c in zip(tail.nbytes, tail.loss, strict=True)]


@dataclass(frozen=True)
class _Relaxation:
    """Least loss of the linear relaxation as a function of bytes: [points] each, bytes ascending."""

    nbytes: Floats
    loss: Floats

    def at(self, budget: Any) -> Floats:
        return np.asarray(np.interp(budget, self.nbytes, self.loss), dtype=np.float64)


def _undominated(layer: Sequence[Choice]) -> list[Choice]:
    kept: list[Choice] = []
    for choice in sorted(layer, key=lambda c: (c.nbytes, c.loss)):
        if not kept or choice.loss < kept[-1].loss:
            kept.append(choice)
    return kept


def _hull(layer: Sequence[Choice]) -> list[Choice]:
    hull: list[Choice] = []
    for c in layer:
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (b.loss - a.loss) * (c.nbytes - a.nbytes) < (c.loss - a.loss) * (b.nbytes - a.nbytes):
                break
            hull.pop()
        hull.append(c)
    return hull


def _relaxations(layers: Sequence[Sequence[Choice]]) -> list[_Relaxation]:
    """For each k, the relaxation of layers k and after; the last is of no layer at all."""
    hulls = [_hull(layer) for layer in layers]
    steps = [[(b.nbytes - a.nbytes, b.loss - a.loss) for a, b in itertools.pairwise(h)] for h in hulls]
    owner = np.array([k for k, layer in enumerate(steps) for _ in layer], dtype=np.int64)
    flat = np.array([step for layer in steps for step in layer], dtype=np.float64).reshape(-1, 2)
    order = np.argsort(flat[:, 1] / flat[:, 0], kind="stable") if len(flat) else np.zeros(0, dtype=np.int64)
    owner, flat = owner[order], flat[order]
    result = []
    for k in range(len(layers) + 1):
        mine = flat[owner >= k]
        start = np.array([sum(h[0].nbytes for h in hulls[k:]), sum(h[0].loss for h in hulls[k:])], dtype=np.float64)
        points = np.vstack([start, start + np.cumsum(mine, axis=0)])
        result.append(_Relaxation(points[:, 0], points[:, 1]))
    return result


def _rounded(layers: Sequence[Sequence[Choice]], budget: float) -> float:
    """Loss of a feasible plan: hull steps, steepest first, each taken where it still fits."""
    hulls = [_hull(layer) for layer in layers]
    moves = [
        ((b.loss - a.loss) / (b.nbytes - a.nbytes), k, i + 1)
        for k, h in enumerate(hulls)
        for i, (a, b) in enumerate(itertools.pairwise(h))
    ]
    at = [0] * len(hulls)
    used = sum(h[0].nbytes for h in hulls)
    for _, k, i in sorted(moves):
        extra = hulls[k][i].nbytes - hulls[k][at[k]].nbytes
        if at[k] == i - 1 and used + extra <= budget:
            at[k], used = i, used + extra
    return sum(h[i].loss for h, i in zip(hulls, at, strict=True))
