"""Small constants are stored once: coremltools repeats strides, paddings and groups for every operation."""

from __future__ import annotations

from collections.abc import Container
from typing import Any


def merge_constants(model: Any, unique: Container[str]) -> None:
    """Keeps one of the equal inline constants of each block and binds all users to it.

    Args:
        model: a protobuf `Model`, edited in place.
        unique: names of constants that stay apart.
    """
    for function in model.mlProgram.functions.values():
        for block in function.block_specializations.values():
            _merge(block, unique, {})


def _merge(block: Any, unique: Container[str], renamed: dict[str, str]) -> None:
    first: dict[bytes, str] = {}
    kept = []
    returned = set(block.outputs)
    for operation in block.operations:
        for argument in operation.inputs.values():
            for binding in argument.arguments:
                if binding.name in renamed:
                    binding.name = renamed[binding.name]
        for inner in operation.blocks:
            _merge(inner, unique, renamed)
        value = operation.attributes["val"] if operation.type == "const" else None
        if value is not None and value.WhichOneof("value") == "immediateValue":
            name = operation.outputs[0].name
            key = value.SerializeToString(deterministic=True)
            if name not in unique and name not in returned and first.setdefault(key, name) != name:
                renamed[name] = first[key]
                continue
        kept.append(type(operation).FromString(operation.SerializeToString()))
    del block.operations[:]
    block.operations.extend(kept)
    _rename_outputs(block, renamed)


def _rename_outputs(block: Any, renamed: dict[str, str]) -> None:
    """A nested block may return a constant of the block around it."""
    names = [renamed.get(name, name) for name in block.outputs]
    del block.outputs[:]
    block.outputs.extend(names)
