"""Random Hadamard rotation of the inputs of linear layers, so that no weight stands out of its group.

Tseng et al., "QuIP#", 2024, and Malinovskii et al., "HIGGS", 2024 (arXiv 2411.17525). W x = (W R^T)(R x) for every
orthogonal R; the entries of W R^T are sums of many weights with random signs, hence close to Gaussian.

1. n inputs are read as [p, q, m], where p q is the largest power of two that divides n, p = q or p = 2 q. R is
   A (x) B (x) 1: a Hadamard matrix A of size p along the first axis and B of size q along the second, each with
   seeded random signs. That takes n (p + q) products and p^2 + q^2 constants instead of n p q and (p q)^2.
2. Layers that read the same value share its rotation, and values of the same width share the constants.
3. Where the value comes straight from a linear layer that nothing else reads, R goes into the rows of that layer's
   weight and into its bias, and nothing is left to compute. Elsewhere two products with the constants are inserted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, fx

from octoc.errors import UsageError
from octoc.graph import bias_of, fresh_name
from octoc.model import KINDS, Model, aten

KIND = "rewrite"


@dataclass(frozen=True)
class Rotation:
    """R for one width, see step 1.

    Args:
        first: float64 [p, p], orthogonal.
        second: float64 [q, q], orthogonal.
        width: n, a multiple of p q.
    """

    first: Tensor
    second: Tensor
    width: int

    def __call__(self, values: Tensor) -> Tensor:
        """R applied along the last axis, [..., width]."""
        p, q = len(self.first), len(self.second)
        lead = values.shape[:-1]
        once = self.first.to(values.dtype) @ values.reshape(*lead, p, -1)
        return torch.matmul(self.second.to(values.dtype), once.reshape(*lead, p, q, -1)).reshape(values.shape)


def hadamard(size: int) -> Tensor:
    """Sylvester's Hadamard matrix [size, size] divided by the root of the size, a power of two."""
    matrix: Tensor = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.div(matrix, size**0.5)


def rotation(width: int, seed: int = 0) -> Rotation:
    """The seeded rotation of `width` values; the identity where it is odd."""
    power = (width & -width).bit_length() - 1
    rng = np.random.default_rng([seed, width])
    first, second = (
        hadamard(size) * torch.from_numpy(rng.choice([-1.0, 1.0], size))
        for size in (2 ** (power - power // 2), 2 ** (power // 2))
    )
    return Rotation(first, second, width)


def rotatable(model: Model) -> tuple[str, ...]:
    """Weights that `rewrite` takes: of linear layers, with an even number of inputs, read by nothing else."""
    return tuple(node.args[1].target for node in _linears(model))  # type: ignore[union-attr, misc]


def rewrite(model: Model, names: Iterable[str], seed: int = 0) -> Model:
    """The same network with the inputs of some linear layers rotated.

    Args:
        model: with float weights.
        names: of the weights.
        seed: of the random signs.

    Raises:
        UsageError: a weight cannot be rotated.
    """
    wanted = set(names)
    unfit = sorted(wanted - set(rotatable(model)))
    if unfit:
        raise UsageError(f"the inputs of {unfit[0]} cannot be rotated; {len(rotatable(model))} weights' can")
    result = model.copy()
    tensors = dict(result.tensors)
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in _linears(result):
        if _weight(node) in wanted:
            readers.setdefault(node.args[0], []).append(node)  # type: ignore[arg-type]
    for source, nodes in readers.items():
        turn = rotation(tensors[_weight(nodes[0])].shape[1], seed)
        for node in nodes:
            tensors[_weight(node)] = _turned(tensors[_weight(node)], turn)
        if _foldable(source, nodes):
            tensors[_weight(source)] = _turned(tensors[_weight(source)].T, turn).T.contiguous()
            bias = bias_of(source)
            if bias is not None:
                tensors[str(bias.target)] = _turned(tensors[str(bias.target)], turn)
        else:
            turned = _insert(result.graph, tensors, source, turn)
            for node in nodes:
                node.replace_input_with(source, turned)
    return replace(result, tensors=tensors)


def _turned(tensor: Tensor, turn: Rotation) -> Tensor:
    return turn(tensor.double()).to(tensor.dtype)


def _weight(node: fx.Node) -> str:
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    return str(weight.target)


def _linears(model: Model) -> list[fx.Node]:
    """Linear layers, each the only reader of its weight, with an even number of inputs."""
    readers: dict[str, int] = {}
    for node in model.graph.nodes:
        if node.op == "get_attr":
            readers[str(node.target)] = readers.get(str(node.target), 0) + len(node.users)
    return [
        node
        for node in model.graph.nodes
        if node.op == "call_function"
        and node.target is aten.linear.default
        and isinstance(node.args[1], fx.Node)
        and node.args[1].op == "get_attr"
        and readers[_weight(node)] == 1
        and model.tensors[_weight(node)].shape[1] % 2 == 0
    ]


def _foldable(source: fx.Node, nodes: list[fx.Node]) -> bool:
    """Whether the value comes from a linear layer of its own weight and bias, and only `nodes` read it."""
    if source.target not in KINDS or KINDS[source.target].name != "linear" or set(source.users) != set(nodes):
        return False
    weight, bias = source.args[1], bias_of(source)
    parameters = [weight] if bias is None else [weight, bias]
    return all(
        isinstance(node, fx.Node)
        and node.op == "get_attr"
        and sum(
            len(other.users) for other in node.graph.nodes if other.op == "get_attr" and other.target == node.target
        )
        == 1
        for node in parameters
    )


def _insert(graph: fx.Graph, tensors: dict[str, Tensor], source: fx.Node, turn: Rotation) -> fx.Node:
    """Step 3's two products, behind `source`."""
    place = source
    while place.next.op == "placeholder":
        place = place.next
    with graph.inserting_after(place):
        anchor = graph.call_function(aten.unflatten.int, (source, -1, [len(turn.first), -1]))
    with graph.inserting_before(anchor):
        first = graph.get_attr(_constant(tensors, f"rotation_{turn.width}_first", turn.first))
        second = graph.get_attr(_constant(tensors, f"rotation_{turn.width}_second", turn.second))
    last = anchor
    for target, args in (
        (aten.matmul.default, lambda before: (first, before)),
        (aten.unflatten.int, lambda before: (before, -1, [len(turn.second), -1])),
        (aten.matmul.default, lambda before: (second, before)),
        (aten.flatten.using_ints, lambda before: (before, -3, -1)),
    ):
        with graph.inserting_after(last):
            last = graph.call_function(target, args(last))
    return last


def _constant(tensors: dict[str, Tensor], wanted: str, value: Tensor) -> str:
    """Name of a tensor of this value, shared with earlier layers."""
    name = wanted
    if name in tensors and not torch.equal(tensors[name], value.float()):
        name = fresh_name(wanted, tensors)
    tensors[name] = value.float()
    return name
