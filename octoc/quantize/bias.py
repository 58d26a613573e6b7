"""Bias correction: what quantization adds to the mean of a channel is taken off its bias.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, in its empirical form.

1. The float network gives the mean of each channel of each layer's output on some calibration samples.
2. The compressed network is evaluated on the same samples, layer after layer: the difference of a layer's mean goes
   into its bias and is taken off the value at once, so that later layers see corrected inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from octoc.graph import bias_of
from octoc.model import KINDS, Model, aten, evaluate_together

KIND = "tune"


def channel_means(reference: Model, calls: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
    """Mean of each channel of each layer's output, by the name of the layer's operation.

    Args:
        reference: the network in floats.
        calls: inputs of each call, one tensor an input.
    """
    means: dict[str, Tensor] = {}

    def remember(node: fx.Node, values: list[Any]) -> None:
        if node.target in KINDS and bias_of(node) is not None:
            means[node.name] = _mean(node, values)

    evaluate_together(reference, calls, remember)
    return means


def corrections(
    means: Mapping[str, Tensor], small: Model, calls: Sequence[Sequence[Tensor]]
) -> dict[str, NDArray[np.float32]]:
    """What to add to each bias.

    Args:
        means: of the float network's layers, on the same calls.
        small: the compressed network with decoded weights; its layers have the reference's names.
        calls: inputs of each call, one tensor an input.

    Returns:
        name of a bias in `small` -> [channels].
    """
    found: dict[str, NDArray[np.float32]] = {}

    def correct(node: fx.Node, values: list[Any]) -> None:
        bias = bias_of(node) if node.name in means and node.target in KINDS else None
        if bias is None or len(bias.users) > 1:
            return
        shift = (means[node.name] - _mean(node, values)).float()
        found[str(bias.target)] = shift.numpy()
        for value in values:
            value.add_(shift.reshape([-1 if i == _channel(node, value) else 1 for i in range(value.dim())]))

    evaluate_together(small, calls, correct)
    return found


def _channel(node: fx.Node, value: Tensor) -> int:
    return value.dim() - 1 if node.target is aten.linear.default else 1


def _mean(node: fx.Node, values: Sequence[Tensor]) -> Tensor:
    return torch.stack([_mean_of(node, value) for value in values]).mean(0)


def _mean_of(node: fx.Node, value: Tensor) -> Tensor:
    others = [i for i in range(value.dim()) if i != _channel(node, value)]
    # without any axis torch would average over all of them
    return value.mean(others, dtype=torch.float64) if others else value.double()


def rewrite(model: Model, shifts: Mapping[str, Sequence[float]]) -> Model:
    """The network with its biases shifted."""
    return model.with_tensors(
        {name: model.tensors[name] + torch.tensor(shift, dtype=torch.float32) for name, shift in shifts.items()}
    )
