"""Blocks: the parts of a network between values that alone carry what the inputs say.

1. A value is a cut where every path from an input to an output goes through it. With the operations in order, this is
   so where no earlier value that depends on an input is needed later. Numbers (sizes) are no values here.
2. A cut ends a block where its first axis is the samples and the original has a value of that name too.
3. Between two coded layers the cut of most elements is taken, the last of those: after an activation, before pooling.
4. Parts with one coded layer are joined in pairs, but not where this leaves far fewer elements to compare (behind
   pooling); a part with more layers (a residual block) stands alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from octoc.model import Model, evaluate
from octoc.recover.network import outputs_of

_PAIR = 2
_FEWER = 4  # times


@dataclass(frozen=True)
class Block:
    """A part of a network.

    Args:
        sources: names of the nodes where it begins: one cut, or the inputs.
        results: name of the cut where it ends, empty where it ends with the outputs.
        layers: names of the coded tensors that it is the first to use.
    """

    sources: tuple[str, ...]
    results: tuple[str, ...]
    layers: tuple[str, ...]


def sizes(model: Model, batch: int) -> tuple[dict[fx.Node, int], dict[fx.Node, Any]]:
    """Elements of each node that is a tensor of so many samples, and the values of those that are no tensors."""
    inputs = dict(zip(model.placeholders, model.examples(batch), strict=True))
    elements = {node: math.prod(value.shape) for node, value in inputs.items()}
    samples = batch if model.dynamic_batch else next((spec.shape[0] for spec in model.inputs if spec.shape), 1)
    numbers: dict[fx.Node, Any] = {}

    def note(node: fx.Node, value: Any) -> None:
        if isinstance(value, Tensor) and value.shape[:1] == (samples,):
            elements[node] = math.prod(value.shape)
        elif isinstance(value, int | float | bool):
            numbers[node] = value

    evaluate(model, dict(inputs), observe=note)
    return elements, numbers


def cuts(model: Model, numbers: Collection[fx.Node]) -> list[fx.Node]:
    """Nodes that every path from an input to an output goes through, in order.

    Args:
        model: the network.
        numbers: nodes whose values are no tensors; paths do not go through them.
    """
    depends = set(model.placeholders)
    for node in model.graph.nodes:
        if node.op == "call_function" and node not in numbers and any(s in depends for s in node.all_input_nodes):
            depends.add(node)
    needed: set[fx.Node] = set()
    waiting = outputs_of(model)
    while waiting:
        node = waiting.pop()
        if node in depends and node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
    order = [node for node in model.graph.nodes if node in needed]
    last = {source: i for i, node in enumerate(order) for source in node.all_input_nodes if source in needed}
    last |= dict.fromkeys((node for node in outputs_of(model) if node in needed), len(order))
    begun = max((i for i, node in enumerate(order) if node.op == "placeholder"), default=0)
    found, live = [], set[fx.Node]()
    for i, node in enumerate(order):
        live = {other for other in (*live, node) if last[other] > i}
        if i >= begun and live == {node}:
            found.append(node)
    return found


def blocks(model: Model, original: Model, coded: Collection[str], batch: int) -> tuple[Block, ...]:
    """The blocks of a compressed network, in order; together they use every coded tensor that an output depends on.

    Args:
        model: the compressed network.
        original: the network whose values the blocks should have.
        coded: names of the tensors that are learned.
        batch: samples in a call.
    """
    elements, numbers = sizes(model, batch)
    known = original.nodes()
    ends = [
        node for node in cuts(model, numbers) if node.name in known and node in elements and node.op != "placeholder"
    ]
    parts: list[tuple[fx.Node | None, list[str]]] = []
    seen: set[str] = set()
    place = {node: i for i, node in enumerate(model.graph.nodes)}
    start = -1
    for end in [*ends, None]:
        stop = len(place) if end is None else place[end]
        fresh = [
            name for node in model.graph.nodes if start < place[node] <= stop for name in _reads(node, coded, seen)
        ]
        start = stop
        if fresh or not parts:
            parts.append((end, fresh))
        elif end is not None and elements[end] >= elements.get(parts[-1][0] or end, 0):
            parts[-1] = (end, parts[-1][1])
    return _joined(model, parts, elements)


def _reads(node: fx.Node, coded: Collection[str], seen: set[str]) -> list[str]:
    """Coded tensors that a node is the first to read."""
    if node.op == "get_attr":
        return []
    names = [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
    fresh = [name for name in dict.fromkeys(names) if name in coded and name not in seen]
    seen.update(fresh)
    return fresh


def _joined(
    model: Model, parts: list[tuple[fx.Node | None, list[str]]], elements: dict[fx.Node, int]
) -> tuple[Block, ...]:
    """Step 4; what is before the first coded layer belongs to its block."""
    found: list[Block] = []
    sources = tuple(node.name for node in model.placeholders)
    before = 0
    for end, layers in parts:
        results = () if end is None else (end.name,)
        size = 0 if end is None else elements[end]
        if not layers:
            continue
        if found and len(layers) + len(found[-1].layers) <= _PAIR and size * _FEWER >= before:
            found[-1] = Block(found[-1].sources, results, (*found[-1].layers, *layers))
        else:
            found.append(Block(found[-1].results if found else sources, results, tuple(layers)))
        before = size
    return tuple(found)
