"""ONNX, opset 21, for onnxruntime.

1. `convert`: torch.onnx with its optimiser off (it drops `x + 1e-12` and turns integer weights back into floats), then
   the exact clean-up of `onnx_lowering.clean`.
2. `write`: each float initializer that `small.qtensors` names becomes codes and the nodes that decode them.
   Operations whose inputs come from DequantizeLinear run in integers: onnxruntime joins the pattern at load.
3. `read_codes`: the facts that ONNX has no place for stand in the file's metadata under "octoc".
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto, numpy_helper
from torch import fx
from torch.export import ExportedProgram

from octoc.compressed import Compressed
from octoc.errors import ArtifactError, HostError, ModelError, first_line
from octoc.export.onnx_lowering.activations import to_unsigned
from octoc.export.onnx_lowering.clean import OPSET, clean
from octoc.export.onnx_lowering.prepare import prepare
from octoc.export.onnx_lowering.weights import Stored, decode, encode
from octoc.model import Layer, Model
from octoc.qtensor import Affine, QTensor, Scheme

FILE = "model.onnx"

# (opset, IR version) of files without and with 2-bit integers.
_USUAL = (OPSET, 10)
_WITH_INT2 = (25, 13)

# Protobuf's limit; beyond it weights would have to leave the file.
_LARGEST_FILE = 2**31 - 1


@dataclass(frozen=True)
class Base:
    """A converted graph without its weights.

    Args:
        proto: the graph; initializers that `weights` names are empty.
        weights: names of the model's tensors that the graph reads.
    """

    proto: onnx.ModelProto
    weights: frozenset[str]


def accepts(scheme: Scheme, layer: Layer, integer: bool) -> str | None:
    """Why ONNX cannot hold the weight so, or None."""
    if scheme.kind in ("palette", "codebook"):
        return "ONNX holds no look-up tables"
    if scheme.sparse:
        return "zeros save no bytes in ONNX"
    if integer and layer.kind not in ("conv", "depthwise", "linear", "matmul"):
        return f"onnxruntime runs no {layer.kind} in integers"
    if integer and (scheme.kind != "affine" or scheme.bits not in (4, 8) or scheme.granularity == "group"):
        return "an integer operation takes weights of 4 or 8 bits with one scale per channel or tensor"
    if scheme.kind != "cast" and scheme.bits not in (2, 4, 8):
        return f"ONNX has no {scheme.bits}-bit integers"
    if scheme.bits == 2 and len(layer.shape) == 2 and layer.shape[layer.axis] % 4:
        return f"onnxruntime 1.32 computes 2-bit products of {layer.shape[layer.axis]} outputs wrong: no multiple of 4"
    return scheme.unfit(layer.shape, layer.axis)


def convert(model: Model) -> Base:
    """Converts a graph.

    Raises:
        ModelError: an operation has no ONNX form; the message names it.
    """
    model = prepare(model)
    _check_ranges(model)
    program = _export(model)
    names = _names(model, program.graph)
    with _quiet():
        try:
            converted = torch.onnx.export(
                program,
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=OPSET,
                input_names=[spec.name for spec in model.inputs],
                output_names=list(model.outputs),
            )
        except Exception as error:
            raise ModelError(f"ONNX: {_reason(error)}") from error
    assert converted is not None

    def origin(node: Any) -> str:
        traced = node.meta.get("node")
        if traced is None:  # a local function's node, which has lost everything but its result's name
            return names.get(str(node.outputs[0].name), "")
        sources = [source.name for source in traced.meta.get("from_node", ())]
        return names.get(sources[0] if sources else traced.name, str(traced.name))

    weights = frozenset(converted.model.graph.initializers) & model.tensors.keys()
    proto = clean(converted.model, weights, origin)
    to_unsigned(proto.graph)
    proto.producer_name, proto.producer_version, proto.graph.name = "octoc", "", "octoc"
    for value in (*proto.graph.input, *proto.graph.output):
        _name_batch(value, model.dynamic_batch)
    for tensor in proto.graph.initializer:
        if tensor.name in weights:
            tensor.ClearField("raw_data")
    return Base(proto, weights & {tensor.name for tensor in proto.graph.initializer})


def _check_ranges(model: Model) -> None:
    """QuantizeLinear saturates at the type's limits; a narrower range would need a clip that breaks integer fusion."""
    for node in model.graph.nodes:
        if node.op == "call_function" and "quantized_decomposed.quantize_per" in str(node.target):
            low, high, dtype = node.args[-3:]
            limits = torch.iinfo(dtype)
            if (low, high) != (limits.min, limits.max):
                raise ModelError(
                    f"operation {node.name} quantizes to {low}..{high}; ONNX quantizes {dtype} to "
                    f"{limits.min}..{limits.max} only"
                )


