"""Readers: one file per kind of source, each ends in a `Model`. `load_model` chooses among them.

| source | reader |
|---|---|
| a live `nn.Module` | `module.py` |
| `package.module:function`, with or without a file of weights | `factory.py`, `weights.py` |
| a `.pt2` archive of torch.export, whatever its name ends in | `program.py` |
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from octoc.errors import ModelError, UsageError
from octoc.reference import is_reference

if TYPE_CHECKING:
    from torch import Tensor, nn

    from octoc.model import Model

ACCEPTED = "a .pt2 file of torch.export.save, or package.module:function that returns an nn.Module"

_WEIGHTS = "holds weights without the network; name the function that builds it, package.module:function, and give "
_WEIGHTS += "this file as --weights-file"
_WRITTEN = "is a format that octoc writes and does not read; give the network it was made from: "
_FOREIGN = "is not a format that octoc reads; give "
# What a file that is no torch.export archive must be, by how its name ends.
_REFUSED = {
    **dict.fromkeys((".pt", ".pth", ".th", ".ckpt", ".bin", ".safetensors"), _WEIGHTS),
    **dict.fromkeys((".onnx", ".tflite", ".mlpackage", ".mlmodel"), _WRITTEN + ACCEPTED),
    **dict.fromkeys((".h5", ".keras", ".pb", ".pkl", ".pickle", ".gguf", ".py"), _FOREIGN + ACCEPTED),
}


def load_model(
    source: str | Path | nn.Module, weights: str | Path | None = None, examples: Sequence[Tensor] | None = None
) -> Model:
    """Reads a network from any accepted source.

    Args:
        source: a `.pt2` file, `package.module:function`, or a module.
        weights: file for the module that the function returns: safetensors, or torch.save's read without running code.
        examples: one tensor for each input, samples first; a `.pt2` brings its own.

    Raises:
        UsageError: the source or a combination of arguments cannot be meant.
        ModelError: the source cannot be read, or is not a network that can be exported.
    """
    if not isinstance(source, str | Path):
        from octoc.load.module import from_module

        if weights is not None:
            raise UsageError(f"weights {weights} given with a live module; load them into the module first")
        return from_module(source, examples)
    path = Path(source)
    if isinstance(source, str) and is_reference(source) and not path.exists():
        from octoc.load.factory import from_factory

        return from_factory(source, None if weights is None else Path(weights), examples)
    if weights is not None:
        raise UsageError(f"weights {weights} given with {path}; they go with package.module:function alone")
    from octoc.load.program import from_archive, is_archive

    if path.suffix.lower() == ".pt2" or is_archive(path):
        return from_archive(path)
    suffix = path.suffix.lower()
    if suffix in _REFUSED:
        raise ModelError(f"{path} {_REFUSED[suffix]}")
    if not path.exists():
        raise ModelError(f"{source}: no such file; MODEL is {ACCEPTED}")
    raise ModelError(f"{path} {_FOREIGN}{ACCEPTED}")
