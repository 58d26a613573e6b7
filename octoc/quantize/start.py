"""Floats at the start of a network, where int8 values would cost much and their layers hardly any time.

Partial quantization of Wu et al., "Integer Quantization for Deep Learning Inference: Principles and Empirical
Evaluation", arXiv 2004.09602, section 5.2, for layers at the start: a few channels of a large image, which each have a
range of their own, so that one scale for all is coarse. What stays in floats is a start and no island: values still
become int8 once, only later, and nothing is decoded in between. Integer kernels gain nothing on few channels either.

1. A cut is a quantization point through which alone what comes before reaches what comes after.
2. For each cut with few multiply-accumulates before it, the outputs' divergence from the original's is measured with
   int8 values from the cut on.
3. Taken is the cut that removes the largest share of the divergence, less the share of the multiply-accumulates that
   it leaves in floats; and none unless it removes most of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from torch import Tensor, fx

from octoc.model import KINDS, Model
from octoc.quantize.activations import rewrite
from octoc.quantize.ranges import Range

KIND = "rewrite"
MOST_MACS = 0.15  # share of the network's multiply-accumulates that may stay in floats
LEAST_GAIN = 0.5  # share of the divergence that has to go for it, beyond the share of multiply-accumulates

Divergence = Callable[[Sequence[Tensor], Sequence[Tensor]], float]


def float_start(
    model: Model, ranges: Mapping[str, Range], calls: Sequence[Sequence[Tensor]], divergence: Divergence
) -> tuple[str, ...]:
    """Points of the network's start that are better left in floats.

    Args:
        model: that `ranges` was calibrated for, in floats.
        ranges: of all its quantization points.
        calls: inputs of each call on calibration samples, one tensor an input.
        divergence: of outputs from the original's; never negative.

    Returns:
        Names of points to leave out of `ranges`, in graph order; none where int8 from the start costs little.
    """
    allowed = [(cut, share) for cut, share in cuts(model, ranges) if share <= MOST_MACS]
    if not allowed:
        return ()
    order = {node.name: i for i, node in enumerate(model.graph.nodes)}
    references = [model.run(*call) for call in calls]

    def cost(kept: Mapping[str, Range]) -> float:
        coded = rewrite(model, kept)
        return sum(divergence(known, coded.run(*call)) for known, call in zip(references, calls, strict=True))

    def after(cut: str) -> dict[str, Range]:
        return {name: found for name, found in ranges.items() if order[name] >= order[cut]}

    whole = cost(ranges)
    if whole <= 0:
        return ()
    gain, best = max((1 - cost(after(cut)) / whole - share, cut) for cut, share in allowed)
    if gain < LEAST_GAIN:
        return ()
    return tuple(sorted((name for name in ranges if order[name] < order[best]), key=order.__getitem__))


def layers_of(model: Model, spared: Collection[str]) -> tuple[str, ...]:
    """Names of the layers that read any of these values, in the order of first use."""
    nodes = model.nodes()
    return tuple(
        layer.name
        for layer in model.layers()
        if any(source.name in spared for name in layer.nodes for source in nodes[name].all_input_nodes)
    )


def cuts(model: Model, ranges: Mapping[str, Range]) -> list[tuple[str, float]]:
    """Points that alone carry values from before them to after them, and the share of multiply-accumulates before.

    Points before the first layer leave none in floats, and what no layer reads is coded for an activation behind it,
    which cuts as well; both are left out.
    """
    macs = {name: layer.macs / len(layer.nodes) for layer in model.layers() for name in layer.nodes}
    total = sum(macs.values())
    nodes = [node for node in model.graph.nodes if node.op in ("placeholder", "call_function")]
    order = {node: i for i, node in enumerate(nodes)}
    found: list[tuple[str, float]] = []
    reach = -1  # the last node that reads a value from before
    spent = 0.0
    for i, node in enumerate(nodes):
        spent += macs.get(node.name, 0.0)
        feeds_layers = any(user.target in KINDS for user in node.users)
        if spent > 0 and reach <= i and node.name in ranges and feeds_layers:
            found.append((node.name, spent / total))
        reach = max(reach, _last_reader(node, order))
    return found


def _last_reader(node: fx.Node, order: Mapping[fx.Node, int]) -> int:
    return max((order.get(user, len(order)) for user in node.users), default=-1)
