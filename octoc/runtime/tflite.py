"""Runs a TFLite file with LiteRT.

A damaged flatbuffer can crash the interpreter, so a file is read and checked here first (`read_checked`).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import math
import os
import struct
import sys
import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from octoc.errors import ArtifactError, DataError, HostError, reason
from octoc.qtensor import Array
from octoc.runtime import OpRecord, TensorSpec

_IDENTIFIER = b"TFL3"
_BITS = {
    "FLOAT32": 32,
    "FLOAT16": 16,
    "FLOAT64": 64,
    "INT2": 2,
    "INT4": 4,
    "INT8": 8,
    "INT16": 16,
    "INT32": 32,
    "INT64": 64,
    "UINT8": 8,
    "UINT32": 32,
    "BOOL": 8,
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing reaches the terminal: C++ libraries write to the process's streams, Python ones to their loggers."""
    handlers, disabled = logging.root.handlers[:], logging.root.manager.disable
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError, AttributeError):  # closed, or none
            stream.flush()
    kept = [os.dup(1), os.dup(2)]
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        logging.disable(logging.CRITICAL)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        for descriptor in (*kept, sink):
            os.close(descriptor)
        logging.disable(disabled)
        logging.root.handlers[:] = handlers


def read_checked(path: Path) -> bytes:
    """A file's bytes, once its tables, offsets and sizes hold together.

    Raises:
        ArtifactError: it is absent, damaged or no TFLite file.
        HostError: no LiteRT is installed.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) < 16 or content[4:8] != _IDENTIFIER:
        raise ArtifactError(f"{path} is no TFLite file: {len(content)} bytes without the mark {_IDENTIFIER.decode()}")
    if find_spec("ai_edge_litert") is None:
        _interpreter_module()
        return content
    from ai_edge_litert import schema_py_generated as schema

    try:
        model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
        _check(model, schema)
    except (
        struct.error,
        IndexError,
        ValueError,
        TypeError,
        AttributeError,
        KeyError,
        MemoryError,
        OverflowError,
    ) as error:
        raise ArtifactError(f"{path} is a damaged TFLite file: {reason(error)}") from error
    return content


def _check(model: Any, schema: Any) -> None:
    """Raises ValueError or IndexError where one table points outside another, or a constant has the wrong size."""
    types = {code: name for name, code in vars(schema.TensorType).items()}
    operators = {code for name, code in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
    if not model.subgraphs or not model.buffers:
        raise ValueError("it has no operations or no buffers")
    for code in model.operatorCodes or ():
        if max(code.builtinCode, code.deprecatedBuiltinCode) not in operators:
            raise ValueError(f"unknown operator {code.builtinCode}")
    for graph in model.subgraphs:
        tensors = graph.tensors or ()
        for tensor in tensors:
            _check_tensor(tensor, model.buffers, types)
        for operator in graph.operators or ():
            _within([operator.opcodeIndex], 0, len(model.operatorCodes), "operator code")
            _within(operator.inputs, -1, len(tensors), "input")
            _within(operator.outputs, 0, len(tensors), "output")
        _within(graph.inputs, 0, len(tensors), "graph input")
        _within(graph.outputs, 0, len(tensors), "graph output")
    for signature in model.signatureDefs or ():
        _within([signature.subgraphIndex], 0, len(model.subgraphs), "signature")
        for entry in (*(signature.inputs or ()), *(signature.outputs or ())):
            _within([entry.tensorIndex], 0, len(model.subgraphs[signature.subgraphIndex].tensors), entry.name.decode())


def _within(indices: Any, low: int, high: int, what: str) -> None:
    for index in () if indices is None else indices:
        if not low <= index < high:
            raise IndexError(f"{what} {index} outside {low}..{high - 1}")


def _check_tensor(tensor: Any, buffers: Any, types: Mapping[int, str]) -> None:
    (tensor.name or b"").decode()
    _within([tensor.buffer], 0, len(buffers), "buffer")
    shape = () if tensor.shape is None else tuple(int(size) for size in tensor.shape)
    if any(size < 0 for size in shape) or math.prod(shape) > 2**40:
        raise ValueError(f"shape {shape}")
    kind = types[tensor.type]
    data = buffers[tensor.buffer].data
    if data is not None and kind in _BITS and len(data) != -(-math.prod(shape) * _BITS[kind] // 8):
        raise ValueError(f"{len(data)} bytes for a constant {kind}{list(shape)}")
    quantization = tensor.quantization
    if quantization is None or quantization.scale is None or quantization.detailsType:
        return
    count, axis = len(quantization.scale), quantization.quantizedDimension
    points = quantization.zeroPoint
    if points is not None and len(points) != count:
        raise ValueError(f"{len(points)} zero points for {count} scales")
    if count > 1 and not (0 <= axis < len(shape) and shape[axis] == count):
        raise ValueError(f"{count} scales along axis {axis} of {list(shape)}")


def _interpreter_module() -> Any:
    if find_spec("ai_edge_litert") is not None:
        return importlib.import_module("ai_edge_litert.interpreter")
    if find_spec("tflite_runtime") is not None:
        warnings.warn(
            "tflite_runtime is no longer maintained and wrong for some integer layers; install ai-edge-litert",
            stacklevel=3,
        )
        return importlib.import_module("tflite_runtime.interpreter")
    raise HostError('running TFLite files needs the package ai_edge_litert: pip install "octoc[tflite]"')


class Session:
    """A file ready to run.

    Attributes:
        inputs, outputs: in the order of the file, by the names of its signature.
    """

    def __init__(self, path: Path, threads: int | None) -> None:
        self._path = path
        self._content = read_checked(path)
        self._threads = threads
        self._interpreter = self._load()
        inputs, outputs = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        names_in, names_out = self._names(inputs, outputs)
        self.inputs = tuple(_spec(name, detail) for name, detail in zip(names_in, inputs, strict=True))
        self.outputs = tuple(_spec(name, detail) for name, detail in zip(names_out, outputs, strict=True))
        self._inputs = {name: detail["index"] for name, detail in zip(names_in, inputs, strict=True)}
        self._outputs = {name: detail["index"] for name, detail in zip(names_out, outputs, strict=True)}

    def _load(self, **options: Any) -> Any:
        module = _interpreter_module()
        try:
            with quiet():
                interpreter = module.Interpreter(model_content=self._content, num_threads=self._threads, **options)
                interpreter.allocate_tensors()
        except (RuntimeError, ValueError) as error:
            raise ArtifactError(f"{self._path}: LiteRT refuses it: {reason(error)}") from error
        return interpreter

    def _names(self, inputs: list[Any], outputs: list[Any]) -> tuple[list[str], list[str]]:
        """Signature names where there is one signature, tensor names otherwise."""
        signatures = self._interpreter._get_full_signature_list()
        if len(signatures) != 1:
            return [detail["name"] for detail in inputs], [detail["name"] for detail in outputs]
        signature = next(iter(signatures.values()))
        found = []
        for side, details in (("inputs", inputs), ("outputs", outputs)):
            by_index: dict[int, list[str]] = {}
            for name, index in signature[side].items():
                by_index.setdefault(index, []).append(name)
            found.append([by_index[detail["index"]].pop(0) for detail in details])
        return found[0], found[1]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """One call.

        Args:
            feeds: an array for each input, of its shape.

        Raises:
            DataError: a feed is absent, unknown or of another shape or type.
            ArtifactError: the interpreter fails.
        """
        self._feed(self._interpreter, feeds)
        return self._invoke()

    def run_many(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Many calls in a row.

        Args:
            feeds: [calls, *shape] for each input.

        Returns:
            [calls, *shape] for each output.
        """
        counts = {len(array) for array in feeds.values()}
        if len(counts) != 1:
            raise DataError(f"feeds of different lengths: {sorted(counts)}")
        calls = [self.run({name: array[i] for name, array in feeds.items()}) for i in range(counts.pop())]
        if not calls:
            return {spec.name: np.empty((0, *map(int, _sizes(spec))), spec.dtype) for spec in self.outputs}
        return {spec.name: np.stack([call[spec.name] for call in calls]) for spec in self.outputs}

    def trace(self, feeds: Mapping[str, Array]) -> list[OpRecord]:
        """One call with every operation's outputs as floats, computed by the plain kernels (no XNNPACK).

        Args:
            feeds: as in `run`.
        """
        resolver = _interpreter_module().OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        interpreter = self._load(experimental_preserve_all_tensors=True, experimental_op_resolver_type=resolver)
        self._feed(interpreter, feeds)
        try:
            with quiet():
                interpreter.invoke()
        except (RuntimeError, ValueError) as error:
            raise ArtifactError(f"{self._path}: LiteRT fails: {reason(error)}") from error
        tensors = {detail["index"]: detail for detail in interpreter.get_tensor_details()}
        records = []
        for operation in interpreter._get_ops_details():
            outputs = [tensors[i] for i in operation["outputs"] if i in tensors]
            records.append(
                OpRecord(
                    name=outputs[0]["name"],
                    kind=operation["op_name"],
                    inputs=tuple(tensors[i]["name"] for i in operation["inputs"] if i in tensors),
                    outputs={detail["name"]: _floats(interpreter, detail) for detail in outputs},
                )
            )
        return records

    def _feed(self, interpreter: Any, feeds: Mapping[str, Array]) -> None:
        if feeds.keys() != self._inputs.keys():
            raise DataError(f"the network takes {sorted(self._inputs)}, not {sorted(feeds)}")
        for spec in self.inputs:
            array = np.asarray(feeds[spec.name])
            if array.shape != spec.shape:
                raise DataError(f"input {spec.name} has shape {list(_sizes(spec))}, not {list(array.shape)}")
            fed = array.astype(spec.dtype)
            if not np.array_equal(fed, array, equal_nan=array.dtype.kind == "f") and fed.dtype.kind != "f":
                raise DataError(f"input {spec.name}: values of {array.dtype} do not fit {spec.dtype}")
            interpreter.set_tensor(self._inputs[spec.name], fed)

    def _invoke(self) -> dict[str, Array]:
        try:
            self._interpreter.invoke()
        except (RuntimeError, ValueError) as error:
            raise ArtifactError(f"{self._path}: LiteRT fails: {reason(error)}") from error
        return {name: self._interpreter.get_tensor(index) for name, index in self._outputs.items()}


