"""Plans under several budgets are what trying every combination finds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octoc import budgets, plan
from octoc.plan import Choice

Layers = list[list[Choice]]


def choice(nbytes: int, loss: float, memory: float, latency: float) -> Choice:
    return Choice(None, nbytes, loss, {"memory": memory, "latency": latency})


whole = st.integers(0, 9)
choices = st.builds(choice, whole, st.integers(-6, 6).map(float), whole, whole)
problems = st.lists(st.lists(choices, min_size=1, max_size=4), max_size=4)
limits = st.fixed_dictionaries(
    {name: st.one_of(st.integers(-1, 30).map(float), st.just(math.inf)) for name in ("nbytes", "memory", "latency")}
)


def spent(found: list[Choice] | tuple[Choice, ...], name: str) -> float:
    return sum(c.nbytes if name == "nbytes" else c.costs[name] for c in found)


def fits(found: list[Choice] | tuple[Choice, ...], limits: dict[str, float]) -> bool:
    return all(spent(found, name) <= limit for name, limit in limits.items())


def loss(found: list[Choice] | tuple[Choice, ...]) -> float:
    return math.fsum(c.loss for c in found)


@settings(deadline=None)
@given(problems, limits)
def test_the_plan_is_the_best_of_all_combinations_within_every_budget(layers: Layers, limits: dict[str, float]) -> None:
    fitting = [loss(p) for p in itertools.product(*layers) if fits(p, limits)]
    found = budgets.solve(layers, limits)
    assert (found is None) == (not fitting)
    if found is not None:
        assert fits(found, limits)
        assert loss(found) == pytest.approx(min(fitting), abs=1e-6)
        assert all(any(c is other for other in layer) for c, layer in zip(found, layers, strict=True))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1))
def test_one_budget_alone_gives_what_dynamic_programming_gives(seed: int) -> None:
    layers = network(np.random.default_rng(seed), 12, 6)
    budget = sum(np.mean([c.nbytes for c in layer]) for layer in layers)
    exact, found = plan.solve(layers, budget), budgets.solve(layers, {"nbytes": budget})
    assert exact is not None
    assert found is not None
    assert loss(found) == pytest.approx(loss(exact), rel=1e-6)


def network(generator: np.random.Generator, layers: int, choices: int) -> Layers:
    """Losses that fall with the bits, as those of real layers do."""
    found = []
    for size in np.exp(generator.uniform(5, 13, layers)):
        bits = np.sort(generator.uniform(1, 16, choices))
        weight = generator.uniform(0.1, 5)
        found.append(
            [
                choice(
                    int(size * b / 8),
                    weight * 4.0**-b * generator.uniform(0.7, 1.3),
                    float(size),
                    size * generator.uniform(0.5, 1.5),
                )
                for b in bits
            ]
        )
    return found


@pytest.mark.parametrize("latency", [0.95, 0.9])
def test_large_networks_keep_every_budget_and_come_near_the_bound(latency: float) -> None:
    layers = network(np.random.default_rng(0), 200, 20)
    limits = {
        "nbytes": 0.5 * sum(np.mean([c.nbytes for c in layer]) for layer in layers),
        "latency": latency * sum(np.mean([c.costs["latency"] for c in layer]) for layer in layers),
    }
    found = budgets.solve(layers, limits)
    assert found is not None
    assert fits(found, limits)
    relaxed = plan.solve(layers, limits["nbytes"])
    assert relaxed is not None
    assert not fits(relaxed, limits), "the second budget binds"
    # The linear relaxation, by an independent solver, is a lower bound.
    assert loss(found) <= 1.01 * relaxation(layers, limits)


def relaxation(layers: Layers, limits: dict[str, float]) -> float:
    from scipy.optimize import linprog
    from scipy.sparse import csr_matrix

    flat = [c for layer in layers for c in layer]
    owner = np.repeat(np.arange(len(layers)), [len(layer) for layer in layers])
    pick = csr_matrix((np.ones(len(flat)), (owner, np.arange(len(flat)))))
    rows = np.array([[spent([c], name) / limit for c in flat] for name, limit in limits.items()])
    losses = np.array([c.loss for c in flat])
    found = linprog(losses * 1e3, A_ub=rows, b_ub=np.ones(len(rows)), A_eq=pick, b_eq=np.ones(len(layers)))
    return float(found.fun) / 1e3
