"""From a `.mlpackage` folder to plain data.

1. `Manifest.json` names the model file inside `Data/`.
2. The model file is a protobuf; its `mlProgram` holds functions, blocks and operations.
3. Constants are inline or records of a weight file beside the model file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, cast

from octoc.errors import ArtifactError
from octoc.runtime import TensorSpec
from octoc.runtime.mil.schema import data_type_names, model_class
from octoc.runtime.mil.storage import DATA_TYPES, WeightFile, immediate_array

# FeatureTypes.proto, ArrayFeatureType.ArrayDataType
_FEATURE_DTYPES = {65552: "float16", 65568: "float32", 65600: "float64", 131104: "int32", 131080: "int8"}


@dataclass(frozen=True)
class TensorType:
    """Declared type of a value; `dtype` is a MIL name. A list or dictionary has dtype "LIST" and no shape."""

    dtype: str
    shape: tuple[int | None, ...]
    is_state: bool = False


@dataclass(frozen=True)
class Operation:
    """One operation: what it reads by parameter (names of values, or constants), and what it defines."""

    name: str
    kind: str
    inputs: dict[str, list[Any]]  # a value's name is a `Name`; an array, string or list is a constant
    outputs: dict[str, TensorType]
    blocks: tuple[Block, ...] = ()


class Name(str):
    """The name of a value, as against a string constant."""

    __slots__ = ()


@dataclass(frozen=True)
class Block:
    """A sequence of operations with named inputs and outputs."""

    inputs: dict[str, TensorType]
    outputs: tuple[str, ...]
    operations: tuple[Operation, ...] = field(repr=False)


@dataclass(frozen=True)
class Program:
    """The entry function of a package and the types its users see."""

    main: Block
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def read_program(path: Path) -> Program:
    """Read the entry function of a package.

    Args:
        path: a `.mlpackage` folder.

    Raises:
        ArtifactError: a file is missing, damaged or not an mlprogram.
        HostError: coremltools is not installed.
    """
    model_file = _model_file(path)
    try:
        model = model_class().FromString(model_file.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{path.name}: cannot read {model_file.name}: {error.strerror}") from error
    except _decode_error() as error:
        raise ArtifactError(f"{path.name}: {model_file.name} is not a Core ML model") from error
    if model.WhichOneof("Type") != "mlProgram":
        raise ArtifactError(f"{path.name}: holds a {model.WhichOneof('Type') or 'empty model'}, not an mlProgram")
    try:
        return _Reader(model_file.parent).program(model)
    except ArtifactError as error:
        raise ArtifactError(f"{path.name}: {error}") from error


def _decode_error() -> type[Exception]:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    return cast(type[Exception], DecodeError)


def _model_file(path: Path) -> Path:
    manifest_file = path / "Manifest.json"
    try:
        manifest = json.loads(manifest_file.read_bytes())
        root = manifest["rootModelIdentifier"]
        relative = manifest["itemInfoEntries"][root]["path"]
        return _inside(path / "Data", relative)
    except OSError as error:
        raise ArtifactError(f"{path.name}: cannot read Manifest.json: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path.name}: Manifest.json does not name a model file") from error


def _inside(folder: Path, relative: str) -> Path:
    """`folder / relative`, refusing a path that leaves the folder."""
    parts = PurePosixPath(relative)
    if parts.is_absolute() or ".." in parts.parts:
        raise ArtifactError(f"path {relative!r} leaves the package")
    return folder / parts


class _Reader:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.weight_files: dict[str, WeightFile] = {}
        self.dtype_names = data_type_names()

    def program(self, model: Any) -> Program:
        description = model.description
        functions = model.mlProgram.functions
        entry = description.defaultFunctionName or "main"
        if entry not in functions:
            raise ArtifactError(f"no function {entry!r} (has {sorted(functions)})")
        function = functions[entry]
        if function.opset not in function.block_specializations:
            raise ArtifactError(f"function {entry!r} has no block for its opset {function.opset!r}")
        inputs = {named.name: self.type(named.type) for named in function.inputs}
        body = self.block(function.block_specializations[function.opset])
        main = Block(inputs, body.outputs, body.operations)
        described = next((f for f in description.functions if f.name == entry), description)
        defined = {name: kind for op in main.operations for name, kind in op.outputs.items()} | inputs
        return Program(
            main,
            tuple(_spec(name, kind, described.input) for name, kind in inputs.items() if not kind.is_state),
            tuple(_spec(name, _defined(defined, name), described.output) for name in main.outputs),
        )

    def block(self, block: Any) -> Block:
        inputs = {named.name: self.type(named.type) for named in block.inputs}
        return Block(inputs, tuple(block.outputs), tuple(self.operation(op) for op in block.operations))

    def operation(self, op: Any) -> Operation:
        outputs = {named.name: self.type(named.type) for named in op.outputs}
        name = next(iter(outputs), op.type)
        inputs: dict[str, list[Any]] = {}
        try:
            # iOS 16 constexpr operations and `const` keep their tensors in attributes, all others in inputs.
            for key, value in op.attributes.items():
                if key == "name":
                    name = str(self.value(value))
                else:
                    inputs[key] = [self.value(value)]
            for key, argument in op.inputs.items():
                inputs[key] = [self.binding(binding) for binding in argument.arguments]
        except ArtifactError as error:
            raise ArtifactError(f"{op.type} {name!r}: {error}") from error
        return Operation(name, op.type, inputs, outputs, tuple(self.block(block) for block in op.blocks))

    def binding(self, binding: Any) -> Any:
        return Name(binding.name) if binding.WhichOneof("binding") == "name" else self.value(binding.value)

    def type(self, declared: Any) -> TensorType:
        field = declared.WhichOneof("type")
        if field == "stateType":
            wrapped = self.type(declared.stateType.wrappedType)
            return TensorType(wrapped.dtype, wrapped.shape, is_state=True)
        if field != "tensorType":
            return TensorType("LIST", ())
        tensor = declared.tensorType
        dims = (dim.constant.size if dim.WhichOneof("dimension") == "constant" else None for dim in tensor.dimensions)
        return TensorType(self.dtype_names.get(tensor.dataType, str(tensor.dataType)), tuple(dims))

    def value(self, value: Any) -> Any:
        """A constant: an array, a string, or a list of these."""
        if value.WhichOneof("value") == "immediateValue":
            immediate = value.immediateValue
            kind = immediate.WhichOneof("value")
            if kind in ("list", "tuple"):
                return [self.value(item) for item in getattr(immediate, kind).values]
            if kind == "tensor" and value.type.tensorType.dataType == 2:  # STRING
                strings = list(immediate.tensor.strings.values)
                return strings[0] if not value.type.tensorType.dimensions and strings else strings
            if kind == "tensor":
                return immediate_array(immediate.tensor, *self.fixed_type(value.type))
            raise ArtifactError(f"constant of kind {kind!r} is not known")
        if value.WhichOneof("value") != "blobFileValue":
            raise ArtifactError("constant without a value")
        blob = value.blobFileValue
        return self.weight_file(blob.fileName).read(blob.offset, *self.fixed_type(value.type))

    def fixed_type(self, declared: Any) -> tuple[str, tuple[int, ...]]:
        tensor_type = self.type(declared)
        if tensor_type.dtype not in DATA_TYPES:
            raise ArtifactError(f"constant of data type {tensor_type.dtype} is not known")
        shape = tuple(dim for dim in tensor_type.shape if dim is not None)
        if len(shape) != len(tensor_type.shape):
            raise ArtifactError("constant with an unknown dimension")
        return tensor_type.dtype, shape

    def weight_file(self, name: str) -> WeightFile:
        if name not in self.weight_files:
            prefix = "@model_path/"
            if not name.startswith(prefix):
                raise ArtifactError(f"weight file {name!r} is not inside the package")
            self.weight_files[name] = WeightFile(_inside(self.folder, name.removeprefix(prefix)))
        return self.weight_files[name]


def constant_value(op: Operation) -> Any:
    """The value of a `const` operation: an array, a string, or a list of these."""
    value = op.inputs.get("val", [])
    if len(value) != 1 or len(op.outputs) != 1:
        raise ArtifactError(f"const {op.name!r} does not define one value")
    return value[0]


def _defined(defined: dict[str, TensorType], name: str) -> TensorType:
    if name not in defined:
        raise ArtifactError(f"output {name!r} is never defined")
    return defined[name]


def _spec(name: str, declared: TensorType, features: Any) -> TensorSpec:
    """What a user feeds or reads: MIL's shape with the dtype of the model's description."""
    feature = next((f for f in features if f.name == name), None)
    dtype = DATA_TYPES[declared.dtype].numpy.name if declared.dtype in DATA_TYPES else declared.dtype
    if feature is not None and feature.type.WhichOneof("Type") == "multiArrayType":
        dtype = _FEATURE_DTYPES.get(feature.type.multiArrayType.dataType, dtype)
    return TensorSpec(name, declared.shape, dtype)
