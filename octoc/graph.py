"""Graph edits that several methods share. Each returns a new `Model` that computes the same function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from octoc.model import KINDS, Model, aten, groups


def fresh_name(wanted: str, taken: Mapping[str, Any]) -> str:
    """`wanted`, or `wanted_2`, `wanted_3` ... where it is taken."""
    name, count = wanted, 1
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    return name


def sweep(model: Model) -> Model:
    """Drops operations that nothing uses and tensors that no operation reads."""
    for node in reversed(model.graph.nodes):
        if node.op in ("call_function", "get_attr") and not node.users:
            model.graph.erase_node(node)
    used = {str(node.target) for node in model.graph.nodes if node.op == "get_attr"}
    return replace(model, tensors={name: tensor for name, tensor in model.tensors.items() if name in used})


def fold_batch_norm(model: Model) -> Model:
    """Folds each batch norm into the convolution or linear layer before it.

    Left as they are: a batch norm whose input has another use or comes from a weight that several operations share,
    one that takes its statistics from the batch, and one after a linear layer with more than two dimensions (its
    channels are not the layer's).
    """
    result = model.copy()
    tensors = dict(result.tensors)
    shapes = model.shapes()
    for node in list(result.graph.nodes):
        if node.op != "call_function" or node.target is not aten.batch_norm.default:
            continue
        from_batch = node.args[3] is None or node.args[4] is None or bool(node.args[5])
        source = node.args[0]
        kind = KINDS.get(source.target) if source.op == "call_function" else None
        if from_batch or kind is None or kind.bias is None or len(source.users) > 1:
            continue
        weight = source.args[1]
        if weight.op != "get_attr" or len(weight.users) > 1:
            continue
        if kind.name == "linear" and len(shapes[source.name]) != 2:
            continue
        _fold_one(result.graph, tensors, node, source, weight)
    return sweep(replace(result, tensors=tensors))


def _fold_one(graph: fx.Graph, tensors: dict[str, Tensor], norm: fx.Node, source: fx.Node, weight: fx.Node) -> None:
    """In float64: w' = w * gamma / sqrt(var + eps), b' = (b - mean) * gamma / sqrt(var + eps) + beta."""
    gamma, beta, mean, var = (
        None if arg is None else tensors[str(arg.target)].double()  # type: ignore[union-attr]
        for arg in norm.args[1:5]
    )
    assert mean is not None
    assert var is not None
    factor = 1 / torch.sqrt(var + float(norm.args[7]))  # type: ignore[arg-type]
    if gamma is not None:
        factor = factor * gamma
    old_bias = source.args[2] if len(source.args) > 2 else source.kwargs.get("bias")
    bias = -mean if not isinstance(old_bias, fx.Node) else tensors[str(old_bias.target)].double() - mean
    bias = bias * factor
    if beta is not None:
        bias = bias + beta
    name = str(weight.target)
    dense = tensors[name].double()
    if KINDS[source.target].name == "conv_transpose":  # [in, out / groups, ...]: channels vary by group, then by column
        blocks = dense.reshape(groups(source), -1, *dense.shape[1:])
        scaled = blocks * factor.reshape(groups(source), 1, -1, *[1] * (dense.dim() - 2))
        tensors[name] = scaled.flatten(0, 1).float()
    else:
        tensors[name] = (dense * factor.reshape(-1, *[1] * (dense.dim() - 1))).float()
    bias_name = fresh_name(name.removesuffix("weight") + "bias", tensors)
    tensors[bias_name] = bias.float()
    with graph.inserting_before(source):
        set_bias(source, graph.get_attr(bias_name))
    norm.replace_all_uses_with(source)
    graph.erase_node(norm)


def set_bias(node: fx.Node, bias: fx.Node) -> None:
    """Gives a convolution or linear node its bias, wherever the call keeps it."""
    position = KINDS[node.target].bias
    assert position is not None
    args = list(node.args)
    if len(args) > position:
        args[position] = bias
    else:
        args.append(bias)
    node.args = tuple(args)
    node.kwargs = {key: value for key, value in node.kwargs.items() if key != "bias"}


def bias_of(node: fx.Node) -> fx.Node | None:
    """The bias node of a convolution or linear operation, None where it has none."""
    position = KINDS[node.target].bias
    if position is None:
        return None
    bias = node.args[position] if len(node.args) > position else node.kwargs.get("bias")
    return bias if isinstance(bias, fx.Node) else None
