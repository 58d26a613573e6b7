"""TFLite: litert-torch converts the float graph, the lowering puts our codes and integer operations in its place.

1. `convert` runs litert-torch on the graph with fingerprints for weights, which shows where each weight went.
2. `write` sets every weight to its value, replaces operations between DEQUANTIZE and QUANTIZE by integer operations
   (`tflite_lowering.integers`), and each remaining coded weight by its codes behind DEQUANTIZE
   (`tflite_lowering.weights`).
3. `read_codes` takes the codes from the file's constants; the metadata entry "octoc" says only what a constant does not
   say of itself (the weight's shape and order of axes).

64-bit integer inputs and outputs become 32-bit ones, which is what mobile runtimes take.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from octoc.compressed import Compressed
from octoc.errors import ArtifactError, ModelError
from octoc.export.tflite_lowering import weights
from octoc.export.tflite_lowering.flat import Graph, Operation, Value, graph_bytes, read_graph
from octoc.export.tflite_lowering.integers import to_integers
from octoc.export.tflite_lowering.places import Place, Places, locate
from octoc.export.tflite_lowering.prepare import cropped, one_reader_each
from octoc.model import Layer, Model
from octoc.qtensor import QTensor, Scheme
from octoc.runtime.tflite import quiet, read_checked

FILE = "model.tflite"

# Kinds of layers with integer kernels, by the bits of a code.
_INTEGER_KINDS = {
    8: ("conv", "depthwise", "conv_transpose", "linear", "matmul"),
    4: ("conv", "depthwise", "linear"),
}


@dataclass(frozen=True)
class Base:
    """A converted graph, ready to take any codes.

    Args:
        graph: float operations, with QUANTIZE and DEQUANTIZE where the model has them.
        places: constants of `graph` by tensor name.
        model: what was converted.
    """

    graph: Graph
    places: Places
    model: Model

    @property
    def names(self) -> frozenset[str]:
        """Tensors that can be coded. The converter has transformed the others."""
        return frozenset(self.places)


def accepts(scheme: Scheme, layer: Layer, integer: bool) -> str | None:
    """Why the format cannot hold the weight so, or None.

    Args:
        scheme: the weight's encoding.
        layer: the weight.
        integer: the operation's activations are int8.
    """
    if scheme.sparse:
        return "zeros save no bytes in TFLite"
    if scheme.kind in ("palette", "codebook"):
        return "TFLite has no look-up tables for weights"
    if scheme.kind != "cast" and scheme.bits not in weights.CODE_TYPES:
        return f"TFLite stores codes of 2, 4 or 8 bits, not {scheme.bits}"
    if integer and (scheme.kind != "affine" or scheme.bits not in _INTEGER_KINDS):
        return f"TFLite's integer kernels take weights of 4 or 8 bits, not {scheme}"
    if integer and layer.kind not in _INTEGER_KINDS[scheme.bits]:
        return f"TFLite has no integer kernel for {scheme.bits}-bit weights of kind {layer.kind}"
    if integer and scheme.granularity == "group":
        return "TFLite's integer kernels take a scale per tensor or output channel"
    return scheme.unfit(layer.shape, layer.axis)


def convert(model: Model) -> Base:
    """Runs the converter; prints nothing.

    Raises:
        ModelError: the converter refuses the network, with the operation's name.
    """
    graph, places = locate(model, lambda tensors: _convert(model, tensors))
    return Base(graph, places, model)


def _convert(model: Model, tensors: Mapping[str, Tensor]) -> Graph:
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the converter's own, of torch and Python
        import litert_torch

        try:
            module = cropped(one_reader_each(model)).as_module(tensors)
            content = litert_torch.convert(module, model.examples(1)).model_content()
        except Exception as error:  # the converter raises whatever its passes raise
            raise ModelError(f"TFLite: the converter refuses the network: {_reason(error)}") from error
    graph, _ = read_graph(content)
    for names, values in ((_names(model.inputs), graph.inputs), (model.outputs, graph.outputs)):
        if len(names) != len(values):
            raise ModelError(f"TFLite: the converter made {len(values)} inputs or outputs of {len(names)}")
    inputs = dict(zip(_names(model.inputs), graph.inputs.values(), strict=True))
    outputs = dict(zip(model.outputs, graph.outputs.values(), strict=True))
    for value in (value for operation in graph.operations for value in (*operation.inputs, *operation.outputs)):
        if value is not None:
            value.name = ""  # the converter's names are module paths, longer than many constants
    for name, value in (inputs | outputs).items():
        value.name = name
    return Graph(graph.operations, inputs, outputs)


def _names(inputs: Any) -> tuple[str, ...]:
    return tuple(spec.name for spec in inputs)


def _reason(error: Exception) -> str:
    """The operation that is at fault, and the converter's words on one line."""
    text = " ".join(str(error).split())
    where = re.search(r'loc\("?(?:[^()"]*;"\()?"?([\w.]+)', text)
    what = re.search(r"failed to legalize operation '([^']+)'", text)
    if what:
        return f"no TFLite operation for {what[1]}" + (f" (from {where[1]})" if where else "")
    node = re.search(r"target=torch\.ops\.([\w.]+)", text)
    words = text.split(" While executing")[0][:300] or type(error).__name__
    return words if node is None or node[1] in words else f"{words} (in {node[1]})"


