"""What an error of a value does to the outputs: the diagonal of the Fisher information, sampled.

Amari, "Natural Gradient Works Efficiently in Learning", 1998; Martens, "New Insights and Perspectives on the Natural
Gradient Method", 2020, on why the labels have to be drawn from the network itself and not taken from the data.

To second order an error e of a value v, independent of all others, moves the outputs away from the original's by
e**2 / 2 * E[(d loss / d v)**2] nats, where the loss is the negative log-likelihood of an output that the network itself
predicts. No labels are needed.

1. Run the network on a batch and keep the values that are asked for.
2. Draw an output for each sample: a class from the predicted probabilities, or for outputs that are no logits a normal
   deviation from the predicted values.
3. The gradient of that draw's loss by each kept value, squared, is one sample of the expectation.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from octoc.errors import ModelError
from octoc.model import Model, evaluate


def sampled_gradients(
    model: Model, inputs: Sequence[Tensor], names: Collection[str], classes: bool, generator: torch.Generator
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Values and their gradients for one draw of the outputs.

    Args:
        model: the network in floats.
        inputs: one tensor an input, a batch that the network takes in one call.
        names: nodes whose values are wanted.
        classes: outputs are logits over the last axis; otherwise values whose deviations are compared relative to
            their mean square.
        generator: of the draws.

    Returns:
        name -> value and gradient of its shape; None where no output depends on the value by operations that have one.

    Raises:
        ModelError: an operation of the network fails, or has no gradient and does not say so before.
    """
    kept: dict[str, Tensor] = {}

    def keep(node: fx.Node, value: Any) -> None:
        if node.name in names and isinstance(value, Tensor):
            if value.is_floating_point() and not value.requires_grad:
                value.requires_grad_()
            kept[node.name] = value

    values: dict[fx.Node, Any] = {}
    for node, value in zip(model.placeholders, inputs, strict=True):
        values[node] = value.detach().clone()
        keep(node, values[node])
    outputs = evaluate(model, values, observe=keep, gradients=True)
    losses = [_draw(output, classes, generator) for output in outputs if output.requires_grad]
    asked = [name for name, value in kept.items() if value.requires_grad]
    found: dict[str, Tensor | None] = {}
    if losses and asked:
        loss = torch.stack(losses).sum()
        try:
            gradients = torch.autograd.grad(loss, [kept[name] for name in asked], allow_unused=True)
        except RuntimeError as error:
            raise ModelError(f"the network has no gradients: {str(error).splitlines()[0]}") from error
        found = dict(zip(asked, gradients, strict=True))
    return {name: (value.detach(), found.get(name)) for name, value in kept.items()}


def obstacle(model: Model, classes: bool) -> str | None:
    """Why `sampled_gradients` cannot be had of the network; None where it can."""
    if model.subgraphs:
        return "control flow has no gradients"
    names = [node.name for node in model.graph.nodes if node.op == "call_function"]
    try:
        sampled_gradients(model, model.examples(1), names, classes, torch.Generator())
    except ModelError as error:
        return str(error)
    return None


def _draw(output: Tensor, classes: bool, generator: torch.Generator) -> Tensor:
    """Negative log-likelihood of a drawn output, up to a constant, summed over the samples."""
    if classes and output.dim() >= 2:
        likelihoods = output.log_softmax(-1).flatten(0, -2)
        chances = likelihoods.detach().exp().nan_to_num(0.0)
        chances = torch.where(chances.sum(-1, keepdim=True) > 0, chances, 1.0)  # outputs that are NaN name no class
        drawn = torch.multinomial(chances, 1, generator=generator)
        return -likelihoods.gather(1, drawn).sum()
    finite = output.isfinite()
    spread = output.detach()[finite].square().mean().sqrt().clamp_min(1e-30)
    noise = torch.randn(output.shape, generator=generator).to(output.dtype)
    return torch.where(finite, output * (noise / spread), 0.0).sum()
