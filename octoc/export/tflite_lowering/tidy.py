"""The same function with fewer operations: moves in a row are joined, equal operations are done once."""

from __future__ import annotations

import numpy as np

from octoc.export.tflite_lowering.flat import Graph, Operation, Value, constant, is_identity
from octoc.qtensor import Array


def join_moves(graph: Graph) -> None:
    """Transposes in a row become one, or none; of reshapes in a row the last remains."""
    before: dict[Value, Operation] = {}
    changed: dict[Value, Value] = {}
    for op in graph.operations:
        op.inputs = [value if value is None else changed.get(value, value) for value in op.inputs]
        source = op.inputs[0] if op.inputs else None
        if op.kind not in ("TRANSPOSE", "RESHAPE") or source is None:
            continue
        first = before.get(source)
        before[op.outputs[0]] = op
        if first is not None and first.kind == op.kind:
            op.inputs[0] = first.inputs[0]
            if op.kind == "TRANSPOSE":
                op.inputs[1] = constant(_order(first)[_order(op)].astype(np.int32))
        start = op.inputs[0]
        if op.kind == "TRANSPOSE" and is_identity(_order(op)) and start is not None:
            changed[op.outputs[0]] = start
    graph.substitute(changed)
    graph.drop_unused()


def _order(op: Operation) -> Array:
    order = op.inputs[1]
    assert order is not None
    return order.array()


def merge_equal(graph: Graph) -> None:
    """The same TRANSPOSE, QUANTIZE or DEQUANTIZE of the same value is done once."""
    seen: dict[object, Value] = {}
    changed: dict[Value, Value] = {}
    for op in graph.operations:
        op.inputs = [value if value is None else changed.get(value, value) for value in op.inputs]
        if op.kind not in ("TRANSPOSE", "QUANTIZE", "DEQUANTIZE"):
            continue
        result = op.outputs[0]
        detail = _order(op).tobytes() if op.kind == "TRANSPOSE" else b""
        if result.grid is not None:
            detail += result.grid.scale.tobytes() + result.grid.zero_point.tobytes()
        key = (op.kind, op.inputs[0], result.type, detail)
        if key in seen:
            changed[result] = seen[key]
        seen.setdefault(key, result)
    graph.substitute(changed)
    graph.drop_unused()
