"""Applies the decisions of a recipe, each in one function; what a step needs is checked against the network first."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from octoc.compressed import Compressed
from octoc.errors import UsageError
from octoc.graph import bias_of, fold_batch_norm
from octoc.hessian import Hessian
from octoc.model import Layer, Model
from octoc.qtensor import Affine, Codebook, Palette, QTensor, Scheme, Sparse
from octoc.quantize import bias, encode
from octoc.quantize import equalize as equalization
from octoc.quantize.activations import (
    encode_bias,
    integer_layers,
    make_room,
    rewrite,
    separate_biases,
)
from octoc.quantize.ranges import Range
from octoc.recipe import (
    CorrectBiases,
    Decision,
    Encode,
    Equalize,
    Factorize,
    FoldBatchNorm,
    Prune,
    QuantizeActivations,
    Recover,
)
from octoc.recover import Tuned, tuner


def fingerprint(model: Model) -> str:
    """sha256 of the graph and its tensors, the same in every process."""
    digest = hashlib.sha256()
    _add_graph(digest, model.graph, model.tensors)
    for name in sorted(model.subgraphs):
        for inner, module in model.subgraphs[name].named_modules():
            if isinstance(module, fx.GraphModule):
                digest.update(f"{name} {inner}\n".encode())
                _add_graph(digest, module.graph, module.state_dict())
    return digest.hexdigest()


def _add_graph(digest: Any, graph: fx.Graph, tensors: Mapping[str, Tensor]) -> None:
    for node in graph.nodes:
        digest.update(f"{node.name} {node.op} {node.target} {node.args} {node.kwargs}\n".encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())


def restructure(model: Model, steps: Iterable[Decision]) -> Model:
    """Applies the steps that change the graph or its floats, in their order; encodings are left to `encode_weights`."""
    for step in steps:
        match step:
            case Equalize() | QuantizeActivations() | CorrectBiases() if step.method != type(step).method:
                raise UsageError(f"there is no method {step.method!r} in octoc/quantize/ for the step {step.step}")
            case Prune() | Factorize():
                folder = "prune" if isinstance(step, Prune) else "lowrank"
                amount = step.sparsity if isinstance(step, Prune) else step.rank
                model = _method(folder, step.method).rewrite(model, _layer(model, step.tensor), amount)
            case FoldBatchNorm():
                model = fold_batch_norm(model)
            case Equalize():
                model = equalize(model, step.powers)
            case QuantizeActivations():
                model = quantize_activations(model, {n: Range(*pair) for n, pair in step.ranges.items()})
            case CorrectBiases():
                model = correct_biases(model, step.shifts)
            case Recover():
                model = set_vectors(model, step.vectors)
            case Encode():
                pass
    return model


def equalize(model: Model, powers: Mapping[str, tuple[int, ...]]) -> Model:
    """The model with its channels rescaled; see `octoc.quantize.equalize`."""
    channels = {pair.first: pair.channels for pair in equalization.pairs(model)}
    for first, exponents in powers.items():
        if channels.get(first) != len(exponents):
            raise UsageError(
                f"the recipe rescales {len(exponents)} channels of {first}, and the network has no such pair"
            )
    return equalization.rewrite(model, powers)


def quantize_activations(model: Model, ranges: Mapping[str, Range]) -> Model:
    """The model with int8 activations where ranges are given."""
    missing = sorted(set(ranges) - set(model.nodes()))
    if missing:
        raise UsageError(f"the recipe gives ranges for {len(missing)} values the network lacks, such as {missing[0]}")
    return rewrite(separate_biases(model), ranges)


def _method(folder: str, name: str) -> Any:
    module = f"octoc.{folder}.{name}"
    if not name.isidentifier() or importlib.util.find_spec(module) is None:
        raise UsageError(f"there is no method {name!r} in octoc/{folder}/")
    return importlib.import_module(module)


def _layer(model: Model, name: str) -> Layer:
    for layer in model.layers():
        if layer.name == name:
            return layer
    raise UsageError(f"the recipe names the weight {name}, which the network lacks")


class Encoder:
    """Encodes the weights of one model, each (weight, scheme, dtype) once: a fleet shares what its devices share.

    Args:
        model: after `restructure`.
        proven: compressed tensors, by tensor name, to use as they are in place of computing any; None computes them.
    """

    def __init__(self, model: Model, proven: Mapping[str, QTensor] | None = None) -> None:
        self.model = model
        self.proven = proven
        self._done: dict[tuple[str, str, str, str | None], QTensor] = {}

    def __call__(
        self,
        layer: Layer,
        scheme: Scheme,
        dtype: str,
        method: str | None = None,
        hessian: Hessian | None = None,
    ) -> QTensor:
        if self.proven is not None:
            tensor = self.proven.get(layer.name)
            wrong = "does not hold it" if tensor is None else unlike(tensor, layer, scheme, dtype)
            if tensor is None or wrong:
                raise UsageError(
                    f"the recipe stores {layer.name} as {scheme}, and the proof beside it {wrong}; "
                    "compute the codes anew with --recompute"
                )
            return tensor
        weight = self.model.tensors[layer.name].detach().numpy()
        if hessian is not None:  # it is that of one plan, and no other artefact shares it
            return encode(weight, scheme, layer.axis, dtype=dtype, method=method, hessian=hessian)
        key = (layer.name, str(scheme), dtype, method)
        if key not in self._done:
            self._done[key] = encode(weight, scheme, layer.axis, dtype=dtype, method=method)
        return self._done[key]


def unlike(tensor: QTensor, layer: Layer, scheme: Scheme, dtype: str) -> str | None:
    """Why a compressed weight is not what a scheme makes of a layer, or None.

    Args:
        tensor: the compressed weight.
        layer: whose weight it should be.
        scheme: how the weight should be stored.
        dtype: of its scales or tables.
    """
    if tensor.shape != layer.shape:
        return f"holds it with shape {list(tensor.shape)}, not {list(layer.shape)}"
    dense = tensor.dense if isinstance(tensor, Sparse) else tensor
    kind, sparse = type(dense).__name__.lower(), isinstance(tensor, Sparse)
    if isinstance(dense, Affine) and dense.zero_point is not None:
        kind = "asymmetric"
    if (kind, dense.bits, sparse) != (scheme.kind, scheme.bits, scheme.sparse):
        return f"holds it as {kind} of {dense.bits} bits{' with a mask' if sparse else ''}"
    if isinstance(dense, Codebook) and dense.table.shape[1] != scheme.vector:
        return f"holds it in vectors of {dense.table.shape[1]}"
    if isinstance(dense, Affine | Codebook):
        grid, stored = dense.scale.shape, dense.scale.dtype
    elif isinstance(dense, Palette):
        grid, stored = dense.table.shape[:-1], dense.table.dtype
    else:
        return None
    wanted = scheme.grid(layer.shape, layer.axis)
    if tuple(grid) != wanted:
        return f"holds it on a grid of {list(grid)}, not {list(wanted)}"
    if stored != dtype:
        return f"holds it with scales in {stored}, not {dtype}"
    return None


def encode_weights(model: Model, steps: Iterable[Encode], encoder: Callable[..., QTensor]) -> dict[str, QTensor]:
    """Compressed weights by name.

    Args:
        model: after `restructure`.
        steps: what each weight becomes.
        encoder: computes one of a layer, a scheme, a dtype and, where a step names it, a method.
    """
    layers = {layer.name: layer for layer in model.layers()}
    coded: dict[str, QTensor] = {}
    for step in steps:
        if step.tensor not in layers:
            raise UsageError(f"the recipe names the weight {step.tensor}, which the network lacks")
        named = () if step.method is None else (step.method,)
        coded[step.tensor] = encoder(layers[step.tensor], Scheme.parse(step.scheme), step.dtype, *named)
    return coded


def encode_biases(model: Model, coded: Mapping[str, QTensor]) -> dict[str, QTensor]:
    """32-bit biases, by name, of the layers that run in integers, and those of their weights that had to change."""
    found: dict[str, QTensor] = {}
    for name, uses in integer_layers(model).items():
        weight = coded.get(name)
        if not runs_in_integers(weight):
            continue
        assert isinstance(weight, Affine)
        biases = {
            str(source.target): (model.tensors[str(source.target)].detach().numpy(), taken.scale)
            for node, taken in uses
            if (source := bias_of(node)) is not None
        }
        roomy = make_room(weight, biases.values())
        if roomy is not weight:
            found[name] = roomy
        found |= {bias: encode_bias(values, roomy, scale) for bias, (values, scale) in biases.items()}
    return found


def runs_in_integers(weight: QTensor | None) -> bool:
    """Whether integer kernels take the weight: symmetric, of 4 or 8 bits, one scale a tensor or an output channel."""
    if not isinstance(weight, Affine) or not weight.signed or weight.zero_point is not None:
        return False
    if weight.bits not in (4, 8):
        return False
    return sum(int(size > 1) for size in weight.scale.shape) <= 1


def correct_biases(model: Model, shifts: Mapping[str, Sequence[float]]) -> Model:
    """The model with shifted biases; see `octoc.quantize.bias`."""
    for name, shift in shifts.items():
        if name not in model.tensors or tuple(model.tensors[name].shape) != (len(shift),):
            raise UsageError(f"the recipe shifts {len(shift)} values of the bias {name}, which the network lacks")
    return bias.rewrite(model, shifts)


def set_vectors(model: Model, vectors: Mapping[str, Sequence[float]]) -> Model:
    """The model with vectors as training left them."""
    for name, values in vectors.items():
        if name not in model.tensors or tuple(model.tensors[name].shape) != (len(values),):
            raise UsageError(f"the recipe sets {len(values)} values of the vector {name}, which the network lacks")
    return model.with_tensors({name: torch.tensor(values, dtype=torch.float32) for name, values in vectors.items()})


def recover(
    small: Compressed,
    original: Model,
    inputs: Sequence[Any],
    method: str,
    *,
    classes: bool,
    seed: int = 0,
    steps: int | None = None,
    seconds: float | None = None,
    step: Callable[[int, int], Any] = lambda done, total: None,
    state: Path | None = None,
) -> tuple[Tuned, Recover]:
    """Trains a compressed network towards the original's outputs.

    Args:
        small: the compressed network; its model still holds the float weights.
        original: the network in floats, restructured and equalised as `small.model` is.
        inputs: calibration samples, [samples, ...] for each input, arrays or what an index turns into one.
        method: a file of octoc/recover/.
        classes: outputs are logits over their last axis.
        seed: of everything random.
        steps: batches to learn from; the method's own number where neither this nor seconds are given.
        seconds: time to spend instead.
        step: called with the steps done and their total.
        state: file that lets a later call go on where this one was ended.

    Returns:
        What training made, and the decision that makes it again.
    """
    tuned = tuner(method).tune(
        small,
        original,
        inputs,
        classes=classes,
        encode_biases=encode_biases,
        seed=seed,
        steps=steps,
        seconds=seconds,
        step=step,
        state=state,
    )
    return tuned, Recover(method, tuned.steps, seed, tuned.vectors)