def _export(model: Model) -> ExportedProgram:
    batch = {0: torch.export.Dim("batch")} if model.dynamic_batch else None
    examples = model.examples(2)  # torch specialises sizes 0 and 1
    try:
        with _quiet():
            return torch.export.export(model.as_module(), examples, dynamic_shapes=tuple(batch for _ in examples))
    except Exception as error:
        raise ModelError(f"ONNX: torch.export cannot trace the graph: {_reason(error)}") from error


def _names(model: Model, traced: fx.Graph) -> dict[str, str]:
    """Names of the traced graph's operations -> the model's, where both call an operation equally often."""

    def calls(graph: fx.Graph) -> dict[Any, list[str]]:
        found: dict[Any, list[str]] = {}
        for node in graph.nodes:
            if node.op == "call_function":
                found.setdefault(node.target, []).append(node.name)
        return found

    ours, theirs = calls(model.graph), calls(traced)
    names: dict[str, str] = {}
    for target, found in theirs.items():
        wanted = ours.get(target, [])
        names.update(zip(found, wanted if len(wanted) == len(found) else found, strict=True))
    return names


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx warns of what it does itself, and logs that torchvision is not installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _name_batch(value: onnx.ValueInfoProto, free: bool) -> None:
    sizes = value.type.tensor_type.shape.dim
    if free and len(sizes) and not sizes[0].HasField("dim_value") and "*" not in sizes[0].dim_param:
        sizes[0].dim_param = "batch"


