"""Rewrites ATen calls that torch.onnx cannot translate into ones that it can, with the same result."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from octoc.model import Model, aten

_ATTENTION = aten.scaled_dot_product_attention.default


def prepare(model: Model) -> Model:
    """A model that computes the same; operations that stay keep their names."""
    rewrites: dict[object, Callable[[fx.Graph, fx.Node, dict[str, int]], None]] = {
        _ATTENTION: _four_dimensions,
        aten.clamp.default: _alike_limits,
        aten.clamp_.default: _alike_limits,
    }
    if not any(node.target in rewrites for node in model.graph.nodes):
        return model
    result = model.copy()
    ranks = {name: len(shape) for name, shape in model.shapes().items()}
    ranks |= {node.name: len(spec.shape) for node, spec in zip(model.placeholders, model.inputs, strict=True)}
    for node in list(result.graph.nodes):
        if node.op == "get_attr" and node.target in model.tensors:
            ranks[node.name] = model.tensors[node.target].dim()
        if node.target in rewrites:
            rewrites[node.target](result.graph, node, ranks)
    return result


def _four_dimensions(graph: fx.Graph, node: fx.Node, ranks: dict[str, int]) -> None:
    """Attention of [batch, tokens, features] as that of one head; torch.onnx takes four dimensions only."""
    if any(ranks.get(source.name) != 3 for source in node.all_input_nodes[:3]):
        return
    with graph.inserting_before(node):
        heads = [graph.call_function(aten.unsqueeze.default, (source, 1)) for source in node.args[:3]]
        rest = list(node.args[3:])
        if rest and isinstance(rest[0], fx.Node) and ranks.get(rest[0].name) == 3:
            rest[0] = graph.call_function(aten.unsqueeze.default, (rest[0], 1))
    users = list(node.users)
    node.args = (*heads, *rest)
    with graph.inserting_after(node):
        merged = graph.call_function(aten.squeeze.dim, (node, 1))
    for user in users:
        user.replace_input_with(node, merged)


def _alike_limits(graph: fx.Graph, node: fx.Node, ranks: dict[str, int]) -> None:
    """`clamp(x, 0.1, 1)`: torch.onnx finds no form for a float and an integer."""
    limits = [float(limit) if isinstance(limit, int) else limit for limit in node.args[1:]]
    if any(isinstance(limit, float) for limit in node.args[1:]):
        node.args = (node.args[0], *limits)
