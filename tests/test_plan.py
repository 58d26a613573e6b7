"""The knapsack finds what trying every combination finds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octoc.plan import Choice, front, largest, smallest, solve

Layers = list[list[Choice]]

# Whole losses add up exactly, so that ties are ties.
choices = st.builds(Choice, st.integers(0, 9), st.integers(0, 12), st.integers(-6, 6).map(float))
problems = st.lists(st.lists(choices, min_size=1, max_size=5), max_size=5)


def every_plan(layers: Layers) -> list[tuple[float, int]]:
    """(loss, bytes) of every combination."""
    return [(math.fsum(c.loss for c in p), sum(c.nbytes for c in p)) for p in itertools.product(*layers)]


def worth(plan: list[Choice]) -> tuple[float, int]:
    return math.fsum(c.loss for c in plan), sum(c.nbytes for c in plan)


@given(problems, st.one_of(st.integers(-1, 61), st.just(math.inf)))
def test_the_plan_is_the_best_of_all_combinations_and_of_equal_ones_the_smallest(layers: Layers, budget: float) -> None:
    fitting = [plan for plan in every_plan(layers) if plan[1] <= budget]
    found = solve(layers, budget)
    if not fitting:
        assert found is None
    else:
        assert found is not None
        assert worth(found) == min(fitting)
        assert all(any(choice is c for c in layer) for choice, layer in zip(found, layers, strict=True))


@given(
    st.lists(
        st.lists(st.builds(Choice, st.none(), st.integers(0, 10**9), st.floats(-1e9, 1e9)), min_size=1, max_size=4),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 5 * 10**9),
)
def test_real_losses_of_any_size_and_sign_lose_nothing_to_pruning(layers: Layers, budget: int) -> None:
    fitting = [loss for loss, nbytes in every_plan(layers) if nbytes <= budget]
    found = solve(layers, budget)
    assert (found is None) == (not fitting)
    if found is not None:
        magnitude = sum(max(abs(c.loss) for c in layer) for layer in layers)
        assert worth(found)[0] <= min(fitting) + 1e-12 * magnitude


@pytest.mark.parametrize("magnitude", [1e6, 1e12, 1e30])
def test_losses_that_cancel_do_not_drown_the_bound(magnitude: float) -> None:
    generator = np.random.default_rng(3)
    for _ in range(50):
        layers = [
            [Choice(None, int(n), offset + float(x)) for n, x in zip(sizes, losses, strict=True)]
            for offset, sizes, losses in zip(
                (magnitude, magnitude / 3, -magnitude * 4 / 3),
                generator.integers(0, 9, (3, 4)),
                magnitude * 1e-9 * generator.uniform(0.5, 1.5, (3, 4)),
                strict=True,
            )
        ]
        budget = int(generator.integers(smallest(layers), 28))
        found = solve(layers, budget)
        assert found is not None
        best = min(loss for loss, nbytes in every_plan(layers) if nbytes <= budget)
        assert worth(found)[0] <= best + 1e-12 * magnitude


@given(problems.filter(bool))
def test_the_reachable_range_is_that_of_all_plans(layers: Layers) -> None:
    plans = every_plan(layers)
    assert smallest(layers) == min(nbytes for _, nbytes in plans)
    assert largest(layers) == min(plans)[1]
    assert solve(layers, smallest(layers) - 1) is None
    assert solve(layers, smallest(layers)) is not None
    best = solve(layers, largest(layers))
    assert best is not None
    assert worth(best) == min(plans)


@given(problems.filter(bool))
def test_the_front_is_the_lower_convex_hull_of_all_plans(layers: Layers) -> None:
    plans = every_plan(layers)
    points = front(layers)
    assert {(loss, nbytes) for nbytes, loss in points} <= set(plans)
    assert points[0][0] == smallest(layers)
    assert points[-1] == (largest(layers), min(plans)[0])
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(points))
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(points)]
    assert all(a <= b for a, b in itertools.pairwise(slopes))
    # No plan lies below the hull.
    hull = np.interp([nbytes for _, nbytes in plans], [p[0] for p in points], [p[1] for p in points])
    assert all(loss >= below - 1e-9 for (loss, _), below in zip(plans, hull, strict=True))


@given(problems.filter(bool))
def test_a_plan_on_the_front_is_what_its_budget_gives(layers: Layers) -> None:
    for nbytes, loss in front(layers):
        found = solve(layers, nbytes)
        assert found is not None
        assert worth(found) == (loss, nbytes)


def test_hundreds_of_layers_with_dozens_of_choices_stay_exact_at_the_ends_and_monotone_between() -> None:
    generator = np.random.default_rng(0)
    layers = [
        [
            Choice(i, int(nbytes), float(loss))
            for i, (nbytes, loss) in enumerate(
                zip(generator.integers(100, 100_000, 30), generator.exponential(size=30), strict=True)
            )
        ]
        for _ in range(500)
    ]
    low, high = smallest(layers), largest(layers)
    budgets = [low, *np.linspace(low, high, 5)[1:-1].tolist(), high, math.inf]
    plans = [solve(layers, budget) for budget in budgets]
    losses = []
    for plan, budget in zip(plans, budgets, strict=True):
        assert plan is not None
        assert sum(c.nbytes for c in plan) <= budget
        losses.append(worth(plan)[0])
    assert all(a >= b for a, b in itertools.pairwise(losses))
    assert losses[-1] == losses[-2] == math.fsum(min(c.loss for c in layer) for layer in layers)
    # No plan beats the linear relaxation, and the best one is within one step of it.
    points = front(layers)
    for loss, budget in zip(losses[:-1], budgets[:-1], strict=True):
        bound = float(np.interp(budget, [p[0] for p in points], [p[1] for p in points]))
        assert bound - 1e-6 <= loss <= bound + 1.0


def test_no_layers_make_an_empty_plan_that_takes_nothing() -> None:
    assert solve([], 0) == []
    assert solve([], math.inf) == []
    assert solve([], -1) is None
    assert smallest([]) == largest([]) == 0
    assert front([]) == [(0, 0.0)]