def write(base: Base, small: Compressed, path: Path) -> None:
    """Writes the file; see the package's contract.

    Raises:
        ArtifactError: a compressed tensor has no place in the graph or no representation.
        HostError: the file cannot be written.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(base.proto)
    unknown = sorted(small.qtensors.keys() - base.weights)
    if unknown:
        raise ArtifactError(f"compressed tensors {', '.join(unknown)} are not in the converted graph")
    facts = {}
    decoders: list[onnx.NodeProto] = []
    initializers = [tensor for tensor in proto.graph.initializer if tensor.name not in base.weights]
    for name in sorted(base.weights):
        tensor = small.qtensors.get(name)
        if tensor is None:
            values = small.model.tensors[name].detach().cpu().contiguous().numpy()
            initializers.append(numpy_helper.from_array(values, name))
            continue
        stored = _encode(proto.graph, name, tensor)
        initializers += stored.initializers
        decoders += stored.nodes
        facts[name] = stored.facts
    nodes = [*decoders, *proto.graph.node]
    del proto.graph.node[:], proto.graph.initializer[:]
    proto.graph.node.extend(nodes)
    proto.graph.initializer.extend(initializers)
    _finish(proto, facts)
    _save(proto, path)


def _uses(graph: onnx.GraphProto, name: str) -> list[tuple[onnx.NodeProto, int]]:
    return [(node, i) for node in graph.node for i, used in enumerate(node.input) if used == name]


def _encode(graph: onnx.GraphProto, name: str, tensor: QTensor) -> Stored:
    """Chooses the form by what reads the tensor; `_turn` may edit the graph."""
    if not isinstance(tensor, Affine) or tensor.bits > 8:
        return encode(name, tensor)
    transposed = _turn(graph, name)
    readers = [node for node, _ in _uses(graph, name)]
    integer = all(_takes_integers(graph, node) for node in readers)
    widened = integer and tensor.bits == 4 and tensor.signed and tensor.zero_point is None
    # onnxruntime's QGemm wants a zero point, though ONNX lets it away.
    explicit_zero = any(node.op_type == "Gemm" for node in readers)
    at_load = not widened and all(
        node.op_type in ("Conv", "ConvTranspose") and not (tensor.bits == 8 and _takes_integers(graph, node))
        for node in readers
    )
    return encode(name, tensor, transposed, explicit_zero, at_load, widened)


def _takes_integers(graph: onnx.GraphProto, node: onnx.NodeProto) -> bool:
    return any(maker.op_type == "DequantizeLinear" and node.input[0] in maker.output for maker in graph.node)


def _turn(graph: onnx.GraphProto, name: str) -> bool:
    """Edits the graph so that it reads a linear layer's matrix as [in, out], where all its readers can.

    onnxruntime joins DequantizeLinear and MatMul only where nothing stands between. A Gemm with integer inputs is left
    alone, because onnxruntime has an integer Gemm; any other Gemm becomes MatMul and Add.

    Returns:
        Whether the graph now reads the transposed matrix.
    """
    uses = _uses(graph, name)
    outputs = {value.name for value in graph.output}

    def turns(node: onnx.NodeProto, at: int) -> bool:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Transpose":
            return list(attributes["perm"]) == [1, 0] and node.output[0] not in outputs
        plain = node.op_type == "Gemm" and at == 1 and attributes == {"transB": 1}
        return plain and not _takes_integers(graph, node)

    if not uses or not all(turns(node, at) for node, at in uses):
        return False
    for node, _ in uses:
        if node.op_type == "Transpose":
            _bypass(graph, node, name)
        else:
            _split(graph, node)
    return True


def _bypass(graph: onnx.GraphProto, node: onnx.NodeProto, name: str) -> None:
    for user, i in _uses(graph, node.output[0]):
        user.input[i] = name
    graph.node.remove(node)


def _split(graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
    """Gemm(x, w, b) -> Add(MatMul(x, w), b), in place."""
    at = list(graph.node).index(node)
    product = onnx.helper.make_node("MatMul", list(node.input[:2]), [node.output[0]], name=node.name)
    made = [product]
    if len(node.input) > 2:
        product.output[0], product.name = f"{node.output[0]}:product", ""
        made.append(onnx.helper.make_node("Add", [product.output[0], node.input[2]], [node.output[0]], name=node.name))
    nodes = [*graph.node[:at], *made, *graph.node[at + 1 :]]
    del graph.node[:]
    graph.node.extend(nodes)


def _finish(proto: onnx.ModelProto, facts: dict[str, Any]) -> None:
    narrow = any(t.data_type in (TensorProto.INT2, TensorProto.UINT2) for t in proto.graph.initializer)
    opset, proto.ir_version = _WITH_INT2 if narrow else _USUAL
    for entry in proto.opset_import:
        if entry.domain == "":
            entry.version = opset
    text = json.dumps({"tensors": facts}, sort_keys=True, separators=(",", ":"))
    proto.metadata_props.add(key="octoc", value=text)


def _save(proto: onnx.ModelProto, path: Path) -> None:
    if proto.ByteSize() > _LARGEST_FILE:
        raise ArtifactError(f"{path.name} would have {proto.ByteSize()} bytes; an ONNX file holds at most 2 GiB")
    try:
        path.write_bytes(proto.SerializeToString(deterministic=True))
    except OSError as error:
        raise HostError(f"{path} cannot be written: {error.strerror}") from error


def read_codes(path: Path) -> dict[str, QTensor]:
    """The compressed tensors that a file of `write` holds, by name.

    Raises:
        ArtifactError: the file is damaged or octoc did not write it.
        HostError: the file cannot be opened.
    """
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
        (text,) = (entry.value for entry in proto.metadata_props if entry.key == "octoc")
        facts = json.loads(text)["tensors"]
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist") from error
    except OSError as error:
        raise HostError(f"{path} cannot be read: {error.strerror}") from error
    except (DecodeError, ValueError, KeyError) as error:
        raise ArtifactError(f"{path} is not an ONNX file that octoc wrote: {_reason(error)}") from error
    initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
    return {name: decode(name, entry, initializers) for name, entry in facts.items()}
