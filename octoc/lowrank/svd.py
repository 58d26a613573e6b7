"""Truncated singular value decomposition of linear and convolution weights.

Eckart and Young, "The approximation of one matrix by another of lower rank", 1936; for convolutions as in Zhang et al.,
"Accelerating Very Deep Convolutional Networks for Classification and Detection", 2015.

1. Write the weight as a matrix W [O, I * taps] and decompose it in float64: W = U diag(s) V.
2. Keep the first r: first = sqrt(s) V is a layer with r outputs, second = U sqrt(s) maps these to O, point by point.
   Splitting the singular values evenly gives both factors the same norm, which quantization likes.
3. The squared error is the sum of the squares of the singular values left out; no other pair of this rank has less.
4. Both layers run at the original's output positions, so that r * (O + I * taps) is the number of weights and also the
   multiply-accumulates a position; it pays only while that is less than O * I * taps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from octoc.errors import ModelError, UsageError
from octoc.graph import bias_of, fresh_name, sweep
from octoc.model import KINDS, Layer, Model, aten, groups
from octoc.qtensor import Array

KIND = "rewrite"

_POINTWISE = {3: aten.conv1d.default, 4: aten.conv2d.default, 5: aten.conv3d.default}  # by rank of the weight


@dataclass(frozen=True)
class Factors:
    """Two weights in place of one.

    Args:
        first: [r, I, *taps], or [I, r] where the output axis is 1; applied to the input.
        second: [O, r, 1, ...], or [r, O] where the output axis is 1; applied to what the first gives.
        error: Frobenius norm of the original less the product.
    """

    first: Array
    second: Array
    error: float


def factorize(weight: Array, rank: int, axis: int = 0) -> Factors:
    """The best two factors of a weight.

    Args:
        weight: [O, I] or [O, I, *taps]; [I, O] where axis is 1.
        rank: from 1 to the smaller side of the matrix.
        axis: output-channel axis.

    Returns:
        Factors of the weight's dtype.

    Raises:
        UsageError: the rank or the axis is out of range.
    """
    matrix = _matrix(weight, axis)
    if not 1 <= rank <= min(matrix.shape):
        raise UsageError(f"rank {rank} of a weight {list(weight.shape)} is not in 1 ... {min(matrix.shape)}")
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    root = np.sqrt(values[:rank])
    first = (root[:, None] * right[:rank]).astype(weight.dtype)
    second = (left[:, :rank] * root).astype(weight.dtype)
    error = float(np.linalg.norm(values[rank:]))
    if axis == 1:
        return Factors(np.ascontiguousarray(first.T), np.ascontiguousarray(second.T), error)
    taps = weight.shape[2:]
    return Factors(first.reshape(rank, *weight.shape[1:]), second.reshape(*second.shape, *[1] * len(taps)), error)


def costs(shape: Sequence[int], rank: int, axis: int = 0) -> tuple[int, int]:
    """Weights before and after; also the multiply-accumulates for one output position."""
    outputs = shape[axis]
    inputs = math.prod(shape) // max(1, outputs)
    return outputs * inputs, rank * (outputs + inputs)


def saves(shape: Sequence[int], rank: int, axis: int = 0) -> bool:
    """Whether two factors of this rank are smaller than the weight."""
    before, after = costs(shape, rank, axis)
    return after < before


def planned_ranks(model: Model, share: float) -> dict[str, int]:
    """Ranks by weight for every layer that can be factorized and gets smaller by it.

    Args:
        model: the network.
        share: of the full rank that is kept, above 0 and at most 1.

    Raises:
        UsageError: the share is out of range.
    """
    if not 0 < share <= 1:
        raise UsageError(f"a share of {share:g} of the rank is not in (0, 1]")
    ranks = {}
    for layer in model.layers():
        outputs = layer.shape[layer.axis]
        rank = max(1, round(share * min(outputs, layer.size // max(1, outputs))))
        if refusal(model, layer) is None and saves(layer.shape, rank):
            ranks[layer.name] = rank
    return ranks


def refusal(model: Model, layer: Layer) -> str | None:
    """Why a layer cannot be factorized at any rank, or None."""
    return next((reason for node in _uses(model, layer) if (reason := _refusal(node, layer.name))), None)


def rewrite(model: Model, layer: Layer, rank: int) -> Model:
    """Replaces every use of a weight by two operations, in a copy of the graph.

    The new weights are called after the old one, with `_a` and `_b` at the end; the second operation takes the bias.

    Args:
        model: left as it is.
        layer: a convolution without groups or a linear layer.
        rank: of the product.

    Raises:
        ModelError: the layer is of another kind, or has groups, or something else also reads its weight, or two factors
            of this rank are not smaller; with the reason.
        UsageError: the rank is out of range.
    """
    result = model.copy()
    uses = _uses(result, layer)
    reason = refusal(model, layer)
    if reason:
        raise ModelError(f"{layer.name} cannot be factorized: {reason}")
    before, after = costs(layer.shape, rank)
    if after >= before:
        raise ModelError(f"{layer.name} cannot be factorized: rank {rank} takes {after} weights in place of {before}")
    tensor = model.tensors[layer.name]
    factors = factorize(tensor.detach().double().numpy(), rank)
    tensors = dict(result.tensors)
    place = next(node for node in result.graph.nodes if _reads(node, layer.name))
    weights = []  # one node each, whatever the number of uses: who edits the graph next sees that they are shared
    for factor, end in ((factors.first, "_a"), (factors.second, "_b")):
        name = fresh_name(layer.name + end, tensors)
        tensors[name] = torch.from_numpy(factor).to(tensor.dtype).contiguous()
        with result.graph.inserting_after(place):
            weights.append(result.graph.get_attr(name))
    for node in uses:
        _replace(result.graph, node, weights, len(layer.shape))
    return sweep(replace(result, tensors=tensors))


def _matrix(weight: Array, axis: int) -> NDArray[np.float64]:
    """[O, I * taps] in float64."""
    if weight.ndim < 2 or axis not in (0, 1) or (axis == 1 and weight.ndim != 2):
        raise UsageError(f"a weight {list(weight.shape)} with output axis {axis} has no factorization here")
    matrix = weight.astype(np.float64)
    return matrix.T if axis == 1 else matrix.reshape(len(matrix), -1)


def _uses(model: Model, layer: Layer) -> list[fx.Node]:
    """Every operation that reads the weight, known or not."""
    return [user for node in model.graph.nodes if _reads(node, layer.name) for user in node.users]


def _reads(node: fx.Node, name: str) -> bool:
    return node.op == "get_attr" and node.target == name


def _refusal(node: fx.Node, name: str) -> str | None:
    """Why an operation cannot be replaced, or None."""
    kind = KINDS.get(node.target) if node.op == "call_function" else None
    if kind is None or kind.name not in ("conv", "linear"):
        return f"{node.name} ({node.target}) reads it"
    places = [i for i, arg in enumerate(node.args) if isinstance(arg, fx.Node) and _reads(arg, name)]
    if places != [kind.weight]:
        return f"{node.name} takes it as argument {places}, not as its weight alone"
    if kind.name == "conv" and groups(node) != 1:
        return f"{node.name} has {groups(node)} groups"
    return None


def _replace(graph: fx.Graph, node: fx.Node, weights: Sequence[fx.Node], weight_rank: int) -> None:
    """Two operations in place of one; stride, padding and dilation stay with the first."""
    args: list[Any] = list(node.args)
    bias = bias_of(node)
    second = aten.linear.default if weight_rank == 2 else _POINTWISE[weight_rank]
    with graph.inserting_before(node):
        args[1] = weights[0]
        if len(args) > 2:
            args[2] = None
        kwargs = {key: value for key, value in node.kwargs.items() if key != "bias"}
        inner = graph.call_function(node.target, tuple(args), kwargs)  # type: ignore[arg-type]
        outer_args = (inner, weights[1], *([bias] if bias is not None else []))
        outer = graph.call_function(second, outer_args)
    inner.meta, outer.meta = dict(node.meta), dict(node.meta)
    node.replace_all_uses_with(outer)
    graph.erase_node(node)
