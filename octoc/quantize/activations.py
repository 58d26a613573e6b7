"""Static int8 activations: where they are quantized, and over which range.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018
(where quantizers stand so that every operation between them can run in integers).

1. `quantization_points` walks the graph and names the values that become int8: inputs and outputs of operations that
   integer kernels exist for, after the activation that is fused into them.
2. Calibration runs the network batch by batch and keeps one histogram a point, never an activation.
3. `ranges.choose_range` takes the range of least expected error, or as the method says. Before a leaky ReLU a negative
   value counts with the square of the slope, because that is what is left of its error afterwards. `share_grid` then
   moves the range behind it to where every kernel computes the same.
4. `rewrite` inserts quantize/dequantize pairs: the graph then is the definition of what all formats compute.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor, fx

from octoc.errors import DataError
from octoc.graph import bias_of, fresh_name, set_bias
from octoc.model import KINDS, Model, argument, aten
from octoc.qtensor import Affine, expand
from octoc.quantize.ranges import HIGH, LOW, Range, choose_range
from octoc.stats import Histogram

KIND = "rewrite"
_MOST_MOVED = 0.03  # share of its scale by which a range may move so that a kernel computes it exactly
_LEAST_BIAS = 1e-28  # counts for smaller ones and for zero: 2**-30 of it is still a normal float32

# Operations with integer kernels in LiteRT and onnxruntime: they read int8 and write int8.
_COMPUTE = {
    *(target for target, kind in KINDS.items() if kind.bias is not None),
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.mean.dim,
    aten.leaky_relu.default,
    aten.cat.default,
}
# What a kernel applies to its result before it is rounded.
_FUSED = {
    aten.relu.default,
    aten.relu6.default,
    aten.hardtanh.default,
}
# Operations that move values without changing them: int8 in, the same int8 out.
_MOVES = {
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.squeeze.dim,
    aten.squeeze.default,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.max_pool2d.default,
}


def moves(node: fx.Node) -> bool:
    """Whether the node only moves values, zeros that padding brings included."""
    if node.target in _MOVES:
        return True
    return (
        node.target is aten.pad.default
        and argument(node, "mode", 2, "constant") == "constant"
        and not argument(node, "value", 3, None)
    )


def computes(node: fx.Node) -> bool:
    """Whether integer kernels exist for the node as it stands."""
    if node.op != "call_function" or node.target not in _COMPUTE:
        return False
    kind = KINDS.get(node.target)
    if kind is not None:
        weight = node.args[kind.weight]
        return isinstance(weight, fx.Node) and weight.op == "get_attr"
    return all(source.op != "get_attr" for source in node.all_input_nodes)


def quantization_points(model: Model) -> dict[str, str]:
    """Values that become int8.

    Returns:
        name of the node whose value is quantized -> name of the node whose range it takes (itself, or for a node that
        only moves values the one they come from).
    """
    floats = _floats(model)
    points: dict[str, str] = {}
    for node in model.graph.nodes:
        if node.op == "placeholder" and node.name in floats and any(_reads_int8(user) for user in node.users):
            points[node.name] = node.name
        elif computes(node):
            for value in (_after_fused(node), *node.all_input_nodes):
                if value.op == "call_function" and value.name in floats and _after_fused(value) is value:
                    points[value.name] = value.name
    # Not before all other points are known: the reader that makes a value int8 may come after one that moves it.
    for node in model.graph.nodes:
        if node.op == "call_function" and moves(node):
            source = node.args[0]
            if isinstance(source, fx.Node) and source.name in points:
                points[node.name] = points[source.name]
    return points


def _floats(model: Model) -> set[str]:
    """Names of the values that are tensors of floats, and neither token or class numbers nor sizes."""
    inputs = zip(model.placeholders, model.inputs, strict=True)
    found = {node.name for node, spec in inputs if spec.dtype.is_floating_point}

    def note(node: fx.Node, value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point():
            found.add(node.name)

    model.run(*model.examples(1), observe=note)
    return found


def _reads_int8(node: fx.Node) -> bool:
    return computes(node) or (node.op == "call_function" and moves(node))


def _after_fused(node: fx.Node) -> fx.Node:
    users = list(node.users)
    if len(users) == 1 and users[0].target in _FUSED and computes(node):
        return users[0]
    return node


def calibrate(
    model: Model, batches: Iterable[tuple[Tensor, ...]], steps: int = 100, ranges: str = "mse"
) -> dict[str, Range]:
    """Ranges of all quantization points.

    Args:
        model: batch norm folded.
        batches: inputs of the network, samples first.
        steps: clipping ratios tried on each side.
        ranges: how they are chosen, a key of `ranges.METHODS`.

    Returns:
        name of a node -> its range.
    """
    points = quantization_points(model)
    histograms = {name: Histogram() for name in points.values()}

    def note(node: fx.Node, value: Any) -> None:
        if node.name in histograms:
            histograms[node.name].update(value.detach().float().numpy())

    for batch in batches:
        for node, values in zip(model.placeholders, batch, strict=True):
            if node.name in histograms:
                histograms[node.name].update(values.numpy())
        model.run(*batch, observe=note)
    nodes = model.nodes()
    unseen = [name for name, histogram in histograms.items() if histogram.counts.sum() == 0]
    if unseen:
        raise DataError(
            f"calibration saw no finite value of {unseen[0]} (and {len(unseen) - 1} more); give more samples"
        )
    chosen = {name: choose_range(h, _slope(nodes[name]), steps, ranges) for name, h in histograms.items()}
    for name in chosen:
        before = _only_source(nodes[name])
        if nodes[name].target is aten.leaky_relu.default and before in chosen:
            slope = float(argument(nodes[name], "negative_slope", 1, 0.01))
            chosen[name] = share_grid(chosen[before], chosen[name], slope)
    return {name: chosen[source] for name, source in points.items()}


def _only_source(node: fx.Node) -> str:
    source = node.args[0] if node.args else None
    return source.name if isinstance(source, fx.Node) else ""


def share_grid(before: Range, behind: Range, slope: float) -> Range:
    """The range behind a leaky ReLU, moved a little so that 8-bit multipliers compute it exactly.

    XNNPACK (`qs8-vlrelu`) multiplies codes by the quotient of the scales, and below zero by the slope as well, both
    rounded to 256ths: another quotient puts a share of all values on the wrong code, always to the same side.

    Args:
        before: of the leaky ReLU's input.
        behind: of its output.
        slope: of the leaky ReLU below zero.
    """
    wanted = 256 * before.scale / behind.scale
    near = np.arange(np.ceil(wanted * (1 - _MOST_MOVED)), np.floor(wanted * (1 + _MOST_MOVED)) + 1)
    if not near.size or near[0] < 1:
        return behind  # so much coarser behind that 256ths say nothing
    missed = np.round(np.abs(near * slope - np.round(near * slope)), 6)
    nearest = near[np.lexsort((np.abs(near - wanted), missed))[0]]
    return Range(float(np.float32(256 * before.scale / nearest)), behind.zero_point)


def _slope(node: fx.Node) -> float:
    """Slope below zero of the leaky ReLU that alone reads the node, 1 elsewhere."""
    if node.users and all(user.target is aten.leaky_relu.default for user in node.users):
        return max(abs(float(argument(user, "negative_slope", 1, 0.01))) for user in node.users)
    return 1.0


def rewrite(model: Model, ranges: Mapping[str, Range]) -> Model:
    """Inserts a quantize/dequantize pair after each node that has a range."""
    result = model.copy()
    ops = torch.ops.quantized_decomposed
    for node in list(result.graph.nodes):
        found = ranges.get(node.name)
        if found is None:
            continue
        rest = (found.scale, found.zero_point, LOW, HIGH, torch.int8)
        readers = [user for user in node.users if "sym_size" not in str(user.target)]
        with result.graph.inserting_after(node):
            code = result.graph.call_function(ops.quantize_per_tensor.default, (node, *rest))
        with result.graph.inserting_after(code):
            back = result.graph.call_function(ops.dequantize_per_tensor.default, (code, *rest))
        for user in readers:
            user.replace_input_with(node, back)
    return result


def integer_layers(model: Model) -> dict[str, list[tuple[fx.Node, Range]]]:
    """Weights whose operations all run in integers, with each operation and its input's range."""
    found: dict[str, list[tuple[fx.Node, Range]]] = {}
    floats: set[str] = set()
    for node in model.graph.nodes:
        kind = KINDS.get(node.target) if node.op == "call_function" else None
        if kind is None:
            continue
        weight = node.args[kind.weight]
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            continue
        source = node.args[0]
        name = str(weight.target)
        if kind.bias is not None and isinstance(source, fx.Node) and "dequantize_per_tensor" in str(source.target):
            found.setdefault(name, []).append((node, Range(float(source.args[1]), int(source.args[2]))))  # type: ignore[arg-type]
        else:
            floats.add(name)
    return {name: uses for name, uses in found.items() if name not in floats}


