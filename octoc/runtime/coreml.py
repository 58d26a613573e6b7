"""Run a Core ML `.mlpackage` (an mlprogram) on any operating system.

The package is read directly and evaluated in torch: what is computed is the program's meaning, operation by
operation with its declared types, not the arithmetic of one Apple device. Sums are float32; a float16 result is
rounded once, after its operation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from octoc.errors import ArtifactError, DataError
from octoc.runtime import OpRecord, TensorSpec
from octoc.runtime.mil.evaluate import Evaluator, Step, to_torch
from octoc.runtime.mil.reader import Name, Operation, read_program

_CALLS_PER_CHUNK = 64  # beyond this, activations leave the cache and nothing is gained


def open_session(path: Path, threads: int | None = None) -> Session:
    """Read a package and prepare it to run.

    Args:
        path: a `.mlpackage` folder.
        threads: CPU threads during a run; None leaves torch's setting alone.

    Raises:
        ArtifactError: the package is damaged, or uses an operation that is not implemented
            (`octoc.runtime.mil.operation.UnsupportedOperation`).
    """
    program = read_program(Path(path))
    try:
        with torch.no_grad():
            return Session(Evaluator(program), threads)
    except ArtifactError as error:
        raise type(error)(f"{Path(path).name}: {error}") from error


class Session:
    """A package ready to run. A package with states keeps them from call to call, starting at zero."""

    def __init__(self, evaluator: Evaluator, threads: int | None) -> None:
        self.inputs: tuple[TensorSpec, ...] = evaluator.program.inputs
        self.outputs: tuple[TensorSpec, ...] = evaluator.program.outputs
        self._evaluator = evaluator
        self._threads = threads
        self._states = evaluator.initial_states()

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One call.

        Args:
            feeds: input name -> array of the declared shape.

        Returns:
            output name -> array.

        Raises:
            DataError: an input is missing, unknown or of another shape.
            ArtifactError: an operation cannot be computed; it is named.
        """
        values = self._tensors(feeds, calls=False)
        with self._torch():
            return self._arrays(self._evaluator.run({**values, **self._states}))

    def run_many(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Many calls at once, with the numbers of as many separate runs (up to the order of float32 sums).

        Args:
            feeds: input name -> array [calls, *declared shape].

        Returns:
            output name -> array [calls, *output shape].

        Raises:
            DataError: as `run`, or inputs with different numbers of calls.
        """
        values = self._tensors(feeds, calls=True)
        counts = {len(value) for value in values.values()}
        if len(counts) != 1:
            raise DataError(f"inputs with different numbers of calls: {sorted(counts)}")
        calls = counts.pop()
        if calls == 0:
            raise DataError("no calls given")
        if self._evaluator.vectorizable and calls > 1:
            try:
                return self._run_vectorized(values, calls)
            except ArtifactError:
                # torch cannot vectorise one of the operations; if the file is at fault, the loop says so
                self._evaluator.vectorizable = False
        separate = [self.run({name: array[i] for name, array in feeds.items()}) for i in range(calls)]
        return {spec.name: np.stack([one[spec.name] for one in separate]) for spec in self.outputs}

    def _run_vectorized(self, values: Mapping[str, torch.Tensor], calls: int) -> dict[str, np.ndarray]:
        run_chunk = torch.func.vmap(self._evaluator.run)
        with self._torch():
            chunks = [
                self._arrays(run_chunk({name: value[i : i + _CALLS_PER_CHUNK] for name, value in values.items()}))
                for i in range(0, calls, _CALLS_PER_CHUNK)
            ]
        return {spec.name: np.concatenate([chunk[spec.name] for chunk in chunks]) for spec in self.outputs}

    def trace(self, feeds: Mapping[str, np.ndarray]) -> list[OpRecord]:
        """Every executed operation of one call in order, constants aside; states are left as they were.

        Args:
            feeds: as for `run`.
        """
        records: list[OpRecord] = []

        def observe(step: Step, results: Sequence[Any]) -> None:
            op = step.operation
            names = tuple(str(value) for values in op.inputs.values() for value in values if isinstance(value, Name))
            outputs = {
                name: _array(result, kind.dtype)
                for (name, kind), result in zip(op.outputs.items(), results, strict=True)
                if isinstance(result, torch.Tensor)
            }
            records.append(OpRecord(op.name, op.kind, names, outputs))

        values = self._tensors(feeds, calls=False)
        with self._torch():
            self._evaluator.run({**values, **{name: copy(state) for name, state in self._states.items()}}, observe)
        return records

    def _tensors(self, feeds: Mapping[str, np.ndarray], calls: bool) -> dict[str, torch.Tensor]:
        expected = {spec.name for spec in self.inputs}
        if set(feeds) != expected:
            raise DataError(f"inputs {sorted(feeds)} given, {sorted(expected)} expected")
        tensors = {}
        for spec in self.inputs:
            array = np.asarray(feeds[spec.name])
            shape = array.shape[1:] if calls else array.shape
            fits = len(shape) == len(spec.shape) and all(
                want in (None, have) for want, have in zip(spec.shape, shape, strict=True)
            )
            if not fits or (calls and array.ndim == 0):
                wanted = ["calls"] * calls + ["?" if size is None else size for size in spec.shape]
                raise DataError(f"input {spec.name!r} has shape {list(array.shape)}, expected {wanted}")
            tensors[spec.name] = to_torch(array.astype(spec.dtype, copy=False))
        return tensors

    def _arrays(self, outputs: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        return {spec.name: outputs[spec.name].numpy().astype(spec.dtype, copy=False) for spec in self.outputs}

    @contextmanager
    def _torch(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads or before)
        try:
            with torch.no_grad():
                yield
        finally:
            torch.set_num_threads(before)


def _array(tensor: torch.Tensor, dtype: str) -> np.ndarray:
    """A value in its declared type."""
    array = tensor.numpy()
    return array.astype(np.float16) if dtype == "FLOAT16" else array


# Operations with a weight, and the parameter that it is.
_WEIGHTS = {"conv": "weight", "conv_transpose": "weight", "linear": "weight", "matmul": "y"}
_CODES = ("constexpr_affine_dequantize", "constexpr_blockwise_shift_scale")
# Operations that hand on what they read: an int8 value stays one behind them.
_MOVES = {"cast", "identity", "pad", "reshape", "transpose", "expand_dims", "squeeze", "slice_by_index"}


def integer_operations(path: Path) -> int:
    """How many convolutions and products read `dequantize` and codes: those that a device can run in integers."""
    operations = read_program(Path(path)).main.operations
    producers = {name: operation for operation in operations for name in operation.outputs}

    def source(operation: Operation, parameter: str) -> str:
        value: Any = operation.inputs.get(parameter, [None])[0]
        before = producers.get(value) if isinstance(value, Name) else None
        while before is not None and before.kind in _MOVES:
            value = before.inputs["x"][0]
            before = producers.get(value) if isinstance(value, Name) else None
        return "" if before is None else before.kind

    return sum(
        source(operation, "x") == "dequantize" and source(operation, _WEIGHTS[operation.kind]) in _CODES
        for operation in operations
        if operation.kind in _WEIGHTS
    )
