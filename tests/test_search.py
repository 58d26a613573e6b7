"""The search holds its budget and its goal whatever files and networks turn out to be, and keeps the best it saw."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from octoc.model import Layer
from octoc.plan import Choice
from octoc.qtensor import Scheme
from octoc.search import Limits, Plan, Search, Tools, loss, payload

SCHEMES = [Scheme("affine", bits) for bits in range(2, 9)]
FILE = Path("model.bin")


@dataclass(frozen=True)
class Code:
    """A compressed weight of any size and error."""

    nbytes: int
    error: float

    def dequantize(self) -> NDArray[np.float64]:
        """Of the weight [1, 1], which is 1."""
        return np.array([[1.0 - self.error]])


@dataclass
class World:
    """Files and networks of which everything is known.

    Args:
        table: for each layer (bytes, squared error) of each choice.
        extra: plan -> bytes of the file beside its weights.
        model_quality, file_quality: predicted loss -> quality.
        goal: the least quality that holds, None without one.
        divergence: of a plan from the original; None where nothing is planned.
    """

    table: list[list[tuple[int, float]]]
    extra: Callable[[Plan], int] = lambda plan: 0
    model_quality: Callable[[float], float] = lambda lost: 100 - lost
    file_quality: Callable[[float], float] = lambda lost: 100 - lost
    goal: float | None = None
    divergence: Callable[[Plan], float] | None = None
    codes: dict[Any, Code] = field(default_factory=dict)
    assembled: list[tuple[Plan, bool]] = field(default_factory=list)
    written: list[Plan] = field(default_factory=list)
    tried: list[Plan] = field(default_factory=list)

    def search(self, measured: bool = True) -> Search:
        layers = [Layer(f"w{i}", "linear", (1, 1), 0, 1, 4, ("linear",)) for i in range(len(self.table))]
        schemes = {layer.name: SCHEMES[: len(row)] for layer, row in zip(layers, self.table, strict=True)}
        self.codes = {
            (layer.name, scheme): Code(nbytes, error**0.5)
            for layer, row in zip(layers, self.table, strict=True)
            for scheme, (nbytes, error) in zip(SCHEMES, row, strict=False)
        }
        make: Any = Tools
        tools = make(
            encode=lambda layer, scheme: self.codes[layer.name, scheme],
            assemble=self._assemble,
            write=self._write,
            quality=self._quality,
            count=lambda path: self.file_quality(loss(self.written[-1])),
            divergence=self.divergence,
            worse=None if self.goal is None else lambda quality: quality < self.goal - 1e-9,
        )
        weights = {layer.name: np.ones((1, 1), np.float32) for layer in layers}
        result = Search(layers, schemes, {}, weights, tools)
        if measured:
            result.measure_overhead()
        return result

    def size(self, plan: Plan) -> int:
        return sum(self.codes[choice.key].nbytes for choice in plan) + self.extra(plan)

    def _assemble(self, plan: Plan, correct: bool) -> Any:
        self.assembled.append((plan, correct))
        return plan

    def _write(self, plan: Plan) -> tuple[Path, int]:
        self.written.append(plan)
        return FILE, self.size(plan)

    def _quality(self, plan: Plan) -> float:
        self.tried.append(plan)
        return self.model_quality(loss(plan))


rows = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 30).map(float)), min_size=1, max_size=4)
tables = st.lists(rows, min_size=1, max_size=4)


def shaky(seed: int, most: int) -> Callable[[Plan], int]:
    """Bytes beside the weights that depend on the plan in no way that could be predicted."""
    return lambda plan: 50 + hash((seed, *(c.key[1].bits for c in plan))) % (most + 1)


def every(search: Search) -> list[Plan]:
    return [list(plan) for plan in itertools.product(*search.choices)]


def assert_consistent(world: World, outcome: Any) -> None:
    """What is returned was assembled and written last, and exactly one point is the chosen one."""
    assert world.assembled[-1] == (outcome.plan, True)
    assert world.written[-1] == outcome.plan == outcome.small
    assert outcome.path == FILE
    assert outcome.nbytes == world.size(outcome.plan)
    assert outcome.quality == world.file_quality(loss(outcome.plan))
    chosen = [point for point in outcome.points if point.kind == "chosen"]
    assert [(p.nbytes, p.predicted, p.quality) for p in chosen] == [
        (outcome.nbytes, loss(outcome.plan), outcome.quality)
    ]
    assert {point.kind for point in outcome.points} <= {"chosen", "tried", "rejected"}
    if world.goal is not None:
        assert not any(p.kind == "tried" and p.quality < world.goal - 1e-9 for p in outcome.points)


@given(tables)
def test_a_choice_costs_its_bytes_and_its_relative_error_times_the_sensitivity(
    table: list[list[tuple[int, float]]],
) -> None:
    search = World(table).search(measured=False)
    for row, choices in zip(table, search.choices, strict=True):
        assert [c.nbytes for c in choices] == [nbytes for nbytes, _ in row]
        assert [c.loss for c in choices] == pytest.approx([error for _, error in row], abs=1e-9)
    search.sensitivity = {"w0": 3.0}
    assert [c.loss for c in search._price(search.layers[0])] == pytest.approx([3 * e for _, e in table[0]], abs=1e-9)


@given(tables, st.integers(0, 300), st.integers(0, 80), st.integers(0, 400), st.booleans())
def test_a_budget_that_any_plan_holds_is_held(
    table: list[list[tuple[int, float]]], seed: int, most: int, budget: int, measured: bool
) -> None:
    world = World(table, shaky(seed, most))
    search = world.search(measured)
    outcome = search.run(Limits(budget))
    assert_consistent(world, outcome)
    if world.size(search.smallest()) <= budget:
        assert outcome.nbytes <= budget


@given(tables, st.integers(0, 60), st.one_of(st.none(), st.integers(50, 400)))
def test_bits_a_weight_are_held_on_average_and_beside_a_budget_of_bytes(
    table: list[list[tuple[int, float]]], mean: int, budget: int | None
) -> None:
    """Each weight has one element, so that eight times its bytes are its bits."""
    world = World(table, lambda plan: 50)
    search = world.search()
    limits = Limits(budget, 8.0 * mean)
    held = [
        loss(p) for p in every(search) if search.bits(p) <= 8 * mean and (budget is None or world.size(p) <= budget)
    ]
    outcome = search.run(limits)
    assert_consistent(world, outcome)
    if held:
        assert search.bits(outcome.plan) <= 8 * mean
        assert budget is None or outcome.nbytes <= budget
        assert loss(outcome.plan) == pytest.approx(min(held), abs=1e-6)


def test_coarse_codes_are_chosen_by_what_is_measured_and_never_worse_than_uniform_ones() -> None:
    """The linear model believes in the second layer; in truth only the first one matters."""
    row = [(bits, 4.0**-bits) for bits in range(2, 9)]
    world = World([row, row], divergence=lambda plan: 4.0 ** -plan[0].key[1].bits if len(plan) == 2 else 0.0)
    search = world.search()
    search.sensitivity = {"w0": 0.01, "w1": 1.0}
    search.choices = [search._price(layer) for layer in search.layers]
    search.layers = [replace(layer, shape=(16, 1)) for layer in search.layers]  # so that the codes count as coarse
    believed = search.within(Limits(8))
    assert believed is not None
    assert believed[0].nbytes < believed[1].nbytes
    outcome = search.run(Limits(8))
    assert outcome.nbytes <= 8
    assert outcome.plan[0].nbytes >= 4, "a uniform plan of 4 bits gives the first layer as much"


@given(tables, st.integers(0, 300), st.integers(0, 80), st.integers(0, 400), st.integers(0, 120), st.booleans())
def test_a_budget_is_held_with_a_quality_goal_too(
    table: list[list[tuple[int, float]]], seed: int, most: int, budget: int, allowed: int, measured: bool
) -> None:
    world = World(table, shaky(seed, most), goal=100.0 - allowed)
    search = world.search(measured)
    outcome = search.run(Limits(budget))
    assert_consistent(world, outcome)
    if world.size(search.smallest()) <= budget:
        assert outcome.nbytes <= budget


@given(tables, st.integers(0, 200), st.integers(0, 300))
def test_with_a_constant_overhead_the_plan_is_the_best_within_the_budget(
    table: list[list[tuple[int, float]]], overhead: int, budget: int
) -> None:
    world = World(table, lambda plan: overhead)
    search = world.search()
    assert search.overhead == overhead
    outcome = search.run(Limits(budget))
    fitting = [loss(plan) for plan in every(search) if world.size(plan) <= budget]
    if fitting:
        assert loss(outcome.plan) == pytest.approx(min(fitting), abs=1e-9)
    else:
        assert outcome.plan == search.smallest()
        assert outcome.nbytes > budget
    sizes = [world.size(plan) for plan in every(search)]
    assert outcome.reachable == (min(sizes), world.size(search.best()))


@given(tables, st.integers(0, 200), st.integers(0, 300))
def test_an_overhead_that_was_not_measured_is_learnt_from_the_files(
    table: list[list[tuple[int, float]]], overhead: int, budget: int
) -> None:
    """Each file over the budget raises the overhead, never beyond the true one: no plan that fits is lost."""
    world = World(table, lambda plan: overhead)
    search = world.search(measured=False)
    outcome = search.run(Limits(budget))
    assert search.overhead <= overhead
    fitting = [loss(plan) for plan in every(search) if world.size(plan) <= budget]
    if fitting and len(world.written) < 8:
        assert loss(outcome.plan) == pytest.approx(min(fitting), abs=1e-9)


@given(tables, st.integers(0, 300), st.integers(0, 80))
def test_an_impossible_budget_gives_the_smallest_plan(
    table: list[list[tuple[int, float]]], seed: int, most: int
) -> None:
    for goal in (None, 0.0, 100.0):
        world = World(table, shaky(seed, most), goal=goal)
        search = world.search()
        outcome = search.run(Limits(1))
        assert_consistent(world, outcome)
        assert outcome.plan == search.smallest()
        assert outcome.nbytes > 1


@given(tables)
def test_without_budget_and_goal_the_plan_is_that_of_least_loss(table: list[list[tuple[int, float]]]) -> None:
    world = World(table, lambda plan: 7)
    search = world.search()
    outcome = search.run(Limits(None))
    assert_consistent(world, outcome)
    assert loss(outcome.plan) == pytest.approx(min(loss(plan) for plan in every(search)), abs=1e-9)


def ladder(layers: int = 12) -> list[list[tuple[int, float]]]:
    """Fewer bits cost four times the error for each, in layers of different sizes."""
    generator = np.random.default_rng(4)
    sizes = generator.integers(20, 200, layers)
    weights = generator.uniform(0.1, 3.0, layers)
    return [[(int(n * b / 8), float(w * 4.0 ** (4 - b))) for b in range(2, 9)] for n, w in zip(sizes, weights)]  # noqa: B905


def smallest_good(search: Search, world: World, goal: float) -> int:
    """Bytes of the smallest plan whose quality holds, by trying every budget."""
    low, high = search.reachable()
    for budget in range(low, high + 1):
        found = search.within(Limits(budget))
        assert found is not None
        if world.file_quality(loss(found)) >= goal - 1e-9:
            return world.size(found)
    raise AssertionError("no plan is good")


@pytest.mark.parametrize("allowed", [0.2, 1.0, 5.0, 40.0, 1e6])
@pytest.mark.parametrize("max_size", [None, 1_000_000, 1200])
def test_the_smallest_good_plan_is_found_to_a_hundredth_of_the_range(allowed: float, max_size: int | None) -> None:
    world = World(ladder(6), lambda plan: 300, goal=100 - allowed)
    search = world.search()
    low, high = search.reachable()
    outcome = search.run(Limits(max_size))
    assert_consistent(world, outcome)
    assert outcome.quality >= 100 - allowed
    best = smallest_good(search, world, 100 - allowed)
    assert best <= outcome.nbytes <= best + max((high - low) / 2**7, 0.005 * outcome.nbytes) + 1
    assert len(world.tried) <= 7


def test_what_each_encoding_costs_beside_its_codes_is_learnt_from_files() -> None:
    """Every plan's file is then predicted to the byte where these costs add up."""
    beside = {scheme: 10 + 7 * scheme.bits for scheme in SCHEMES}
    world = World(ladder(4), lambda plan: 300 + sum(beside[c.key[1]] for c in plan))
    search = world.search()
    generator = np.random.default_rng(0)
    for _ in range(50):
        plan = [layer[generator.integers(len(layer))] for layer in search.choices]
        assert payload(plan) + search.overhead == world.size(plan)
    assert not any(correct for _, correct in world.assembled)  # no bias is corrected for the sake of a size
    outcome = search.run(Limits(900))
    assert_consistent(world, outcome)
    fitting = [loss(plan) for plan in every(search) if world.size(plan) <= 900]
    assert loss(outcome.plan) == pytest.approx(min(fitting), abs=1e-9)


