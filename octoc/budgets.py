"""The planner's core under several budgets at once: bytes, bits a weight, memory, latency.

A multiple-choice knapsack with several constraints, given to an integer program (HiGHS through scipy). For large
networks most choices are ruled out first by Lagrangian relaxation (Fisher, "The Lagrangian Relaxation Method for
Solving Integer Programming Problems", 1981):

1. The dual bound: multipliers of the budgets that maximise the sum over layers of the least (loss + multipliers *
   costs), by cutting planes (Kelley, 1960).
2. A choice's reduced cost is what it adds to that bound. The integer program sees the choices whose reduced cost is at
   most delta; its optimum is the optimum of all where it is within delta of the bound.
3. Otherwise delta grows. Up to `_EXACT` choices there is nothing to rule out and the answer is exact; beyond, a plan
   within `_GAP` of the bound is good enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_matrix

from octoc.plan import Choice, Floats

_EXACT = 2000
_GAP = 1e-3  # of the bound
_CUTS = 200


def solve(layers: Sequence[Sequence[Choice]], budgets: Mapping[str, float]) -> list[Choice] | None:
    """The plan of least total loss within every budget; None where there is none.

    Args:
        layers: the choices of each layer.
        budgets: by the name of a cost; "nbytes" is `Choice.nbytes`, others are in `Choice.costs`.
    """
    if not layers:
        return [] if min(budgets.values(), default=0.0) >= 0 else None
    owner = np.repeat(np.arange(len(layers)), [len(layer) for layer in layers])
    flat = [choice for layer in layers for choice in layer]
    losses = np.array([choice.loss for choice in flat])
    losses = losses / max(float(np.abs(losses).max()), 1e-300)
    costs = np.array([[_cost(choice, name) for choice in flat] for name in budgets], dtype=np.float64)  # [budgets, n]
    limits = np.array(list(budgets.values()), dtype=np.float64)
    finite = np.isfinite(limits)
    costs, limits = costs[finite], limits[finite]
    if (np.array([np.minimum.reduceat(row, _starts(owner)).sum() for row in costs]) > limits).any():
        return None
    picks = _exact(losses, costs, limits, owner) if len(flat) <= _EXACT else _reduced(losses, costs, limits, owner)
    return None if picks is None else [flat[i] for i in picks]


def _cost(choice: Choice, name: str) -> float:
    return float(choice.nbytes) if name == "nbytes" else float(choice.costs[name])


def _starts(owner: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.diff(owner, prepend=-1))


def _exact(losses: Floats, costs: Floats, limits: Floats, owner: np.ndarray, gap: float = 0.0) -> np.ndarray | None:
    """One index a layer, from an integer program over all of these choices; None where nothing fits."""
    n, layers = len(losses), int(owner[-1]) + 1
    unit = np.minimum(1.0, 1e9 / np.maximum(np.abs(limits), 1.0))
    pick = csr_matrix((np.ones(n), (owner, np.arange(n))), shape=(layers, n))
    allowed = limits.copy()
    while True:
        rows = [LinearConstraint(pick, 1, 1)]
        if len(limits):
            rows.append(LinearConstraint(csr_matrix(costs * unit[:, None]), -np.inf, allowed * unit))
        found = milp(
            losses * 1e4,
            integrality=np.ones(n),
            bounds=Bounds(0, 1),
            constraints=rows,
            options={"mip_rel_gap": gap},
        )
        if found.x is None:
            return None
        chosen: np.ndarray = np.flatnonzero(found.x > 0.5)
        # HiGHS lets a row miss its bound by a millionth.
        over = costs[:, chosen].sum(axis=1) - limits
        if (over <= 0).all():
            return chosen
        allowed = allowed - np.where(over > 0, 2 * over + 1e-9 * np.abs(limits), 0)


def _reduced(losses: Floats, costs: Floats, limits: Floats, owner: np.ndarray) -> np.ndarray | None:
    """The same over the choices of small reduced cost, which grow in number until the answer is near the bound."""
    multipliers = _multipliers(losses, costs, limits, owner)
    priced = losses + multipliers @ costs
    least = np.minimum.reduceat(priced, _starts(owner))
    bound = float(least.sum() - multipliers @ limits)
    reduced = priced - least[owner]
    count = 2 * len(least)
    while True:
        delta = np.inf if count >= len(losses) else float(np.partition(reduced, count)[count])
        kept = np.flatnonzero(reduced <= delta)
        found = _exact(losses[kept], costs[:, kept], limits, owner[kept], _GAP)
        if found is not None:
            picks: np.ndarray = kept[found]
            away = float(losses[picks].sum()) - bound
            if away <= max(delta, _GAP * max(abs(bound), 1e-12)):
                return picks
        if len(kept) == len(losses):
            return None if found is None else kept[found]
        count *= 2


def _multipliers(losses: Floats, costs: Floats, limits: Floats, owner: np.ndarray) -> Floats:
    """Step 1: [budgets], not negative."""
    scale = np.maximum(np.abs(limits), 1.0)
    units, starts = costs / scale[:, None], _starts(owner)
    goal = limits / scale
    top = float(np.abs(losses).sum()) + 1.0
    current = np.zeros(len(limits))
    best, highest = current, -np.inf
    rows: list[Floats] = []
    sides: list[float] = []
    for _ in range(_CUTS):
        priced = losses + current @ units
        least = np.minimum.reduceat(priced, starts)
        chosen = [s + int(np.argmin(part)) for s, part in zip(starts, np.split(priced, starts[1:]), strict=True)]
        value = float(least.sum() - current @ goal)
        slope = units[:, chosen].sum(axis=1) - goal
        if value > highest:
            best, highest = current, value
        rows.append(np.append(-slope, 1.0))
        sides.append(value - float(slope @ current))
        found = linprog(
            np.append(np.zeros(len(limits)), -1.0),
            A_ub=np.array(rows),
            b_ub=np.array(sides),
            bounds=[(0, 1e9)] * len(limits) + [(None, top)],
        )
        if found.x is None or found.x[-1] - highest <= 1e-9 * max(abs(highest), 1e-9):
            break
        current = found.x[:-1]
    multipliers: Floats = best / scale
    return multipliers
