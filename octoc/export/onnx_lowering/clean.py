"""Shrinks the graph that `torch.onnx.export(optimize=False)` emits, without changing one result.

torch's own optimiser drops `x + 1e-12` and folds integer weights back to floats, so this one may do only what is exact:

1. local functions are inlined;
2. a node whose inputs are all known becomes a constant where it only moves data or computes on integers (a `Shape` of
   fixed sizes, the arithmetic on it); weights never count as known, because their codes are not floats;
3. nodes that return their input are bypassed, a bias of zeros goes;
4. the one free size of a `Reshape` becomes -1;
5. what is left unused goes, equal constants become one initializer, values get short names, and operations keep the
   name of the ATen operation that they compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnxscript import ir
from onnxscript.ir.passes import common

Array = NDArray[Any]
Known = dict[ir.Value, Array]

# The first with 4-bit integers and one scale per block.
OPSET = 21

# Folding a larger constant would cost more bytes than the nodes that make it.
LARGEST_CONSTANT = 256

_MOVES = {"Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
_ON_INTEGERS = {"Abs", "Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min"}
_ON_INTEGERS |= {"Mod", "Mul", "Neg", "Not", "Or", "Range", "ReduceProd", "ReduceSum", "Sign", "Sub", "Where"}

# Position of a bias that may be left out.
_BIAS = {"Conv": 2, "ConvTranspose": 2, "Gemm": 2}


def clean(model: ir.Model, weights: frozenset[str], origin: Callable[[ir.Node], str]) -> onnx.ModelProto:
    """Applies the steps above in place.

    Args:
        model: as the exporter made it.
        weights: initializers that stay initializers under their own names.
        origin: the name of the ATen operation that a node belongs to.

    Returns:
        The model without names of tracing, stack traces and types of inner values.
    """
    names = _operations(model, origin)
    common.InlinePass()(model)
    for node in _nodes(model):
        node.name = names.get(node.outputs[0].name, "")
    known = _fold(model, weights)
    _drop_zero_bias(model, known)
    _free_reshapes(model, known)
    _lift(model, known)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    common.RemoveUnusedOpsetsPass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    _rename(model, weights)
    return _to_proto(model)


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    """All nodes, those of subgraphs among them."""
    yield from ir.traversal.RecursiveGraphIterator(model.graph)


def _operations(model: ir.Model, origin: Callable[[ir.Node], str]) -> dict[str | None, str]:
    """ATen operations by the value that is their result: the last that one of their nodes makes."""
    named: dict[str, str | None] = {}
    for node in _nodes(model):
        named[origin(node)] = node.outputs[0].name
    return {value: name for name, value in named.items()}


def _fold(model: ir.Model, weights: frozenset[str]) -> Known:
    known: Known = {
        value: value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if name not in weights and value.const_value is not None and value.const_value.size <= LARGEST_CONSTANT
    }
    for node in _nodes(model):
        if node.domain:
            continue
        if len(node.outputs) == 1:
            result = _evaluate(node, known)
            if result is not None and result.size <= LARGEST_CONSTANT:
                known[node.outputs[0]] = result
                continue
        source = _bypassed(node, known)
        if source is not None:
            _replace(model, node.outputs[0], source)
    return known


def _evaluate(node: ir.Node, known: Known) -> Array | None:
    """The node's result where it is known exactly."""
    if node.op_type == "Constant":
        return _constant(node)
    if node.op_type == "Shape":
        return _fixed_sizes(node)
    if node.op_type == "CastLike" and node.inputs[0] in known and node.inputs[1] is not None:
        dtype = node.inputs[1].dtype
        return None if dtype is None else _cast(known[node.inputs[0]], dtype)
    if any(value is not None and value not in known for value in node.inputs):
        return None
    arrays = [known[value] for value in node.inputs if value is not None]
    if node.op_type == "Cast":
        return _cast(arrays[0], ir.DataType(node.attributes["to"].as_int()))
    whole = all(array.dtype.kind in "iub" for array in arrays)
    if not arrays or not (node.op_type in _MOVES or (whole and node.op_type in _ON_INTEGERS)):
        return None
    if node.op_type == "Expand" and int(np.prod(arrays[1])) > LARGEST_CONSTANT:
        # A bias of zeros of any length is one zero, which is all that dropping it needs.
        return np.zeros(1, arrays[0].dtype) if _only_bias(node.outputs[0]) and not arrays[0].any() else None
    return _reference(node, known)


def _constant(node: ir.Node) -> Array | None:
    (attribute,) = node.attributes.values()
    if attribute.type == ir.AttributeType.TENSOR:
        return np.asarray(attribute.as_tensor().numpy())
    dtypes = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}
    return np.array(attribute.value, dtypes[attribute.name]) if attribute.name in dtypes else None


def _fixed_sizes(node: ir.Node) -> Array | None:
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if shape is None:
        return None
    start, end = (node.attributes[key].as_int() if key in node.attributes else None for key in ("start", "end"))
    sizes = list(shape)[start:end]
    return np.array(sizes, np.int64) if all(isinstance(size, int) for size in sizes) else None


def _cast(array: Array, to: ir.DataType) -> Array | None:
    """Casts that every runtime rounds alike."""
    if to.numpy().kind in "fiub" and (array.dtype.kind != "f" or to.numpy().kind == "f"):
        return array.astype(to.numpy())
    return None


def _only_bias(value: ir.Value) -> bool:
    return all(use.idx == _BIAS.get(use.node.op_type) for use in value.uses())


