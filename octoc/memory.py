"""How large a model may be on a device: what its activations leave of the memory that one app gets."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx

from octoc.device import Device
from octoc.model import Model, aten
from octoc.units import format_size

# The result shares the memory of the first argument.
_VIEWS = {
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.squeeze.dim,
    aten.squeeze.default,
    aten.unsqueeze.default,
}


@dataclass(frozen=True)
class ModelLimit:
    """The most bytes of a model, and what sets them."""

    nbytes: int
    why: str


def peak_activation_bytes(model: Model, itemsize: int) -> int:
    """Most bytes of results that are alive at once while one sample runs in the order of the graph.

    A result is alive from the operation that makes it to the last one that reads it, inputs included.

    Args:
        model: the network.
        itemsize: bytes of one value.
    """
    shapes = model.shapes()
    order = [node for node in model.graph.nodes if node.name in shapes and node.op != "get_attr"]
    owner: dict[fx.Node, fx.Node] = {}
    last: dict[fx.Node, int] = {}
    for step, node in enumerate([*order, *(n for n in model.graph.nodes if n.op == "output")]):
        for source in node.all_input_nodes:
            if source in owner:
                last[owner[source]] = step
        view = node.target in _VIEWS and node.all_input_nodes[0] in owner
        owner[node] = owner[node.all_input_nodes[0]] if view else node
        last[owner[node]] = step
    peak = alive = 0
    ends: dict[int, int] = {}
    for step, node in enumerate(order):
        size = math.prod(shapes[node.name]) * itemsize if owner[node] is node else 0
        alive += size
        peak = max(peak, alive)
        ends[last[owner[node]]] = ends.get(last[owner[node]], 0) + size
        alive -= ends.pop(step, 0)
    return peak


def model_limit(device: Device, activations: int) -> ModelLimit | None:
    """The tightest limit on the bytes of a model, or None where nobody published one.

    Args:
        device: the profile.
        activations: bytes of the activations that are alive at once.
    """
    limits = [
        ModelLimit(int(figures[0].base), f"{what} of {device.id}")
        for figures, what in ((device.model_budget, "the budget of a model"), (device.storage, "the storage"))
        if figures and figures[0].base is not None
    ]
    app = device.app_memory_bytes()
    if app is not None:
        # A microcontroller reads weights where they are stored; elsewhere they are loaded beside the activations.
        stored = device.platform == "bare-metal"
        left = max(int(app) - activations, 0)
        why = f"{format_size(int(app))} for one app on {device.id}, less {format_size(activations)} of activations"
        if not stored or left == 0:
            limits.append(ModelLimit(left, why))
    return min(limits, key=lambda limit: limit.nbytes, default=None)