def separate_biases(model: Model) -> Model:
    """Gives every operation a bias of its own, because an integer bias depends on its operation's input scale."""
    result = model.copy()
    tensors = dict(result.tensors)
    seen: set[str] = set()
    for node in result.graph.nodes:
        if node.op != "call_function" or node.target not in KINDS:
            continue
        bias = bias_of(node)
        if bias is None:
            continue
        name = str(bias.target)
        if name in seen:
            copy = fresh_name(name, tensors)
            tensors[copy] = tensors[name].clone()
            with result.graph.inserting_before(node):
                set_bias(node, result.graph.get_attr(copy))
        seen.add(name)
    return replace(result, tensors=tensors)


def make_room(weight: Affine, biases: Iterable[tuple[np.ndarray[Any, Any], float]]) -> Affine:
    """The weight with scales so large that the biases of its operations fit 32 bits; see `encode_bias`.

    The scale of a channel with hardly any weight is so small that its bias would end far below its value. On a scale of
    which the bias takes 2**30 the rounding of the weights is nothing beside the bias.

    Args:
        weight: symmetric, of 4 or 8 bits, one scale a tensor or a channel.
        biases: float32 [out] and the scale of the int8 input, for each operation that has a bias.
    """
    scale = weight.scale.astype(np.float64)
    needed = np.zeros(scale.size)
    for bias, input_scale in biases:
        size = np.maximum(np.abs(bias.astype(np.float64)), _LEAST_BIAS).reshape(-1, scale.size)  # [groups, scales]
        needed = np.maximum(needed, size.max(axis=0) / (input_scale * 2.0**30))
    grown = np.maximum(weight.scale, needed.reshape(scale.shape).astype(weight.scale.dtype))
    if (grown == weight.scale).all():
        return weight
    codes = np.round(weight.codes * expand(scale / grown, weight.shape)).astype(weight.codes.dtype)
    return replace(weight, codes=codes, scale=grown)


def encode_bias(bias: np.ndarray[Any, Any], weight: Affine, input_scale: float) -> Affine:
    """A bias as 32-bit integers on the grid of the accumulator.

    Args:
        bias: float32 [out].
        weight: the layer's weight, one scale a tensor or a channel.
        input_scale: of the layer's int8 input.

    Returns:
        codes int32 [out], scale float32 [out] = input_scale * weight scale.
    """
    # A transposed convolution with groups has the same scales in each of them.
    scales = np.tile(weight.scale.reshape(-1), bias.size // weight.scale.size)
    scale = (np.float32(input_scale) * scales.astype(np.float32)).astype(np.float32)
    limit = 2**31 - 1
    codes = np.clip(np.round(bias.astype(np.float64) / scale.astype(np.float64)), -limit, limit)
    return Affine(codes.astype(np.int32), scale, None, 32, True)
