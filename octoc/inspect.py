"""What a network is made of, and what each device's accelerator would refuse: the data behind `octoc inspect`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from octoc.data import load_data
from octoc.device import find_device, load_devices
from octoc.errors import UsageError
from octoc.graph import fold_batch_norm
from octoc.load import load_model
from octoc.model import Model
from octoc.placement import fallbacks, runs_only_int8
from octoc.report import Note

# Activations of an artefact whose weights alone are compressed, as its exporter writes them.
_FLOAT = {"coreml": "float16"}


@dataclass(frozen=True)
class LayerFacts:
    """One weight.

    Args:
        name: of the weight.
        kind: of its operations.
        shape: of the weight.
        weights: how many numbers.
        nbytes: of these numbers as they are.
        macs: multiply-accumulates a sample.
        activation_bytes: float32 bytes of one sample's outputs.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    weights: int
    nbytes: int
    macs: int
    activation_bytes: int


@dataclass(frozen=True)
class InputFacts:
    """One input: its name, shape (None where a size is free) and dtype."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str


@dataclass(frozen=True)
class Refusals:
    """What a device's first accelerator for a format does not run.

    Args:
        device: profile id.
        format: of the artefact.
        accelerator: its name; None where no accelerator runs the format.
        dtype: of the activations.
        operations: how many the network has.
        refused: operations that fall back, with the reason.
    """

    device: str
    format: str
    accelerator: str | None
    dtype: str
    operations: int
    refused: tuple[Note, ...]


@dataclass(frozen=True)
class Inspection:
    """A network.

    Args:
        model: what the user typed.
        inputs: what it takes.
        outputs: names of what it gives.
        parameters: floats among its tensors.
        nbytes: of its tensors.
        macs: multiply-accumulates a sample.
        layers: its weights, in the order of use.
        devices: one for each device that was asked about.
    """

    model: str
    inputs: tuple[InputFacts, ...]
    outputs: tuple[str, ...]
    parameters: int
    nbytes: int
    macs: int
    layers: tuple[LayerFacts, ...]
    devices: tuple[Refusals, ...]


def inspect_model(
    source: str,
    *,
    weights_file: Path | None = None,
    data: str | None = None,
    shapes: Sequence[str] = (),
    devices: Sequence[str] = (),
    activations: str | None = None,
    devices_file: Path | None = None,
) -> Inspection:
    """Reads a network and says what is in it.

    Args:
        source: a `.pt2` file or `package.module:function`.
        weights_file: weights for a factory.
        data: samples that give the shapes of a factory's inputs.
        shapes: or these shapes themselves, one for each input, samples first: "1,3,32,32".
        devices: profile ids.
        activations: "float", "int8" or "int8-all"; None means floats, and int8 where the device runs nothing else.
        devices_file: further device profiles.

    Raises:
        OctocError: the network, the data or a device cannot be read.
    """
    known = load_devices(devices_file)
    chosen = [find_device(name, known) for name in dict.fromkeys(devices)]
    model = load_model(source, weights_file, _examples(data, shapes))
    layers = tuple(
        LayerFacts(
            layer.name,
            layer.kind,
            layer.shape,
            layer.size,
            layer.size * model.tensors[layer.name].element_size(),
            layer.macs,
            layer.activation_bytes,
        )
        for layer in model.layers()
    )
    folded = fold_batch_norm(model)  # as every artefact has it
    refusals = []
    for device in chosen:
        fmt = device.formats[0]
        wanted = activations or ("int8" if runs_only_int8(device, fmt) else "float")
        dtype = "int8" if wanted != "float" else _FLOAT.get(fmt, "float32")
        runners = device.runners(fmt)
        name = runners[0].name if runners else None
        refused = fallbacks(folded, device, fmt, dtype)
        refusals.append(Refusals(device.id, fmt, name, dtype, _operations(folded), refused))
    return Inspection(
        source,
        tuple(_input_facts(model)),
        model.outputs,
        sum(tensor.numel() for tensor in model.tensors.values() if tensor.is_floating_point()),
        sum(tensor.numel() * tensor.element_size() for tensor in model.tensors.values()),
        sum(layer.macs for layer in layers),
        layers,
        tuple(refusals),
    )


def _operations(model: Model) -> int:
    return sum(node.op == "call_function" and "sym_size" not in str(node.target) for node in model.graph.nodes)


def _input_facts(model: Model) -> list[InputFacts]:
    facts = []
    for spec in model.inputs:
        shape: tuple[int | None, ...] = (None, *spec.shape[1:]) if model.dynamic_batch else spec.shape
        facts.append(InputFacts(spec.name, shape, str(spec.dtype).removeprefix("torch.")))
    return facts


def _examples(data: str | None, shapes: Sequence[str]) -> list[Tensor] | None:
    """Example inputs for a factory, from samples or from shapes; None where neither is given."""
    if data is not None and shapes:
        raise UsageError("give --data or --input-shape, not both: both say what the inputs look like")
    if data is not None:
        return [torch.from_numpy(np.array(array[:2])) for array in load_data(data).inputs]
    return [torch.zeros(_shape(text)) for text in shapes] or None


def _shape(text: str) -> tuple[int, ...]:
    parts = text.replace("x", ",").split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"input shape {text!r}: write whole numbers, samples first, such as 1,3,32,32")
    shape = tuple(int(part) for part in parts)
    if math.prod(shape) > 2**31:
        raise UsageError(f"input shape {text!r} holds {math.prod(shape)} numbers, more than an example can")
    return shape
