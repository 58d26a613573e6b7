"""The graph of a `Model` as a function that autograd goes through, built once.

1. Every tensor that is trained becomes an argument.
2. What depends on neither an input nor a trained tensor is computed now.
3. A quantize/dequantize pair becomes one operation whose gradient is 1 within the range and 0 outside it (the
   straight-through estimator).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from octoc.errors import ModelError
from octoc.model import KINDS, Model, aten

_OPS = torch.ops.quantized_decomposed
_NORMS = {
    aten.mul.Tensor,
    aten.add.Tensor,
    aten.layer_norm.default,
    aten.group_norm.default,
    aten.rms_norm.default,
    aten.instance_norm.default,
}

Network = Callable[..., tuple[Tensor, ...]]


def quantizes(node: fx.Node) -> bool:
    return node.target is _OPS.quantize_per_tensor.default


def dequantizes(node: fx.Node) -> bool:
    return node.target is _OPS.dequantize_per_tensor.default


def free_floats(model: Model, coded: Sequence[str]) -> tuple[str, ...]:
    """Names of the vectors of floats that operations add or multiply by: biases and the weights of norms.

    Args:
        model: the network.
        coded: names of the tensors that have codes.
    """
    found: dict[str, None] = {}
    for node in model.graph.nodes:
        if node.op != "get_attr" or node.target in coded or node.target not in model.tensors:
            continue
        tensor = model.tensors[str(node.target)]
        vector = tensor.dtype == torch.float32 and tensor.dim() == 1
        if vector and node.users and all(user.target in KINDS or user.target in _NORMS for user in node.users):
            found[str(node.target)] = None
    return tuple(found)


def between(graph: fx.Graph, sources: Sequence[fx.Node], results: Sequence[fx.Node]) -> list[fx.Node]:
    """Nodes that the results need besides the sources, in graph order."""
    needed: set[fx.Node] = set()
    waiting = [node for node in results if node not in sources]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += [source for source in node.all_input_nodes if source not in sources]
    return [node for node in graph.nodes if node in needed]


def outputs_of(model: Model) -> list[fx.Node]:
    """Nodes whose values are the outputs."""
    output = next(node for node in model.graph.nodes if node.op == "output")
    return [node for node in output.args[0] if isinstance(node, fx.Node)]


def training_network(
    model: Model,
    trained: Sequence[str],
    sources: Sequence[fx.Node] | None = None,
    results: Sequence[fx.Node] | None = None,
    known: Mapping[fx.Node, Any] | None = None,
) -> Network:
    """Part of a network as a function (*values of the sources, *trained tensors) -> values of the results.

    Args:
        model: the network.
        trained: names of the tensors that are arguments.
        sources: where the part begins; the inputs where None.
        results: where it ends; the outputs where None.
        known: values of other nodes, taken as constants.
    """
    sources = model.placeholders if sources is None else sources
    results = outputs_of(model) if results is None else results
    known = known or {}
    graph, root = fx.Graph(), torch.nn.Module()
    mapped: dict[fx.Node, Any] = {}
    for i, source in enumerate(sources):
        mapped[source] = graph.placeholder(f"source_{i}")
    arguments = {name: graph.placeholder(f"trained_{i}") for i, name in enumerate(trained)}
    fixed: dict[fx.Node, Any] = {}
    for node in between(model.graph, [*sources, *known], results):
        if node.op == "placeholder":
            raise ModelError(f"the part of the network up to {results[0].name} also reads the input {node.name}")
        if node.op == "get_attr" and node.target in arguments:
            mapped[node] = arguments[str(node.target)]
        elif node.op == "get_attr":
            name = str(node.target)
            fixed[node] = model.subgraphs[name] if name in model.subgraphs else model.tensors[name].detach()
        elif all(source in fixed or source in known for source in node.all_input_nodes):
            values = {**known, **fixed}
            args = fx.node.map_arg(node.args, values.__getitem__)
            kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
            fixed[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        else:
            for source in node.all_input_nodes:
                if source not in mapped:
                    mapped[source] = _constant(graph, root, source.name, {**known, **fixed}[source])
            mapped[node] = _call(graph, node, mapped)
    for node in results:
        if node not in mapped:
            mapped[node] = _constant(graph, root, node.name, {**known, **fixed}[node])
    graph.output(tuple(mapped[node] for node in results))
    function: Network = fx.GraphModule(root, graph)
    return function


def _constant(graph: fx.Graph, root: torch.nn.Module, name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        root.register_buffer(f"fixed_{name}", value)
        return graph.get_attr(f"fixed_{name}")
    if isinstance(value, torch.nn.Module):
        root.add_module(f"fixed_{name}", value)
        return graph.get_attr(f"fixed_{name}")
    return value


def _call(graph: fx.Graph, node: fx.Node, mapped: Mapping[fx.Node, Any]) -> Any:
    if quantizes(node):  # its dequantize does all the work
        return mapped[node.args[0]]  # type: ignore[index]
    if dequantizes(node):
        _, scale, zero_point, low, high, _ = node.args
        rest = (scale, zero_point, low, high)
        return graph.call_function(torch.fake_quantize_per_tensor_affine, (mapped[node.all_input_nodes[0]], *rest))
    args = fx.node.map_arg(node.args, mapped.__getitem__)
    kwargs = fx.node.map_arg(node.kwargs, mapped.__getitem__)
    return graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
