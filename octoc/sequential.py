"""Encodes the weights of a network one after another, each against what the earlier ones have left of its inputs.

1. Go through the layers in the order of the graph. Layers that read the same values form a stage.
2. Run the network compressed so far, and the original beside it, up to the stage, batch by batch: each batch adds to
   the `Hessian` of each layer and is forgotten.
3. What a layer's outputs miss is taken behind the sum where something else is added to them (the shortcut of a residual
   block), so that the layer makes up for errors that came along the other way too.
4. Encode the stage, and take what that adds to the mean of each channel off its bias.

Layers whose inputs are not gathered are encoded by the usual method, and the reason is reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from octoc.compressed import Compressed
from octoc.errors import DataError, UsageError
from octoc.graph import bias_of
from octoc.hessian import Hessian
from octoc.model import KINDS, Layer, Model, argument, aten, evaluate, groups
from octoc.qtensor import QTensor, Scheme
from octoc.quantize import encoder as method_named
from octoc.quantize.bias import rewrite
from octoc.recipe import Encode
from octoc.report import Note

_SUMS = (aten.add.Tensor, aten.add_.Tensor)


def encode_sequentially(
    model: Model,
    steps: Iterable[Encode],
    encoder: Callable[..., QTensor],
    calls: Sequence[Sequence[Tensor]],
    *,
    reference: Model | None = None,
) -> tuple[Compressed, tuple[Note, ...]]:
    """The compressed network, its biases corrected, and which weights took another method than their step's.

    Args:
        model: after `restructure`.
        steps: what each weight becomes; layers without a step stay float.
        encoder: takes layer, scheme, dtype, method and Hessian, as `octoc.apply.Encoder` does.
        calls: calibration samples, the inputs of each call.
        reference: the network whose values are wanted, with the node names of `model`; `model` where None.

    Raises:
        UsageError: a step names a weight that the network lacks.
        DataError: there are no samples, or values that are NaN or infinite.
    """
    wanted = {step.tensor: step for step in steps}
    layers = model.layers()
    if absent := set(wanted) - {layer.name for layer in layers}:
        raise UsageError(f"the recipe names the weight {min(absent)}, which the network lacks")
    small = model
    coded: dict[str, QTensor] = {}
    shifts: dict[str, tuple[float, ...]] = {}
    notes: list[Note] = []
    for stage in _stages(model, [layer for layer in layers if layer.name in wanted]):
        guided = [layer for layer in stage if needs_hessian(wanted[layer.name])]
        reasons = {layer.name: reason for layer in guided if (reason := unfit(model, layer)) is not None}
        hessians = gather(reference or model, small, [x for x in guided if x.name not in reasons], calls)
        decoded: dict[str, Tensor] = {}
        for layer in stage:
            step, method, hessian = wanted[layer.name], wanted[layer.name].method, hessians.get(layer.name)
            if layer.name in reasons:
                notes.append(Note(layer.name, f"encoded by the usual method, not {method}: {reasons[layer.name]}"))
                method = None
            bias = None if hessian is None else _own_bias(model, layer)
            taken = hessian if hessian is None or bias is None else hessian.centred()
            coded[layer.name] = encoder(layer, Scheme.parse(step.scheme), step.dtype, method, taken)
            stored = coded[layer.name].dequantize().copy()
            if hessian is not None and bias is not None:
                shift = hessian.shift(model.tensors[layer.name].detach().numpy(), stored, layer.axis)
                shifts[bias] = tuple(float(x) for x in shift.astype("float32"))
                decoded |= {bias: rewrite(model, {bias: shifts[bias]}).tensors[bias]}
            decoded[layer.name] = torch.from_numpy(stored)
        small = small.with_tensors(decoded)
    return Compressed(rewrite(model, shifts), coded, shifts), tuple(notes)


def needs_hessian(step: Encode) -> bool:
    """Whether the method of a step looks at the inputs of its layer."""
    return step.method is not None and "hessian" in method_named(step.method).NEEDS


def unfit(model: Model, layer: Layer) -> str | None:
    """Why the inputs of a layer are not gathered, or None."""
    nodes = model.nodes()
    kinds = {KINDS[nodes[name].target].name for name in layer.nodes}
    if not (kinds <= {"linear", "conv"} or (kinds == {"matmul"} and len(layer.shape) == 2)):
        return f"the inputs of {' and '.join(sorted(kinds))} are not gathered"
    if len({_parts(nodes[name]) for name in layer.nodes}) > 1:
        return "its operations have different numbers of groups"
    return None


def _parts(node: fx.Node) -> int:
    return groups(node) if KINDS[node.target].name == "conv" else 1


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _stages(model: Model, layers: Sequence[Layer]) -> list[list[Layer]]:
    """Neighbouring layers that read the same values, where none adds to the outputs of another."""
    nodes = model.nodes()
    stages: list[list[Layer]] = []
    last: Any = None
    for layer in layers:
        sources = [nodes[name].args[0] for name in layer.nodes]
        sums = {_sum(nodes[name]) for name in layer.nodes}
        if (
            last is None
            or sources != last[0]
            or any(s.op == "call_function" and s.target in _SUMS for s in sums & last[1])
        ):
            stages.append([])
            last = (sources, set())
        last[1].update(sums)
        stages[-1].append(layer)
    return stages


def _sum(node: fx.Node) -> fx.Node:
    """Step 3: the addition that alone uses a layer's outputs, otherwise the layer."""
    users = list(node.users)
    if len(users) == 1 and users[0].target in _SUMS and users[0].args[0] is not users[0].args[1]:
        return users[0]
    return node


