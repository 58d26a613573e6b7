"""torch.export's program -> `Model`.

1. Bring the program into canonical form (`canonical.py`).
2. Parameters, buffers and constants become `get_attr` nodes; shared ones stay one.
3. Inputs keep the names of the module's arguments; outputs take the keys of what it returns.
4. What depends on weights alone is computed once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.export.graph_signature import InputSpec as ProgramInput
from torch.utils import _pytree as pytree

from octoc.errors import ModelError
from octoc.load.canonical import Values, copy_calls, functional, single
from octoc.load.tensors import plain
from octoc.model import InputSpec, Model, evaluate

_WEIGHT_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


@dataclass
class _Draft:
    """What is known of the model while its graph is copied."""

    graph: fx.Graph = field(default_factory=fx.Graph)
    values: Values = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    subgraphs: dict[str, fx.GraphModule] = field(default_factory=dict)
    inputs: list[InputSpec] = field(default_factory=list)
    attributes: dict[str, fx.Node] = field(default_factory=dict)  # by the name of tensor or subgraph
    first: dict[tuple[Any, ...], str] = field(default_factory=dict)  # a tensor's place in memory -> its first name

    def weight(self, name: str, tensor: Tensor, kind: InputKind) -> fx.Node:
        """The node of a tensor; tensors that share their memory share the node of the first."""
        checked = plain(name, tensor, kind)
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        name = self.first.setdefault(key, name) if tensor.numel() else name
        if name not in self.attributes:
            self.tensors[name] = checked
            self.attributes[name] = self.graph.get_attr(name)
        return self.attributes[name]

    def attribute(self, name: str, held: Any) -> fx.Node:
        """The node of a tensor or graph module that a graph module owns."""
        if isinstance(held, Tensor):
            return self.weight(name, held, InputKind.CONSTANT_TENSOR)
        if not isinstance(held, fx.GraphModule):
            raise ModelError(f"the network holds {name} of type {type(held).__name__}, which no format holds")
        if name not in self.attributes:
            self.subgraphs[name] = held
            self.attributes[name] = self.graph.get_attr(name)
        return self.attributes[name]


def from_program(program: ExportedProgram) -> Model:
    """The model of an exported program.

    Raises:
        ModelError: the program changes its own state, takes or returns something other than tensors, or its weights
            are NaN or infinite.
    """
    program = functional(program)
    draft = _Draft()
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    for node in placeholders:
        _add_placeholder(draft, program, node, specs[node.name])
    copy_calls(program.graph_module, draft.graph, draft.values, draft.attribute)
    outputs, names = _outputs(program, [spec.name for spec in draft.inputs])
    draft.graph.output(tuple(draft.values[node] for node in outputs))
    taken = {spec.name for spec in draft.inputs}
    ends = [*(node for node in placeholders if node.name in taken), *outputs]
    model = Model(draft.graph, draft.tensors, tuple(draft.inputs), names, _batch_is_free(ends), draft.subgraphs)
    _drop_dead(model.graph)
    return _fold_constants(model)


def _add_placeholder(draft: _Draft, program: ExportedProgram, node: fx.Node, spec: ProgramInput) -> None:
    if spec.kind in _WEIGHT_KINDS:
        target = str(spec.target)
        tensor = program.state_dict[target] if target in program.state_dict else program.constants[target]
        draft.values[node] = draft.weight(target, tensor, spec.kind)
    elif isinstance(spec.arg, ConstantArgument) and not node.users:
        return  # None or a number that tracing has burnt in
    elif spec.kind == InputKind.USER_INPUT:
        draft.inputs.append(_input(node))
        draft.values[node] = draft.graph.placeholder(node.name)
    else:
        raise ModelError(f"the network takes {node.name} of kind {spec.kind.name}, which no format holds")


def _input(node: fx.Node) -> InputSpec:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        raise ModelError(f"input {node.name} is {type(value).__name__}, not a tensor")
    for i, size in enumerate(value.shape[1:], 1):
        if isinstance(size, torch.SymInt):
            raise ModelError(f"input {node.name}: size {i} is free; mobile formats keep all sizes but the first fixed")
    sizes = tuple(1 if isinstance(size, torch.SymInt) else int(size) for size in value.shape)
    return InputSpec(node.name, sizes, single(value.dtype))


def _batch_is_free(ends: Iterable[fx.Node]) -> bool:
    """Whether the first size of every input and output is one and the same free size."""
    sizes = [node.meta["val"].shape[:1] for node in ends]
    return all(size and isinstance(size[0], torch.SymInt) for size in sizes) and len({str(s[0]) for s in sizes}) == 1


def _outputs(program: ExportedProgram, inputs: list[str]) -> tuple[list[fx.Node], tuple[str, ...]]:
    """The nodes that the network returns, and their names; None is left out."""
    output = next(node for node in program.graph.nodes if node.op == "output")
    found: list[Any] = []
    for spec, argument in zip(program.graph_signature.output_specs, output.args[0], strict=True):
        if spec.kind == OutputKind.BUFFER_MUTATION:
            raise ModelError(
                f"the network changes its buffer {spec.target} while it runs; export it after model.eval()"
            )
        if spec.kind == OutputKind.USER_OUTPUT:
            found.append(argument)
    keys = _keys(program.call_spec.out_spec, len(found))
    nodes: list[fx.Node] = []
    names: list[str] = []
    for key, argument in zip(keys, found, strict=True):
        if argument is None:
            continue
        if not isinstance(argument, fx.Node) or not isinstance(argument.meta.get("val"), Tensor):
            raise ModelError(f"the network returns {key}, which is a number and not a tensor")
        nodes.append(argument)
        names.append(_free_name(key, {*inputs, *names}))
    if not nodes:
        raise ModelError("the network returns no tensor")
    return nodes, tuple(names)


def _keys(spec: pytree.TreeSpec | None, count: int) -> list[str]:
    """One name for each leaf of what the network returns: `output`, `output_1` in a tuple, else the keys."""
    fallback = ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
    if spec is None or spec.num_leaves != count:
        return fallback
    try:
        tree = pytree.tree_unflatten(range(count), spec)
        paths = [path for path, _ in pytree.tree_flatten_with_path(tree)[0]]
    except Exception:  # noqa: BLE001 - a class of the user's may check its fields, which are numbers here
        return fallback
    return [_key(path) if len(path) else "output" for path in paths] if len(paths) == count else fallback


def _key(path: Iterable[Any]) -> str:
    parts = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", "")))) for k in path]
    text = re.sub(r"\W", "_", "_".join(parts), flags=re.ASCII)
    return f"output_{text}" if not text or text[0].isdigit() else text


def _free_name(wanted: str, taken: set[str]) -> str:
    name = wanted
    while name in taken:
        name += "_output" if name == wanted else "_"
    return name


def _drop_dead(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)


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
            name = _free_name(f"{node.name}_folded", set(tensors))
            tensors[name] = values[node].contiguous()
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.get_attr(name))
    _drop_dead(graph)
    used = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    return replace(model, tensors={name: tensor for name, tensor in tensors.items() if name in used})