def open_session(path: Path, threads: int | None = None) -> Session:
    """Loads a file.

    Args:
        path: a `.tflite` file.
        threads: of the interpreter; its own choice where None.

    Raises:
        ArtifactError: the file is damaged.
        HostError: no LiteRT is installed.
    """
    return Session(Path(path), threads)


def _spec(name: str, detail: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(name, tuple(int(size) for size in detail["shape"]), np.dtype(detail["dtype"]).name)


def _sizes(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(size or 0 for size in spec.shape)


def _floats(interpreter: Any, detail: Mapping[str, Any]) -> Array:
    array: Array = interpreter.get_tensor(detail["index"])
    quantization = detail["quantization_parameters"]
    scales, points = quantization["scales"], quantization["zero_points"]
    if array.dtype.kind in "iu" and len(scales):
        shape = [1] * array.ndim
        if len(scales) > 1:
            shape[quantization["quantized_dimension"]] = len(scales)
        scale, point = scales.reshape(shape), points.reshape(shape)
        array = (array.astype(np.int64) - point).astype(np.float32) * scale
    floats: Array = array.astype(np.float32)
    return floats


# Their second input is the weight.
_WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV", "BATCH_MATMUL")


def integer_operations(path: Path) -> int:
    """How many convolutions and fully connected layers have an integer result and constant integer weights."""
    content = read_checked(path)
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    kinds = {getattr(schema.BuiltinOperator, kind) for kind in _WEIGHTED}
    integers = (schema.TensorType.INT8, schema.TensorType.INT16)
    codes = (schema.TensorType.INT8, schema.TensorType.INT4)
    count = 0
    for graph in model.subgraphs:
        computed = {i for operator in graph.operators for i in operator.outputs} | set(graph.inputs)
        for operator in graph.operators:
            code = model.operatorCodes[operator.opcodeIndex]
            if max(code.builtinCode, code.deprecatedBuiltinCode) not in kinds:
                continue
            weight, result = operator.inputs[1], graph.tensors[operator.outputs[0]]
            constant = weight not in computed and graph.tensors[weight].type in codes
            count += constant and result.type in integers
    return count
