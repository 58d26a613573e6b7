"""`package.module:function` -> `Model`: the function builds an `nn.Module`, a file may give its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from octoc.errors import ModelError
from octoc.load.module import from_module
from octoc.load.weights import load_weights
from octoc.model import Model
from octoc.reference import call, resolve


def from_factory(source: str, weights: Path | None, examples: Sequence[Tensor] | None) -> Model:
    """Builds a module and exports it.

    Args:
        source: `package.module:function`, or the name of a module object; importable from the current directory.
        weights: a safetensors or torch file; None keeps what the function made.
        examples: one tensor for each input, samples first.

    Raises:
        UsageError: there is no such function.
        ModelError: it fails, or returns something other than an `nn.Module`.
    """
    found = resolve(source, ModelError)
    module = found if isinstance(found, nn.Module) else call(source, ModelError)
    if not isinstance(module, nn.Module):
        raise ModelError(f"{source} returned {type(module).__name__}, not an nn.Module")
    if weights is not None:
        load_weights(module, weights)
    return from_module(module, examples)
