"""`Model`: an ATen graph and the tensors it names. `Layer`: one weighted operation of it.

The graph is torch.export's training dialect, undecomposed. Weights are `get_attr` nodes whose target is a key of
`tensors`; the graph never owns them, so that a reader may hand in a mapping that loads each one when it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from octoc.errors import ModelError, first_line

aten = torch.ops.aten

Observer = Callable[[fx.Node, Any], None]


@dataclass(frozen=True)
class InputSpec:
    """One input of the network.

    Args:
        name: as the original network calls it; every artefact keeps it.
        shape: the example's shape; the first size is free where the model's batch is.
        dtype: as the network takes it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Kind:
    """What is known of one weighted ATen operation.

    Args:
        name: the field's word for it.
        weight: position of the weight among the arguments.
        bias: position of the bias, None where the operation has none.
        axis: output-channel axis of the weight.
    """

    name: str
    weight: int
    bias: int | None
    axis: int


_CONV = [aten.conv1d, aten.conv2d, aten.conv3d]
_CONV_TRANSPOSE = [aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input]
KINDS: dict[Any, Kind] = {
    **{op.default: Kind("conv", 1, 2, 0) for op in _CONV},
    **{op.padding: Kind("conv", 1, 2, 0) for op in _CONV},
    **{op: Kind("conv_transpose", 1, 2, 1) for op in _CONV_TRANSPOSE},
    aten.linear.default: Kind("linear", 1, 2, 0),
    aten.embedding.default: Kind("embedding", 0, None, 0),
    aten.matmul.default: Kind("matmul", 1, None, 1),
    aten.mm.default: Kind("matmul", 1, None, 1),
}


