"""What a device can hold and run of a network: weight encodings it likes, operations that fall back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

from torch import fx

from octoc.accelerator import Accelerator, Encoding
from octoc.device import Device
from octoc.export import Exporter
from octoc.model import KINDS, Layer, Model, argument, operation
from octoc.qtensor import Scheme
from octoc.report import Note

# Operations that multiply by weights: `model.KINDS` has no word for some, and for others not in every position.
_UNCODED = {"lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"}
_UNCODED |= {"mm", "matmul", "bmm", "addmm", "addbmm", "baddbmm", "einsum", "bilinear", "tensordot"}
_UNCODED |= {"conv1d", "conv2d", "conv3d", "linear", "cond", "while_loop", "scan", "map_impl"}


@dataclass(frozen=True)
class Offer:
    """One encoding that a device runs well, as a scheme."""

    scheme: Scheme
    only_for: tuple[str, ...]

    def suits(self, operations: Sequence[str]) -> bool:
        """Whether it is meant for all of these operation kinds."""
        return not self.only_for or all(name in self.only_for for name in operations)


def offers(device: Device, fmt: str) -> tuple[Offer, ...]:
    """Every dense weight encoding that some accelerator of the device runs in this format, without repeats."""
    return offers_of(device, device.runners(fmt))


def offers_of(device: Device, accelerators: Sequence[Accelerator]) -> tuple[Offer, ...]:
    """Every dense weight encoding that one of these accelerators of the device runs, without repeats."""
    found: dict[Scheme, Offer] = {}
    for accelerator in accelerators:
        for encoding in device.encodings(accelerator):
            for scheme in _schemes(encoding):
                known = found.get(scheme)
                # Of two accelerators that run it, one without a restriction lifts the other's.
                if known is None or (known.only_for and not encoding.only_for):
                    found[scheme] = Offer(scheme, encoding.only_for)
    return tuple(found.values())


def _schemes(encoding: Encoding) -> list[Scheme]:
    if encoding.kind == "float":
        return [Scheme("cast", 16)]
    if encoding.kind == "sparse":
        return []
    sizes = encoding.groups or (0,)
    return [Scheme(encoding.kind, encoding.bits, encoding.granularity, size) for size in sizes]


def sparse_offers(device: Device, fmt: str) -> tuple[Offer, ...]:
    """Encodings of pruned weights: zeros as a bit mask over what the device allows beneath it."""
    dense = offers(device, fmt)
    found: dict[Scheme, Offer] = {}
    for accelerator in device.runners(fmt):
        for encoding in device.encodings(accelerator):
            if encoding.kind != "sparse":
                continue
            for offer in dense:
                scheme = offer.scheme
                name = str(scheme) if scheme.kind == "affine" else f"palette-{scheme.bits}"
                if scheme.kind == "cast" or name in encoding.over:
                    thin = Scheme(scheme.kind, scheme.bits, scheme.granularity, scheme.group_size, True)
                    found[thin] = Offer(thin, offer.only_for)
    return tuple(found.values())


def runs_only_int8(device: Device, fmt: str) -> bool:
    """Whether no accelerator of the device runs float activations in a format."""
    dtypes = [name for accelerator in device.runners(fmt) for name in device.activations(accelerator)]
    return "int8" in dtypes and not any(name.startswith("float") for name in dtypes)


def choices(
    layer: Layer, operations: Sequence[str], offered: Sequence[Offer], writer: Exporter, integer: bool
) -> tuple[list[Scheme], dict[str, str]]:
    """Schemes that the device runs and the exporter accepts for a layer, and why the others are not among them."""
    good: list[Scheme] = []
    refused: dict[str, str] = {}
    for offer in offered:
        reason = offer.scheme.unfit(layer.shape, layer.axis)
        if reason is None and not offer.suits(operations):
            reason = f"the device runs it only for {', '.join(offer.only_for)}"
        if reason is None:
            reason = writer.accepts(offer.scheme, layer, integer)
        if reason is None:
            good.append(offer.scheme)
        else:
            refused[str(offer.scheme)] = reason
    return good, refused


def uncoded(model: Model) -> tuple[Note, ...]:
    """Weights that an operation multiplies by and that no layer covers, such as an LSTM's: they stay floats."""
    covered = {layer.name for layer in model.layers()}
    notes: dict[str, Note] = {}
    for node in model.graph.nodes:
        kind = operation(node, model.tensors) if node.op == "call_function" else ""
        for source in node.all_input_nodes if kind in _UNCODED else ():
            name = str(source.target)
            if source.op == "get_attr" and name in model.tensors and name not in covered:
                tensor = model.tensors[name]
                if tensor.is_floating_point() and tensor.dim() >= 2:
                    notes[name] = Note(name, f"left in floats: octoc codes no weights of {kind} in this place")
    return tuple(notes.values())


