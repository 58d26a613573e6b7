"""Where a converter put each weight, found by converting with weights that are random.

1. Every float tensor is replaced by random float16 values: no pass can then merge two weights because they are equal,
   or drop one because it is zero, and float16 keeps every bit.
2. A constant of the converted program that equals a fingerprint, up to the order of axes and axes of size 1, is that
   tensor.
3. A tensor that is nowhere was computed with; it must keep its true values, and the program is converted again.
4. A tensor may be found and computed with as well. `suspects` names those that may be: where a constant depends on the
   fingerprint, two conversions with different ones differ in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from octoc.model import KINDS, aten
from octoc.qtensor import Array

# Operations that move elements and compute nothing.
_MOVES = {
    aten.permute.default,
    aten.t.default,
    aten.transpose.int,
    aten.view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.clone.default,
}
_FEW = 4  # tensors of so few elements get values that no other such tensor has


@dataclass(frozen=True)
class Place:
    """A tensor's layout in the program.

    Args:
        axes: for each axis of the constant the tensor's axis, or -1 for an axis of size 1 that the tensor lacks.
        rank: of the tensor; axes that are not named have size 1.
    """

    axes: tuple[int, ...]
    rank: int

    @property
    def is_plain(self) -> bool:
        return self.axes == tuple(range(self.rank))

    def store(self, array: Array) -> Array:
        """The constant of a tensor, or of an array that tiles it such as a scale."""
        dropped = [axis for axis in range(self.rank) if axis not in self.axes]
        order = [axis for axis in self.axes if axis >= 0] + dropped
        shape = [array.shape[axis] if axis >= 0 else 1 for axis in self.axes]
        extra = array.shape[self.rank :]  # a table's entries
        moved = array.transpose(*order, *range(self.rank, array.ndim))
        return np.ascontiguousarray(moved).reshape(*shape, *extra)

    def restore(self, array: Array) -> Array:
        """The inverse of `store`."""
        named = [axis for axis in self.axes if axis >= 0]
        extra = array.shape[len(self.axes) :]
        sizes = [array.shape[i] for i, axis in enumerate(self.axes) if axis >= 0]
        packed = array.reshape(*sizes, *extra)
        order = [named.index(axis) for axis in sorted(named)]
        moved = packed.transpose(*order, *range(len(named), packed.ndim))
        shape = [moved.shape[sorted(named).index(axis)] if axis in named else 1 for axis in range(self.rank)]
        return np.ascontiguousarray(moved).reshape(*shape, *extra)


def suspects(program: ExportedProgram) -> set[str]:
    """Tensors that a converter may compute new constants from, beside using them as they are."""
    sources: dict[fx.Node, frozenset[str]] = {}  # of nodes that depend on tensors alone
    found: set[str] = set()
    targets = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs}
    for node in program.graph.nodes:
        if node.op == "placeholder" and targets[node.name] is not None:
            sources[node] = frozenset({str(targets[node.name])})
            if len(node.users) > 1 and any(user.target not in KINDS for user in node.users):
                found |= sources[node]
        elif node.op == "get_attr":
            sources[node] = frozenset()
        elif node.op == "call_function" and all(source in sources for source in node.all_input_nodes):
            sources[node] = frozenset().union(*(sources[source] for source in node.all_input_nodes))
            if node.target not in _MOVES:
                found |= sources[node]
    return found


def fingerprints(tensors: Mapping[str, Tensor], true: Iterable[str] = (), seed: int = 0) -> dict[str, Tensor]:
    """Random values in place of every float tensor.

    Args:
        tensors: by name.
        true: names of tensors that keep their values.
        seed: of the random values.
    """
    kept = set(true)
    draw = np.random.default_rng(seed)
    singles = iter(draw.permutation(1024))
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel() or name in kept:
            continue
        count = tensor.numel()
        if count <= _FEW:
            drawn = [next(singles, None) for _ in range(count)]
            if None in drawn:
                continue
            values = 2.0 + np.array(drawn, np.float64) / 512  # all different, in [2, 4)
        else:
            values = 0.5 + draw.integers(0, 1024, count) / 2048  # float16 numbers in [0.5, 1)
        found[name] = torch.from_numpy(values).to(tensor.dtype).reshape(tensor.shape)
    return found


def places(constants: Mapping[str, Array], marks: Mapping[str, Tensor]) -> dict[str, tuple[str, Place]]:
    """Finds fingerprints among constants.

    Args:
        constants: float arrays by name.
        marks: fingerprints by tensor name.

    Returns:
        For each constant that is a fingerprint the tensor's name and its layout.
    """
    index: dict[tuple[tuple[int, ...], float], list[tuple[str, Array]]] = {}
    for name, mark in marks.items():
        array = mark.float().numpy()
        index.setdefault(_key(array), []).append((name, array))
    found: dict[str, tuple[str, Place]] = {}
    for constant, values in constants.items():
        for name, fingerprint in index.get(_key(values), ()):
            place = _match(values, fingerprint)
            if place is not None:
                found[constant] = (name, place)
                break
    return _without_coincidences(found, marks)


def _without_coincidences(
    found: dict[str, tuple[str, Place]], marks: Mapping[str, Tensor]
) -> dict[str, tuple[str, Place]]:
    """A single number may equal a literal of the graph: a constant with the tensor's name is preferred to others."""
    named = {name for constant, (name, _) in found.items() if _sanitised(name) in constant}
    return {
        constant: (name, place)
        for constant, (name, place) in found.items()
        if marks[name].numel() > 1 or name not in named or _sanitised(name) in constant
    }


def _sanitised(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _key(array: Array) -> tuple[tuple[int, ...], float]:
    """Equal where only the order of axes differs: fingerprints are multiples of 2**-11, so that their sum is exact."""
    with np.errstate(invalid="ignore"):
        total = float(array.sum(dtype=np.float64))
    return tuple(sorted(size for size in array.shape if size > 1)), total


def _match(constant: Array, mark: Array) -> Place | None:
    wide = [axis for axis, size in enumerate(mark.shape) if size > 1]
    target = [size for size in constant.shape if size > 1]
    squeezed = mark.reshape([mark.shape[axis] for axis in wide])
    flat = constant.reshape(target)
    for order in permutations(range(len(wide))):
        if [squeezed.shape[i] for i in order] == target and np.array_equal(squeezed.transpose(order), flat):
            return Place(_axes(constant.shape, mark.shape, [wide[i] for i in order]), mark.ndim)
    return None


def _axes(shape: tuple[int, ...], mark: tuple[int, ...], wide: list[int]) -> tuple[int, ...]:
    """Axes of size 1 keep their position where the ranks agree and nothing moved."""
    if shape == mark and wide == sorted(wide):
        return tuple(range(len(mark)))
    rest = iter(wide)
    return tuple(next(rest) if size > 1 else -1 for size in shape)
