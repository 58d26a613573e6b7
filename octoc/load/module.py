"""A live `torch.nn.Module` -> `Model`."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from octoc.errors import ModelError, UsageError, reason
from octoc.load.graph import from_program
from octoc.model import Model


def from_module(module: nn.Module, examples: Sequence[Tensor] | None = None) -> Model:
    """Exports a module, with a free batch where it allows one; the model's notes say where it does not, and why.

    Args:
        module: put into inference mode for the export and back afterwards; otherwise untouched.
        examples: one tensor for each input, samples first; the module's attribute `example_inputs` where None.

    Raises:
        UsageError: no examples are known.
        ModelError: torch.export cannot trace the module, with its reason.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError(f"{module.original_name} is TorchScript; give the nn.Module that it was made from")
    while isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        module = module.module
    with _inference(module):
        given = _examples(module, examples)
        try:
            return _export(module, given)
        except ModelError:
            if all(example.is_floating_point() for example in given):
                raise
            with contextlib.suppress(ModelError):  # integers for a network of floats: the data's error, not its own
                return _export(module, [example.to(_floating(module)) for example in given])
            raise


def _examples(module: nn.Module, given: Sequence[Tensor] | None) -> list[Tensor]:
    """Examples as the module takes them: contiguous, on its device, in its floating dtype."""
    if given is None:
        given = getattr(module, "example_inputs", None)
    if given is None:
        raise UsageError(
            f"the input shapes of {type(module).__name__} are not known; give data or examples, "
            "or set the module's example_inputs to a tuple of tensors"
        )
    examples = [given] if isinstance(given, Tensor) else list(given)
    if not examples or not all(isinstance(example, Tensor) for example in examples):
        raise UsageError(f"examples for {type(module).__name__} are not one or more tensors")
    if empty := [i for i, example in enumerate(examples) if example.numel() == 0]:
        raise UsageError(f"example {empty[0]} is {list(examples[empty[0]].shape)}, which holds no sample")
    held = [*module.parameters(), *module.buffers()]
    if any(nn.parameter.is_lazy(tensor) for tensor in held):
        raise ModelError(f"{type(module).__name__} has lazy layers without weights; run it once on an example first")
    if any(tensor.is_meta for tensor in held):
        raise ModelError(f"{type(module).__name__} has meta tensors, shapes without values; load its weights first")
    device = held[0].device if held else torch.device("cpu")
    cast = [e.to(device, _floating(module) if e.is_floating_point() else None) for e in examples]
    return [example.detach().contiguous() for example in cast]


def _floating(module: nn.Module) -> torch.dtype:
    """The floating dtype of a module's parameters, float32 where they have none or several."""
    dtypes = {tensor.dtype for tensor in module.parameters() if tensor.is_floating_point()}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _export(module: nn.Module, examples: list[Tensor]) -> Model:
    # torch specialises sizes 0 and 1, so a free batch must be traced with another size.
    pair = [torch.cat([example[:1], example[:1]]) if example.dim() else example for example in examples]
    why = "an input has no samples, only one value"
    if all(example.dim() for example in examples):
        try:
            model = _trace(module, pair, free_batch=True)
            if model.dynamic_batch:
                return model
            why = "not every output has a sample for each sample of the inputs"
        except ModelError:
            raise
        except Exception as error:  # noqa: BLE001 - torch.export raises whatever the module's own code raises
            why = reason(error)
    model = _fixed(module, examples)
    sizes = {spec.shape[0] for spec in model.inputs if spec.shape}
    number = f"{sizes.pop()} to a call" if len(sizes) == 1 else "as in the examples"
    return replace(model, notes=(*model.notes, f"the number of samples is fixed, {number}: {why}"))


def _fixed(module: nn.Module, examples: list[Tensor]) -> Model:
    """One sample a call, or as many as the examples have where the module is written for that number."""
    one = [example[:1] if example.dim() else example for example in examples]
    try:
        return _trace(module, one, free_batch=False)
    except ModelError:
        raise
    except Exception as error:
        if any(example.dim() and len(example) > 1 for example in examples):
            try:
                return _trace(module, examples, free_batch=False)
            except Exception:  # noqa: BLE001 - the reason for one sample is the clearer one
                pass
        given = ", ".join(f"{str(e.dtype).removeprefix('torch.')} {list(e.shape)}" for e in examples)
        raise ModelError(f"torch.export cannot trace {type(module).__name__} on {given}: {reason(error)}") from error


def _trace(module: nn.Module, examples: list[Tensor], free_batch: bool) -> Model:
    args, kwargs = _bind(module, examples)
    shapes: Any = None
    if free_batch:
        batch = torch.export.Dim("batch")
        names = _bound_names(module, len(args), list(kwargs))
        shapes = {name: {0: batch} for name in names}
        if (variadic := _variadic(module)) and len(args) > len(names) - len(kwargs):
            shapes[variadic] = tuple({0: batch} for _ in range(len(args) - len(names) + len(kwargs)))
    with warnings.catch_warnings():
        # raised by copyreg while torch copies its own tree specifications
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
        # nn.LSTM and its kin set their list of weights anew on each export, to what it was
        warnings.filterwarnings("ignore", r"The tensor attributes?.*_flat_weights", UserWarning)
        return from_program(torch.export.export(module, args, kwargs, dynamic_shapes=shapes))


def _bind(module: nn.Module, examples: list[Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Examples in the order of forward's arguments, those that must be named last."""
    parameters = inspect.signature(module.forward).parameters.values()
    required = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    place = len(examples) - len(required)
    if place < 0:
        raise ModelError(f"{type(module).__name__} takes {', '.join(required)}; {len(examples)} examples are given")
    return tuple(examples[:place]), dict(zip(required, examples[place:], strict=True))


def _bound_names(module: nn.Module, count: int, named: list[str]) -> list[str]:
    parameters = inspect.signature(module.forward).parameters.values()
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return positional[:count] + named


def _variadic(module: nn.Module) -> str | None:
    parameters = inspect.signature(module.forward).parameters.values()
    return next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)


@contextlib.contextmanager
def _inference(module: nn.Module) -> Iterator[None]:
    """Inference mode inside; each submodule's own mode afterwards, for a frozen part may differ from the whole."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
