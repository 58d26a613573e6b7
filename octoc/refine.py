"""Corrects a plan of coarse codes by what is measured around it.

The sum over layers of `sensitivity * error ** 2` holds for small errors. Below about 4 bits layers interact, and the
sum is off by factors; its order still serves. So:

1. Measure the divergence of the plan, and of every uniform plan (one encoding for all layers) that the budget admits.
2. For each layer, measure the plan with that layer alone left in floats. What this takes off the divergence is the
   layer's true price there.
3. Multiply each layer's coefficient by the ratio of true to predicted price, and solve again.
4. Repeat while new plans come out; the plan that measured best wins, so that it is never worse than uniform bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from octoc.plan import Choice

Plan = list[Choice]
Solve = Callable[[Mapping[int, float]], Plan | None]

ROUNDS = 4
_MOST = 16.0  # by which one round may change a coefficient, up or down


@dataclass(frozen=True)
class Measured:
    """A plan and its divergence from the original, measured."""

    plan: Plan
    divergence: float


def refine(
    uniform: Sequence[Plan],
    solve: Solve,
    measure: Callable[[Plan], float],
    rounds: int = ROUNDS,
) -> list[Measured]:
    """Plans that were measured, the best first; of equal ones the earlier.

    Args:
        uniform: plans within the budget to be no worse than.
        solve: factors of the layers' losses by position (1 where none is given) -> the best plan within the budget.
        measure: divergence of a plan; a plan may lack layers, which are floats then.
        rounds: how often to solve again at most.
    """
    factors: dict[int, float] = {}
    seen: list[Measured] = [Measured(plan, measure(plan)) for plan in uniform]
    for _ in range(rounds + 1):
        plan = solve(factors)
        if plan is None or any(_same(plan, other.plan) for other in seen[len(uniform) :]):
            break
        seen.append(Measured(plan, measure(plan)))
        if len(seen) > len(uniform) + rounds:
            break
        factors = _repriced(seen[-1], factors, measure)
    return sorted(seen, key=lambda found: found.divergence)


def _same(a: Plan, b: Plan) -> bool:
    return all(x.key == y.key for x, y in zip(a, b, strict=True))


def _repriced(found: Measured, factors: Mapping[int, float], measure: Callable[[Plan], float]) -> dict[int, float]:
    """Steps 2 and 3."""
    true = [
        max(found.divergence - measure([*found.plan[:i], *found.plan[i + 1 :]]), 0.0) for i in range(len(found.plan))
    ]
    guess = [choice.loss * factors.get(i, 1.0) for i, choice in enumerate(found.plan)]
    # Only ratios between layers matter to the solver.
    unit = sum(true) / max(sum(guess), 1e-300)
    ratios = [t / (g * unit) if g * unit > 0 else 1.0 for t, g in zip(true, guess, strict=True)]
    return {
        i: factors.get(i, 1.0) * min(max(ratio, 1 / _MOST), _MOST) if unit > 0 else factors.get(i, 1.0)
        for i, ratio in enumerate(ratios)
    }
