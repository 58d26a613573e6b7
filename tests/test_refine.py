"""Re-pricing finds what the linear model misses, and never returns a plan that measures worse than uniform bits."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from octoc import plan
from octoc.plan import Choice
from octoc.refine import Plan, refine

BITS = (2, 3, 4, 8)


def network(sensitivity: list[float]) -> list[list[Choice]]:
    return [[Choice((i, b), b, s * 4.0**-b) for b in BITS] for i, s in enumerate(sensitivity)]


def uniform(layers: list[list[Choice]], budget: int) -> list[Plan]:
    plans = [[layer[k] for layer in layers] for k in range(len(BITS))]
    return [p for p in plans if sum(c.nbytes for c in p) <= budget]


def solver(layers: list[list[Choice]], budget: int):  # type: ignore[no-untyped-def]
    def solve(factors: Mapping[int, float]) -> Plan | None:
        priced = [[replace(c, loss=c.loss * factors.get(i, 1.0)) for c in layer] for i, layer in enumerate(layers)]
        found = plan.solve(priced, budget)
        keys = None if found is None else [c.key for c in found]
        return (
            None
            if keys is None
            else [next(c for c in layer if c.key == key) for layer, key in zip(layers, keys, strict=True)]
        )

    return solve


floats = st.floats(0.01, 100)


@given(st.lists(st.tuples(floats, floats), min_size=1, max_size=5), st.integers(2, 40))
def test_the_best_measured_plan_wins_and_no_uniform_one_beats_it(pairs: list[tuple[float, float]], budget: int) -> None:
    """The first of each pair is what the linear model believes, the second is true."""
    layers = network([believed for believed, _ in pairs])
    true = [t for _, t in pairs]

    def measure(found: Plan) -> float:
        return sum(true[c.key[0]] * 4.0 ** -c.key[1] for c in found)

    same = uniform(layers, budget)
    found = refine(same, solver(layers, budget), measure)
    assert [m.divergence for m in found] == sorted(m.divergence for m in found)
    assert all(measure(m.plan) == m.divergence for m in found)
    assert all(sum(c.nbytes for c in m.plan) <= budget for m in found)
    if same:
        assert found[0].divergence <= min(map(measure, same))


def test_a_wrong_coefficient_is_corrected_by_what_is_measured() -> None:
    layers, true = network([1.0, 1.0, 1.0, 100.0]), [30.0, 1.0, 1.0, 1.0]

    def measure(found: Plan) -> float:
        return sum(true[c.key[0]] * 4.0 ** -c.key[1] for c in found)

    budget = 16
    first = solver(layers, budget)({})
    assert first is not None
    best = min(measure(list(p)) for p in itertools.product(*layers) if sum(c.nbytes for c in p) <= budget)
    found = refine(uniform(layers, budget), solver(layers, budget), measure, rounds=8)
    assert measure(first) > 3 * best
    assert found[0].divergence <= 1.05 * best


def test_layers_that_only_hurt_together_are_found() -> None:
    """Two layers whose errors add up to more than their sum: the linear model cannot know."""
    layers = network([1.0, 1.0, 1.5, 1.5])

    def measure(found: Plan) -> float:
        error = {c.key[0]: 4.0 ** -c.key[1] for c in found}
        return sum(error.values()) + 200 * error.get(0, 0.0) * error.get(1, 0.0)

    budget = 11
    first = solver(layers, budget)({})
    assert first is not None
    found = refine([], solver(layers, budget), measure)
    assert found[0].divergence < measure(first)


def test_what_is_never_measured_is_never_returned() -> None:
    layers = network([1.0, 2.0])
    calls: list[int] = []

    def measure(found: Plan) -> float:
        calls.append(len(found))
        return float(np.sum([c.loss for c in found]))

    found = refine([], solver(layers, 3), measure)
    assert found == []
    assert calls == []
