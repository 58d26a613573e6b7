"""float16, which the Neural Engine computes in, or float32 where a constant of the graph does not survive float16."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

FLOAT16_LARGEST = 65504.0


def choose(program: ExportedProgram, tensors: Mapping[str, Tensor]) -> tuple[str, tuple[str, ...]]:
    """The dtype that a program computes in, and why it is not float16.

    Args:
        program: its literal arguments are checked.
        tensors: the true values of its tensors, by name.

    Returns:
        "float16" or "float32", and one line for each reason against float16.
    """
    where: dict[tuple[float, str], list[str]] = {}
    for place, value in _constants(program, tensors):
        reason = misfit(value)
        if reason:
            where.setdefault((value, reason), []).append(place)
    notes = tuple(
        f"computes in float32: the constant {value:g} of {found[0]}"
        f"{f' and {len(found) - 1} more' if len(found) > 1 else ''} {reason} in float16"
        for (value, reason), found in where.items()
    )
    return ("float32" if notes else "float16"), notes


def _constants(program: ExportedProgram, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, float]]:
    """Every constant with its place. Of a tensor the largest: small weights may vanish beside it, the whole may not."""
    for node, value in _literals(program.graph_module):
        yield f"operation {node}", value
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            values = tensor.detach()[torch.isfinite(tensor)]
            if values.numel():
                yield f"tensor {name}", float(values.abs().max())


def misfit(value: float) -> str | None:
    """What happens to a constant in float16 that must not happen, or None."""
    if value and math.isfinite(value):
        if np.float16(min(abs(value), 1.0)) == 0:
            return "vanishes"
        if abs(value) > FLOAT16_LARGEST:
            return "overflows"
    return None


def _literals(module: fx.GraphModule) -> Iterator[tuple[str, float]]:
    """Numbers that an operation computes with, as against sizes and positions."""
    for node in module.graph.nodes:
        if node.op == "get_attr":
            inner = getattr(module, str(node.target), None)
            if isinstance(inner, fx.GraphModule):
                yield from _literals(inner)
        if node.op != "call_function" or not _computes_floats(node):
            continue
        schema = getattr(node.target, "_schema", None)
        for position, argument in enumerate(getattr(schema, "arguments", ())):
            given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            if given is None and argument.has_default_value():
                given = argument.default_value
            counted = "int" not in str(argument.type) and "Int" not in str(argument.type)
            if counted and isinstance(given, (int, float)) and not isinstance(given, bool):
                yield node.name, float(given)


def _computes_floats(node: fx.Node) -> bool:
    """An argument or a result is a float tensor."""
    values: list[Any] = [node.meta.get("val"), *(source.meta.get("val") for source in node.all_input_nodes)]
    flat = [v for value in values for v in (value if isinstance(value, (tuple, list)) else (value,))]
    return any(isinstance(v, Tensor) and v.is_floating_point() for v in flat)
