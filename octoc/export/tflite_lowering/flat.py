"""A TFLite flatbuffer as operations that read and define values, and back.

Indices into tables of tensors, buffers and operator codes exist only in the file: `read_graph` resolves them and
`graph_bytes` numbers what is left, so that nothing unused is written and equal graphs give equal bytes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import flatbuffers  # type: ignore[import-untyped]
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from octoc.errors import ModelError
from octoc.qtensor import Array

TYPES: dict[int, type[np.generic]] = {
    schema.TensorType.FLOAT32: np.float32,
    schema.TensorType.FLOAT16: np.float16,
    schema.TensorType.INT32: np.int32,
    schema.TensorType.INT64: np.int64,
    schema.TensorType.INT8: np.int8,
    schema.TensorType.UINT8: np.uint8,
    schema.TensorType.BOOL: np.bool_,
}
KINDS: dict[int, str] = {code: name for name, code in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
_CODES = {name: code for code, name in KINDS.items()}
_METADATA = b"octoc"
_LARGEST = 2**31 - 1  # bytes; offsets of a flatbuffer are 32-bit


@dataclass(frozen=True, eq=False)
class Grid:
    """What the integers of a value mean: `(code - zero_point) * scale`.

    Args:
        scale: float32 [1] or [size of axis].
        zero_point: int64, scale's shape.
        axis: the axis that the scales run along.
    """

    scale: Array
    zero_point: Array
    axis: int = 0

    def same(self, other: Grid) -> bool:
        return (
            np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero_point, other.zero_point)
            and (self.scale.size == 1 or self.axis == other.axis)
        )


@dataclass(eq=False)
class Value:
    """A tensor of the file; two values are the same only if they are one object.

    Args:
        shape: sizes.
        type: a `schema.TensorType`.
        data: uint8 bytes of a constant, None for what is computed.
        grid: of an integer value.
        name: kept in the file; empty where nothing needs one.
    """

    shape: tuple[int, ...]
    type: int = schema.TensorType.FLOAT32
    data: Array | None = None
    grid: Grid | None = None
    name: str = ""

    @property
    def is_float(self) -> bool:
        return bool(self.type == schema.TensorType.FLOAT32)

    def array(self) -> Array:
        """A constant's elements, in its shape."""
        assert self.data is not None
        return self.data.view(TYPES[self.type]).reshape(self.shape)


@dataclass(eq=False)
class Operation:
    """One operation.

    Args:
        kind: name of the builtin operator.
        inputs: values, None for an optional input that is absent.
        outputs: values.
        version: the operator version that the file asks of a runtime.
        record: the file's own record, for its options.
    """

    kind: str
    inputs: list[Value | None]
    outputs: list[Value]
    version: int = 1
    record: Any = field(default_factory=schema.OperatorT)


@dataclass(eq=False)
class Graph:
    """One function of the file, with the names that callers use.

    Args:
        operations: in an order that can be executed.
        inputs, outputs: values by name, in the order of the network's.
    """

    operations: list[Operation]
    inputs: dict[str, Value]
    outputs: dict[str, Value]

    def producers(self) -> dict[Value, Operation]:
        return {value: operation for operation in self.operations for value in operation.outputs}

    def consumers(self) -> dict[Value, list[Operation]]:
        found: dict[Value, list[Operation]] = {}
        for operation in self.operations:
            for value in dict.fromkeys(operation.inputs):
                if value is not None:
                    found.setdefault(value, []).append(operation)
        return found

    def constants(self) -> list[Value]:
        values = (value for operation in self.operations for value in operation.inputs)
        return list(dict.fromkeys(value for value in values if value is not None and value.data is not None))

    def copy(self) -> tuple[Graph, dict[Value, Value]]:
        """A graph that may be edited, and its values by the values here. Constants' bytes are shared."""
        twins: dict[Value, Value] = {}

        def twin(value: Value) -> Value:
            return twins.setdefault(value, replace(value))

        operations = [
            replace(
                operation,
                inputs=[None if value is None else twin(value) for value in operation.inputs],
                outputs=[twin(value) for value in operation.outputs],
            )
            for operation in self.operations
        ]
        ends = ({name: twin(value) for name, value in named.items()} for named in (self.inputs, self.outputs))
        return Graph(operations, *ends), twins

    def substitute(self, changed: dict[Value, Value]) -> None:
        """Readers of each key, and the outputs, read its value instead; chains are followed."""

        def final(value: Value | None) -> Value | None:
            while value is not None and value in changed:
                value = changed[value]
            return value

        for operation in self.operations:
            operation.inputs = [final(value) for value in operation.inputs]
        self.outputs = {name: changed_value for name, v in self.outputs.items() if (changed_value := final(v))}

    def drop_unused(self) -> None:
        """Removes operations whose outputs nobody reads."""
        needed = set(self.outputs.values())
        kept: list[Operation] = []
        for operation in reversed(self.operations):
            if any(value in needed for value in operation.outputs):
                kept.append(operation)
                needed.update(value for value in operation.inputs if value is not None)
        self.operations = kept[::-1]


