"""Evaluate a MIL program in torch, one operation at a time.

1. Each operation is bound once to its function; constants take the form that the function wants.
2. What depends on no input is computed at once, so that compressed weights are dequantized only once.
3. A call computes the rest in order, in float32, and rounds each result to its declared type.

A value is `data` if it depends on an input otherwise than through its shape. A program whose operations never
read data as a Python number, never branch on it and keep no state may be vectorised with `torch.func.vmap`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from octoc.errors import ArtifactError
from octoc.runtime.mil import compressed, control, elementwise, indexing, layout, neural, recurrent, spatial
from octoc.runtime.mil.control import State
from octoc.runtime.mil.operation import Table, UnsupportedOperation, conversions, reads_number
from octoc.runtime.mil.reader import Block, Name, Operation, Program, TensorType, constant_value

OPERATIONS: Table = {
    **compressed.OPERATIONS,
    **control.OPERATIONS,
    **elementwise.OPERATIONS,
    **indexing.OPERATIONS,
    **layout.OPERATIONS,
    **neural.OPERATIONS,
    **recurrent.OPERATIONS,
    **spatial.OPERATIONS,
}

_STATEFUL = {"read_state", "write_state", "coreml_update_state"}
_NOT_VECTORIZED = _STATEFUL | {"while_loop", "non_zero"}

# The torch dtype that holds a MIL type. float16 lives in float32, rounded: products of rounded numbers are then
# computed without a conversion. torch computes little in unsigned types, so these live in the next wider one.
_HELD = {
    "BOOL": torch.bool,
    "FLOAT16": torch.float32,
    "FLOAT32": torch.float32,
    "FLOAT64": torch.float64,
    "INT4": torch.int8,
    "INT8": torch.int8,
    "INT16": torch.int16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "UINT1": torch.uint8,
    "UINT2": torch.uint8,
    "UINT3": torch.uint8,
    "UINT4": torch.uint8,
    "UINT6": torch.uint8,
    "UINT8": torch.uint8,
    "UINT16": torch.int32,
    "UINT32": torch.int64,
}

Observer = Callable[["Step", Sequence[Any]], None]
Environment = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """An operation bound to its function.

    Attributes:
        operation: as read.
        function: None for an operation that was computed when it was bound.
        fixed: arguments known beforehand.
        read: parameter -> names of values (one, or a list) and the conversion to apply.
        results: the outputs of a step without a function.
    """

    operation: Operation
    function: Callable[..., Any] | None
    fixed: dict[str, Any]
    read: dict[str, tuple[str | list[str], Callable[[Any], Any]]]
    results: tuple[Any, ...] = ()


def hold(value: Any, declared: TensorType) -> Any:
    """A computed value as its declared type stores it; float16 is rounded and stays float32."""
    if not isinstance(value, Tensor) or declared.dtype not in _HELD:
        return value
    held = _HELD[declared.dtype]
    if value.dtype != held:
        value = value.to(held)
    return value.half().float() if declared.dtype == "FLOAT16" else value


def to_torch(array: Any) -> Any:
    """A constant as the evaluator holds it."""
    if isinstance(array, list):
        return [to_torch(item) for item in array]
    if not isinstance(array, np.ndarray):
        return array
    wider = {"float16": np.float32, "uint16": np.int32, "uint32": np.int64, "uint64": np.int64}
    return torch.from_numpy(np.array(array, wider.get(array.dtype.name, array.dtype.newbyteorder("="))))


class Evaluator:
    """A program ready to run."""

    def __init__(self, program: Program) -> None:
        """Bind every operation and compute what depends on no input.

        Raises:
            UnsupportedOperation: an operation, or a parameter of one, is not implemented.
            ArtifactError: an operation does not accept its constants.
        """
        self.program = program
        self.constants: Environment = {}
        self.vectorizable = True
        self._data: set[str] = {name for name, kind in program.main.inputs.items() if not kind.is_state}
        self._steps = self._bind_block(program.main, foldable=True)

    def initial_states(self) -> dict[str, State]:
        """All states of the program, zero."""
        return {
            name: State(torch.zeros([size or 1 for size in kind.shape], dtype=_HELD[kind.dtype]), kind.dtype)
            for name, kind in self.program.main.inputs.items()
            if kind.is_state
        }

    def run(self, values: Mapping[str, Any], observe: Observer | None = None) -> dict[str, Tensor]:
        """Compute the outputs.

        Args:
            values: a tensor per input and a `State` per state.
            observe: called after each operation with its step and outputs.

        Raises:
            ArtifactError: an operation fails; its name is in the message.
        """
        known = {**self.constants, **values}
        self._run_steps(self._steps, known, observe)
        return {name: known[name] for name in self.program.main.outputs}

    def _run_steps(self, steps: Sequence[Step], known: Environment, observe: Observer | None) -> None:
        for step in steps:
            results = step.results if step.function is None else self._compute(step, known, observe)
            for name, result in zip(step.operation.outputs, results, strict=True):
                known[name] = result
            if observe is not None:
                observe(step, results)

    def _compute(self, step: Step, known: Environment, observe: Observer | None = None) -> tuple[Any, ...]:
        op = step.operation
        assert step.function is not None
        try:
            arguments = {
                key: convert(known[names] if isinstance(names, str) else [known[name] for name in names])
                for key, (names, convert) in step.read.items()
            }
            if op.blocks:
                arguments["blocks"] = [
                    self._block_call(block, steps, known, observe)
                    for block, steps in zip(op.blocks, step.fixed["blocks"], strict=True)
                ]
            result = step.function(**{**step.fixed, **arguments})
        except UnsupportedOperation as error:
            raise UnsupportedOperation(f"{op.kind} {op.name!r}: {error}") from error
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ArtifactError(f"{op.kind} {op.name!r} cannot be computed: {reason}") from error
        if isinstance(result, Tensor) or next(iter(op.outputs.values()), TensorType("", ())).dtype == "LIST":
            result = (result,) if not op.blocks else result
        if len(result) != len(op.outputs):
            raise ArtifactError(f"{op.kind} {op.name!r} has {len(op.outputs)} outputs, {len(result)} were computed")
        if op.kind in layout.OPERATIONS:
            return tuple(result)  # values already in their declared type
        return tuple(hold(value, kind) for value, kind in zip(result, op.outputs.values(), strict=True))

    def _block_call(
        self, block: Block, steps: Sequence[Step], known: Environment, observe: Observer | None
    ) -> Callable[[Sequence[Any]], list[Any]]:
        def call(arguments: Sequence[Any]) -> list[Any]:
            inner = {**known, **dict(zip(block.inputs, arguments, strict=True))}
            self._run_steps(steps, inner, observe)
            return [inner[name] for name in block.outputs]

        return call

    def _bind_block(self, block: Block, foldable: bool) -> tuple[Step, ...]:
        steps = []
        for op in block.operations:
            if op.kind == "const":
                self.constants[next(iter(op.outputs))] = to_torch(constant_value(op))
            else:
                steps.append(self._bind(op, foldable))
        return tuple(steps)

    def _bind(self, op: Operation, foldable: bool) -> Step:
        if op.kind not in OPERATIONS:
            raise UnsupportedOperation(f"operation {op.kind!r} (at {op.name!r}) is not implemented")
        function = OPERATIONS[op.kind]
        wanted = conversions(function)
        unknown = sorted(set(op.inputs) - set(wanted))
        if unknown:
            raise UnsupportedOperation(f"{op.kind} {op.name!r}: parameter {', '.join(unknown)} is not implemented")
        fixed: dict[str, Any] = {}
        read: dict[str, tuple[str | list[str], Callable[[Any], Any]]] = {}
        for key, values in op.inputs.items():
            if all(self._is_constant(value) for value in values):
                given = [self.constants[v] if isinstance(v, Name) else to_torch(v) for v in values]
                fixed[key] = self._convert(op, key, wanted[key], given[0] if len(given) == 1 else given)
            elif all(isinstance(value, Name) for value in values):
                read[key] = (values[0] if len(values) == 1 else list(values), wanted[key])
            else:
                raise UnsupportedOperation(f"{op.kind} {op.name!r}: {key} mixes names and inline values")
        self._mark_data(op, read)
        if op.blocks:
            fixed["blocks"] = [self._bind_block(inner, foldable=False) for inner in op.blocks]
        step = Step(op, function, fixed, read)
        if foldable and not read and not op.blocks and op.kind not in _STATEFUL:
            results = self._compute(step, {})
            self.constants.update(zip(op.outputs, results, strict=True))
            return Step(op, None, {}, {}, results)
        return step

    def _is_constant(self, value: Any) -> bool:
        return not isinstance(value, Name) or value in self.constants

    @staticmethod
    def _convert(op: Operation, key: str, convert: Callable[[Any], Any], value: Any) -> Any:
        try:
            return convert(value)
        except (RuntimeError, ValueError, TypeError) as error:
            raise ArtifactError(f"{op.kind} {op.name!r}: {key} has an unfit value") from error

    def _mark_data(self, op: Operation, read: Mapping[str, tuple[str | list[str], Callable[[Any], Any]]]) -> None:
        """Follow data through one operation; note where it makes a vectorised run impossible."""
        touched = {key for key, (names, _) in read.items() if self._data & set(_listed(names))}
        if op.blocks:
            touched |= {"blocks"} if op.kind == "while_loop" else set()
            for block in op.blocks:
                self._data |= set(block.inputs)
        if op.kind in _NOT_VECTORIZED or any(reads_number(read[key][1]) for key in touched if key in read):
            self.vectorizable = False
        if (touched or op.blocks) and op.kind != "shape":
            self._data |= set(op.outputs)


def _listed(names: str | list[str]) -> Iterator[str]:
    yield from [names] if isinstance(names, str) else names
