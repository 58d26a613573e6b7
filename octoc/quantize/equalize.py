"""Cross-layer equalisation of activation ranges, for int8 activations with one scale a tensor.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, with the ranges of the
activations in place of those of the weights, as in Xiao et al., "SmoothQuant", 2023: weights have a scale for each
output channel here, so that what hurts is one channel of an activation that is much larger than the others.

1. A pair is a layer, an optional ReLU or leaky ReLU, and the only layer that reads it. Scaling channel c of the first
   by 1/s and column c of the second by s changes nothing, because these activations commute with positive factors.
2. s_c = range_c relative to the largest channel, before the activation: what is negative there has to be coded too.
   Where the second layer is depthwise its weight scales absorb s entirely; elsewhere the second layer's columns would
   grow uneven instead, and half of it (in the exponent) is taken.
3. s is rounded to a power of two: the network stays the same to the last bit, and a recipe holds whole exponents.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from octoc.graph import bias_of
from octoc.model import KINDS, Model, aten, groups

KIND = "rewrite"

_HOMOGENEOUS = {aten.relu.default, aten.leaky_relu.default}
_MOST = 8  # exponents; a channel that never exceeds 1/256 of the largest is lifted by no more


@dataclass(frozen=True)
class Pair:
    """Two layers between which channels may be rescaled.

    Args:
        first, second: names of their operations.
        depthwise: the second has one input channel a group.
        channels: between them.
    """

    first: str
    second: str
    depthwise: bool
    channels: int


def pairs(model: Model) -> list[Pair]:
    """All pairs of the network, in the order of their first layer; weights with other uses are left out."""
    found = []
    for node in model.graph.nodes:
        bias = bias_of(node) if _is_layer(node) else None
        if not _is_layer(node) or (bias is not None and len(bias.users) > 1):
            continue
        end = node
        while len(end.users) == 1 and next(iter(end.users)).target in _HOMOGENEOUS:
            end = next(iter(end.users))
        readers = list(end.users)
        if len(readers) != 1 or not _is_layer(readers[0]) or readers[0].args[0] is not end:
            continue
        second = readers[0]
        weight = model.tensors[_name(second)]
        depthwise = groups(second) > 1 and weight.shape[1] == 1
        if KINDS[second.target].name != KINDS[node.target].name or (groups(second) > 1 and not depthwise):
            continue
        found.append(Pair(node.name, second.name, depthwise, model.tensors[_name(node)].shape[0]))
    return found


def _is_layer(node: fx.Node) -> bool:
    kind = KINDS.get(node.target) if node.op == "call_function" else None
    if kind is None or kind.name not in ("conv", "linear"):
        return False
    weight = node.args[kind.weight]
    return isinstance(weight, fx.Node) and weight.op == "get_attr" and len(weight.users) == 1


def _name(node: fx.Node) -> str:
    weight = node.args[KINDS[node.target].weight]
    assert isinstance(weight, fx.Node)
    return str(weight.target)


def exponents(model: Model, batches: Iterable[tuple[Tensor, ...]]) -> dict[str, tuple[int, ...]]:
    """Powers of two by which each pair's channels are divided, by the name of the first operation."""
    wanted = {pair.first: pair for pair in pairs(model)}
    linear = {node.name for node in model.graph.nodes if node.target is aten.linear.default}
    peaks: dict[str, list[Tensor]] = {}

    def note(node: fx.Node, value: Any) -> None:
        if node.name in wanted:
            channel = value.dim() - 1 if node.name in linear else 1
            peaks.setdefault(node.name, []).append(value.abs().amax([i for i in range(value.dim()) if i != channel]))

    for batch in batches:
        model.run(*batch, observe=note)
    found = {}
    for first, each in peaks.items():
        peak = torch.stack(each).mean(0).numpy()  # the largest of all would follow a single odd sample
        ratio = np.log2(np.maximum(peak / max(float(peak.max()), 1e-30), 2.0**-_MOST))
        power = np.round(ratio if wanted[first].depthwise else ratio / 2).astype(int)
        if power.any():
            found[first] = tuple(int(p) for p in power)
    return found


def rewrite(model: Model, powers: Mapping[str, tuple[int, ...]]) -> Model:
    """The same network with channel c of each named operation divided by 2**powers[c]."""
    nodes, tensors = model.nodes(), dict(model.tensors)
    known = {pair.first: pair for pair in pairs(model)}
    for first, exponent in powers.items():
        pair = known[first]
        factor = torch.exp2(torch.tensor(exponent, dtype=torch.float32))
        name, bias = _name(nodes[first]), bias_of(nodes[first])
        weight = tensors[name]
        tensors[name] = weight / factor.reshape(-1, *[1] * (weight.dim() - 1))
        if bias is not None:
            tensors[str(bias.target)] = tensors[str(bias.target)] / factor
        name = _name(nodes[pair.second])
        weight = tensors[name]
        if pair.depthwise:  # some outputs for each input channel
            factor = factor.repeat_interleave(weight.shape[0] // pair.channels)
        shape = (-1, *[1] * (weight.dim() - 1)) if pair.depthwise else (1, -1, *[1] * (weight.dim() - 2))
        tensors[name] = weight * factor.reshape(shape)
    return replace(model, tensors=tensors)
