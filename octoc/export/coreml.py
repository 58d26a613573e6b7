"""Core ML: a `model.mlpackage` (an mlprogram for iOS 18, macOS 15 and later).

1. `convert` runs coremltools once on a graph, with random weights that are easy to find again.
2. `write` edits the converted program: each weight is replaced by its codes, every other tensor by its value, and a
   new weight file is written. No converter runs, so that a recipe costs milliseconds.
3. `read_codes` reads the package alone.

Operations that run in integers keep a float bias: Core ML has no 32-bit bias. It holds what the 32-bit codes mean,
rounded to the program's dtype, and `read_codes` leaves it out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from octoc.compressed import Compressed
from octoc.errors import ModelError
from octoc.export.coreml_lowering.compact import merge_constants
from octoc.export.coreml_lowering.encode import Encoder
from octoc.export.coreml_lowering.fingerprint import Place, fingerprints, places, suspects
from octoc.export.coreml_lowering.package import write_package
from octoc.export.coreml_lowering.precision import FLOAT16_LARGEST, choose
from octoc.export.coreml_lowering.program import convert as run_coremltools
from octoc.export.coreml_lowering.program import expand, export
from octoc.export.coreml_lowering.read import METADATA, Values, operations, read_package
from octoc.export.coreml_lowering.storage import WeightWriter
from octoc.model import Layer, Model
from octoc.qtensor import Affine, Array, Palette, QTensor, Scheme, Sparse, describe
from octoc.runtime.mil.schema import data_type_names, model_class

FILE = "model.mlpackage"

_AFFINE_BITS = (4, 8)
_LARGEST_RANK = 5


@dataclass(frozen=True)
class Base:
    """A converted program whose weights are still to be set.

    Args:
        program: the serialised model; constants of ten elements and more are empty.
        constants: these constants by name, without the model's float tensors.
        places: constant -> the tensor that it is, and its layout.
        compute: dtype that the program computes in, "float16" or "float32"; scales and tables must have it.
        notes: one line for each reason why that is not float16.
        names: tensors that `write` takes codes for.
        kept: tensors that the converter computed with. They cannot change without another conversion.
        inputs: names of the program's inputs, in the model's order.
        outputs: names of its outputs.
    """

    program: bytes = field(repr=False)
    constants: Mapping[str, Array] = field(repr=False)
    places: Mapping[str, tuple[str, Place]] = field(repr=False)
    compute: str
    notes: tuple[str, ...]
    names: frozenset[str]
    kept: Mapping[str, Tensor]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def accepts(scheme: Scheme, layer: Layer, integer: bool) -> str | None:
    """Why Core ML cannot hold a layer's weight so, or None.

    Scales, zero points and tables may form any grid. Their dtype must be the program's, `Base.compute`: the pipeline
    encodes for it, because a scale rounded afterwards would change every weight.

    Args:
        scheme: how the weight is to be stored.
        layer: whose weight it is.
        integer: the operation takes int8 activations.
    """
    if len(layer.shape) > _LARGEST_RANK:
        return f"Core ML takes at most {_LARGEST_RANK} axes, the weight has {len(layer.shape)}"
    if scheme.kind == "codebook":
        return "octoc writes no table with scales beside it for Core ML"
    if scheme.kind in ("affine", "asymmetric") and scheme.bits not in _AFFINE_BITS:
        return f"Core ML stores affine codes of 4 or 8 bits, not {scheme.bits}"
    if integer and (scheme.kind != "affine" or scheme.granularity == "group" or scheme.sparse):
        return f"Core ML takes integer weights, one scale a tensor or channel, beside int8 activations, not {scheme}"
    return scheme.unfit(layer.shape, layer.axis)


def convert(model: Model) -> Base:
    """Runs coremltools on a model's graph for one sample.

    Raises:
        ModelError: an operation has no counterpart in Core ML; it is named.
        HostError: coremltools is not installed.
    """
    true: set[str] = set()
    while True:
        marks = fingerprints(model.tensors, true)
        first = _convert_marked(model, marks)
        lost = marks.keys() - {name for name, _ in first.places.values()}
        if not lost and first.suspects & marks.keys():
            second = _convert_marked(model, fingerprints(model.tensors, true, seed=1))
            if not first.agrees(second):
                lost = first.suspects & marks.keys()
        if not lost:
            return _base(model, marks, first)
        true |= lost


@dataclass(frozen=True)
class _Converted:
    """What coremltools made of a graph with random weights.

    Args:
        program: the protobuf model.
        arrays: its numeric constants by name.
        places: those that are a tensor.
        suspects: tensors that constants may have been computed from.
        compute: dtype that the program computes in.
        notes: why that is not float16.
    """

    program: Any
    arrays: Mapping[str, Array]
    places: Mapping[str, tuple[str, Place]]
    suspects: set[str]
    compute: str
    notes: tuple[str, ...]

    def agrees(self, other: _Converted) -> bool:
        """Whether no other constant depends on the random values."""
        if self.arrays.keys() != other.arrays.keys() or self.places != other.places:
            return False
        rest = self.arrays.keys() - self.places.keys()
        return all(np.array_equal(self.arrays[name], other.arrays[name], equal_nan=True) for name in rest)


def _convert_marked(model: Model, marks: Mapping[str, Tensor]) -> _Converted:
    exported = export(model, marks)
    compute, notes = choose(exported, model.tensors)
    try:
        converted = run_coremltools(exported, model.outputs, compute)
    except ModelError as refused:
        try:  # recurrent layers convert only when their loops are written out
            exported = expand(exported)
            converted = run_coremltools(exported, model.outputs, compute)
        except ModelError:
            raise refused from None
    program = model_class().FromString(converted.get_spec().SerializeToString())
    values = Values(Path(converted.weights_dir).parent)
    arrays = {}
    for operation in operations(program):
        if operation.type == "const" and _is_array(operation.attributes["val"]):
            arrays[operation.outputs[0].name], _ = values.value(operation.attributes["val"])
    found = places({name: array for name, array in arrays.items() if array.dtype.kind == "f"}, marks)
    return _Converted(program, arrays, found, suspects(exported), compute, notes)


def _base(model: Model, marks: Mapping[str, Tensor], converted: _Converted) -> Base:
    program, arrays, found = converted.program, converted.arrays, converted.places
    # A constant that the program keeps in another dtype is used by an operation that takes no codes.
    uncoded = {name for constant, (name, _) in found.items() if arrays[constant].dtype.name != converted.compute}
    merge_constants(program, found.keys())
    program.description.metadata.Clear()
    stored = {
        operation.outputs[0].name
        for operation in operations(program)
        if operation.type == "const" and operation.attributes["val"].WhichOneof("value") == "blobFileValue"
    }
    return Base(
        program=program.SerializeToString(deterministic=True),
        constants={name: arrays[name] for name in sorted(stored - found.keys())},
        places=found,
        compute=converted.compute,
        notes=converted.notes,
        names=frozenset(name for name, _ in found.values()) - uncoded,
        kept={name: tensor for name, tensor in model.tensors.items() if name not in marks},
        inputs=tuple(feature.name for feature in program.description.input),
        outputs=tuple(feature.name for feature in program.description.output),
    )


def _is_array(value: Any) -> bool:
    return (
        value.type.WhichOneof("type") == "tensorType" and data_type_names()[value.type.tensorType.dataType] != "STRING"
    )


def write(base: Base, small: Compressed, path: Path) -> None:
    """Writes a package with `small`'s codes and tensors.

    Args:
        base: from `convert`, of the same graph; the values of tensors may have changed since.
        small: each scale or table must be of `base.compute`.
        path: does not exist before.

    Raises:
        ModelError: a weight cannot be stored as it is given; it is named.
    """
    for name, tensor in base.kept.items():
        given = small.model.tensors.get(name)
        if given is not tensor and (given is None or not torch.equal(given, tensor)):
            raise ModelError(f"Core ML: tensor {name} changed since the conversion, which computed with it")
    coded = {name: q for name, q in small.qtensors.items() if not _is_bias(q)}
    for name, q in coded.items():
        if name not in base.names:
            raise ModelError(f"Core ML: weight {name} is not a plain constant of the program; leave it in float")
        reason = _misfit(q, base.compute)
        if reason:
            raise ModelError(f"Core ML: weight {name}: {reason}")
    write_package(path, lambda weights: _fill(base, small, coded, weights))


def _fill(base: Base, small: Compressed, coded: Mapping[str, QTensor], weights: WeightWriter) -> bytes:
    """The program with every constant set, serialised."""
    program = model_class().FromString(base.program)
    writer = _Writer(base, small, coded, Encoder(base.compute, weights))
    for function in program.mlProgram.functions.values():
        for block in function.block_specializations.values():
            writer.block(block)
    entries = {"weights": writer.entries}
    program.description.metadata.userDefined[METADATA] = json.dumps(entries, separators=(",", ":"), sort_keys=True)
    return bytes(program.SerializeToString(deterministic=True))


def read_codes(path: Path) -> dict[str, QTensor]:
    """Compressed weights of a package by the names of `small.qtensors`, without 32-bit biases."""
    return read_package(path)


def _is_bias(tensor: QTensor) -> bool:
    return isinstance(tensor, Affine) and tensor.bits == 32


def _misfit(tensor: QTensor, compute: str) -> str | None:
    """Why the program cannot hold a compressed weight, or None."""
    dense = tensor.dense if isinstance(tensor, Sparse) else tensor
    if isinstance(dense, Affine):
        if dense.bits not in _AFFINE_BITS:
            return f"Core ML stores affine codes of 4 or 8 bits, not {dense.bits}"
        if dense.scale.dtype != compute:
            return f"the program computes in {compute}, the scales are {dense.scale.dtype}"
    if isinstance(dense, Palette) and dense.table.dtype != compute:
        return f"the program computes in {compute}, the table is {dense.table.dtype}"
    return None


class _Writer:
    """Fills one program with the tensors of one `Compressed`."""

    def __init__(self, base: Base, small: Compressed, coded: Mapping[str, QTensor], encoder: Encoder) -> None:
        self.base = base
        self.small = small
        self.coded = coded
        self.encoder = encoder
        self.entries: dict[str, Any] = {}  # constant -> what the metadata say of it

    def block(self, block: Any) -> None:
        """Replaces the constants of a block and of those inside it."""
        filled: list[Any] = []
        for operation in block.operations:
            for inner in operation.blocks:
                self.block(inner)
            filled.extend(self.operation(operation))
        # A repeated message field cannot be assigned to; copies outlive the deletion.
        copies = [type(operation).FromString(operation.SerializeToString()) for operation in filled]
        del block.operations[:]
        block.operations.extend(copies)

    def operation(self, operation: Any) -> list[Any]:
        constant = operation.outputs[0].name if operation.type == "const" else ""
        if constant in self.base.constants:
            self.encoder.fill(operation.attributes["val"], self.base.constants[constant])
        elif constant in self.base.places:
            name, place = self.base.places[constant]
            shape = tuple(int(size.constant.size) for size in operation.outputs[0].type.tensorType.dimensions)
            if name in self.coded:
                return self.codes(constant, name, place, shape)
            self.encoder.fill(operation.attributes["val"], self.floats(operation, name, place, shape))
        return [operation]

    def codes(self, constant: str, name: str, place: Place, shape: tuple[int, ...]) -> list[Any]:
        tensor = self.coded[name]
        _check_shape(name, tensor.shape, place, shape)
        entry: dict[str, Any] = {"tensor": name, "facts": describe(tensor)}
        if not place.is_plain:
            entry |= {"axes": list(place.axes), "rank": place.rank}
        self.entries[constant] = entry
        try:
            return self.encoder.operations(constant, tensor, place)
        except ModelError as error:
            raise ModelError(f"Core ML: weight {name}: {error}") from error

    def floats(self, operation: Any, name: str, place: Place, shape: tuple[int, ...]) -> Array:
        given = self.small.qtensors.get(name)
        if given is None and name not in self.small.model.tensors:
            raise ModelError(f"Core ML: tensor {name} is missing; the program was converted from another graph")
        array = given.dequantize() if given is not None else self.small.model.tensors[name].detach().cpu().numpy()
        _check_shape(name, array.shape, place, shape)
        kind = data_type_names()[operation.outputs[0].type.tensorType.dataType].lower()
        with np.errstate(over="ignore"):
            stored = place.store(array).astype(kind.replace("FLOAT", "float"))
        lost = np.isinf(stored) & np.isfinite(place.store(array))
        if lost.any():
            raise ModelError(f"Core ML: tensor {name} has a value beyond {FLOAT16_LARGEST:g}, float16's largest")
        return stored


def _check_shape(name: str, given: tuple[int, ...], place: Place, shape: tuple[int, ...]) -> None:
    stored = place.store(np.broadcast_to(np.int8(0), given)).shape if len(given) == place.rank else None
    if stored != shape:
        raise ModelError(f"Core ML: tensor {name} of shape {list(given)} does not fit the program's {list(shape)}")