def _own_bias(model: Model, layer: Layer) -> str | None:
    """Name of the bias that this layer alone has."""
    bias = bias_of(model.nodes()[layer.nodes[0]])
    return str(bias.target) if bias is not None and len(bias.users) == 1 and len(layer.nodes) == 1 else None


def gather(
    reference: Model, small: Model, layers: Sequence[Layer], calls: Sequence[Sequence[Tensor]]
) -> dict[str, Hessian]:
    """Sums over the inputs of some layers and over what their outputs miss, by name.

    Args:
        reference: the network whose values are wanted.
        small: the network compressed so far, these layers still float, with the same node names.
        layers: those to gather for.
        calls: inputs of each call.
    """
    if layers and not calls:
        raise DataError("there are no calibration samples")
    nodes = {name: node for name, node in small.nodes().items() if any(name in layer.nodes for layer in layers)}
    behind = {name: _sum(node).name for name, node in nodes.items()}
    found = {}
    for layer in layers:
        count, outputs = _parts(nodes[layer.nodes[0]]), layer.shape[layer.axis]
        found[layer.name] = Hessian(count, outputs // count, math.prod(layer.shape) // outputs)
    for call in calls if layers else ():
        wanted = _values(reference, set(behind.values()), call)
        seen = _values(small, {_source(node).name for node in nodes.values()} | set(behind.values()), call)
        for layer in layers:
            for name in layer.nodes:
                node, end = nodes[name], behind[name]
                inputs = unfold(node, seen[_source(node).name], layer.shape)
                missing = _rows(node, wanted[end] - seen[end])
                found[layer.name].update(inputs.numpy(), missing.numpy())
    return found


def _values(model: Model, names: set[str], call: Sequence[Tensor]) -> dict[str, Tensor]:
    """Values of some nodes for one call; what does not lead to them is not computed."""
    given = dict(zip(model.placeholders, call, strict=True))
    found = {node.name: value for node, value in given.items() if node.name in names}
    needed = {node for node in model.graph.nodes if node.name in names}
    for node in reversed(model.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)

    def note(node: fx.Node, value: Any) -> None:
        if node.name in names:
            found[node.name] = value.clone()  # a later operation may change it in place

    evaluate(model, dict(given), observe=note, only=[node for node in model.graph.nodes if node in needed])
    return found


def _rows(node: fx.Node, outputs: Tensor) -> Tensor:
    """Outputs of a layer in the order of `unfold`: [groups, samples, rows]."""
    if KINDS[node.target].name == "conv":
        outputs = outputs.movedim(1, -1)
    rows = outputs.reshape(-1, _parts(node), outputs.shape[-1] // _parts(node))
    return torch.movedim(rows, 0, 1)


def unfold(node: fx.Node, value: Tensor, shape: Sequence[int]) -> Tensor:
    """What each output of a linear layer or convolution is computed from.

    Args:
        node: the operation.
        value: its input.
        shape: of its weight.

    Returns:
        [groups, samples, width]: samples are places of outputs, width is the size of a filter.
    """
    if KINDS[node.target].name != "conv":
        return value.reshape(1, -1, value.shape[-1])
    count, kernel = groups(node), shape[2:]
    rank = len(kernel)
    stride, dilation = (_each(argument(node, *at, 1), rank) for at in (("stride", 3), ("dilation", 5)))
    padding = argument(node, "padding", 4, 0)
    if isinstance(padding, str):
        total = [d * (k - 1) * (padding == "same") for d, k in zip(dilation, kernel, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(p, p) for p in _each(padding, rank)]
    x = F.pad(value, [p for pair in reversed(sides) for p in pair])
    for i in range(rank):
        x = x.unfold(2 + i, dilation[i] * (kernel[i] - 1) + 1, stride[i])[..., :: dilation[i]]
    x = x.reshape(x.shape[0], count, -1, *x.shape[2:])  # [batch, groups, channels, *places, *kernel]
    x = x.permute(1, 0, *range(3, 3 + rank), 2, *range(3 + rank, 3 + 2 * rank))
    return x.reshape(count, x.shape[1 : 2 + rank].numel(), -1)


def _each(value: Any, rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values