@pytest.mark.parametrize("hidden", [5_000, -200])
def test_the_smallest_good_plan_is_found_although_the_overhead_was_mispredicted(hidden: int) -> None:
    """The smallest plan's file, from which the overhead is learnt, differs from all others."""
    world = World(ladder(6), goal=95.0)
    smallest = world.search().smallest()
    world.extra = lambda plan: 300 + (0 if plan == smallest else hidden)
    search = world.search()
    outcome = search.run(Limits(60_000))
    assert_consistent(world, outcome)
    assert outcome.quality >= 95
    best = smallest_good(search, world, 95.0)
    assert outcome.nbytes <= best * 1.02


@given(tables, st.integers(0, 120), st.integers(0, 40))
def test_where_the_file_is_worse_than_its_network_the_plan_moves_up_until_the_file_is_good(
    table: list[list[tuple[int, float]]], allowed: int, worse: int
) -> None:
    world = World(table, lambda plan: 9, file_quality=lambda lost: 100 - worse - lost, goal=100.0 - allowed)
    search = world.search()
    outcome = search.run(Limits(None))
    assert_consistent(world, outcome)
    if any(world.file_quality(loss(plan)) >= 100 - allowed for plan in every(search)):
        assert outcome.quality >= 100 - allowed - 1e-9