@dataclass(frozen=True)
class Layer:
    """One weight and the operations that use it.

    Args:
        name: the weight's key in `Model.tensors`.
        kind: `Kind.name` of its operations, "depthwise" for a convolution with one input channel a group.
        shape: of the weight.
        axis: output-channel axis of the weight.
        macs: multiply-accumulates for one sample, over all operations that share the weight.
        activation_bytes: float32 bytes of one sample's outputs.
        nodes: names of the operations in the graph.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    axis: int
    macs: int
    activation_bytes: int
    nodes: tuple[str, ...]

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Model:
    """An ATen graph and its tensors.

    Args:
        graph: placeholders (the inputs, in order), `get_attr` nodes (keys of `tensors` or `subgraphs`), ATen calls and
            one output node whose argument is a flat tuple.
        tensors: parameters, buffers and constants by name.
        inputs: in the order of the placeholders.
        outputs: names of the outputs.
        dynamic_batch: the first size of every input is free.
        subgraphs: graph modules of control-flow operations by name.
        notes: what reading the network could not keep, a sentence each.
    """

    graph: fx.Graph
    tensors: Mapping[str, Tensor]
    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]
    dynamic_batch: bool
    subgraphs: Mapping[str, fx.GraphModule] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def run(
        self, *inputs: Tensor, overrides: Mapping[str, Tensor] | None = None, observe: Observer | None = None
    ) -> tuple[Tensor, ...]:
        """Evaluates the graph.

        Args:
            inputs: as `self.inputs` says.
            overrides: tensors to use in place of those of the same name.
            observe: called with each operation's node and its value, in order; a value is dropped after its last use.

        Returns:
            The outputs, as a tuple.
        """
        return evaluate(self, dict(zip(self.placeholders, inputs, strict=True)), overrides, observe)

    @property
    def placeholders(self) -> tuple[fx.Node, ...]:
        return tuple(node for node in self.graph.nodes if node.op == "placeholder")

    def nodes(self) -> dict[str, fx.Node]:
        """Nodes by name."""
        return {node.name: node for node in self.graph.nodes}

    def copy(self, tensors: Mapping[str, Tensor] | None = None) -> Model:
        """A model whose graph may be edited; tensors are shared unless given."""
        graph = fx.Graph()
        mapped: dict[fx.Node, fx.Node] = {}
        graph.graph_copy(self.graph, mapped)
        output = next(node for node in self.graph.nodes if node.op == "output")
        graph.output(fx.node.map_arg(output.args[0], mapped.__getitem__))
        return replace(self, graph=graph, tensors=dict(self.tensors if tensors is None else tensors))

    def with_tensors(self, changed: Mapping[str, Tensor]) -> Model:
        """The same graph with some tensors replaced."""
        return replace(self, tensors={**self.tensors, **changed})

    def as_module(self, overrides: Mapping[str, Tensor] | None = None) -> fx.GraphModule:
        """A module that converters take: tensors become buffers under their own names."""
        used = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        known: dict[str, Any] = {**self.tensors, **self.subgraphs, **(overrides or {})}
        module = fx.GraphModule({name: known[name] for name in used}, self.copy().graph, "Octoc")
        return module.eval()

    def examples(self, batch: int | None = None) -> tuple[Tensor, ...]:
        """Zero inputs of the example's shape, with `batch` samples where the batch is free."""
        sizes = ((batch, *spec.shape[1:]) if batch and self.dynamic_batch else spec.shape for spec in self.inputs)
        return tuple(torch.zeros(size, dtype=spec.dtype) for size, spec in zip(sizes, self.inputs, strict=True))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every input and result for one sample (the example's batch where that is fixed)."""
        examples = self.examples(1)
        found = {node.name: tuple(e.shape) for node, e in zip(self.placeholders, examples, strict=True)}

        def note(node: fx.Node, value: Any) -> None:
            if isinstance(value, Tensor):
                found[node.name] = tuple(value.shape)

        self.run(*examples, observe=note)
        return found

    def layers(self) -> tuple[Layer, ...]:
        """Every weight that a known operation uses, in the order of first use."""
        shapes = self.shapes()
        users: dict[str, list[tuple[fx.Node, Kind]]] = {}
        for node in self.graph.nodes:
            kind = KINDS.get(node.target) if node.op == "call_function" else None
            if kind is None or len(node.args) <= kind.weight:
                continue
            weight = node.args[kind.weight]
            if isinstance(weight, fx.Node) and weight.op == "get_attr" and weight.target in self.tensors:
                tensor = self.tensors[str(weight.target)]
                if tensor.is_floating_point() and tensor.dim() >= 2:
                    users.setdefault(str(weight.target), []).append((node, kind))
        return tuple(self._layer(name, uses, shapes) for name, uses in users.items())

    def _layer(self, name: str, uses: Sequence[tuple[fx.Node, Kind]], shapes: Mapping[str, tuple[int, ...]]) -> Layer:
        shape = tuple(self.tensors[name].shape)
        kinds = {kind.name for _, kind in uses}
        first, kind = uses[0]
        label = kind.name if len(kinds) == 1 else "shared"
        if label == "conv" and shape[1] == 1 and groups(first) > 1:
            label = "depthwise"
        outputs = [math.prod(shapes[node.name]) for node, _ in uses]
        macs = sum(_macs(k.name, shape, shapes, node) for node, k in uses)
        return Layer(name, label, shape, kind.axis, macs, 4 * sum(outputs), tuple(node.name for node, _ in uses))


def groups(node: fx.Node) -> int:
    """Groups of a convolution, transposed or not."""
    return int(argument(node, "groups", 6, 1))


def operation(node: fx.Node, tensors: Mapping[str, Tensor]) -> str:
    """ATen name of a call without namespace and overload, `depthwise_conv2d` for a depthwise convolution.

    Args:
        node: the call.
        tensors: of the model.
    """
    name = getattr(node.target, "__name__", str(node.target)).split(".")[0]
    kind = KINDS.get(node.target)
    if kind is not None and kind.name == "conv" and groups(node) > 1:
        weight = node.args[kind.weight]
        if isinstance(weight, fx.Node) and weight.op == "get_attr" and tensors[str(weight.target)].shape[1] == 1:
            return f"depthwise_{name}"
    return name


def argument(node: fx.Node, name: str, position: int, default: Any) -> Any:
    """An argument of an ATen call, given by position, by name or not at all."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def _macs(kind: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]], node: fx.Node) -> int:
    if kind == "embedding":
        return 0
    if kind == "conv":  # each output element is a sum over one filter
        return math.prod(shapes[node.name]) * math.prod(shape[1:])
    if kind == "conv_transpose":  # each input element is spread by one filter
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return math.prod(shapes[source.name]) * math.prod(shape[1:])
    inner = shape[1] if kind == "linear" else shape[-2]
    return math.prod(shapes[node.name]) * inner


def last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the nodes whose values are not needed after it."""
    seen: set[fx.Node] = set()
    dropped: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                dropped.setdefault(node, []).append(source)
    return dropped


@torch.no_grad()
def evaluate(
    model: Model,
    values: dict[fx.Node, Any],
    overrides: Mapping[str, Tensor] | None = None,
    observe: Observer | None = None,
    only: Iterable[fx.Node] | None = None,
    keep: bool = False,
) -> tuple[Tensor, ...]:
    """Evaluates the graph node by node.

    Args:
        model: the graph and its tensors.
        values: what is known already: at least the placeholders; filled in place.
        overrides: tensors to use in place of those of the same name.
        observe: called with each operation's node and its value.
        only: nodes to evaluate, in graph order (the others' values must be given); all where None.
        keep: keep every value instead of dropping it after its last use.

    Returns:
        The outputs, as a tuple; empty where `only` leaves the output node out.
    """
    dropped = {} if keep else last_uses(model.graph)
    chosen = model.graph.nodes if only is None else only
    for node in chosen:
        if node.op == "output":
            outputs: Any = fx.node.map_arg(node.args[0], values.__getitem__)
            return tuple(outputs)
        if node.op == "get_attr":
            name = str(node.target)
            if overrides and name in overrides:
                values[node] = overrides[name]
            else:
                values[node] = model.subgraphs[name] if name in model.subgraphs else model.tensors[name]
        elif node.op == "call_function":
            args = fx.node.map_arg(node.args, values.__getitem__)
            kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
            try:
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            except RuntimeError as error:
                raise ModelError(f"operation {node.name} ({node.target}) failed: {first_line(error)}") from error
            if observe is not None:
                observe(node, values[node])
        elif node.op != "placeholder":
            raise ModelError(f"node {node.name} of kind {node.op} has no place in an ATen graph")
        for done in dropped.get(node, ()):
            if done is not node:
                values.pop(done, None)
    return ()


def evaluate_together(
    model: Model, calls: Sequence[Sequence[Tensor]], observe: Callable[[fx.Node, list[Any]], None]
) -> None:
    """Evaluates several calls side by side, operation after operation.

    Args:
        model: the graph and its tensors.
        calls: inputs of each call.
        observe: called with each operation's node and its value in every call; what it changes in place, later
            operations see.
    """
    dropped = last_uses(model.graph)
    states: list[dict[fx.Node, Any]] = [dict(zip(model.placeholders, call, strict=True)) for call in calls]
    for node in model.graph.nodes:
        if node.op == "output":
            return
        for values in states:
            evaluate(model, values, only=[node], keep=True)
        if node.op == "call_function":
            observe(node, [values[node] for values in states])
        for values in states:
            for done in dropped.get(node, ()):
                values.pop(done, None)
