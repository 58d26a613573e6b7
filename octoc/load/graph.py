"""torch.export's program -> `Model`: parameters become `get_attr` nodes, what only tracing needs goes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from octoc.errors import ModelError
from octoc.model import InputSpec, Model, aten, evaluate

_WEIGHT_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)

# Operations that return their first argument as it is, in inference.
_IDENTITIES = {
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.contiguous.default,
    aten.dropout.default,
    aten.dropout_.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
}
_CHECKS = {
    "_assert_tensor_metadata.default",
    "_assert_scalar.default",
    "sym_constrain_range_for_size.default",
    "sym_constrain_range.default",
}


def from_program(program: ExportedProgram) -> Model:
    """The model of an exported program.

    Raises:
        ModelError: where the program changes its own state, takes something other than tensors, or its weights are NaN.
    """
    graph = fx.Graph()
    values: dict[Any, Any] = {}  # the program's nodes, and names of tensors, -> nodes of the new graph
    tensors: dict[str, Tensor] = {}
    inputs: list[InputSpec] = []
    subgraphs: dict[str, fx.GraphModule] = {}
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    canonical: dict[tuple[int, ...], str] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            if spec.kind in _WEIGHT_KINDS:
                name = _canonical(_tensor(program, str(spec.target)), str(spec.target), canonical, tensors)
                values[node] = graph.get_attr(name) if name not in values else values[name]
                values[name] = values[node]
            elif spec.kind == InputKind.USER_INPUT:
                values[node] = graph.placeholder(node.name)
                inputs.append(_input(node))
            else:
                raise ModelError(f"the network takes {node.name} of kind {spec.kind.name}, which no format holds")
        elif node.op == "get_attr":
            module = getattr(program.graph_module, str(node.target))
            if isinstance(module, fx.GraphModule):
                subgraphs[str(node.target)] = module
            else:
                tensors[str(node.target)] = module.detach().contiguous()
            values[node] = graph.get_attr(str(node.target))
        elif node.op == "call_function":
            if node.target in _IDENTITIES or _is_whole_slice(node):
                values[node] = values[node.args[0]]
            elif getattr(node.target, "__name__", "") not in _CHECKS:
                values[node] = graph.node_copy(node, lambda n: values[n])
                kwargs = {
                    k: v for k, v in values[node].kwargs.items() if k not in ("memory_format", "layout", "pin_memory")
                }
                values[node].kwargs = kwargs
        elif node.op == "output":
            outputs = _outputs(program, node)
            graph.output(tuple(values[n] for n in outputs))
    for node in graph.nodes:
        node.meta = {k: v for k, v in node.meta.items() if k == "nn_module_stack"}
    takes = {spec.name for spec in inputs}
    ends = [*(node for node in program.graph.nodes if node.name in takes), *outputs]
    dynamic = bool(inputs) and all(_free_batch(node) for node in ends)
    model = Model(graph, tensors, tuple(inputs), tuple(n.name for n in outputs), dynamic, subgraphs)
    _drop_dead(graph)
    parameters = {str(s.target) for s in specs.values() if s.kind == InputKind.PARAMETER}
    _check_finite(tensors, parameters)
    return _fold_constants(model)


def _is_whole_slice(node: fx.Node) -> bool:
    """`x[:]`, which tracing leaves behind wherever a later size is sliced."""
    return node.target is aten.slice.Tensor and node.args[2:4] == (0, 2**63 - 1) and len(node.args) == 4


def _tensor(program: ExportedProgram, target: str) -> Tensor:
    found: Tensor = program.state_dict[target] if target in program.state_dict else program.constants[target]
    return found


def _canonical(tensor: Tensor, name: str, canonical: dict[tuple[int, ...], str], tensors: dict[str, Tensor]) -> str:
    """The first name of a tensor's storage, so that shared weights stay one weight."""
    key = (tensor.data_ptr(), *tensor.shape, *tensor.stride(), hash(tensor.dtype))
    if tensor.numel() and key in canonical:
        return canonical[key]
    canonical[key] = name
    tensors[name] = tensor.detach().contiguous()
    return name


def _input(node: fx.Node) -> InputSpec:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        raise ModelError(f"input {node.name} is {type(value).__name__}, not a tensor")
    sizes = []
    for i, size in enumerate(value.shape):
        if isinstance(size, torch.SymInt):
            if i > 0:
                raise ModelError(
                    f"input {node.name}: size {i} is free; mobile formats keep all sizes but the first fixed"
                )
            size = 1
        sizes.append(int(size))
    return InputSpec(node.name, tuple(sizes), value.dtype)


def _free_batch(node: fx.Node) -> bool:
    shape = node.meta["val"].shape
    return len(shape) > 0 and isinstance(shape[0], torch.SymInt)


def _outputs(program: ExportedProgram, node: fx.Node) -> list[fx.Node]:
    result = []
    for spec, argument in zip(program.graph_signature.output_specs, node.args[0], strict=True):  # type: ignore[arg-type]
        if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION):
            raise ModelError(f"the network changes {spec.target} while it runs; export it without state")
        if spec.kind == OutputKind.USER_OUTPUT and isinstance(argument, fx.Node):
            result.append(argument)
    if not result:
        raise ModelError("the network returns no tensor")
    return result


def _drop_dead(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)


def _check_finite(tensors: dict[str, Tensor], parameters: set[str]) -> None:
    """A buffer may hold -inf, as attention masks do; a parameter may not."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        bad = int((~torch.isfinite(tensor) if name in parameters else torch.isnan(tensor)).sum())
        if bad:
            raise ModelError(f"weight {name}: {bad} of {tensor.numel()} values are NaN or infinite")


def _fold_constants(model: Model) -> Model:
    """Evaluates what depends on weights alone (`weight.t()`, weight norm) where nothing else uses the weight."""
    graph = model.graph
    constant: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            constant[node] = str(node.target) in model.tensors and len(node.users) == 1
        elif node.op == "call_function":
            sources = node.all_input_nodes
            constant[node] = bool(sources) and all(constant.get(source, False) for source in sources)
    chosen = [node for node, yes in constant.items() if yes]
    ends = [n for n in chosen if n.op == "call_function" and not all(constant.get(user, False) for user in n.users)]
    values: dict[fx.Node, Any] = {}
    evaluate(model, values, only=chosen, keep=True)
    tensors = dict(model.tensors)
    for node in ends:
        if isinstance(values[node], Tensor):
            name = _new_name(node.name, tensors)
            tensors[name] = values[node].contiguous()
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.get_attr(name))
    _drop_dead(graph)
    used = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    return replace(model, tensors={name: tensor for name, tensor in tensors.items() if name in used})


def _new_name(wanted: str, taken: dict[str, Tensor]) -> str:
    name = f"{wanted}_folded"
    while name in taken:
        name += "_"
    return name
