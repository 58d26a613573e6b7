"""Float operations between DEQUANTIZE and QUANTIZE become integer operations.

Reference: the TensorFlow Lite 8-bit quantization specification (https://ai.google.dev/edge/litert/models/quantization_spec).

1. QUANTIZE moves up and DEQUANTIZE moves down through operations that only move values (or pick the largest), so that
   those run on integers. Q(DQ(x)) with the same scale is x; with another scale it is a QUANTIZE of integers.
2. An operation whose inputs all come from DEQUANTIZE and whose output goes to one QUANTIZE takes the integers, where
   TFLite has an integer kernel for it. Its weight must be codes of 8 bits, within -127..127, or of 4 without a zero
   point, and its bias 32-bit codes. Kernels that cannot change the scale are followed by a QUANTIZE of integers.
3. Transposes (and reshapes) in a row are joined, equal operations are done once, and what nobody reads goes.

XNNPACK takes fully connected 4-bit weights; for convolutions LiteRT's own kernels unpack them on each run and round
twice (to a fraction of a step, then to a step): up to 14 % of MobileNet's codes come out one off.

What does not fit stays a float operation between DEQUANTIZE and QUANTIZE: the same result, only slower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from octoc.export.tflite_lowering.flat import Graph, Grid, Operation, Value, constant, is_one_number, operation
from octoc.export.tflite_lowering.places import Places
from octoc.export.tflite_lowering.tidy import join_moves, merge_equal
from octoc.export.tflite_lowering.weights import encode, encode_integer_bias
from octoc.qtensor import Affine, QTensor

# Operations that move values, or pick the largest of some: the operator version that takes int8.
_MOVES = {
    "BATCH_TO_SPACE_ND": 2,
    "BROADCAST_TO": 3,
    "DEPTH_TO_SPACE": 2,
    "EXPAND_DIMS": 1,
    "GATHER": 2,
    "MAX_POOL_2D": 2,
    "PAD": 2,
    "REDUCE_MAX": 2,
    "RESHAPE": 1,
    "RESIZE_NEAREST_NEIGHBOR": 2,
    "SLICE": 2,
    "SPACE_TO_BATCH_ND": 2,
    "SPACE_TO_DEPTH": 2,
    "SQUEEZE": 1,
    "STRIDED_SLICE": 2,
    "TRANSPOSE": 2,
}
# The same for operations with several float inputs, which must agree on the scale.
_JOINS = {"CONCATENATION": 2, "MAXIMUM": 2, "MINIMUM": 2, "PACK": 2}

# Operations with a weight: position of input, weight and bias; the weight's channel axis; the versions that take int8
# values, by the type of the weight.
_INT8, _INT4 = schema.TensorType.INT8, schema.TensorType.INT4
_WEIGHTED = {
    "CONV_2D": (0, 1, 2, 0, {_INT8: 3, _INT4: 7}),
    "DEPTHWISE_CONV_2D": (0, 1, 2, 3, {_INT8: 3, _INT4: 7}),
    "FULLY_CONNECTED": (0, 1, 2, 0, {_INT8: 4, _INT4: 10}),
    "TRANSPOSE_CONV": (2, 1, 3, 0, {_INT8: 3}),
}
_FULLY_CONNECTED_PER_CHANNEL = 12  # older runtimes compute garbage; the version makes them refuse

# Kernels that rescale: any input and output scales. Version for int8.
_RESCALING = {
    "ADD": 2,
    "BATCH_MATMUL": 2,
    "GELU": 2,
    "HARD_SWISH": 1,
    "LEAKY_RELU": 2,
    "MEAN": 2,
    "MUL": 2,
    "RELU": 2,
    "RELU6": 2,
    "SQUARED_DIFFERENCE": 2,
    "SUB": 3,
}
# Kernels whose output has the input's scale.
_KEEPING = {"AVERAGE_POOL_2D": 2, "RESIZE_BILINEAR": 2}
# Kernels with one output scale and zero point.
_FIXED = {
    "LOGISTIC": (2, 1 / 256, -128),
    "SOFTMAX": (2, 1 / 256, -128),
    "TANH": (2, 1 / 128, 0),
}


@dataclass(frozen=True)
class _Coded:
    """A constant of the graph that is a compressed weight."""

    name: str
    tensor: QTensor
    axes: tuple[int, ...]


def to_integers(graph: Graph, places: Places, tensors: Mapping[str, QTensor]) -> dict[str, Value]:
    """Replaces float operations in place; see the module.

    Args:
        graph: float operations, QUANTIZE and DEQUANTIZE.
        places: constants of the graph by the names of weights.
        tensors: compressed weights by name.

    Returns:
        Integer constants that now stand in the graph, by weight name.
    """
    coded = {
        place.value: _Coded(name, tensors[name], place.axes)
        for name, found in places.items()
        if name in tensors
        for place in found
    }
    _lift_quantize(graph)
    _sink_dequantize(graph)
    fold = _Fold(graph, coded)
    fold.run()
    join_moves(graph)
    merge_equal(graph)
    graph.drop_unused()
    return fold.stored


def _data_inputs(op: Operation) -> list[int]:
    """Positions of the inputs that carry the values an operation moves."""
    return [i for i, value in enumerate(op.inputs) if value is not None and value.is_float]


def _common_grid(value: Value, readers: Mapping[Value, list[Operation]], outputs: set[Value]) -> Grid | None:
    """The grid on which every reader of a float value quantizes it, if all do."""
    users = readers.get(value, [])
    if not users or value in outputs or any(user.kind != "QUANTIZE" for user in users):
        return None
    grids = [user.outputs[0].grid for user in users]
    first = grids[0]
    if first is None or not all(grid is not None and grid.same(first) for grid in grids):
        return None
    return first if users[0].outputs[0].type == schema.TensorType.INT8 else None


def _lift_quantize(graph: Graph) -> None:
    """Q(move(x)) = move(Q(x)): what a move's output is quantized to, its input can be quantized to."""
    lifted: list[Operation] = []
    readers, outputs = graph.consumers(), set(graph.outputs.values())
    changed: dict[Value, Value] = {}
    for op in reversed(graph.operations):
        lifted.append(op)
        grid = _common_grid(op.outputs[0], readers, outputs) if op.kind in _MOVES else None
        if grid is None or len(_data_inputs(op)) != 1:
            continue
        position = _data_inputs(op)[0]
        source, result = op.inputs[position], op.outputs[0]
        if source is None or source.data is not None:
            continue
        quantized = Value(source.shape, schema.TensorType.INT8, grid=grid)
        moved = _on_integers(op, {position: quantized}, grid, _MOVES[op.kind])
        changed |= {user.outputs[0]: moved.outputs[0] for user in readers[result]}
        quantize = operation("QUANTIZE", [source], quantized)
        lifted[-1:] = [moved, quantize]
        readers.setdefault(source, []).append(quantize)
        if op in readers[source]:
            readers[source].remove(op)
    graph.operations = lifted[::-1]
    graph.substitute(changed)
    graph.drop_unused()


