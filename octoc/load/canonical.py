"""One form for what torch.export writes in several, so that every later step meets fewer operations.

1. An operation that writes into its input is replaced by the one that returns a new tensor: directly where nothing
   else sees the input, else by torch's own functionalization of the whole program.
2. Blocks under `torch.no_grad()` or autocast are put in line.
3. Memory formats, devices and floating dtypes other than float32 leave the arguments; copies that only changed
   those leave the graph, and `view` becomes `reshape`, for a view may be valid in the traced memory format alone.
4. What only tracing needs (assertions) or what does nothing in inference (dropout) goes.
5. A pooling whose stride is left out gets its kernel as its stride, which is what torch takes it for.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram

from octoc.errors import ModelError
from octoc.load.tensors import FLOATS
from octoc.model import aten

# Operations that return their first argument as it is, in inference.
_IDENTITIES = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.dropout.default,
    aten.dropout_.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
}
# Operations that return their first argument as it is where its dtype is already the result's.
_CASTS = {
    aten.to.device,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.other,
    aten.type_as.default,
    aten._to_copy.default,
}
_RESHAPES = {aten.view.default, aten._unsafe_view.default}
_CHECKS = {
    "_assert_tensor_metadata.default",
    "_assert_scalar.default",
    "_assert_async.msg",
    "sym_constrain_range_for_size.default",
    "sym_constrain_range.default",
}
_BLOCKS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}  # position of the block; its operands follow
_LAYOUT_ARGUMENTS = {"memory_format", "layout", "pin_memory"}
_UNBATCHED_NORM = aten._native_batch_norm_legit_no_training.default
_CONVOLUTIONS = {3: aten.conv1d.default, 4: aten.conv2d.default, 5: aten.conv3d.default}
_TRANSPOSED = {3: aten.conv_transpose1d.default, 4: aten.conv_transpose2d.input, 5: aten.conv_transpose3d.input}
_POOLS = {
    *(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default),
    *(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default),
}
_PRODUCTS: dict[Any, int] = {aten.addmm.default: 2, aten.mm.default: 1}  # position of the second factor
_TURNS = {
    (aten.t.default, ()),
    (aten.numpy_T.default, ()),
    (aten.permute.default, ("[1, 0]",)),
    (aten.transpose.int, ("0", "1")),
    (aten.transpose.int, ("-1", "-2")),
    (aten.transpose.int, ("-2", "-1")),
}

Values = dict[Any, Any]  # the program's nodes -> nodes of the new graph, or tuples of them


def functional(program: ExportedProgram) -> ExportedProgram:
    """The program, functionalized by torch where step 1 cannot do it by replacing one operation."""
    if any(_writes(node) and _replacement(node) is None for node in _nodes(program.graph_module)):
        with warnings.catch_warnings():
            # raised by copyreg while torch copies its own tree specifications
            warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
            program = program.run_decompositions({})
    return program


def copy_calls(
    source: fx.GraphModule, graph: fx.Graph, values: Values, attribute: Callable[[str, Any], fx.Node]
) -> None:
    """Copies a graph's operations into a new graph in canonical form.

    Args:
        source: what to copy; its placeholders must be among `values`.
        graph: where to.
        values: filled with what each node became.
        attribute: makes a node for a tensor or graph module that the source owns under a name.

    Raises:
        ModelError: an operation is not ATen's.
    """
    for node in source.graph.nodes:
        if node.op == "get_attr":
            target = str(node.target)
            held = operator.attrgetter(target)(source)
            values[node] = held if _is_block(node) else attribute(target, held)
        elif node.op == "call_function" and node.users:
            _copy_call(node, graph, values, attribute)


def _copy_call(node: fx.Node, graph: fx.Graph, values: Values, attribute: Callable[[str, Any], fx.Node]) -> None:
    target = node.target
    name = getattr(target, "__name__", "")
    if name in _CHECKS:
        return
    if name in _BLOCKS and isinstance(target, HigherOrderOperator):
        values[node] = _inline(node, graph, values, attribute)
    elif target is operator.getitem and isinstance(values[node.args[0]], tuple):
        values[node] = values[node.args[0]][node.args[1]]
    elif target in _IDENTITIES or _is_whole_slice(node) or _changes_no_dtype(node):
        values[node] = values[node.args[0]]
    elif target is _UNBATCHED_NORM:
        x, weight, bias, mean, variance, momentum, eps = map_arguments(node.args, values)
        call = graph.call_function(
            aten.batch_norm.default, (x, weight, bias, mean, variance, False, momentum, eps, False)
        )
        values[node] = (_described(call, node),)
    elif target is aten.convolution.default:
        values[node] = _described(_convolution(node, graph, values), node)
    elif (weight := _transposed_weight(node)) is not None:
        bias, x = node.args[:2] if target is aten.addmm.default else (None, node.args[0])
        args = map_arguments((x, weight, bias), values)
        values[node] = _described(graph.call_function(aten.linear.default, args), node)
    else:
        _check_target(node)
        args, kwargs = map_arguments(node.args, values), map_arguments(node.kwargs, values)
        kwargs = {key: value for key, value in kwargs.items() if key not in _LAYOUT_ARGUMENTS}
        if target in _POOLS and not (args[2] if len(args) > 2 else kwargs.get("stride")):
            args = (*args[:2], args[1], *args[3:])
            kwargs.pop("stride", None)
        plain = aten.reshape.default if target in _RESHAPES else (_replacement(node) or target)
        values[node] = _described(graph.create_node("call_function", plain, args, kwargs, name=node.name), node)


def map_arguments(arguments: Any, values: Values) -> Any:
    """Arguments with new nodes, on the CPU, in float32 for every floating dtype."""

    def mapped(item: Any) -> Any:
        if isinstance(item, fx.Node):
            return values[item]
        if isinstance(item, torch.dtype):
            return torch.float32 if item in FLOATS else item
        return torch.device("cpu") if isinstance(item, torch.device) else item

    return fx.node.map_aggregate(arguments, mapped)


def single(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a tensor has in the model."""
    return torch.float32 if dtype in FLOATS else dtype