def _reference(node: ir.Node, known: Known) -> Array | None:
    names = ["" if value is None else f"x{i}" for i, value in enumerate(node.inputs)]
    feeds = {name: known[value] for name, value in zip(names, node.inputs, strict=True) if value is not None}
    inputs = [onnx.helper.make_tensor_value_info(name, _element(array), None) for name, array in feeds.items()]
    attributes = [ir.serde.serialize_attribute(attribute) for attribute in node.attributes.values()]
    single = onnx.helper.make_node(node.op_type, names, ["y"])
    single.attribute.extend(attributes)
    graph = onnx.helper.make_graph([single], "one", inputs, [onnx.helper.make_empty_tensor_value_info("y")])
    one = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)])
    (result,) = ReferenceEvaluator(one).run(None, cast(dict[str, Any], feeds))
    return np.asarray(result)


def _element(array: Array) -> int:
    return int(onnx.helper.np_dtype_to_tensor_dtype(array.dtype))


def _bypassed(node: ir.Node, known: Known) -> ir.Value | None:
    """The input that the node returns unchanged."""
    source, output = (node.inputs[0] if node.inputs else None), node.outputs[0]
    if source is None or len(node.outputs) > 1:
        return None
    if node.op_type == "Identity":
        return source
    if node.op_type in ("Cast", "CastLike") and source.dtype is not None and source.dtype == output.dtype:
        return source
    if node.op_type in ("Reshape", "Expand") and source.shape is not None and source.shape.is_static():
        target = known.get(node.inputs[1]) if node.inputs[1] is not None else None
        if target is not None and tuple(target) == tuple(source.shape):
            return source
    return None


def _replace(model: ir.Model, old: ir.Value, new: ir.Value) -> None:
    """Readers of `old` read `new`; an output of the network keeps its own name, so its node stays."""
    if not old.is_graph_output():
        ir.convenience.replace_all_uses_with(old, new)


def _drop_zero_bias(model: ir.Model, known: Known) -> None:
    for node in _nodes(model):
        at = None if node.domain else _BIAS.get(node.op_type)
        if at is not None and len(node.inputs) > at:
            bias = node.inputs[at]
            if bias in known and not known[bias].any():
                node.resize_inputs(at)


def _free_reshapes(model: ir.Model, known: Known) -> None:
    """A `Reshape` to sizes of which one is free: `Reshape(x, Concat(batch, 64))` -> `Reshape(x, (-1, 64))`."""
    for node in _nodes(model):
        shape = node.outputs[0].shape if node.op_type == "Reshape" and not node.domain else None
        if shape is None or node.inputs[1] in known:
            continue
        sizes = [size if isinstance(size, int) else -1 for size in shape]
        if sizes.count(-1) == 1 and 0 not in sizes:
            target = ir.Value(name=f"{node.outputs[0].name}_sizes")
            known[target] = np.array(sizes, np.int64)
            node.replace_input_with(1, target)


def _lift(model: ir.Model, known: Known) -> None:
    """Known values that an operation still reads become initializers, equal ones the same one."""
    made: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
    for node in list(_nodes(model)):
        for i, value in enumerate(node.inputs):
            if value is None or value not in known or value.is_graph_output():
                continue
            array = np.ascontiguousarray(known[value]).reshape(known[value].shape)
            key = (array.dtype.str, array.shape, array.tobytes())
            if key not in made:
                made[key] = ir.Value(name=f"c{len(made)}", const_value=ir.Tensor(array, name=f"c{len(made)}"))
                model.graph.initializers.add(made[key])
            node.replace_input_with(i, made[key])


def _rename(model: ir.Model, weights: frozenset[str]) -> None:
    """Short names for inner values; torch's are as long as its operations' names."""
    keep = {value.name for value in (*model.graph.inputs, *model.graph.outputs)} | weights
    constants = [model.graph.initializers.pop(name) for name in list(model.graph.initializers) if name not in weights]
    count = 0
    for value in constants:
        value.name, count = _short("c", count, keep)
        model.graph.initializers.add(value)
    count = 0
    for node in _nodes(model):
        for value in node.outputs:
            if value.name not in keep:
                value.name, count = _short("n", count, keep)


def _short(prefix: str, count: int, taken: set[str | None] | frozenset[str]) -> tuple[str, int]:
    count += 1
    while f"{prefix}{count}" in taken:
        count += 1
    return f"{prefix}{count}", count


def _to_proto(model: ir.Model) -> onnx.ModelProto:
    proto: onnx.ModelProto = ir.to_proto(model)
    _strip(proto.graph)
    for value in (*proto.graph.input, *proto.graph.output):
        value.ClearField("metadata_props")
    initializers = sorted(proto.graph.initializer, key=lambda tensor: tensor.name)
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(initializers)
    return proto


def _strip(graph: onnx.GraphProto) -> None:
    """Drops types of inner values, and attributes that hold their default."""
    del graph.value_info[:]
    for node in graph.node:
        kept = [attribute for attribute in node.attribute if not _default(node, attribute)]
        del node.attribute[:]
        node.attribute.extend(kept)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _strip(attribute.g)


def _default(node: onnx.NodeProto, attribute: onnx.AttributeProto) -> bool:
    known = _defaults(node.domain, node.op_type).get(attribute.name)
    return known is not None and onnx.helper.get_attribute_value(known) == onnx.helper.get_attribute_value(attribute)


def _defaults(domain: str, op_type: str) -> Mapping[str, onnx.AttributeProto]:
    if domain or not onnx.defs.has(op_type):
        return {}
    schema = onnx.defs.get_schema(op_type, max_inclusive_version=OPSET)
    return {name: a.default_value for name, a in schema.attributes.items() if a.default_value.name}