def write(base: Base, small: Compressed, path: Path) -> None:
    """Writes the file.

    Args:
        base: of the same graph.
        small: its codes, and its floats where there are none.
        path: of the new file.

    Raises:
        ModelError: a weight cannot be coded as asked.
    """
    missing = sorted(name for name in small.qtensors if name not in base.places)
    if missing:
        raise ModelError(f"TFLite: the converter transforms {', '.join(missing)}, so their codes have no place")
    _check_fixed(base, small.model)
    graph, twins = base.graph.copy()
    places = {
        name: tuple(Place(twins[place.value], place.axes) for place in found) for name, found in base.places.items()
    }
    for name, found in places.items():
        array = small.model.tensors[name].detach().numpy()
        found[0].value.name = name
        for place in found:
            place.value.data = np.frombuffer(array.transpose(place.axes).astype(np.float32).tobytes(), np.uint8)
    stored = to_integers(graph, places, small.qtensors)
    inserted: dict[Value, tuple[list[Operation], Value]] = {}
    for name, tensor in small.qtensors.items():
        for place in places[name]:
            operations, codes, result = weights.encode("" if name in stored else name, tensor, place.value, place.axes)
            inserted[place.value] = (operations, result)
            stored.setdefault(name, codes)
    _insert(graph, inserted)
    known = {name: weights.facts(tensor, places[name][0].axes) for name, tensor in small.qtensors.items()}
    Path(path).write_bytes(graph_bytes(graph, {"weights": known} if known else {}))


def _check_fixed(base: Base, model: Model) -> None:
    """What the converter has transformed cannot change afterwards."""
    for name, tensor in model.tensors.items():
        before = base.model.tensors.get(name)
        if name in base.places or tensor is before:
            continue
        if before is None or not torch.equal(before, tensor):
            raise ModelError(f"TFLite: {name} is not what it was when the network was converted")


def _insert(graph: Graph, inserted: Mapping[Value, tuple[list[Operation], Value]]) -> None:
    """Puts what computes a weight before its first reader."""
    done: set[Value] = set()
    operations: list[Operation] = []
    for operation in graph.operations:
        for i, value in enumerate(operation.inputs):
            if value is not None and value in inserted:
                before, result = inserted[value]
                operations += [] if value in done else before
                operation.inputs[i] = result
                done.add(value)
        operations.append(operation)
    graph.operations = operations


def read_codes(path: Path) -> dict[str, QTensor]:
    """The compressed weights that a file holds.

    Raises:
        ArtifactError: the file is damaged or was not written by `write`.
    """
    graph, facts = read_graph(read_checked(path))
    by_name = {value.name: value for value in graph.constants()}
    known = facts.get("weights", {})
    absent = sorted(known.keys() - by_name.keys())
    if absent:
        raise ArtifactError(f"{path} lacks the constants {', '.join(absent)}")
    return {name: weights.decode(by_name[name], about) for name, about in known.items()}