def _nodes(module: fx.GraphModule) -> list[fx.Node]:
    inner = [child for child in module.children() if isinstance(child, fx.GraphModule)]
    return [*module.graph.nodes, *(node for child in inner for node in _nodes(child))]


def _writes(node: fx.Node) -> bool:
    if node.target in _IDENTITIES or not isinstance(node.target, OpOverload):
        return False
    return node.target._schema.is_mutable


def _replacement(node: fx.Node) -> OpOverload | None:
    """The operation that returns what this one writes, where nothing else can see the written tensor."""
    if not _writes(node):
        return None
    target, source = node.target, node.args[0] if node.args else None
    assert isinstance(target, OpOverload)
    packet = getattr(aten, target._opname.removesuffix("_"), None)
    overload = getattr(packet, target._overloadname, None) if target._opname.endswith("_") else None
    if overload is None or not isinstance(source, fx.Node) or source.op != "call_function" or len(source.users) > 1:
        return None
    return overload if _is_fresh(source) else None


def _is_fresh(node: fx.Node) -> bool:
    """Whether an operation's result shares memory with no other value that is still used."""
    if node.target in _IDENTITIES or not isinstance(node.target, OpOverload):
        return False
    if _writes(node):
        return _replacement(node) is not None
    return all(result.alias_info is None for result in node.target._schema.returns)


def _is_block(node: fx.Node) -> bool:
    """Whether a graph module serves only blocks that are put in line."""
    return all(getattr(user.target, "__name__", "") in _BLOCKS for user in node.users)


def _inline(node: fx.Node, graph: fx.Graph, values: Values, attribute: Callable[[str, Any], fx.Node]) -> Any:
    position = _BLOCKS[getattr(node.target, "__name__", "")]
    block = values[node.args[position]]
    placeholders = [inner for inner in block.graph.nodes if inner.op == "placeholder"]
    inner: Values = {p: values[a] for p, a in zip(placeholders, node.args[position + 1 :], strict=True)}
    copy_calls(block, graph, inner, attribute)
    output = next(n for n in block.graph.nodes if n.op == "output")
    return map_arguments(output.args[0], inner)


def _is_whole_slice(node: fx.Node) -> bool:
    """`x[:]`, which tracing leaves behind wherever a later size is sliced."""
    return node.target is aten.slice.Tensor and node.args[2:4] == (0, 2**63 - 1) and len(node.args) == 4


def _changes_no_dtype(node: fx.Node) -> bool:
    if node.target not in _CASTS or not isinstance(node.args[0], fx.Node):
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    return single(before.dtype) == single(after.dtype)


def _convolution(node: fx.Node, graph: fx.Graph, values: Values) -> fx.Node:
    """`aten.convolution`, the decomposed form, as the convolution that it came from."""
    rank = node.args[1].meta["val"].dim()  # type: ignore[union-attr]
    x, weight, bias, stride, padding, dilation, transposed, extra, groups = map_arguments(node.args, values)
    if transposed:
        return graph.call_function(_TRANSPOSED[rank], (x, weight, bias, stride, padding, extra, groups, dilation))
    return graph.call_function(_CONVOLUTIONS[rank], (x, weight, bias, stride, padding, dilation, groups))


def _transposed_weight(node: fx.Node) -> fx.Node | None:
    """The weight of `x @ weight.t() (+ bias)`, the decomposed form of a linear layer."""
    position = _PRODUCTS.get(node.target)
    if position is None or node.kwargs:
        return None
    turned = node.args[position]
    if not isinstance(turned, fx.Node) or turned.op != "call_function":
        return None
    is_turn = (turned.target, tuple(map(str, turned.args[1:]))) in _TURNS
    weight = turned.args[0] if is_turn else None
    return weight if isinstance(weight, fx.Node) and weight.op == "placeholder" else None


def _described(call: fx.Node, origin: fx.Node) -> fx.Node:
    """Keeps where in the module the operation came from; shapes and traces belong to the program."""
    call.meta = {key: value for key, value in origin.meta.items() if key == "nn_module_stack"}
    return call


def _check_target(node: fx.Node) -> None:
    target = node.target
    if isinstance(target, HigherOrderOperator):
        return
    if isinstance(target, OpOverload):
        if target.namespace not in ("aten", "prims"):
            raise ModelError(f"operation {target} of the network is not ATen's, and no format holds it")
        return
    home = getattr(target, "__module__", "")
    name = getattr(target, "__name__", "")
    if home in (operator.__name__, "_operator", math.__name__) or (
        home.startswith("torch") and name.startswith("sym_")
    ):
        return
    raise ModelError(f"operation {name or target} of the network is not ATen's, and no format holds it")