@given(tables, st.integers(0, 400), st.integers(1, 40))
def test_where_no_plan_reaches_the_goal_the_best_within_the_budget_is_kept(
    table: list[list[tuple[int, float]]], budget: int, missing: int
) -> None:
    world = World(table, lambda plan: 9, file_quality=lambda lost: 100 - missing - lost, goal=100.0)
    search = world.search()
    outcome = search.run(Limits(budget))
    assert_consistent(world, outcome)
    fitting = [loss(plan) for plan in every(search) if world.size(plan) <= budget]
    if fitting:
        assert loss(outcome.plan) == pytest.approx(min(fitting), abs=1e-9)
        assert outcome.nbytes <= budget


@given(tables, st.integers(0, 300), st.integers(0, 80), st.integers(0, 120))
def test_the_outcome_is_no_larger_than_a_good_file_that_was_seen(
    table: list[list[tuple[int, float]]], seed: int, most: int, allowed: int
) -> None:
    """A plan of fewer weight bytes may make a larger file; then the file that was there before is kept."""
    world = World(table, shaky(seed, most), goal=100.0 - allowed)
    search = world.search()
    before = len(world.written)
    outcome = search.run(Limits(None))
    top = world.written[before]
    if world.file_quality(loss(top)) >= 100 - allowed - 1e-9:
        assert outcome.quality >= 100 - allowed - 1e-9
        assert outcome.nbytes <= world.size(top)


def test_quality_that_is_no_number_is_no_quality() -> None:
    world = World([[(10, 1.0), (20, 0.0)]], file_quality=lambda lost: float("nan"), goal=0.0)
    search = world.search()
    search.tools = Tools(**{**vars(search.tools), "worse": lambda quality: not quality >= 0.0})
    outcome = search.run(Limits(None))
    assert outcome.plan == search.best()
    assert np.isnan(outcome.quality)


def test_a_network_without_weights_has_one_plan() -> None:
    for goal in (None, 0.0):
        world = World([], lambda plan: 40, goal=goal)
        search = world.search()
        assert search.reachable() == (40, 40)
        for budget in (None, 10, 100):
            outcome = search.run(Limits(budget))
            assert outcome.plan == []
            assert outcome.nbytes == 40


def test_the_bytes_and_the_loss_of_a_plan_are_the_sums_over_its_choices() -> None:
    plan = [Choice("a", 3, 0.5), Choice("b", 4, 0.25)]
    assert payload(plan) == 7
    assert loss(plan) == 0.75
