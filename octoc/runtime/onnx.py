"""Runs an ONNX file in onnxruntime, on the processor.

onnxruntime multiplies by 4- and 8-bit weight-only matrices with activations that it rounds to 8 bits on the fly, unless
`session.qdq_matmulnbits_accuracy_level` says otherwise. An exact session asks for float32 products: they are what the
file says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray

from octoc.errors import ArtifactError, DataError, HostError, reason
from octoc.runtime import OpRecord, TensorSpec

Array = NDArray[Any]

# Samples that `run_many` runs at once where the batch is free.
CHUNK = 64

_DTYPES = {"tensor(float)": "float32", "tensor(double)": "float64", "tensor(bool)": "bool"}

# 3 keeps errors and drops warnings: onnxruntime warns of its own optimiser's leftovers.
_ERRORS_ONLY = 3
# Operations with integer kernels, and which input is the weight.
_INTEGER_WEIGHTS = {
    "QLinearConv": 3,
    "QGemm": 3,
    "QLinearMatMul": 3,
    "ConvInteger": 1,
    "MatMulInteger": 1,
    "MatMulIntegerToFloat": 1,
}
_FLOAT32_PRODUCTS = ("session.qdq_matmulnbits_accuracy_level", "1")


@dataclass(frozen=True)
class Session:
    """A loaded file.

    Args:
        path: of the file.
        inputs: what `run` takes.
        outputs: what `run` returns.
        engine: onnxruntime's session.
    """

    path: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    engine: Any

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name.

        Raises:
            DataError: an input is missing, unknown or of another shape.
        """
        return self._run(self.engine, feeds, [spec.name for spec in self.outputs])

    def run_many(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Runs many calls.

        Args:
            feeds: by name [calls, *shape], a free size being 1.

        Returns:
            By name [calls, *output shape], a free size being 1.
        """
        calls = len(next(iter(feeds.values())))
        if not self._free_batch():
            rows = [self.run({name: array[i] for name, array in feeds.items()}) for i in range(calls)]
            return {spec.name: np.stack([row[spec.name] for row in rows]) for spec in self.outputs}
        merged = {name: array.reshape(-1, *array.shape[2:]) for name, array in feeds.items()}
        parts = [
            self.run({name: array[i : i + CHUNK] for name, array in merged.items()}) for i in range(0, calls, CHUNK)
        ]
        return {spec.name: np.concatenate([part[spec.name] for part in parts])[:, None] for spec in self.outputs}

    def trace(self, feeds: Mapping[str, Array]) -> list[OpRecord]:
        """Every operation of the graph as the file states it, in order, with onnxruntime's optimiser off.

        Operations inside the branches of control flow are not shown.
        """
        proto = _parse(self.path)
        shown = [name for node in proto.graph.node for name in node.output if name]
        known = {value.name for value in proto.graph.output}
        proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in shown if name not in known)
        values = self._run(_engine(proto.SerializeToString(), self.path, plain=True), feeds, shown)
        return [
            OpRecord(
                node.name or next(iter(node.output)),
                node.op_type,
                tuple(name for name in node.input if name),
                {name: values[name] for name in node.output if isinstance(values.get(name), np.ndarray)},
            )
            for node in proto.graph.node
        ]

    def _free_batch(self) -> bool:
        return all(spec.shape and spec.shape[0] is None for spec in (*self.inputs, *self.outputs))

    def _run(self, engine: Any, feeds: Mapping[str, Array], names: list[str]) -> dict[str, Array]:
        arrays = self._checked(feeds)
        try:
            return dict(zip(names, engine.run(names, arrays), strict=True))
        except Exception as error:
            raise ArtifactError(f"{self.path.name} fails in onnxruntime: {reason(error)}") from error

    def _checked(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        takes = {spec.name: spec for spec in self.inputs}
        if feeds.keys() != takes.keys():
            raise DataError(f"{self.path.name} takes {', '.join(takes)}; given: {', '.join(feeds) or 'nothing'}")
        for name, spec in takes.items():
            sizes = feeds[name].shape
            if len(sizes) != len(spec.shape) or any(
                want not in (None, size) for want, size in zip(spec.shape, sizes, strict=True)
            ):
                wanted = ", ".join("any" if size is None else str(size) for size in spec.shape)
                raise DataError(f"input {name} takes [{wanted}]; given: {list(sizes)}")
        return {
            name: np.ascontiguousarray(feeds[name], dtype=spec.dtype).reshape(feeds[name].shape)
            for name, spec in takes.items()
        }


def open_session(path: Path, threads: int | None = None, exact: bool = True) -> Session:
    """Loads a file.

    Args:
        path: of the file.
        threads: onnxruntime's own choice where None.
        exact: multiply by weight-only matrices in float32; False leaves onnxruntime its default.

    Raises:
        ArtifactError: the file is damaged, or onnxruntime cannot run it.
        HostError: the file cannot be opened, or onnxruntime is not installed.
    """
    engine = _engine(_parse(path).SerializeToString(), path, threads, exact)
    inputs, outputs = (tuple(_spec(value) for value in side) for side in (engine.get_inputs(), engine.get_outputs()))
    return Session(path, inputs, outputs, engine)


def optimized_operations(path: Path) -> Counter[str]:
    """How often each operation stands in the graph that onnxruntime makes of the file."""
    return Counter(node.op_type for node in _optimized(path).node)


def _optimized(path: Path) -> onnx.GraphProto:
    with TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        _engine(_parse(path).SerializeToString(), path, optimized=optimized)
        return _parse(optimized).graph


def _parse(path: Path) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist") from error
    except OSError as error:
        raise HostError(f"{path} cannot be read: {error.strerror}") from error
    except DecodeError as error:
        raise ArtifactError(f"{path} is not an ONNX file: {reason(error)}") from error
    if not proto.graph.output:
        raise ArtifactError(f"{path} is not an ONNX file: it has no outputs")
    return proto


def _engine(
    raw: bytes,
    path: Path,
    threads: int | None = None,
    exact: bool = True,
    plain: bool = False,
    optimized: Path | None = None,
) -> Any:
    if find_spec("onnxruntime") is None:
        raise HostError("onnxruntime is not installed; pip install onnxruntime")
    import onnxruntime

    onnxruntime.set_default_logger_severity(_ERRORS_ONLY)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    if threads:
        options.intra_op_num_threads = threads
    if exact:
        options.add_session_config_entry(*_FLOAT32_PRODUCTS)
    if plain:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized:
        options.optimized_model_filepath = str(optimized)
        options.log_severity_level = _ERRORS_ONLY + 1
    try:
        return onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ArtifactError(f"{path} cannot be loaded by onnxruntime: {reason(error)}") from error


def _spec(value: Any) -> TensorSpec:
    shape = tuple(size if isinstance(size, int) else None for size in value.shape)
    inner = value.type.removeprefix("tensor(").removesuffix(")")
    return TensorSpec(value.name, shape, _DTYPES.get(value.type, inner))


def integer_operations(path: Path) -> int:
    """How many convolutions and products with a constant weight onnxruntime computes in integers."""
    graph = _optimized(path)
    constants = {tensor.name for tensor in graph.initializer}
    found = (node.input[_INTEGER_WEIGHTS[node.op_type]] for node in graph.node if node.op_type in _INTEGER_WEIGHTS)
    return sum(name in constants for name in found)
