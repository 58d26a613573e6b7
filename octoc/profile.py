"""What is measured once of a network and serves every device: what each layer's error does to the outputs.

The linearity theorem (Malinovskii et al., "Pushing the Limits of Large Language Model Quantization via the Linearity
Theorem", arXiv 2411.17525): for small errors the loss increase is close to the sum over layers of
`sensitivity * relative_error ** 2`, where relative_error = |W - W'| / |W| in the Frobenius norm.

1. Run the network on some calibration samples and keep every value.
2. For each layer, add Gaussian noise of a known relative size to its weight and evaluate only what depends on it.
3. sensitivity = divergence of the outputs from the original's / relative size squared. The divergence is never
   negative, so that, unlike a difference of losses, it is not drowned by the noise of the samples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from octoc.errors import UsageError
from octoc.model import Layer, Model, evaluate

NOISE = 0.1  # relative size; small enough for the quadratic regime, large enough to stand above float rounding
DRAWS = 2


@dataclass(frozen=True)
class Profile:
    """Measurements of one network.

    Args:
        layers: its weighted operations.
        sensitivity: divergence per squared relative error, by layer name.
        divergence: "kl" (nats a sample) or "relative" (squared error over squared outputs).
        samples: how many were used.
    """

    layers: tuple[Layer, ...]
    sensitivity: dict[str, float]
    divergence: str
    samples: int

    def to_json(self, model: str) -> str:
        """As `read_profile` reads it.

        Args:
            model: fingerprint of the network that was measured.
        """
        facts = {"model": model, "divergence": self.divergence, "samples": self.samples}
        return json.dumps({**facts, "sensitivity": self.sensitivity}, indent=1) + "\n"


def read_profile(path: Path, model: str, layers: tuple[Layer, ...], divergence: str) -> Profile:
    """The inverse of `Profile.to_json`.

    Args:
        path: of the file.
        model: fingerprint of the network that is to be planned.
        layers: its weighted operations.
        divergence: how its outputs are compared.

    Raises:
        UsageError: no such file, it is of another network or another comparison, or a number is missing.
    """
    try:
        data = json.loads(path.read_text())
        found = {str(name): float(value) for name, value in data["sensitivity"].items()}
        facts = (str(data["model"]), str(data["divergence"]), int(data["samples"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"sensitivities {path} cannot be read: {type(error).__name__}: {error}") from error
    if facts[:2] != (model, divergence):
        raise UsageError(
            f"sensitivities {path} were measured on another network or by another divergence than this run's"
        )
    missing = [layer.name for layer in layers if not 0 <= found.get(layer.name, -1.0) < math.inf]
    if missing:
        raise UsageError(f"sensitivities {path} hold none for {len(missing)} weights, such as {missing[0]}")
    return Profile(layers, found, divergence, facts[2])


def measure(
    model: Model,
    inputs: Sequence[Tensor],
    classes: bool,
    seed: int,
    step: Callable[[], Any] = lambda: None,
) -> Profile:
    """Sensitivity of every layer.

    Args:
        model: as it will be quantized (batch norm folded).
        inputs: calibration samples, one tensor an input; a batch the model takes in one call.
        classes: outputs are logits over the last axis, compared by Kullback-Leibler divergence; otherwise by
            relative squared error.
        seed: of the noise.
        step: called after each layer.
    """
    values: dict[fx.Node, Any] = dict(zip(model.placeholders, inputs, strict=True))
    reference = evaluate(model, values, keep=True)
    generator = torch.Generator().manual_seed(seed)
    layers = model.layers()
    sensitivity = {}
    for layer in layers:
        weight = model.tensors[layer.name]
        affected = _downstream(model, [n for n in model.graph.nodes if n.op == "get_attr" and n.target == layer.name])
        total = 0.0
        for _ in range(DRAWS):
            noise = torch.randn(weight.shape, generator=generator)
            noise *= NOISE * weight.norm() / noise.norm().clamp_min(1e-30)
            scratch = dict(values)
            outputs = evaluate(model, scratch, {layer.name: weight + noise}, only=affected, keep=True)
            total += divergence(reference, outputs, classes)
        sensitivity[layer.name] = total / DRAWS / NOISE**2
        step()
    return Profile(layers, sensitivity, "kl" if classes else "relative", len(inputs[0]))


def _downstream(model: Model, sources: Sequence[fx.Node]) -> list[fx.Node]:
    """Nodes that depend on any of the sources, these included, in graph order."""
    reached = set(sources)
    ordered = []
    for node in model.graph.nodes:
        if node in reached or any(source in reached for source in node.all_input_nodes) or node.op == "output":
            reached.add(node)
            ordered.append(node)
    return ordered


def divergence(reference: Sequence[Tensor], outputs: Sequence[Tensor], classes: bool) -> float:
    """How far outputs are from the original's: mean KL in nats, or relative squared error; never negative."""
    total = 0.0
    for original, changed in zip(reference, outputs, strict=True):
        if not original.is_floating_point():
            continue
        if classes and original.dim() >= 2:
            p, q = original.double().log_softmax(-1), changed.double().log_softmax(-1)
            total += float((p.exp() * _gap(p, q)).sum(-1).mean().clamp_min(0))
        else:
            power = float(original[original.isfinite()].double().square().sum())
            total += float(_gap(original.double(), changed.double()).square().sum()) / max(power, 1e-30)
    return total


def _gap(a: Tensor, b: Tensor) -> Tensor:
    """a - b; 0 where both are minus infinity, as masked outputs are."""
    return torch.where(a == b, 0.0, a - b)
