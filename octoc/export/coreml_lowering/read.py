"""Compressed weights from a package alone.

What each weight is follows from the operation that defines it and from the data types that the file declares; the
model's own metadata says only which tensor it is, in which layout, and whether a float16 constant was compressed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from octoc.errors import ArtifactError
from octoc.export.coreml_lowering.fingerprint import Place
from octoc.qtensor import Affine, Array, Cast, Codebook, Palette, QTensor, Sparse, describe
from octoc.runtime.mil.schema import data_type_names, model_class
from octoc.runtime.mil.storage import DATA_TYPES, WeightFile, immediate_array

METADATA = "octoc"
_PREFIX = "@model_path/"


def read_package(path: Path) -> dict[str, QTensor]:
    """Compressed weights by tensor name.

    Args:
        path: a `.mlpackage` folder that octoc wrote.

    Raises:
        ArtifactError: a file is missing or damaged, or an operation is not what the metadata says.
    """
    folder = path / "Data" / "com.apple.CoreML"
    try:
        model = model_class().FromString((folder / "model.mlmodel").read_bytes())
        entries = json.loads(model.description.metadata.userDefined[METADATA])["weights"]
    except OSError as error:
        raise ArtifactError(f"{path.name}: {error.strerror}: {error.filename}") from error
    except Exception as error:
        raise ArtifactError(f"{path.name} is no Core ML package that octoc wrote: {error}") from error
    reader = _Weights(folder, model)
    found = {}
    for constant, entry in entries.items():
        stored = reader.weight(constant, entry["facts"]["kind"] == "cast")
        axes = entry.get("axes")
        place = Place(tuple(axes), entry["rank"]) if axes is not None else None
        tensor = stored if place is None else _restored(stored, place)
        if describe(tensor) != entry["facts"]:
            raise ArtifactError(f"{path.name}: {constant} is {describe(tensor)}, its metadata say {entry['facts']}")
        found[entry["tensor"]] = tensor
    return found


def _restored(tensor: QTensor, place: Place) -> QTensor:
    if isinstance(tensor, Sparse):
        dense = _restored(tensor.dense, place)
        assert not isinstance(dense, Sparse | Codebook)
        return Sparse(place.restore(tensor.mask), dense)
    if isinstance(tensor, Affine):
        point = None if tensor.zero_point is None else place.restore(tensor.zero_point)
        return Affine(place.restore(tensor.codes), place.restore(tensor.scale), point, tensor.bits, tensor.signed)
    if isinstance(tensor, Palette):
        return Palette(place.restore(tensor.codes), place.restore(tensor.table), tensor.bits)
    assert isinstance(tensor, Cast)
    return Cast(place.restore(tensor.values))


class Values:
    """Constants of a program.

    Args:
        folder: that the program's paths are relative to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, WeightFile] = {}
        self.types = data_type_names()

    def value(self, value: Any) -> tuple[Array, str]:
        """The array of a protobuf `Value`, and its MIL data type."""
        declared = value.type.tensorType
        kind = self.types[declared.dataType]
        shape = tuple(int(size.constant.size) for size in declared.dimensions)
        if value.WhichOneof("value") == "immediateValue":
            return immediate_array(value.immediateValue.tensor, kind, shape), kind
        blob = value.blobFileValue
        if blob.fileName not in self.files:
            relative = blob.fileName.removeprefix(_PREFIX)
            if relative == blob.fileName or ".." in Path(relative).parts:
                raise ArtifactError(f"weight file {blob.fileName!r} is not inside the package")
            self.files[blob.fileName] = WeightFile(self.folder / relative)
        return np.array(self.files[blob.fileName].read(blob.offset, kind, shape)), kind


class _Weights(Values):
    def __init__(self, folder: Path, model: Any) -> None:
        super().__init__(folder)
        self.defined = {output.name: operation for operation in operations(model) for output in operation.outputs}

    def weight(self, name: str, is_cast: bool) -> QTensor:
        operation = self.defined.get(name)
        if operation is None:
            raise ArtifactError(f"the program does not define weight {name}")
        if operation.type == "const" and is_cast:
            return Cast(self.value(operation.attributes["val"])[0])
        readers = {
            "constexpr_blockwise_shift_scale": self.affine,
            "constexpr_lut_to_dense": self.palette,
            "constexpr_cast": self.cast,
            "constexpr_sparse_to_dense": self.sparse,
        }
        if operation.type not in readers:
            raise ArtifactError(f"weight {name} is defined by {operation.type}, which is no compressed constant")
        return readers[operation.type](operation)

    def affine(self, operation: Any) -> QTensor:
        codes, kind = self.input(operation, "data")
        return self.shift_scale(operation, codes, kind)

    def shift_scale(self, operation: Any, codes: Array, kind: str) -> Affine:
        scale, _ = self.input(operation, "scale")
        point = self.input(operation, "offset")[0] if "offset" in operation.inputs else None
        return Affine(codes, scale, point, DATA_TYPES[kind].bits, signed=not kind.startswith("U"))

    def palette(self, operation: Any) -> QTensor:
        codes, kind = self.input(operation, "indices")
        return Palette(codes, self.input(operation, "lut")[0][..., 0], DATA_TYPES[kind].bits)

    def cast(self, operation: Any) -> QTensor:
        return Cast(self.input(operation, "source_val")[0])

    def sparse(self, operation: Any) -> QTensor:
        source = self.defined.get(operation.inputs["nonzero_data"].arguments[0].name)
        if source is None:
            mask = self.mask(operation, "mask")
            values = self.input(operation, "nonzero_data")[0].astype(np.float16)
            return Sparse(mask, Cast(_spread(values, mask)))
        if source.type == "constexpr_lut_to_sparse":
            mask = self.mask(source, "indices_mask")
            codes, kind = self.input(source, "indices_nonzero_data")
            table = self.input(source, "lut")[0][..., 0]
            return Sparse(mask, Palette(_spread(codes, mask), table, DATA_TYPES[kind].bits))
        mask = self.mask(source, "data_mask")
        codes, kind = self.input(source, "nonzero_data")
        return Sparse(mask, self.shift_scale(source, _spread(codes, mask), kind))

    def mask(self, operation: Any, key: str) -> Array:
        return np.asarray(self.input(operation, key)[0] != 0)

    def input(self, operation: Any, key: str) -> tuple[Array, str]:
        return self.value(operation.inputs[key].arguments[0].value)


def _spread(kept: Array, mask: Array) -> Array:
    dense = np.zeros(mask.shape, kept.dtype)
    dense[mask] = kept
    return dense


def operations(model: Any) -> Iterator[Any]:
    """Every operation of a model, nested ones included, in order."""
    for function in model.mlProgram.functions.values():
        for block in function.block_specializations.values():
            yield from _inside(block)


def _inside(block: Any) -> Iterator[Any]:
    for operation in block.operations:
        yield operation
        for inner in operation.blocks:
            yield from _inside(inner)