def slowdowns(
    model: Model, device: Device, fmt: str, chosen: Mapping[str, Scheme], integers: Set[str] = frozenset()
) -> tuple[Note, ...]:
    """Weights whose encoding saves bytes, but runs slower than floats on the accelerator that runs it.

    Between int8 values also those whose accelerator computes in floats only.

    Args:
        model: the network.
        device: the profile.
        fmt: of the artefact.
        chosen: the encoding of each weight by its name.
        integers: names of the weights whose operations stand between int8 values.
    """
    nodes, notes = model.nodes(), []
    for layer in model.layers():
        if layer.name not in chosen:
            continue
        scheme = chosen[layer.name]
        kinds = dict.fromkeys(operation(nodes[name], model.tensors) for name in layer.nodes)
        for runner, encoding in _runners(device, fmt, replace(scheme, sparse=False))[:1]:
            integer = layer.name in integers
            if slow := [kind for kind in kinds if kind in (encoding.slow_int8_for if integer else encoding.slow_for)]:
                words = f"{runner.name} runs {', '.join(slow)} slower with {scheme} than with floats"
                notes.append(Note(layer.name, f"{words} ({encoding.source})"))
            if integer and "int8" not in device.activations(runner):
                notes.append(Note(layer.name, f"{runner.name} runs {scheme}, and is not known to compute in int8"))
    return tuple(notes)


def _runners(device: Device, fmt: str, scheme: Scheme) -> list[tuple[Accelerator, Encoding]]:
    """Accelerators that run a dense encoding, the preferred one first, each with what its profile says of it."""
    return [
        (accelerator, encoding)
        for accelerator in device.runners(fmt)
        for encoding in device.encodings(accelerator)
        if scheme in _schemes(encoding)
    ]


def fallbacks(model: Model, device: Device, fmt: str, dtype: str) -> tuple[Note, ...]:
    """Operations that the device's first accelerator for a format refuses, with its reasons.

    Args:
        model: the network.
        device: the profile.
        fmt: of the artefact.
        dtype: of the activations, as the artefact runs them.
    """
    runners = device.runners(fmt)
    if not runners:
        return (Note("everything", f"{device.name} has no accelerator that runs {fmt}"),)
    first, shapes = runners[0], model.shapes()
    notes = []
    for node in model.graph.nodes:
        if node.op != "call_function" or node.name not in shapes or "sym_size" in str(node.target):
            continue
        kernel, stride, dilation = _window(node, model)
        reason = first.refuses(
            operation(node, model.tensors),
            rank=max(
                [len(shapes[node.name]), *(len(shapes[s.name]) for s in node.all_input_nodes if s.name in shapes)]
            ),
            kernel=kernel,
            stride=stride,
            dilation=dilation,
            size=max(shapes[node.name][2:], default=None) if len(shapes[node.name]) == 4 else None,
            channels=shapes[node.name][1] if len(shapes[node.name]) == 4 else None,
            dtype=dtype,
            api_level=device.api_level,
        )
        if reason is not None:
            notes.append(Note(node.name, reason))
    return tuple(notes)


def _window(node: fx.Node, model: Model) -> tuple[int | None, int | None, int | None]:
    """Largest kernel, stride and dilation of a convolution or pooling node; None for other operations."""
    kind = KINDS.get(node.target)
    if kind is not None and "conv" in kind.name:
        weight = node.args[kind.weight]
        shape = (
            model.tensors[str(weight.target)].shape if isinstance(weight, fx.Node) and weight.op == "get_attr" else ()
        )
        transposed = kind.name == "conv_transpose"
        stride = argument(node, "stride", 3, 1)
        return _largest(shape[2:]), _largest(stride), _largest(argument(node, "dilation", 7 if transposed else 5, 1))
    if "pool" in str(node.target) and "adaptive" not in str(node.target):
        size = argument(node, "kernel_size", 1, 1)
        return _largest(size), _largest(argument(node, "stride", 2, None) or size), None
    return None, None, None


def _largest(value: object) -> int | None:
    if isinstance(value, Mapping) or value is None:
        return None
    numbers = [int(v) for v in value] if hasattr(value, "__iter__") else [int(value)]  # type: ignore[attr-defined, call-overload]
    return max(numbers, default=None)
