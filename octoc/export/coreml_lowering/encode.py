"""Compressed weights as MIL operations.

Affine becomes `constexpr_blockwise_shift_scale`, Palette `constexpr_lut_to_dense`, Cast a constant, and Sparse a mask
with the stored codes only. Each operation takes the name of the constant that it replaces, so that its users do not
change. Source: coremltools 9, ops/defs/iOS18/compression.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from octoc.errors import ModelError
from octoc.export.coreml_lowering.fingerprint import Place
from octoc.export.coreml_lowering.storage import WeightWriter, to_bytes
from octoc.qtensor import Affine, Array, Cast, Codebook, Palette, QTensor, Sparse
from octoc.runtime.mil.schema import data_type_names, model_class

_FLOATS = {"float16": "FLOAT16", "float32": "FLOAT32"}
_PLAIN = {
    "float16": "FLOAT16",
    "float32": "FLOAT32",
    "int8": "INT8",
    "uint8": "UINT8",
    "int16": "INT16",
    "uint16": "UINT16",
    "int32": "INT32",
    "uint32": "UINT32",
}
_IN_FILE = 10  # coremltools keeps arrays of fewer elements in the program itself
_WEIGHTS = "@model_path/weights/weight.bin"


class Encoder:
    """Writes values and operations of one program.

    Args:
        compute: dtype that the program computes in.
        weights: the weight file that values go to.
    """

    def __init__(self, compute: str, weights: WeightWriter) -> None:
        self.compute = compute
        self.weights = weights
        self.numbers = {name: number for number, name in data_type_names().items()}

    def fill(self, value: Any, array: Array, kind: str | None = None) -> None:
        """Writes a constant into a protobuf `Value`.

        Args:
            value: filled in place.
            array: its elements; codes narrower than a byte are unpacked.
            kind: MIL data type; the array's own where None.
        """
        kind = kind or _PLAIN[array.dtype.name]
        value.Clear()
        self._type(value.type, kind, array.shape)
        if array.size >= _IN_FILE:
            value.blobFileValue.fileName = _WEIGHTS
            value.blobFileValue.offset = self.weights.add(array, kind)
        elif kind == "FLOAT32":
            value.immediateValue.tensor.floats.values.extend(array.reshape(-1).tolist())
        elif kind in ("INT32", "UINT32", "INT16", "UINT16"):
            value.immediateValue.tensor.ints.values.extend(array.reshape(-1).tolist())
        else:
            value.immediateValue.tensor.bytes.values = to_bytes(array, kind)

    def operations(self, name: str, tensor: QTensor, place: Place) -> list[Any]:
        """Operations that define the constant `name` as a compressed weight.

        Args:
            name: of the constant, and of the last operation.
            tensor: the compressed weight.
            place: its layout in the program.
        """
        if isinstance(tensor, Sparse):
            return self._sparse(name, tensor, place)
        shape = place.store(np.broadcast_to(np.int8(0), tensor.shape)).shape
        if isinstance(tensor, Affine):
            codes = {"data": (place.store(tensor.codes), _code_type(tensor))}
            inputs = codes | self._shift_scale(tensor, place)
            return [self._operation("constexpr_blockwise_shift_scale", name, inputs, [(name, self.compute, shape)])]
        if isinstance(tensor, Palette):
            lut = place.store(tensor.table)[..., None]
            inputs = {"indices": (place.store(tensor.codes), f"UINT{tensor.bits}"), "lut": (lut, None)}
            return [self._operation("constexpr_lut_to_dense", name, inputs, [(name, self.compute, shape)])]
        if isinstance(tensor, Codebook):
            raise ModelError(f"weight {name}: Core ML takes no table with scales beside it from octoc")
        return [self._cast(name, place.store(tensor.values))]

    def _cast(self, name: str, values: Array) -> Any:
        if self.compute == "float16":
            operation = self._operation("const", name, {}, [(name, "float16", values.shape)])
            self.fill(operation.attributes["val"], values)
            return operation
        inputs = {"source_val": (values, None), "output_dtype": "fp32"}
        return self._operation("constexpr_cast", name, inputs, [(name, "float32", values.shape)])

    def _sparse(self, name: str, tensor: Sparse, place: Place) -> list[Any]:
        mask = place.store(tensor.mask).astype(np.uint8)
        count = int(np.count_nonzero(mask))
        if not count:
            raise ModelError("a sparse weight of zeros only has nothing to store; store it densely")
        kept = mask != 0
        masked = (mask, "UINT1")
        dense = tensor.dense
        last: dict[str, Any]
        if isinstance(dense, Cast):
            # A float32 program has no sparse cast: the same values are stored in float32.
            values = place.store(dense.values)[kept].astype(self.compute)
            last = {"nonzero_data": (values, None), "mask": masked}
            return [self._operation("constexpr_sparse_to_dense", name, last, [(name, self.compute, mask.shape)])]
        codes = place.store(dense.codes)[kept]
        kind, inputs = self._sparse_inputs(dense, codes, masked, place)
        outputs = [(f"{name}_mask", "UINT1", mask.shape), (f"{name}_nonzero", self.compute, (count,))]
        first = self._operation(kind, f"{name}_nonzero", inputs, outputs)
        last = {"nonzero_data": Reference(f"{name}_nonzero"), "mask": Reference(f"{name}_mask")}
        return [first, self._operation("constexpr_sparse_to_dense", name, last, [(name, self.compute, mask.shape)])]

    def _sparse_inputs(
        self, dense: Affine | Palette, codes: Array, mask: tuple[Array, str], place: Place
    ) -> tuple[str, dict[str, Any]]:
        if isinstance(dense, Affine):
            inputs = {"data_mask": mask, "nonzero_data": (codes, _code_type(dense))}
            return "constexpr_sparse_blockwise_shift_scale", inputs | self._shift_scale(dense, place)
        lut = (place.store(dense.table)[..., None], None)
        kind = f"UINT{dense.bits}"
        return "constexpr_lut_to_sparse", {"indices_mask": mask, "indices_nonzero_data": (codes, kind), "lut": lut}

    def _shift_scale(self, tensor: Affine, place: Place) -> dict[str, Any]:
        inputs: dict[str, Any] = {"scale": (place.store(tensor.scale), None)}
        if tensor.zero_point is not None:
            inputs["offset"] = (place.store(tensor.zero_point), _code_type(tensor))
        return inputs

    def _operation(
        self, kind: str, name: str, inputs: Mapping[str, Any], outputs: list[tuple[str, str, tuple[int, ...]]]
    ) -> Any:
        operation = _message()
        operation.type = kind
        self._text(operation.attributes["name"], name)
        for key, given in inputs.items():
            binding = operation.inputs[key].arguments.add()
            if isinstance(given, Reference):
                binding.name = given
            elif isinstance(given, str):
                self._text(binding.value, given)
            else:
                self.fill(binding.value, *given)
        for output, dtype, shape in outputs:
            declared = operation.outputs.add()
            declared.name = output
            self._type(declared.type, _FLOATS.get(dtype, dtype), shape)
        return operation

    def _text(self, value: Any, text: str) -> None:
        self._type(value.type, "STRING", ())
        value.immediateValue.tensor.strings.values.append(text)

    def _type(self, declared: Any, kind: str, shape: tuple[int, ...]) -> None:
        declared.tensorType.dataType = self.numbers[kind]
        declared.tensorType.rank = len(shape)
        for size in shape:
            declared.tensorType.dimensions.add().constant.size = size


class Reference(str):
    """The name of a value, as against a text."""

    __slots__ = ()


def _code_type(tensor: Affine) -> str:
    return f"{'' if tensor.signed else 'U'}INT{tensor.bits}"


def _message() -> Any:
    """An empty MIL operation."""
    function = model_class()().mlProgram.functions["main"]
    return function.block_specializations["main"].operations.add()
