"""Unstructured pruning of the weights that matter least.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015; with importance it is the
saliency of LeCun et al., "Optimal Brain Damage", 1989: importance times the squared weight.

1. Score each weight: its magnitude, or importance times its square.
2. Set exactly round(sparsity * size) of them to 0, lowest scores first; of equal scores the first in memory.

`global_threshold` compares magnitudes across weights and says what share of each falls below one common threshold.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from octoc.errors import UsageError
from octoc.model import Layer, Model
from octoc.qtensor import Array

KIND = "rewrite"


def prune(weight: Array, sparsity: float, importance: Array | None = None) -> Array:
    """A copy of a weight with its least elements set to 0.

    Args:
        weight: any shape.
        sparsity: share of zeros in the result, at least 0, less than 1; zeros that are there already count.
        importance: how much the squared error of each element counts, broadcasts to the weight's shape.

    Raises:
        UsageError: the sparsity is out of range.
    """
    _check(sparsity)
    score = np.abs(weight)
    if importance is not None:
        score = np.square(weight, dtype=np.float64) * importance
    pruned = np.array(weight)
    pruned[_lowest(score.ravel(), round(sparsity * weight.size)).reshape(weight.shape)] = 0
    return pruned


def global_threshold(weights: Mapping[str, Array], sparsity: float) -> dict[str, float]:
    """The sparsity of each weight where the smallest magnitudes of all go, wherever they are.

    Args:
        weights: by name.
        sparsity: share of zeros over all weights, at least 0, less than 1.

    Returns:
        By name, so that pruning each weight to its sparsity sets exactly round(sparsity * all elements) to 0. The
        largest element of each weight always stays.

    Raises:
        UsageError: the sparsity is out of range, or would leave a weight without any element.
    """
    _check(sparsity)
    sizes = [weight.size for weight in weights.values()]
    count, total = round(sparsity * sum(sizes)), sum(sizes)
    reachable = total - len(sizes)
    if count > reachable:
        raise UsageError(
            f"sparsity {sparsity:g} would empty a layer; at most {reachable / total:.4g} leaves each one weight"
        )
    scores = [np.abs(weight).ravel().astype(np.float64) for weight in weights.values()]
    for score in scores:
        score[int(np.argmax(score))] = np.inf
    chosen = _lowest(np.concatenate(scores), count) if scores else np.zeros(0, np.bool_)
    parts = np.split(chosen, np.cumsum(sizes)[:-1])
    return {name: int(part.sum()) / part.size for name, part in zip(weights, parts, strict=True)}


def rewrite(model: Model, layer: Layer, sparsity: float) -> Model:
    """The model with one weight pruned. Raises UsageError where the sparsity is out of range."""
    tensor = model.tensors[layer.name]
    pruned = prune(tensor.detach().float().numpy(), sparsity)
    return model.with_tensors({layer.name: torch.from_numpy(pruned).to(tensor.dtype)})


def _check(sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise UsageError(f"sparsity {sparsity:g} is not in [0, 1)")


def _lowest(score: Array, count: int) -> Array:
    """Mask of the `count` lowest scores [n]; of equal ones the first."""
    chosen = np.zeros(score.size, np.bool_)
    if count:
        threshold = np.partition(score, count - 1)[count - 1]
        chosen = score < threshold
        ties = np.flatnonzero(score == threshold)
        chosen[ties[: count - int(np.count_nonzero(chosen))]] = True
    return chosen