def _on_integers(op: Operation, inputs: Mapping[int, Value | None], grid: Grid, version: int) -> Operation:
    """The operation on integer inputs (by position), its output on `grid`."""
    result = replace(op.outputs[0], type=schema.TensorType.INT8, grid=grid, name="")
    taken = [inputs.get(i, value) for i, value in enumerate(op.inputs)]
    return replace(op, inputs=taken, outputs=[result], version=max(op.version, version))


def _sink_dequantize(graph: Graph) -> None:
    """move(DQ(x)) = DQ(move(x)), and QUANTIZE of what was integers before."""
    sources: dict[Value, Value] = {}  # float value -> the integers it is DEQUANTIZE of
    changed: dict[Value, Value] = {}
    operations: list[Operation] = []
    for op in graph.operations:
        op.inputs = [value if value is None else changed.get(value, value) for value in op.inputs]
        first = op.inputs[0] if op.inputs else None
        if op.kind == "DEQUANTIZE" and first is not None and first.type == schema.TensorType.INT8:
            sources[op.outputs[0]] = first
        elif op.kind == "QUANTIZE" and first in sources:
            integers, result = sources[first], op.outputs[0]
            assert integers.grid is not None
            if result.grid is not None and result.type == integers.type and result.grid.same(integers.grid):
                changed[result] = integers
                continue
            op = operation("QUANTIZE", [integers], result, 2)
        else:
            moved = _moved_below(op, sources)
            if moved is not None:
                operations.append(moved)
                sources[op.outputs[0]] = moved.outputs[0]
                op = operation("DEQUANTIZE", [moved.outputs[0]], op.outputs[0], 2)
        operations.append(op)
    graph.operations = operations
    graph.substitute(changed)