def operation(kind: str, inputs: list[Value | None], output: Value, version: int = 1, **options: Any) -> Operation:
    """A new operation; `options` are the fields of its options table, if it has one."""
    record = schema.OperatorT()
    title = "".join(word.capitalize() for word in kind.split("_")) + "Options"
    if hasattr(schema, f"{title}T"):
        record.builtinOptionsType = getattr(schema.BuiltinOptions, title)
        record.builtinOptions = getattr(schema, f"{title}T")()
        for name, value in options.items():
            setattr(record.builtinOptions, name, value)
    return Operation(kind, inputs, [output], version, record)


def constant(array: Array, name: str = "", grid: Grid | None = None) -> Value:
    """A constant of a whole-byte type."""
    kind = next(code for code, dtype in TYPES.items() if dtype == array.dtype)
    return Value(tuple(array.shape), kind, np.frombuffer(array.tobytes(), np.uint8), grid, name)


def is_one_number(value: Value) -> bool:
    """A constant of equal elements."""
    array = value.array()
    return bool(array.size and (array == array.flat[0]).all())


def read_graph(content: bytes) -> tuple[Graph, dict[str, Any]]:
    """The function of a file with one signature, and the facts that `graph_bytes` stored with it.

    Raises:
        ModelError: an operation calls a function of its own.
    """
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    table = model.subgraphs[0]
    values = [_value(tensor, model) for tensor in table.tensors]
    operations = []
    for record in table.operators or ():
        code = model.operatorCodes[record.opcodeIndex]
        kind = KINDS[max(code.builtinCode, code.deprecatedBuiltinCode)]
        if any(name.lower().endswith("subgraphindex") for name in _options(record)):
            raise ModelError(f"TFLite: {kind} calls a function of its own, which mobile runtimes do not do")
        inputs = [None if i < 0 else values[i] for i in _ints(record.inputs)]
        operations.append(Operation(kind, inputs, [values[i] for i in _ints(record.outputs)], code.version, record))
    signatures = model.signatureDefs
    if signatures:
        inputs_by_name, outputs_by_name = (
            {tensor.name.decode(): values[tensor.tensorIndex] for tensor in tensors or ()}
            for tensors in (signatures[0].inputs, signatures[0].outputs)
        )
    else:
        inputs_by_name, outputs_by_name = (
            {values[i].name: values[i] for i in _ints(indices)} for indices in (table.inputs, table.outputs)
        )
    facts: dict[str, Any] = {}
    for entry in model.metadata or ():
        if entry.name == _METADATA:
            facts = json.loads(bytes(model.buffers[entry.buffer].data))
    return Graph(operations, inputs_by_name, outputs_by_name), facts


def _options(record: Any) -> set[str]:
    return {name for options in (record.builtinOptions, record.builtinOptions2) if options for name in vars(options)}


def _ints(array: Any) -> tuple[int, ...]:
    return () if array is None else tuple(int(i) for i in array)


