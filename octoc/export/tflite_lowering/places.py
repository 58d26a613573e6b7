"""Where the converter put each weight.

1. The network is converted with every float tensor replaced by a fingerprint: random values of the tensor's shape. The
   result so depends on the graph alone, and equal weights (zeros, ties) cannot be confused.
2. A constant of the file that holds exactly a fingerprint's values, in another order of axes, is a place of that
   tensor. A tensor counts as found where its places are read as often as the graph reads it.
3. What the converter transformed (folded a batch norm into, summed up) is not found: the network is converted again
   with the true values of those tensors.
4. A constant that the converter computed must not depend on a fingerprint: where there are any, a second conversion
   with other fingerprints shows it.
"""

from __future__ import annotations

import itertools
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from octoc.export.tflite_lowering.flat import Graph, Value, is_one_number
from octoc.model import Model
from octoc.qtensor import Array

_ATTEMPTS = 3


@dataclass(frozen=True)
class Place:
    """A constant that holds a weight.

    Args:
        value: the constant; it equals `weight.transpose(axes).reshape(value.shape)`.
        axes: order of the weight's axes.
    """

    value: Value
    axes: tuple[int, ...]


Places = dict[str, tuple[Place, ...]]


def locate(model: Model, convert: Callable[[Mapping[str, Tensor]], Graph]) -> tuple[Graph, Places]:
    """The graph that the converter makes of a model, and the places of its tensors.

    Args:
        model: the network.
        convert: the converter, given the tensors to use in place of the model's.

    Returns:
        The graph, whose constants are fingerprints at the places and the model's values elsewhere.
    """
    wanted = {name: tensor for name, tensor in model.tensors.items() if _can_be_replaced(tensor)}
    plain = {_content(t.numpy()) for name, t in model.tensors.items() if t.is_floating_point() and name not in wanted}
    computed: list[bytes] | None = None
    for attempt in range(_ATTEMPTS):
        prints = {name: _fingerprint(name, tuple(tensor.shape), attempt) for name, tensor in wanted.items()}
        graph = convert({name: torch.from_numpy(array) for name, array in prints.items()})
        found = _find(model, graph, prints)
        others = _computed(graph, found, plain)
        if found.keys() == wanted.keys() and (not others or others == computed):
            return graph, found
        computed = others if found.keys() == wanted.keys() else None
        wanted = {name: wanted[name] for name in found}
    return convert({}), {}


def _can_be_replaced(tensor: Tensor) -> bool:
    """A mask's infinities and a scalar's sign may decide what the converter does; weights do not."""
    return tensor.dtype == torch.float32 and tensor.numel() > 1 and bool(torch.isfinite(tensor).all())


def _fingerprint(name: str, shape: tuple[int, ...], attempt: int) -> Array:
    """float32 of `shape`, positive, since some of them are variances."""
    rng = np.random.default_rng((zlib.crc32(name.encode()), attempt))
    return rng.uniform(0.5, 1.5, shape).astype(np.float32)


def _find(model: Model, graph: Graph, prints: Mapping[str, Array]) -> Places:
    by_content = {_content(array): name for name, array in prints.items()}
    places: dict[str, list[Place]] = {}
    for value in graph.constants():
        if value.is_float and value.shape:
            array = value.array()
            name = by_content.get(_content(array))
            axes = None if name is None else _axes(prints[name], array)
            if name is not None and axes is not None:
                places.setdefault(name, []).append(Place(value, axes))
    readers = graph.consumers()
    uses = Counter(str(node.target) for node in model.graph.nodes if node.op == "get_attr" for _ in node.users)
    return {
        name: tuple(found)
        for name, found in places.items()
        if sum(len(readers[place.value]) for place in found) >= uses[name]
    }


def _content(array: Array) -> tuple[int, bytes]:
    """Equal for arrays of the same values in any order."""
    values = np.sort(array, axis=None)
    return array.size, values[:16].tobytes() + values[-16:].tobytes() + np.sum(values, dtype=np.float64).tobytes()


def _axes(weight: Array, found: Array) -> tuple[int, ...] | None:
    """The order of the weight's axes that gives what was found, up to a reshape."""
    for axes in itertools.permutations(range(weight.ndim)):
        if np.array_equal(weight.transpose(axes).reshape(found.shape), found):
            return axes
    return None


def _computed(graph: Graph, places: Places, plain: set[tuple[int, bytes]]) -> list[bytes]:
    """Contents of the float constants that are no place, no tensor of the model and not one repeated number."""
    placed = {place.value for found in places.values() for place in found}
    return [
        value.data.tobytes()
        for value in graph.constants()
        if value.is_float and value not in placed and value.data is not None and not is_one_number(value)
        if _content(value.array()) not in plain
    ]
