"""Finds the plan of one artefact: predict, write, count on real data, correct, repeat. Keeps the best so far.

The linear model of `profile.py` prices every choice; `plan.py` solves for a budget exactly. Two things it cannot know
are measured: the bytes of a file around its weights (from the file that was just written), and the quality (by running
the compressed network, and in the end the artefact itself).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from octoc import budgets, plan
from octoc.compressed import Compressed
from octoc.model import Layer
from octoc.plan import Choice
from octoc.qtensor import QTensor, Scheme
from octoc.refine import refine
from octoc.report import Point

Plan = list[Choice]
Key = tuple[str, Scheme]  # name of the weight, its encoding

_CORRECTIONS = 8  # rewrites of a file that came out over its budget; the second already fits in practice
_COARSE = 4.5  # bits a weight, below which a plan is measured and re-priced
_PROBES = 7  # evaluations while looking for the smallest plan within an allowed drop: 1 % of the range of sizes


@dataclass(frozen=True)
class Limits:
    """What a plan must stay within.

    Args:
        nbytes: of the file.
        bits: a weight on average, over the weights with a choice, scales and tables counted.
    """

    nbytes: float | None = None
    bits: float | None = None


@dataclass(frozen=True)
class Tools:
    """What the search needs done, so that it knows neither formats nor networks.

    Args:
        encode: weight and scheme -> compressed tensor.
        assemble: plan, and whether its biases are to be corrected -> compressed network.
        write: compressed network -> file and its bytes.
        quality: of a compressed network on the evaluation data, in torch.
        count: quality of a written file.
        worse: (quality, allowed drop applied) -> whether the quality misses the goal; None where there is no goal.
        divergence: of a compressed network from the original on calibration samples; None where nothing is planned.
    """

    encode: Callable[[Layer, Scheme], QTensor]
    assemble: Callable[[Plan, bool], Compressed]
    write: Callable[[Compressed], tuple[Path, int]]
    quality: Callable[[Compressed], float]
    count: Callable[[Path], float]
    worse: Callable[[float], bool] | None
    divergence: Callable[[Compressed], float] | None = None


@dataclass
class Outcome:
    """What the search ended with.

    Args:
        plan: one choice a layer.
        small: the compressed network.
        path: of the file.
        nbytes: of the file.
        quality: counted on the file.
        points: everything it saw.
        reachable: bytes of the smallest and the largest file.
    """

    plan: Plan
    small: Compressed
    path: Path
    nbytes: int
    quality: float
    points: list[Point]
    reachable: tuple[int, int]


@dataclass
class Search:
    """One artefact's search.

    Args:
        layers: weights with a choice.
        schemes: by layer name, what may be chosen; never empty.
        sensitivity: by layer name; what is not named counts as 1.
        tools: see `Tools`.
    """

    layers: Sequence[Layer]
    schemes: Mapping[str, Sequence[Scheme]]
    sensitivity: Mapping[str, float]
    weights: Mapping[str, np.ndarray]
    tools: Tools
    overhead: int = 0
    points: list[Point] = field(default_factory=list)
    known: dict[tuple[Key, ...], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.choices = [self._price(layer) for layer in self.layers]

    def _price(self, layer: Layer) -> list[Choice]:
        weight = self.weights[layer.name].astype(np.float64)
        power = max(float(np.square(weight).sum()), 1e-30)
        priced = []
        for scheme in self.schemes[layer.name]:
            tensor = self.tools.encode(layer, scheme)
            error = float(np.square(weight - tensor.dequantize()).sum()) / power
            loss = self.sensitivity.get(layer.name, 1.0) * error
            priced.append(Choice((layer.name, scheme), tensor.nbytes, loss, {"bits": 8.0 * tensor.nbytes}))
        return priced

    def reachable(self) -> tuple[int, int]:
        """Bytes of the smallest and of the largest file."""
        return plan.smallest(self.choices) + self.overhead, plan.largest(self.choices) + self.overhead

    def measure_overhead(self) -> None:
        """Writes files to learn what they take beside the weights: at all, and for each encoding of a weight.

        An encoding brings operations of its own (a reshape behind groups, a table's shape), and small networks notice.
        """
        base = self.smallest()
        self.overhead = self._size(base) - payload(base)
        extra: dict[Scheme, float] = {}
        for scheme in dict.fromkeys(choice.key[1] for layer in self.choices for choice in layer):
            plan_of = [
                next((c for c in layer if c.key[1] == scheme), b) for layer, b in zip(self.choices, base, strict=True)
            ]
            changed = sum(c is not b for c, b in zip(plan_of, base, strict=True))
            beside = self._size(plan_of) - payload(plan_of) - self.overhead if changed else 0
            extra[scheme] = beside / max(changed, 1)
        kept = {id(choice) for choice in base}
        self.choices = [
            [c if id(c) in kept else replace(c, nbytes=max(c.nbytes + round(extra[c.key[1]]), 1)) for c in layer]
            for layer in self.choices
        ]

    def _size(self, found: Plan) -> int:
        return self.tools.write(self.tools.assemble(found, False))[1]

    def smallest(self) -> Plan:
        return [min(layer, key=lambda c: (c.nbytes, c.loss)) for layer in self.choices]

    def best(self) -> Plan:
        return [min(layer, key=lambda c: (c.loss, c.nbytes)) for layer in self.choices]

    def within(self, limits: Limits, factors: Mapping[int, float] | None = None) -> Plan | None:
        """The best plan predicted to stay within the limits.

        Args:
            limits: see `Limits`.
            factors: of the losses of some layers, by position.
        """
        budget = math.inf if limits.nbytes is None else limits.nbytes - self.overhead
        by = factors or {}
        layers = [
            [replace(c, loss=c.loss * by[i]) for c in layer] if i in by else layer
            for i, layer in enumerate(self.choices)
        ]
        if limits.bits is None:
            found = plan.solve(layers, budget)
        else:
            total = limits.bits * sum(layer.size for layer in self.layers)
            found = budgets.solve(layers, {"nbytes": budget, "bits": total})
        if found is None or not by:
            return found
        return [
            next(c for c in layer if c.key == choice.key) for layer, choice in zip(self.choices, found, strict=True)
        ]

    def bits(self, found: Plan) -> float:
        """Bits a weight on average, scales and tables counted."""
        return sum(c.costs["bits"] for c in found) / max(sum(layer.size for layer in self.layers), 1)

    def refined(self, limits: Limits) -> Plan | None:
        """The plan within the limits that measures best, where codes are so coarse that the linear model is off."""
        first = self.within(limits)
        if first is None or self.tools.divergence is None or self.bits(first) >= _COARSE:
            return first
        measured = refine(self._uniform(limits), lambda factors: self.within(limits, factors), self._diverges)
        return measured[0].plan

    def _uniform(self, limits: Limits) -> list[Plan]:
        """Plans within the limits that give every layer the same encoding."""
        found = []
        for scheme in dict.fromkeys(choice.key[1] for layer in self.choices for choice in layer):
            same = [next((c for c in layer if c.key[1] == scheme), None) for layer in self.choices]
            if any(choice is None for choice in same):
                continue
            plan_of = [choice for choice in same if choice is not None]
            size_fits = limits.nbytes is None or payload(plan_of) + self.overhead <= limits.nbytes
            if size_fits and (limits.bits is None or self.bits(plan_of) <= limits.bits):
                found.append(plan_of)
        return found

    def _diverges(self, found: Plan) -> float:
        assert self.tools.divergence is not None
        key = tuple(choice.key for choice in found)
        if key not in self.known:
            self.known[key] = self.tools.divergence(self.tools.assemble(found, False))
        return self.known[key]

    def run(self, limits: Limits) -> Outcome:
        """Searches within the limits and the quality goal of the tools.

        Where the budget is impossible the smallest file is the outcome, and where the goal is, the best file within
        the budget; the caller sees in `nbytes` and `quality` what was missed.
        """
        if self.tools.worse is None:
            return self._fit(limits)
        return self._smallest_good(limits)

    def _fit(self, limits: Limits) -> Outcome:
        """The best file within the budget; a wrong prediction of the overhead is corrected from the file itself."""
        if limits.nbytes is None and limits.bits is None:
            return self._finish(self.best())
        for _ in range(_CORRECTIONS):
            found = self.refined(limits)
            if found is None:
                break
            # Codes of the quick methods take as many bytes: what does not fit need not be encoded well.
            excess = 0 if limits.nbytes is None else self._size(found) - int(limits.nbytes)
            if excess > 0:
                self.overhead += excess
                continue
            compressed = self.tools.assemble(found, True)
            path, nbytes = self.tools.write(compressed)
            if limits.nbytes is None or nbytes <= limits.nbytes:
                return self._counted(found, compressed, path, nbytes)
            self.overhead += nbytes - int(limits.nbytes)
        return self._finish(self.smallest())

    def _smallest_good(self, limits: Limits) -> Outcome:
        """Bisects the budget for the smallest plan within the allowed drop, then confirms it on the file."""
        assert self.tools.worse is not None
        top = self._fit(limits)
        low, high = self.reachable()[0], payload(top.plan) + self.overhead
        if high <= low or self.tools.worse(top.quality):
            return top
        good = high
        for _ in range(_PROBES):
            middle = (low + good) / 2
            found = self.within(replace(limits, nbytes=middle))
            if found is None or good - low < 0.005 * good:
                break
            if self._is_good(found):
                good = payload(found) + self.overhead
            else:
                low = int(middle)
        return self._confirm(good, high, top, limits)

    def _is_good(self, found: Plan) -> bool:
        assert self.tools.worse is not None
        quality = self.tools.quality(self.tools.assemble(found, True))
        missed = self.tools.worse(quality)
        kind = "rejected" if missed else "tried"
        self.points.append(Point(payload(found) + self.overhead, loss(found), quality, kind))
        return not missed

    def _confirm(self, budget: float, high: int, top: Outcome, limits: Limits) -> Outcome:
        """Counts on the file; steps up a twelfth of the way at a time while the file misses what its network held."""
        assert self.tools.worse is not None
        step = max((high - budget) / 12, 1.0)
        while budget < high:
            found = self.within(replace(limits, nbytes=budget))
            if found is not None:
                outcome = self._finish(found)
                # Fewer bytes of weights may make a larger file: `top` fits the budget, what is larger may not.
                if not self.tools.worse(outcome.quality) and outcome.nbytes <= top.nbytes:
                    return outcome
                self.points[-1] = Point(outcome.nbytes, loss(found), outcome.quality, "rejected")
            budget += step
        # Networks were assembled since `top`, and its file may have been overwritten.
        return self._finish(top.plan)

    def _finish(self, found: Plan) -> Outcome:
        compressed = self.tools.assemble(found, True)
        path, nbytes = self.tools.write(compressed)
        return self._counted(found, compressed, path, nbytes)

    def _counted(self, found: Plan, compressed: Compressed, path: Path, nbytes: int) -> Outcome:
        quality = self.tools.count(path)
        self.overhead = self.overhead or nbytes - payload(found)  # not measured where there was nothing to plan
        self.points = [
            p if p.kind != "chosen" else Point(p.nbytes, p.predicted, p.quality, "tried") for p in self.points
        ]
        self.points.append(Point(nbytes, loss(found), quality, "chosen"))
        low, high = self.reachable()
        # What corrected biases take is not in the prediction; of the smallest plan the file is known now.
        low = nbytes if payload(found) == payload(self.smallest()) else min(low, nbytes)
        return Outcome(found, compressed, path, nbytes, quality, self.points, (low, max(high, nbytes)))


def payload(found: Plan) -> int:
    """Bytes of the weights of a plan."""
    return sum(choice.nbytes for choice in found)


def loss(found: Plan) -> float:
    """Predicted loss of a plan."""
    return sum(choice.loss for choice in found)