def _value(tensor: Any, model: Any) -> Value:
    grid = None
    quantization = tensor.quantization
    if quantization is not None and quantization.scale is not None and len(quantization.scale):
        scale = np.asarray(quantization.scale, np.float32)
        points = np.asarray(quantization.zeroPoint if quantization.zeroPoint is not None else 0 * scale, np.int64)
        grid = Grid(scale, points, int(quantization.quantizedDimension))
    data = model.buffers[tensor.buffer].data
    return Value(
        _ints(tensor.shape),
        int(tensor.type),
        None if data is None else np.asarray(data, np.uint8),
        grid,
        (tensor.name or b"").decode(),
    )


def graph_bytes(graph: Graph, facts: dict[str, Any]) -> bytes:
    """The file of a graph, with `facts` (JSON data) as metadata.

    Raises:
        ModelError: it would be larger than a flatbuffer can be.
    """
    size = sum(value.data.nbytes for value in graph.constants() if value.data is not None)
    if size > _LARGEST:
        raise ModelError(f"TFLite: {size} bytes of weights are more than the {_LARGEST} that one file holds")
    writer = _Writer()
    table = schema.SubGraphT()
    table.name = b"main"
    table.inputs = [writer.tensor(value) for value in graph.inputs.values()]
    table.operators = [writer.operator(operation) for operation in graph.operations]
    table.outputs = [writer.tensor(value) for value in graph.outputs.values()]
    table.tensors = writer.tensors
    signature = schema.SignatureDefT()
    signature.signatureKey = b"serving_default"
    signature.inputs = writer.named(graph.inputs)
    signature.outputs = writer.named(graph.outputs)
    model = schema.ModelT()
    model.version = 3
    model.operatorCodes = writer.codes
    model.subgraphs = [table]
    model.signatureDefs = [signature]
    if facts:
        entry = schema.MetadataT()
        entry.name = _METADATA
        text = json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
        entry.buffer = writer.buffer(np.frombuffer(text, np.uint8))
        model.metadata = [entry]
    model.buffers = writer.buffers
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


class _Writer:
    """Numbers tensors, buffers and operator codes in the order of their first use."""

    def __init__(self) -> None:
        self.tensors: list[Any] = []
        self.codes: list[Any] = []
        self.buffers: list[Any] = [schema.BufferT()]  # the first is empty by convention
        self._tensor: dict[Value, int] = {}
        self._buffer: dict[bytes, int] = {}
        self._code: dict[tuple[str, int], int] = {}

    def buffer(self, data: Array) -> int:
        key = data.tobytes()
        if key not in self._buffer:
            self._buffer[key] = len(self.buffers)
            table = schema.BufferT()
            table.data = data
            self.buffers.append(table)
        return self._buffer[key]

    def tensor(self, value: Value | None) -> int:
        if value is None:
            return -1
        if value not in self._tensor:
            self._tensor[value] = len(self.tensors)
            table = schema.TensorT()
            table.name = (value.name or f"t{len(self.tensors)}").encode()
            table.shape = list(value.shape)
            table.hasRank = True
            table.type = value.type
            table.buffer = 0 if value.data is None else self.buffer(value.data)
            if value.grid is not None:
                table.quantization = schema.QuantizationParametersT()
                table.quantization.scale = np.asarray(value.grid.scale, np.float32)
                table.quantization.zeroPoint = np.asarray(value.grid.zero_point, np.int64)
                table.quantization.quantizedDimension = value.grid.axis
            self.tensors.append(table)
        return self._tensor[value]

    def operator(self, operation: Operation) -> Any:
        key = (operation.kind, operation.version)
        if key not in self._code:
            self._code[key] = len(self.codes)
            code = schema.OperatorCodeT()
            code.builtinCode = _CODES[operation.kind]
            code.deprecatedBuiltinCode = min(_CODES[operation.kind], 127)
            code.version = operation.version
            self.codes.append(code)
        record = copy.copy(operation.record)
        record.opcodeIndex = self._code[key]
        record.inputs = [self.tensor(value) for value in operation.inputs]
        record.outputs = [self.tensor(value) for value in operation.outputs]
        return record

    def named(self, values: dict[str, Value]) -> list[Any]:
        tables = []
        for name, value in values.items():
            table = schema.TensorMapT()
            table.name = name.encode()
            table.tensorIndex = self.tensor(value)
            tables.append(table)
        return tables


def is_identity(order: Iterable[int]) -> bool:
    return all(i == j for i, j in enumerate(order))