def _moved_below(op: Operation, sources: Mapping[Value, Value]) -> Operation | None:
    version = _MOVES.get(op.kind) or _JOINS.get(op.kind)
    positions = _data_inputs(op)
    found = [sources.get(op.inputs[i]) for i in positions]  # type: ignore[arg-type]
    first = found[0] if found else None
    if version is None or first is None or first.grid is None or (op.kind in _MOVES and len(positions) != 1):
        return None
    if any(value is None or value.grid is None or not value.grid.same(first.grid) for value in found):
        return None
    return _on_integers(op, dict(zip(positions, found, strict=True)), first.grid, version)


class _Fold:
    """Step 2. Keeps what has become of values while it walks through the operations once."""

    def __init__(self, graph: Graph, coded: Mapping[Value, _Coded]) -> None:
        self.graph = graph
        self.coded = coded
        self.stored: dict[str, Value] = {}
        self._weights: dict[Value, Value] = {}
        self._sources = {op.outputs[0]: op.inputs[0] for op in graph.operations if op.kind == "DEQUANTIZE"}
        self._readers, self._outputs = graph.consumers(), set(graph.outputs.values())

    def run(self) -> None:
        changed: dict[Value, Value] = {}
        operations: list[Operation] = []
        for op in self.graph.operations:
            grid = _common_grid(op.outputs[0], self._readers, self._outputs)
            folded = None if grid is None else self._fold(op, grid)
            operations += [op] if folded is None else folded
            if folded is not None:
                changed |= {user.outputs[0]: folded[-1].outputs[0] for user in self._readers[op.outputs[0]]}
        self.graph.operations = operations
        self.graph.substitute(changed)
        self.graph.drop_unused()

    def _fold(self, op: Operation, grid: Grid) -> list[Operation] | None:
        rules: tuple[tuple[Mapping[str, object], Callable[[Operation, Grid], list[Operation] | None]], ...] = (
            (_WEIGHTED, self._weighted),
            (_RESCALING, self._rescaling),
            (_KEEPING, self._keeping),
            (_FIXED, self._fixed),
            (_JOINS, self._joining),
        )
        return next((rule(op, grid) for table, rule in rules if op.kind in table), None)

    def _integers(self, op: Operation) -> dict[int, Value | None] | None:
        """Integer inputs by position, if all float inputs have them."""
        found: dict[int, Value | None] = {}
        for i in _data_inputs(op):
            value = op.inputs[i]
            assert value is not None
            integers = self._sources.get(value) or _exact_scalar(value)
            if integers is None or integers.type != schema.TensorType.INT8 or integers.grid is None:
                return None
            found[i] = integers
        return found

    def _rescaling(self, op: Operation, grid: Grid) -> list[Operation] | None:
        inputs = self._integers(op)
        return None if inputs is None else [_on_integers(op, inputs, grid, _RESCALING[op.kind])]

    def _keeping(self, op: Operation, grid: Grid) -> list[Operation] | None:
        inputs = self._integers(op)
        source = None if inputs is None else inputs[0]
        if inputs is None or source is None or source.grid is None:
            return None
        if source.grid.same(grid):
            return [_on_integers(op, inputs, grid, _KEEPING[op.kind])]
        if op.kind == "AVERAGE_POOL_2D" and op.outputs[0].shape[1:3] == (1, 1) and _covers(op, source):
            # MEAN rounds once, straight to the output's scale.
            result = replace(op.outputs[0], type=schema.TensorType.INT8, grid=grid, name="")
            axes = constant(np.array([1, 2], np.int32))
            return [operation("MEAN", [source, axes], result, _RESCALING["MEAN"], keepDims=True)]
        kept = _on_integers(op, inputs, source.grid, _KEEPING[op.kind])
        return [kept, _requantize(kept.outputs[0], grid)]

    def _fixed(self, op: Operation, grid: Grid) -> list[Operation] | None:
        version, scale, zero_point = _FIXED[op.kind]
        inputs = self._integers(op)
        if inputs is None or grid.scale.tolist() != [scale] or grid.zero_point.tolist() != [zero_point]:
            return None
        return [_on_integers(op, inputs, grid, version)]

    def _joining(self, op: Operation, grid: Grid) -> list[Operation] | None:
        inputs = self._integers(op)
        if inputs is None:
            return None
        before: list[Operation] = []
        for i, value in inputs.items():
            if value is not None and value.grid is not None and not value.grid.same(grid):
                before.append(_requantize(value, grid))
                inputs[i] = before[-1].outputs[0]
        return [*before, _on_integers(op, inputs, grid, _JOINS[op.kind])]

    def _weighted(self, op: Operation, grid: Grid) -> list[Operation] | None:
        source_at, weight_at, bias_at, axis, versions = _WEIGHTED[op.kind]
        source, weight = op.inputs[source_at], op.inputs[weight_at]
        bias = op.inputs[bias_at] if len(op.inputs) > bias_at else None
        integers = None if source is None else self._sources.get(source)
        if integers is None or integers.grid is None or weight is None:
            return None
        codes = self._weight(weight, axis)
        if codes is None or codes.grid is None or codes.type not in versions:
            return None
        inputs: dict[int, Value | None] = {source_at: integers, weight_at: codes}
        if bias is not None:
            inputs[bias_at] = self._bias(bias, integers.grid, codes)
            if inputs[bias_at] is None:
                return None
        self.stored[codes.name] = self._weights[weight] = codes
        if bias in self.coded:
            coded = inputs[bias_at]
            assert coded is not None
            self.stored[coded.name] = coded
        version = versions[codes.type]
        if op.kind == "FULLY_CONNECTED" and codes.grid.scale.size > 1:
            version = _FULLY_CONNECTED_PER_CHANNEL
        return [_on_integers(op, inputs, grid, version)]

    def _weight(self, weight: Value, axis: int) -> Value | None:
        """The integer constant of a weight, if integer kernels take it."""
        if weight in self._weights:
            return self._weights[weight]
        coded = self.coded.get(weight)
        if coded is None or not isinstance(coded.tensor, Affine) or coded.name in self.stored:
            return None
        tensor = coded.tensor
        if tensor.bits not in (4, 8) or not tensor.signed or (tensor.codes == -128).any():
            return None
        if tensor.zero_point is not None and tensor.zero_point.any():
            return None
        operations, stored, _ = encode(coded.name, tensor, weight, coded.axes)
        if stored.grid is None or len(operations) > 1 or (stored.grid.scale.size > 1 and stored.grid.axis != axis):
            return None
        return stored

    def _bias(self, bias: Value, source: Grid, weight: Value) -> Value | None:
        """The 32-bit bias, if it is on the grid of the products or zero."""
        assert weight.grid is not None
        products = source.scale * weight.grid.scale
        coded = self.coded.get(bias)
        if coded is not None and isinstance(coded.tensor, Affine) and coded.tensor.bits == 32:
            if np.allclose(coded.tensor.scale.reshape(-1), products, rtol=1e-5, atol=0):
                return self.stored.get(coded.name) or encode_integer_bias(coded.name, coded.tensor, products.size)
        elif coded is None and bias.data is not None and not bias.array().any():
            grid = Grid(products, np.zeros(products.size, np.int64))
            return constant(np.zeros(bias.shape, np.int32), grid=grid)
        return None


def _requantize(value: Value, grid: Grid) -> Operation:
    return operation("QUANTIZE", [value], replace(value, grid=grid), 2)


def _exact_scalar(value: Value) -> Value | None:
    """One number repeated, as integers that mean exactly it."""
    if value.data is None or not is_one_number(value):
        return None
    number = float(value.array().flat[0])
    if not np.isfinite(number):
        return None
    scale = np.array([abs(number) or 1.0], np.float32)
    return constant(np.full(value.shape, np.sign(number), np.int8), grid=Grid(scale, np.zeros(1, np.int64)))


def _covers(op: Operation, source: Value) -> bool:
    """One window over the whole image, without padding or activation."""
    options = op.record.builtinOptions
    window = (options.filterHeight, options.filterWidth)
    return source.shape[1:3] == window and options.fusedActivationFunction == 0
